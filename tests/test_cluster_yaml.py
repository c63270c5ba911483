"""cluster.yaml by Ray's own code, without a network, and held against what the jobs ask for."""

from __future__ import annotations

import copy
import re
import sys
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from rayrec.config import ServeConfig, preset
from rayrec.evaluation.shards import ACTOR_CPUS
from rayrec.settings import with_settings
from rayrec.training import trainer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    return loaded


def check(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does before it asks the cloud for anything."""
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    prepared = check(config)
    assert prepared["cluster_name"] == "rayrec"
    assert set(workers(prepared)) == {"data_worker", "train_worker", "serve_worker"}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("max_wrokers", 3, "max_wrokers"),
        ("provider.type", "cloudless", "cloudless"),
        ("head_node_type", "nobody", "head_node_type"),
        ("available_node_types.data_worker.min_workers", 99, "min_workers|max_workers"),
        ("available_node_types.data_worker.resources", "many", "many"),
    ],
)
def test_ray_refuses_a_broken_copy(config: dict[str, Any], path: str, value: Any, words: str) -> None:
    *groups, name = path.split(".")
    reduce(getitem, groups, config)[name] = value
    with pytest.raises(Exception, match=words):
        check(config)


def test_bounds_are_consistent(config: dict[str, Any]) -> None:
    types = workers(config)
    assert all(0 <= node["min_workers"] <= node["max_workers"] for node in types.values())
    assert config["max_workers"] == sum(node["max_workers"] for node in types.values()), "all may be full at once"
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0, "the head runs no tasks"


def test_a_training_worker_fits_a_train_node(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    node = config["available_node_types"]["train_worker"]
    n = node["max_workers"]
    everything = {kind: n * amount for kind, amount in node["resources"].items()}
    monkeypatch.setattr("ray.cluster_resources", lambda: everything)
    settings = with_settings(preset("base"), ["train.gpu=true", f"train.workers={n}"])
    asked = trainer.worker_resources(settings, wait_s=0)
    assert asked["GPU"] == node["resources"]["GPU"] == 1, "one worker a node"
    assert asked["CPU"] + 1 <= node["resources"]["CPU"], "and a CPU that feeds it"


def test_a_replica_fits_a_serve_node(config: dict[str, Any]) -> None:
    node = config["available_node_types"]["serve_worker"]
    assert ServeConfig().replica_cpus <= node["resources"]["CPU"]
    assert node["min_workers"] >= 1, "serving starts without waiting for a node"


def test_data_tasks_fit_a_data_node(config: dict[str, Any]) -> None:
    cpus = config["available_node_types"]["data_worker"]["resources"]["CPU"]
    assert cpus >= max(1, ACTOR_CPUS), "a task of Ray Data takes one CPU"


def test_its_ray_is_the_one_that_is_pinned(config: dict[str, Any]) -> None:
    pins = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    (pin,) = [pin for pin in pins if pin.startswith("ray[")]
    lowest = re.search(r">=(\d+)\.(\d+)", pin)
    image = re.fullmatch(r"rayproject/ray:(\d+)\.(\d+)\.\d+-py\d+-gpu", config["docker"]["image"])
    assert lowest
    assert image
    assert image.groups() == lowest.groups()
    assert f"<{image[1]}.{int(image[2]) + 1}" in pin


def test_only_loopback_reaches_the_dashboard(config: dict[str, Any]) -> None:
    (start,) = [command for command in config["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start


def test_a_lost_node_is_missed_in_seconds(config: dict[str, Any]) -> None:
    (start,) = [command for command in config["head_start_ray_commands"] if "--head" in command]
    given = {name: float(value) for name, value in re.findall(r"RAY_health_check_(\w+)=(\d+)", start)}
    assert given["failure_threshold"] * (given["period_ms"] + given["timeout_ms"]) < 10_000
