"""Fixtures that all tests share: real data where it is at hand, and one local Ray cluster."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from redisserver import RedisServer
from terminal import TINY_PREPARE, TINY_TRAIN, Terminal

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"

# One way of authentication and no usage reports, for this process and all it starts.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_REPORT_URL", "http://127.0.0.1:9/")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# Tiny models gain nothing by a second thread, and threads that wait for each other lose most on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray's workers give way to whatever else the machine does, and on a busy one a training of seconds takes minutes.
os.environ.setdefault("RAY_worker_niceness", "0")

# What a shell starts in the background ignores Ctrl-C, and so does all that it starts in turn; here it must be heard.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Schemathesis needs a newer Python than rayrec does.
collect_ignore = ["test_openapi.py"] if sys.version_info < (3, 11) else []

# How long an example takes depends on what else the machine does.
settings.register_profile("rayrec", deadline=None)
settings.load_profile("rayrec")


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Folder of a real data set by name; skips the test where it is not at hand."""

    def find(name: str) -> Path:
        folder = SHARED_DATA / name
        if not folder.is_dir():
            pytest.skip(f"real data set '{name}' is not at hand ({folder})")
        return folder

    return find


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own, to be killed; skips the test where none is installed."""
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder).start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for the whole run; skips the test where none is installed."""
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.kill()


@pytest.fixture
def redis_url(shared_redis: RedisServer) -> str:
    """The shared Redis, emptied."""
    shared_redis.empty()
    return shared_redis.url


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One local Ray cluster for the whole run."""
    import ray

    for _ in range(3):  # Ray gives its start half a minute, which is little on a busy machine
        try:
            ray.init(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False)
            break
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
    assert ray.is_initialized(), "this machine is too busy to start Ray"
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def terminal(cluster: None) -> Iterator[Terminal]:
    """Runs commands as processes of their own, on the shared cluster."""
    import ray

    with Terminal(RAY_ADDRESS=ray.get_runtime_context().gcs_address) as terminal:
        yield terminal


@pytest.fixture(scope="session")
def tiny_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw folder by `rayrec sample`: 60 users, 24 items with pictures, 1,500 events."""
    folder = tmp_path_factory.mktemp("tiny") / "shop"
    with Terminal() as terminal:
        ran = terminal.rayrec("sample", folder, "--users", 60, "--items", 24, "--events", 1500)
    assert ran.code == 0, ran.err
    return folder


@pytest.fixture(scope="session")
def tiny_dataset(tiny_shop: Path, terminal: Terminal) -> Path:
    """`tiny_shop` by `rayrec prepare`. Read it only."""
    dataset = tiny_shop.parent / "dataset"
    ran = terminal.rayrec("prepare", tiny_shop, dataset, *TINY_PREPARE)
    assert ran.code == 0, ran.err
    return dataset


@pytest.fixture(scope="session")
def tiny_bundles(tiny_dataset: Path, terminal: Terminal) -> Path:
    """A BUNDLES folder by `rayrec train` on `tiny_dataset`, one epoch a stage. Copy it to write to it."""
    bundles = tiny_dataset.parent / "bundles"
    ran = terminal.rayrec("train", tiny_dataset, bundles, *TINY_TRAIN)
    assert ran.code == 0, ran.err
    return bundles
