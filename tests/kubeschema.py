"""What a cluster takes of a manifest, asked without one.

In: an object of a manifest. Out: nothing, or ValueError with the place that is wrong. Ray's kinds are held against the
fields below, which are those of KubeRay 1.7 by name and type; what is Kubernetes' own, alone or inside of them, against
its schemas; what Ray Serve reads against Ray's. At no level may there be a field that its type has not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal

import kubernetes_validate
import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from ray.scripts.scripts import start
from ray.serve.schema import ServeDeploySchema
from typing_extensions import Required, TypedDict

KUBERNETES = "1.33"
"""Whose schemas: an old one, for what it takes newer ones take too."""


def check(found: Mapping[str, Any]) -> None:
    """Raise ValueError unless Kubernetes with KubeRay would take this object."""
    version, kind = found.get("apiVersion"), found.get("kind")
    if not isinstance(version, str) or not isinstance(kind, str):
        raise ValueError("an object has an apiVersion and a kind")
    if version == "ray.io/v1" and kind in KINDS:
        KINDS[kind].validate_python(found)
    else:
        _by_kubernetes(json.dumps(found))


@cache  # pods are many and alike, and each asking reads all of Kubernetes' types
def _by_kubernetes(found: str) -> None:
    try:
        kubernetes_validate.validate(json.loads(found), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ValueError(f"{'.'.join(map(str, error.path))}: {error.message}") from None
    except kubernetes_validate.SchemaNotFoundError as error:
        raise ValueError(error.message) from None


def part(kind: str, version: str, whole: Callable[[Any], dict[str, Any]]) -> AfterValidator:
    """A value of a type of Kubernetes, which is asked of an object of `kind` that `whole` makes of it."""

    def checked(value: Any) -> Any:
        _by_kubernetes(json.dumps({**whole(value), "apiVersion": version, "kind": kind}))
        return value

    return AfterValidator(checked)


def of_container(name: str) -> AfterValidator:
    """A field of a container."""
    return part("PodTemplate", "v1", lambda it: _pod({name: it}))


def _pod(container: dict[str, Any]) -> dict[str, Any]:
    return {"template": {"spec": {"containers": [{"name": "any", **container}]}}}


def of_policy(name: str) -> AfterValidator:
    """A field of a network policy."""
    return part("NetworkPolicy", "networking.k8s.io/v1", lambda it: {"spec": {"podSelector": {}, name: it}})


def _known_to_ray_start(params: dict[str, str]) -> dict[str, str]:
    known = {name.lstrip("-") for option in start.params for name in option.opts}
    if unknown := sorted(set(params) - known):
        raise ValueError(f"ray start has no --{unknown[0]}")
    return params


def _known_to_serve(text: str) -> str:
    given = yaml.safe_load(text)
    _nothing_lost(given, ServeDeploySchema.model_validate(given).model_dump(exclude_unset=True))
    return text


def _nothing_lost(given: Any, kept: Any, place: str = "") -> None:
    """Ray's model drops fields that it does not know."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            if name not in kept:
                raise ValueError(f"Ray Serve knows no {place}{name}")
            _nothing_lost(value, kept[name], f"{place}{name}.")
    elif isinstance(given, list) and isinstance(kept, list):
        for at, (value, other) in enumerate(zip(given, kept, strict=True)):
            _nothing_lost(value, other, f"{place}{at}.")


Count = Annotated[int, Field(ge=0, lt=2**31)]
Texts = dict[str, str]
Meta = Annotated[dict[str, Any], part("PodTemplate", "v1", lambda it: {"metadata": it})]
Pod = Annotated[dict[str, Any], part("PodTemplate", "v1", lambda it: {"template": it})]
Service = Annotated[dict[str, Any], part("Service", "v1", dict)]
Env = Annotated[list[Any], of_container("env")]
Resources = Annotated[dict[str, Any], of_container("resources")]
StartParams = Annotated[dict[str, str], AfterValidator(_known_to_ray_start)]
Manager = Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]


