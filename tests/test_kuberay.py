"""The manifests for Kubernetes, by the schemas of what reads them, and held against what rayrec asks for."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from functools import reduce
from importlib import import_module
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import ray
import typer
import yaml
from kubeschema import check
from ray.serve.schema import ServeDeploySchema

from rayrec.cli import app
from rayrec.config import ServeConfig, preset
from rayrec.serving.app import Application
from rayrec.serving.keys import KEYS
from rayrec.settings import with_settings
from rayrec.state.redis import PASSWORD
from rayrec.training.trainer import worker_resources

TRAIN = ["raycluster.yaml", "rayjob-train.yaml", "rayjob-retrain.yaml", "raycronjob-retrain.yaml"]
CLUSTERS = {
    "RayCluster": "spec",
    "RayJob": "spec.rayClusterSpec",
    "RayCronJob": "spec.jobTemplate.rayClusterSpec",
    "RayService": "spec.rayClusterConfig",
}
MANIFESTS = Path(__file__).resolve().parents[1] / "jobs" / "kuberay"
ALL = sorted(path.name for path in MANIFESTS.glob("*.yaml"))
NAMED_BY_US = {"nodeSelector", "limits", "requests"}  # maps of any names


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


@pytest.mark.parametrize("manifest", ALL)
def test_a_cluster_takes_it(manifest: str) -> None:
    for one in yaml.safe_load_all((MANIFESTS / manifest).read_text()):
        check(one)


SERVE = """
applications: [{name: rayrec, import_path: "rayrec.serving.app:application", %s}]
"""


@pytest.mark.parametrize(
    ("manifest", "place", "value", "words"),
    [
        ("raycluster.yaml", "kind", "RayClutser", "RayClutser"),
        ("raycluster.yaml", "apiVersion", "ray.io/v2", "ray.io/v2"),
        ("raycluster.yaml", "apiVersion", 1, "apiVersion"),
        ("raycluster.yaml", "metadata.lables", {"app": "shop"}, "lables"),
        ("raycluster.yaml", "spec.headGroupSpec.rayStartParams.num-cpu", "0", "num-cpu"),
        ("raycluster.yaml", "spec.workerGroupSpecs.0.maxReplica", 8, "maxReplica"),
        ("raycluster.yaml", "spec.workerGroupSpecs.0.maxReplicas", "8", "maxReplicas"),
        ("raycluster.yaml", "spec.autoscalerOptions.idleTimeout", 300, "idleTimeout"),
        ("raycluster.yaml", "spec.workerGroupSpecs.0.template.spec.containers.0.resource", {}, "resource"),
        ("raycluster.yaml", "spec.workerGroupSpecs.0.template.spec.containers.0.env.0.value", 0, "0 is not"),
        ("raycluster.yaml", "spec.workerGroupSpecs.1.template.spec.tolerations.0.efect", "NoSchedule", "efect"),
        ("rayjob-train.yaml", "spec.backOffLimit", 1, "backOffLimit"),
        ("rayjob-train.yaml", "spec.shutdownAfterJobFinishes", "yes", "shutdownAfterJobFinishes"),
        ("rayjob-train.yaml", "spec.submissionMode", "JobMode", "submissionMode"),
        ("rayjob-train.yaml", "spec.rayClusterSpec.headGroupSpecs", {}, "headGroupSpecs"),
        ("raycronjob-retrain.yaml", "spec.timezone", "Europe/Berlin", "timezone"),
        ("raycronjob-retrain.yaml", "spec.jobTemplate.ttlSeconds", 600, "ttlSeconds"),
        ("rayservice.yaml", "spec.serveConfig", "", "serveConfig"),
        ("rayservice.yaml", "spec.serveConfigV2", SERVE % "arg: {}", "no applications.0.arg"),
        ("rayservice.yaml", "spec.serveConfigV2", SERVE % "args: 3", "args"),
        ("rayservice.yaml", "StatefulSet.spec.replica", 1, "replica"),
        ("rayservice.yaml", "StatefulSet.spec.template.spec.containers.0.volumeMounts.0.path", "/data", "path"),
        ("rayservice.yaml", "StatefulSet.spec.volumeClaimTemplates.0.spec.accessModes", "ReadWriteOnce", "array"),
        ("rayservice.yaml", "StatefulSet.kind", "StatefullSet", "StatefullSet"),
        ("rayservice.yaml", "Service.spec.ports.0.port", "redis", "redis"),
    ],
)
def test_a_broken_copy_is_refused(manifest: str, place: str, value: Any, words: str) -> None:
    by_kind = {one["kind"]: one for one in yaml.safe_load_all((MANIFESTS / manifest).read_text())}
    *path, name = place.split(".")
    found = by_kind[path.pop(0)] if path and path[0] in by_kind else next(iter(by_kind.values()))
    reduce(getitem, [int(step) if step.isdigit() else step for step in path], found)[name] = value
    with pytest.raises(ValueError, match=words):
        check(found)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each map, list and scalar within."""
    yield path
    if isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, name))


def test_no_level_takes_what_it_does_not_know() -> None:
    """A cron job has a job in it, and that a cluster."""
    whole = yaml.safe_load((MANIFESTS / "raycronjob-retrain.yaml").read_text())
    for path in places(whole):
        if path and path[-1] in NAMED_BY_US:
            continue
        broken = copy.deepcopy(whole)
        here = reduce(getitem, path, broken)
        if isinstance(here, dict):
            here["nope"] = "1"
        else:
            reduce(getitem, path[:-1], broken)[path[-1]] = {"nope": "1"}
        with pytest.raises(ValueError, match=r"\S"):
            check(broken)


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


@pytest.mark.parametrize("manifest", ALL)
def test_ray_is_the_one_that_this_is_tested_with(manifest: str) -> None:
    versions = re.findall(r'rayVersion: "(.+)"', (MANIFESTS / manifest).read_text())
    assert versions
    assert {tuple(version.split(".")[:2]) for version in versions} == {tuple(ray.__version__.split(".")[:2])}


def cluster(manifest: str) -> dict[str, Any]:
    """The cluster of Ray that a manifest brings up."""
    found = next(yaml.safe_load_all((MANIFESTS / manifest).read_text()))
    return dict(reduce(getitem, CLUSTERS[found["kind"]].split("."), found))


@pytest.mark.parametrize("manifest", ALL)
def test_a_lost_node_is_missed_in_seconds(manifest: str) -> None:
    (head,) = cluster(manifest)["headGroupSpec"]["template"]["spec"]["containers"]
    given = {one["name"]: float(one["value"]) for one in head["env"] if one["name"].startswith("RAY_health")}
    period, timeout, failures = (
        given[f"RAY_health_check_{name}"] for name in ("period_ms", "timeout_ms", "failure_threshold")
    )
    assert failures * (period + timeout) < 10_000


@pytest.mark.parametrize("manifest", TRAIN)
def test_a_training_worker_fits_a_node_of_its_group(manifest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (group,) = [one for one in cluster(manifest)["workerGroupSpecs"] if one["groupName"] == "train"]
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


def test_a_lost_training_goes_on_by_itself_with_the_nodes_that_are_left() -> None:
    spec, _, given = job_of("rayjob-train.yaml")
    assert given["resume"]
    assert spec["backoffLimit"] > 0, "who else submits it again"
    assert 1 <= given["min_workers"] < given["workers"]


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
    job = nightly["spec"]["jobTemplate"]
    assert (1 + job["backoffLimit"]) * job["activeDeadlineSeconds"] < 86_400, "KubeRay counts anew for each go"


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
