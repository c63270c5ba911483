"""The manifests for Kubernetes, by Ray's own schema and by what rayrec reads."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import ray
import typer
import yaml
from ray.serve.schema import ServeDeploySchema

from rayrec.cli import app
from rayrec.config import ServeConfig, preset
from rayrec.serving.app import Application
from rayrec.serving.keys import KEYS
from rayrec.settings import with_settings
from rayrec.state.redis import PASSWORD
from rayrec.training.trainer import worker_resources

TRAIN = ["raycluster.yaml", "rayjob-train.yaml", "rayjob-retrain.yaml", "raycronjob-retrain.yaml"]
MANIFESTS = Path(__file__).resolve().parents[1] / "jobs" / "kuberay"


@pytest.fixture
def parts() -> dict[str, dict[str, Any]]:
    return {part["kind"]: part for part in yaml.safe_load_all((MANIFESTS / "rayservice.yaml").read_text())}


@pytest.fixture
def serve(parts: dict[str, dict[str, Any]]) -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(parts["RayService"]["spec"]["serveConfigV2"]))


def containers(parts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    cluster = parts["RayService"]["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_the_application_is_one_that_serve_can_build(serve: ServeDeploySchema) -> None:
    (application,) = serve.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(import_module(module), name))
    args = Application.model_validate(application.args)
    config = with_settings(ServeConfig(), args.settings)
    assert config.autoscale.max_replicas > config.autoscale.min_replicas > 1, "no single replica is the service"
    assert args.state.startswith("redis://"), "a file is for one machine"


def test_replicas_are_spread_and_find_room(parts: dict[str, dict[str, Any]], serve: ServeDeploySchema) -> None:
    (group,) = parts["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    config = with_settings(ServeConfig(), Application.model_validate(serve.applications[0].args).settings)
    cpus = float(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert config.replicas_per_node * config.replica_cpus <= cpus
    assert config.autoscale.max_replicas <= group["maxReplicas"] * min(config.replicas_per_node, cpus)
    assert config.autoscale.min_replicas >= group["minReplicas"] >= 2


def test_secrets_come_from_a_secret_and_reach_every_node(parts: dict[str, dict[str, Any]]) -> None:
    for container in containers(parts):
        given = {one["name"]: one for one in container["env"]}
        for name in (KEYS, PASSWORD):
            assert given[name]["valueFrom"]["secretKeyRef"]["name"] == "rayrec"
        assert given["RAY_SERVE_ENABLE_HA_PROXY"]["value"] == "1"


@pytest.mark.parametrize("manifest", sorted(path.name for path in MANIFESTS.glob("*.yaml")))
def test_ray_is_the_one_that_this_is_tested_with(manifest: str) -> None:
    versions = re.findall(r'rayVersion: "(.+)"', (MANIFESTS / manifest).read_text())
    assert versions
    assert {tuple(version.split(".")[:2]) for version in versions} == {tuple(ray.__version__.split(".")[:2])}


def train_cluster(manifest: str) -> dict[str, Any]:
    """The cluster that a manifest trains on."""
    spec = yaml.safe_load((MANIFESTS / manifest).read_text())["spec"]
    spec = spec.get("jobTemplate", spec)
    return dict(spec.get("rayClusterSpec", spec))


@pytest.mark.parametrize("manifest", TRAIN)
def test_a_lost_node_is_missed_in_seconds(manifest: str) -> None:
    (head,) = train_cluster(manifest)["headGroupSpec"]["template"]["spec"]["containers"]
    given = {one["name"]: float(one["value"]) for one in head["env"] if one["name"].startswith("RAY_health")}
    period, timeout, failures = (
        given[f"RAY_health_check_{name}"] for name in ("period_ms", "timeout_ms", "failure_threshold")
    )
    assert failures * (period + timeout) < 10_000


@pytest.mark.parametrize("manifest", TRAIN)
def test_a_training_worker_fits_a_node_of_its_group(manifest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (group,) = [one for one in train_cluster(manifest)["workerGroupSpecs"] if one["groupName"] == "train"]
    (container,) = group["template"]["spec"]["containers"]
    limits, n = container["resources"]["limits"], group["maxReplicas"]
    have = {"CPU": n * float(limits["cpu"]), "GPU": n * float(limits["nvidia.com/gpu"])}
    monkeypatch.setattr("ray.cluster_resources", lambda: have)
    asked = worker_resources(with_settings(preset("base"), ["train.gpu=true", f"train.workers={n}"]), wait_s=0)
    assert asked["GPU"] == float(limits["nvidia.com/gpu"]), "one worker a node"
    assert asked["CPU"] + 1 <= float(limits["cpu"]), "and a CPU that feeds it"


def job_of(manifest: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """A job's specification, the command of rayrec that it runs, and what this is given."""
    spec = yaml.safe_load((MANIFESTS / manifest).read_text())["spec"]
    python, flag, module, name, *words = shlex.split(spec["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "rayrec")
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    return spec, name, command.make_context(name, words).params


@pytest.mark.parametrize("manifest", ["rayjob-train.yaml", "rayjob-retrain.yaml"])
def test_a_training_job_is_a_command_that_there_is(manifest: str) -> None:
    spec, name, given = job_of(manifest)
    assert f"rayjob-{name}.yaml" == manifest
    assert given["gpu"]
    (group,) = [one for one in spec["rayClusterSpec"]["workerGroupSpecs"] if one["groupName"] == "train"]
    assert given["workers"] <= group["maxReplicas"]


def test_a_retraining_reads_the_state_of_the_service_and_its_bundles(serve: ServeDeploySchema) -> None:
    spec, _, given = job_of("rayjob-retrain.yaml")
    service = Application.model_validate(serve.applications[0].args)
    assert (given["state"], given["bundles"]) == (service.state, service.bundle)
    (head,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (password,) = [one for one in head["env"] if one["name"] == PASSWORD]
    assert password["valueFrom"]["secretKeyRef"] == {"name": "rayrec", "key": "redis-password"}
    assert spec["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"], "somebody to add the day, beside the head"


def test_each_night_is_the_same_job_and_ends_before_the_next() -> None:
    nightly = yaml.safe_load((MANIFESTS / "raycronjob-retrain.yaml").read_text())
    assert (nightly["apiVersion"], nightly["kind"]) == ("ray.io/v1", "RayCronJob")
    assert nightly["spec"]["jobTemplate"] == job_of("rayjob-retrain.yaml")[0]
    minute, hour, *rest = nightly["spec"]["schedule"].split()
    assert (minute.isdigit(), hour.isdigit(), rest) == (True, True, ["*", "*", "*"]), "once a day"
    assert nightly["spec"]["jobTemplate"]["activeDeadlineSeconds"] < 86_400


def test_redis_is_one_that_rayrec_takes(parts: dict[str, dict[str, Any]], serve: ServeDeploySchema) -> None:
    stateful, service = parts["StatefulSet"], parts["Service"]
    (container,) = stateful["spec"]["template"]["spec"]["containers"]
    command = container["args"][0]
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert f'--requirepass "${PASSWORD}"' in command
    assert container["volumeMounts"][0]["name"] == stateful["spec"]["volumeClaimTemplates"][0]["metadata"]["name"]
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert Application.model_validate(serve.applications[0].args).state == f"redis://{name}:{port}/0"
    assert service["spec"]["selector"] == stateful["spec"]["template"]["metadata"]["labels"]