class Fields(TypedDict, total=False):
    """These and no others, each of its type and not of one that could become it."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)


class AutoscalerOptions(Fields, total=False):
    args: list[str]
    command: list[str]
    env: Env
    envFrom: Annotated[list[Any], of_container("envFrom")]
    idleTimeoutSeconds: Count
    image: str
    imagePullPolicy: str
    resources: Resources
    securityContext: Annotated[dict[str, Any], of_container("securityContext")]
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    version: Literal["v1", "v2"]
    volumeMounts: Annotated[list[Any], of_container("volumeMounts")]


class AuthOptions(Fields, total=False):
    enableK8sTokenAuth: bool
    mode: Literal["disabled", "token"]
    secretName: str


class Credential(Fields, total=False):
    value: str
    valueFrom: Annotated[
        dict[str, Any], part("PodTemplate", "v1", lambda it: _pod({"env": [{"name": "any", "valueFrom": it}]}))
    ]


class GcsStorage(Fields, total=False):
    accessModes: list[str]
    claimName: str
    deletionPolicy: Literal["DeleteWithCluster", "Retain"]
    size: int | str
    storageClassName: str
    subPath: str


class GcsFaultToleranceOptions(Fields, total=False):
    backend: Literal["redis", "rocksdb"]
    externalStorageNamespace: str
    redisAddress: str
    redisPassword: Credential
    redisUsername: Credential
    storage: GcsStorage


class IngressTls(Fields, total=False):
    hosts: list[str]
    secretName: str


class IngressOptions(Fields, total=False):
    host: str
    path: str
    pathType: Literal["Exact", "Prefix", "ImplementationSpecific"]
    tls: list[IngressTls]


class CollectorOptions(Fields, total=False):
    env: Env
    image: str
    imagePullPolicy: str
    resources: Resources


class HistoryServerOptions(Fields, total=False):
    collectorOptions: CollectorOptions


class NetworkRules(Fields, total=False):
    egressRules: Annotated[list[Any], of_policy("egress")]
    ingressRules: Annotated[list[Any], of_policy("ingress")]


class GroupNetworkRules(NetworkRules, total=False):
    groupName: Required[str]


class NetworkPolicy(Fields, total=False):
    head: NetworkRules
    mode: Literal["DenyAll", "DenyAllIngress", "DenyAllEgress"]
    worker: NetworkRules
    workerGroups: list[GroupNetworkRules]


class TlsOptions(Fields, total=False):
    enabled: bool


class ClusterUpgrade(Fields, total=False):
    type: Literal["Recreate", "None"]


class Group(Fields, total=False):
    labels: Texts
    rayStartParams: StartParams
    resources: Texts
    template: Required[Pod]


class HeadGroup(Group, total=False):
    enableIngress: bool
    headService: Service
    ingressOptions: IngressOptions
    serviceType: str


class ScaleStrategy(Fields, total=False):
    workersToDelete: list[str]


class WorkerGroup(Group, total=False):
    groupName: Required[str]
    idleTimeoutSeconds: Count
    maxReplicas: Required[Count]
    minReplicas: Required[Count]
    numOfHosts: Count
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)]
    replicas: Count
    scaleStrategy: ScaleStrategy
    suspend: bool


class ClusterSpec(Fields, total=False):
    authOptions: AuthOptions
    autoscalerOptions: AutoscalerOptions
    enableInTreeAutoscaling: bool
    gcsFaultToleranceOptions: GcsFaultToleranceOptions
    headGroupSpec: Required[HeadGroup]
    headServiceAnnotations: Texts
    historyServerOptions: HistoryServerOptions
    managedBy: Manager
    networkPolicy: NetworkPolicy
    rayVersion: str
    suspend: bool
    tlsOptions: TlsOptions
    upgradeStrategy: ClusterUpgrade
    workerGroupSpecs: list[WorkerGroup]


Deletion = Literal["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]


class DeletionPolicy(Fields, total=False):
    policy: Deletion


class DeletionCondition(Fields, total=False):
    jobDeploymentStatus: Literal["Failed"]
    jobStatus: Literal["SUCCEEDED", "FAILED"]
    ttlSeconds: Count


class DeletionRule(Fields, total=False):
    condition: Required[DeletionCondition]
    policy: Required[Deletion]


class DeletionStrategy(Fields, total=False):
    deletionRules: list[DeletionRule]
    onFailure: DeletionPolicy
    onSuccess: DeletionPolicy


class SubmitterConfig(Fields, total=False):
    backoffLimit: Count


class JobSpec(Fields, total=False):
    activeDeadlineSeconds: Count
    backoffLimit: Count
    clusterSelector: Texts
    deletionStrategy: DeletionStrategy
    entrypoint: str
    entrypointNumCpus: float
    entrypointNumGpus: float
    entrypointResources: str
    jobId: str
    managedBy: Manager
    metadata: Texts
    preRunningDeadlineSeconds: Annotated[int, Field(ge=1, lt=2**31)]
    rayClusterSpec: ClusterSpec
    runtimeEnvYAML: str
    shutdownAfterJobFinishes: bool
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    submitterConfig: SubmitterConfig
    submitterPodTemplate: Pod
    suspend: bool
    ttlSecondsAfterFinished: Count


class CronJobSpec(Fields, total=False):
    jobTemplate: Required[JobSpec]
    schedule: Required[str]
    suspend: bool
    timeZone: str


class ClusterUpgradeOptions(Fields, total=False):
    gatewayClassName: Required[str]
    intervalSeconds: Required[Count]
    maxSurgePercent: Count
    stepSizePercent: Required[Count]


class ServiceUpgrade(Fields, total=False):
    clusterUpgradeOptions: ClusterUpgradeOptions
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class ServiceSpec(Fields, total=False):
    deploymentUnhealthySecondThreshold: Count
    excludeHeadPodFromServeSvc: bool
    managedBy: Manager
    rayClusterConfig: Required[ClusterSpec]
    rayClusterDeletionDelaySeconds: Count
    serveConfigV2: Annotated[str, AfterValidator(_known_to_serve)]
    serveService: Service
    serviceUnhealthySecondThreshold: Count
    suspend: bool
    upgradeStrategy: ServiceUpgrade


class Named(Fields, total=False):
    apiVersion: Required[str]
    kind: Required[str]
    metadata: Required[Meta]


class Cluster(Named, total=False):
    spec: Required[ClusterSpec]


class Job(Named, total=False):
    spec: Required[JobSpec]


class CronJob(Named, total=False):
    spec: Required[CronJobSpec]


class LiveService(Named, total=False):
    spec: Required[ServiceSpec]


KINDS = {
    "RayCluster": TypeAdapter(Cluster),
    "RayJob": TypeAdapter(Job),
    "RayCronJob": TypeAdapter(CronJob),
    "RayService": TypeAdapter(LiveService),
}
