"""One way to reach a Ray cluster: the one that RAY_ADDRESS names, else a fresh local one, quietly.

In: how many CPUs a local cluster may use. Out: an initialised Ray. It must not know what will run on it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrec.errors import ResourceError, UsageError
from rayrec.interrupts import unbroken

REACH_S = 5.0
LEAST_CPUS = 2
"""A local Ray counts on at least so many, even on one core: a worker that trains, and a task that feeds it."""
_connected_here = False
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the entry point of a submitted job, and for nothing else."""


def connect(num_cpus: int | None = None, env: Mapping[str, str] | None = None, *, dashboard: bool = True) -> None:
    """Initialise Ray unless it is already. Raises ResourceError if no cluster can be reached or started.

    env: environment variables for the processes that this one starts on a cluster that runs already; those of a
    local Ray inherit `os.environ`.
    dashboard: start it with a local Ray; Ray Train and Ray Serve ask it for what they know, Ray Data does not.
    """
    global _connected_here
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    _require_listener(address)
    try:
        with unbroken():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.WARNING,
                include_dashboard=dashboard if address == "local" else None,
                num_cpus=(num_cpus or max(LEAST_CPUS, os.cpu_count() or 1)) if address == "local" else None,
                runtime_env={"env_vars": dict(env)} if env and address != "local" else None,
            )
    except Exception as error:  # Ray raises no narrower kind where a node takes too long to start
        what = "start a local Ray" if address == "local" else f"reach the Ray cluster at {address} (RAY_ADDRESS)"
        raise ResourceError(f"cannot {what}: {error}") from None
    _connected_here = True


def _require_listener(address: str) -> None:
    """Raise ResourceError if nothing listens at `address` (host:port): Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise ResourceError(f"no Ray cluster at {address} (RAY_ADDRESS): {error}") from None


def quiet_data() -> None:
    """Ray Data shows no bars and no notes of its own: ours are enough."""
    from ray.data import DataContext  # dear to import, and not every command uses it

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def disconnect() -> None:
    """Leave the cluster that `connect` joined; a local one that it started stops. Somebody else's stays."""
    global _connected_here
    if not _connected_here:
        return
    _connected_here = False
    with unbroken():  # a Ray that is interrupted while it stops crashes, or leaves processes behind
        ray.shutdown()


def cpus() -> int:
    """CPUs of the connected cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Keeps an actor beside this process, which needs it as long as it runs: on any other node it is lost with that."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def submitted() -> bool:
    """Whether this process is the entry point of `ray job submit`."""
    try:
        config = json.loads(os.environ.get(_JOB_CONFIG, "{}"))
    except ValueError:
        return False
    return "job_submission_id" in config.get("metadata", {})


def require_absolute(*paths: str | Path | None) -> None:
    """Raise UsageError for a relative path in a submitted job, which starts in a copy of the working folder."""
    given = [str(path) for path in paths if path is not None]
    relative = [path for path in given if "://" not in path and not path.startswith("/")]
    if relative and submitted():
        raise UsageError(
            f"{', '.join(relative)}: a relative path. A submitted job runs in a copy of your folder on the cluster, "
            "where it would be lost with the job; give an absolute path that all nodes share, or a URI"
        )
