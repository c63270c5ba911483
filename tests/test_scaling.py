"""How many replicas there shall be, as a function of the load and the hour."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rayrec.config import ServeConfig
from rayrec.errors import UsageError
from rayrec.serving.scaling import Peaks, serve_policy
from rayrec.settings import with_settings

HOUR_S = 3600


def deployment(requests: float) -> Any:
    """What Serve knows, as far as it is read here."""
    return SimpleNamespace(total_num_requests=requests, config=SimpleNamespace(get_target_ongoing_requests=lambda: 8))


class Always:
    """As many replicas as it is told to ask for."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas

    def __call__(self, deployment: object) -> tuple[float, dict[str, Any]]:
        return self.replicas, {}


def replicas(hour: float, requests: float, peaks: dict[str, int]) -> float:
    days = 20_000 * 24
    return Peaks(peaks, now_s=lambda: (days + hour) * HOUR_S)(deployment(requests))[0]


@pytest.mark.parametrize(
    ("hour", "requests", "expected"),
    [(6, 0, 0), (6, 20, 2.5), (7.5, 0, 4), (8.9, 0, 4), (9, 0, 0), (8, 80, 10), (23, 0, 2), (0.5, 0, 2), (2, 0, 0)],
)
def test_a_peak_is_met_ahead_of_its_load(hour: float, requests: float, expected: float) -> None:
    assert replicas(hour, requests, {"07:30-09:00": 4, "22:00-01:00": 2}) == expected


def test_without_peaks_the_load_decides() -> None:
    assert replicas(8, 12, {}) == 1.5


def of(*settings: str) -> Any:
    return serve_policy(with_settings(ServeConfig(), [f"autoscale.{setting}" for setting in settings]).autoscale)


def test_a_policy_is_handed_to_serve() -> None:
    assert of() is None
    named = of("policy=rayrec.serving.scaling:Peaks", "policy_options={peaks: {'07:30-09:00': 4}}")
    assert named == {
        "policy_function": "rayrec.serving.scaling:Peaks",
        "policy_kwargs": {"peaks": {"07:30-09:00": 4}},
    }


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["policy=Peaks"], "write it as module:Class"),
        (["policy=no.such:Peaks"], "autoscale.policy 'no.such:Peaks': No module named 'no'"),
        (["policy=rayrec.serving.scaling:Peak"], "has no attribute 'Peak'"),
        (["policy=rayrec.serving.scaling:Peaks"], "policy_options of .* missing 1 required .* 'peaks'"),
        (["policy=rayrec.serving.scaling:Peaks", "policy_options={peaks: {soon: 4}}"], "write hours and replicas as"),
        (["policy=rayrec.serving.scaling:Peaks", "policy_options={peaks: {'07:30-09:00': 0}}"], "write hours"),
        (["policy=collections:OrderedDict"], "must be a class whose instances can be called"),
        (["policy_options={peaks: {}}"], "names no policy"),
    ],
)
def test_a_policy_that_cannot_be_is_told(settings: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        of(*settings)
