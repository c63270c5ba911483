"""What faults cost a training: it goes on from its last checkpoint, of a step, and ends as if nothing had happened.

Each fault comes in the middle of an epoch, to `rayrec train` as a user runs it: a signal, a killed worker, a killed
job, a node that is gone or about to go, a disk that is full or cannot be written. What is trained on one worker, or on
as many as before, then has the very losses of a training that was left in peace.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import tinyshop
import yaml
from terminal import REPOSITORY, Ran, Running, Terminal

from rayrec.data.dataset import Dataset

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

SETTINGS = (*tinyshop.TINY, "train.epochs=8", "train.patience=8", "train.tracker=[]")
SHARED = ("train.id_optimizer=rowwise_adagrad", "train.id_lr=3", "train.id_held=share")
EVERY_STEP = ("--set", "train.checkpoint_steps=1")

Train = Callable[..., tuple[object, ...]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tinyshop.write(tmp_path_factory.mktemp("shop") / "dataset")


@pytest.fixture(scope="module")
def train(dataset: Dataset) -> Train:
    """The command's words."""

    def words(bundles: Path, *more: object) -> tuple[object, ...]:
        return ("train", dataset.path, bundles, *(word for one in SETTINGS for word in ("--set", one)), *more)

    return words


@pytest.fixture(scope="module")
def in_peace(train: Train, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """What a training that nothing happened to learned."""
    with Terminal() as terminal:
        ran = terminal.rayrec(*train(tmp_path_factory.mktemp("peace") / "bundles", "--json"), timeout_s=800)
    assert ran.code == 0, ran.err
    return learned(ran.json)


@pytest.fixture(scope="module")
def two_in_peace(train: Train, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The same of two workers."""
    with Terminal() as terminal:
        words = train(tmp_path_factory.mktemp("two") / "bundles", "--workers", 2, "--json")
        ran = terminal.rayrec(*words, timeout_s=800)
    assert ran.code == 0, ran.err
    return learned(ran.json)


@pytest.fixture
def own() -> Iterator[Terminal]:
    with Terminal() as terminal:
        yield terminal


def free_port() -> int:
    """For the dashboard of a cluster: another one on this machine may have the usual port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def learned(answer: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Stage, epoch, loss and validation of every epoch."""
    names = ("stage", "epoch", "loss", "samples", "valid_next_ndcg@10")
    return [tuple(line[name] for name in names) for line in answer["training"]]


def under_way(running: Running) -> None:
    """Until it is in its third epoch or later."""
    running.wait_until(lambda: "  retrieval 2: loss" in running.said, within_s=600)


def workers(terminal: Terminal) -> list[psutil.Process]:
    """The processes that train."""
    found = []
    for process in terminal.processes():
        with suppress(psutil.Error):
            if "ray::RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def worker(terminal: Terminal) -> psutil.Process:
    """The only one."""
    (one,) = workers(terminal)
    return one


def shipped_health() -> dict[str, int]:
    """What cluster.yaml has a head ask of its nodes, as `ray start` there takes it from the environment."""
    config = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    (start,) = [command for command in config["head_start_ray_commands"] if "--head" in command]
    return {name: int(value) for name, value in re.findall(r"RAY_(health_check_\w+)=(\d+)", start)}


def seconds(said: str, after: str) -> float:
    """What a script measured: the number that follows `after`. Printed, for `pytest -rP` to show."""
    (told,) = re.findall(rf"{after} ([\d.]+) s", said)
    print(f"{after} {told} s")
    return float(told)


def goes_on(terminal: Terminal, words: tuple[object, ...], in_peace: list[tuple[Any, ...]]) -> None:
    """`--resume` ends with what a training in peace learned, and repeats no epoch of those that were told."""
    ran = terminal.rayrec(*words, "--resume", "--json", timeout_s=800)
    assert ran.code == 0, ran.err
    assert "  retrieval 1: loss" not in ran.err
    assert learned(ran.json) == in_peace


def ended(running: Running, code: int, *words: str) -> None:
    assert running.process.wait(300) == code, running.said
    assert "Traceback" not in running.said, running.said
    for word in words:
        assert word in running.said, running.said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_command_loses_no_step(
    own: Terminal, train: Train, in_peace: list[tuple[Any, ...]], tmp_path: Path, number: int, code: int
) -> None:
    words = train(tmp_path / "bundles")
    running = own.start(*words)
    running.wait_until(lambda: own.has("ray::RayTrainWorker"), within_s=300)
    under_way(running)
    running.process.send_signal(number)
    ended(running, code, "step ", "with --resume goes on from there")
    assert own.left() == []
    goes_on(own, words, in_peace)


def test_sigterm_to_a_worker_ends_the_training_after_a_checkpoint(
    own: Terminal, train: Train, in_peace: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    words = train(tmp_path / "bundles", *EVERY_STEP)
    running = own.start(*words)
    under_way(running)
    worker(own).terminate()
    ended(running, 1, "a worker got SIGTERM", "with --resume goes on from there")
    goes_on(own, words, in_peace)


def test_a_killed_worker_is_replaced_and_goes_on_from_its_step(
    own: Terminal, train: Train, in_peace: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    running = own.start(*train(tmp_path / "bundles", *EVERY_STEP, "--json"))
    under_way(running)
    worker(own).kill()
    ended(running, 0)
    assert learned(json.loads(running.said.strip().splitlines()[-1])) == in_peace
    assert running.said.count("  retrieval 1: loss") == 1


@pytest.mark.parametrize("place", [0, 1])
def test_one_of_two_workers_is_killed_and_both_go_on_from_their_step(
    own: Terminal, train: Train, two_in_peace: list[tuple[Any, ...]], tmp_path: Path, place: int
) -> None:
    """The other one waits in a sum over both meanwhile, and does not wait for good."""
    running = own.start(*train(tmp_path / "bundles", "--workers", 2, *EVERY_STEP, "--json"))
    under_way(running)
    both = sorted(workers(own), key=lambda one: one.create_time())
    assert len(both) == 2
    both[place].kill()
    ended(running, 0)
    assert learned(json.loads(running.said.strip().splitlines()[-1])) == two_in_peace
    assert running.said.count("  retrieval 1: loss") == 1


def test_a_killed_job_goes_on_where_it_was(train: Train, in_peace: list[tuple[Any, ...]], tmp_path: Path) -> None:
    words = train(tmp_path / "bundles", *EVERY_STEP)
    with Terminal() as first:
        under_way(running := first.start(*words))
        for process in first.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        running.process.wait(30)
    newest = max((tmp_path / "bundles" / ".runs").glob("*/checkpoint_*"))
    weights = newest / "model.safetensors"
    if weights.exists():  # and the newest checkpoint was damaged by what killed the job
        weights.write_bytes(weights.read_bytes()[:-100])
    with Terminal() as second:
        goes_on(second, words, in_peace)


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_place_that_cannot_be_written_any_more(
    own: Terminal, train: Train, in_peace: list[tuple[Any, ...]], tmp_path: Path, trouble: str
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        words = train(place / "bundles", *EVERY_STEP)
        running = own.start(*words)
        under_way(running)
        if trouble == "full":
            with suppress(OSError), (place / "filler").open("wb") as filler:
                while True:
                    filler.write(bytes(1 << 16))
                    filler.flush()
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        ended(running, 1, "cannot write there")
        if trouble == "full":
            (place / "filler").unlink()
        else:
            subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        goes_on(own, words, in_peace)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=False)


NODES = """
import json, sys, threading, time
from pathlib import Path
import ray, ray.util.state
from ray.cluster_utils import Cluster

how, health, dashboard = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
dataset, bundles, settings = sys.argv[4], sys.argv[5], sys.argv[6:]
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 2, "include_dashboard": True, "dashboard_port": dashboard, "_system_config": health})
nodes = [cluster.add_node(num_cpus=2, resources={"trains": 1}) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)
from rayrec.config import preset
from rayrec.settings import with_settings
from rayrec.training import trainer

trainer.worker_resources = lambda config, wait_s: {"CPU": 1.0, "trains": 1.0}  # on either of the two nodes

def slow(given):
    from rayrec.training import workers

    class Slow(workers.RayPeers):
        def step(self, *how_far):
            time.sleep(0.5)  # or it would be over before anybody looks whether a node goes away
            super().step(*how_far)

    workers.RayPeers = Slow
    workers.train_worker(given)

def checkpoints(name):
    return set((Path(bundles) / ".runs").glob(f"*/checkpoint_*/{name}"))

def busy():
    return {one["node_id"] for one in ray.util.state.list_actors(address=cluster.address)
            if one["class_name"] == "RayTrainWorker" and one["state"] == "ALIVE"}

def until(true):
    began = time.monotonic()
    while not true():
        time.sleep(0.1)
    return time.monotonic() - began

def tell(*words):
    print(*words, file=sys.stderr, flush=True)

def drain(node):
    from ray.core.generated import autoscaler_pb2
    preempted = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    ends_ms = (time.time_ns() // 1_000_000) + 30_000
    accepted, why = ray._raylet.GcsClient(address=cluster.address).drain_node(node.node_id, preempted, "spot", ends_ms)
    assert accepted, why
    tell(f"had a checkpoint after {until(lambda: checkpoints('worker-0.pt')):.1f} s")

def fault():
    until(lambda: checkpoints("state.json"))
    time.sleep(3)
    (node,) = [node for node in nodes if node.node_id in busy()]
    if how == "drain":
        drain(node)
    cluster.remove_node(node, allow_graceful=False)
    tell("killed a node")
    gone = time.monotonic()
    until(lambda: busy() - {node.node_id})
    tell(f"replaced after {time.monotonic() - gone:.1f} s")
    known = checkpoints("seal-0.json")  # those of the node that is gone were all there before another one trained
    until(lambda: checkpoints("seal-0.json") - known)
    tell(f"went on after {time.monotonic() - gone:.1f} s")

if how == "drain":
    trainer.train_worker = slow
threading.Thread(target=fault, daemon=True).start()
bundle = trainer.train(dataset, bundles, with_settings(preset("small"), settings))
ray.shutdown()  # before the cluster: a process whose node is taken away from under it ends with 1
cluster.shutdown()
print(json.dumps(bundle.json("metrics.json")))
"""


def of_nodes(own: Terminal, how: str, dataset: Dataset, folder: Path, *more: str) -> Ran:
    words = (how, json.dumps(shipped_health()), free_port(), dataset.path, folder / "bundles", *SETTINGS, *more)
    ran = own.run(sys.executable, "-c", NODES, *words, timeout_s=600)
    assert ran.code == 0, ran.err
    assert "killed a node" in ran.err
    return ran


def test_a_node_that_is_gone_is_replaced_by_another_in_seconds(
    own: Terminal, dataset: Dataset, in_peace: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """By the health settings that cluster.yaml ships. By Ray's own it takes more than a minute."""
    ran = of_nodes(own, "kill", dataset, tmp_path, "train.checkpoint_steps=1")
    assert seconds(ran.err, "replaced after") < 30
    assert seconds(ran.err, "went on after") < 60  # a worker's start is long on a busy machine
    assert learned(ran.json) == in_peace


def test_a_node_that_is_drained_leaves_a_checkpoint_within_the_time_of_grace(
    own: Terminal, dataset: Dataset, in_peace: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """Spot preemption: no other checkpoint within an epoch is asked for here, and the node has half a minute."""
    ran = of_nodes(own, "drain", dataset, tmp_path, "train.checkpoint_s=0")
    assert seconds(ran.err, "had a checkpoint after") < 20
    assert learned(ran.json) == in_peace


ELASTIC = """
import os, subprocess, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True,
    "dashboard_port": int(sys.argv.pop()), "_system_config": {
    "health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3}})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
how = sys.argv.pop(1)
state = Path(sys.argv[2]) / ".runs"
code = (
    "from rayrec.training import trainer; from rayrec.cli import main; trainer.LOOK_FOR_MORE_S = 5.0; main()"
)
training = subprocess.Popen(
    [sys.executable, "-c", code, "train", *sys.argv[1:], "--json"], env={**os.environ, "RAY_ADDRESS": cluster.address}
)

def wait(what, workers):
    # A checkpoint of a step within an epoch, by so many workers, that was not there yet.
    known = set(state.glob("*/checkpoint_*"))
    while training.poll() is None:
        for folder in set(state.glob("*/checkpoint_*")) - known:
            if len(list(folder.glob("seal-*.json"))) == len(list(folder.glob("worker-*.pt"))) == workers:
                print(f"{what}: {workers} workers", file=sys.stderr, flush=True)
                return
        time.sleep(0.05)
    sys.exit(f"{what}: the training ended before {workers} worked")

try:
    if how == "elastic":
        wait("at first", 3)
        gone = time.monotonic()
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait("after a node is gone", 2)
        print(f"went on after {time.monotonic() - gone:.1f} s", file=sys.stderr, flush=True)
        cluster.add_node(num_cpus=1)
        wait("after one came", 3)
    sys.exit(training.wait())
finally:
    training.kill()
"""


@pytest.mark.timeout(1800)  # four trainings
@pytest.mark.parametrize("ids", [(), SHARED], ids=["held", "shared"])
def test_with_fewer_workers_and_then_more_again_a_step_is_of_as_many_batches_and_the_model_as_good(
    own: Terminal, dataset: Dataset, ids: tuple[str, ...], tmp_path: Path
) -> None:
    """Three workers of a batch of four each, two after a node is gone, three when another one comes.

    Where they share the table of ids, each of the two has a half of what the three had thirds of.
    """
    settings = [*SETTINGS, *ids, "train.epochs=30", "train.patience=30", "train.batch_size=4", "train.workers=3"]
    settings += ["train.min_workers=1", "train.checkpoint_steps=1", "train.fusion_epochs=0", "train.refit_epochs=0"]

    def trained(how: str, seed: int) -> list[dict[str, Any]]:
        chosen = (word for one in (*settings, f"train.seed={seed}") for word in ("--set", one))
        words = (how, dataset.path, tmp_path / f"{how}-{seed}", *chosen, free_port())
        ran = own.run(sys.executable, "-c", ELASTIC, *words, timeout_s=600)
        assert ran.code == 0, ran.err
        lines: list[dict[str, Any]] = ran.json["training"]
        assert [line["epoch"] for line in lines] == list(range(30)), "no epoch is lost, and none told twice"
        return lines

    elastic, *in_peace = (trained("elastic", 0), *(trained("peace", seed) for seed in (0, 1, 2)))
    steps = {line["steps"] for line in in_peace[0]}
    assert {line["steps"] for line in elastic} <= {n + more for n in steps for more in (-1, 0, 1)}
    for name in ("valid_next_ndcg@10", "loss"):
        end, *ends = (sum(line[name] for line in one[-3:]) / 3 for one in (elastic, *in_peace))
        print(f"{name}: {end:.4f}, in peace {', '.join(f'{one:.4f}' for one in ends)}")
        assert abs(end - sum(ends) / 3) < 3 * (max(ends) - min(ends)), name
