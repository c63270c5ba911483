"""How many replicas there shall be, where Ray Serve's own rule (requests under way a replica) is not enough.

In: what Ray Serve knows of a deployment. Out: a number of replicas; Serve keeps it within its bounds and delays. A
policy is a class: made once of `autoscale.policy_options`, asked ten times a second. `Peaks` is one; a shop names its
own by `autoscale.policy`. It must not know Ray: Serve calls, and policies are tested without it.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rayrec.config import AutoscaleConfig
from rayrec.errors import UsageError

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


class Deployment(Protocol):
    """The part of Serve's `AutoscalingContext` that is read here. total_num_requests: under way or waiting."""

    total_num_requests: float
    config: Any


class Peaks:
    """As many replicas as the load needs, and in the hours of known peaks at least so many, whatever the load.

    peaks: replicas by hours of the day in UTC, as {"07:30-09:00": 4}; hours may pass midnight.
    """

    def __init__(self, peaks: Mapping[str, int], now_s: Callable[[], float] = time.time) -> None:
        self._now_s = now_s
        self._peaks: list[tuple[int, int, int]] = []
        for hours, replicas in peaks.items():
            found = _HOURS.fullmatch(hours)
            if found is None or replicas < 1:
                raise ValueError(
                    f"peaks: write hours and replicas as {{'07:30-09:00': 4}}, not {{{hours!r}: {replicas}}}"
                )
            from_h, from_min, to_h, to_min = map(int, found.groups())
            self._peaks.append((60 * from_h + from_min, 60 * to_h + to_min, replicas))

    def __call__(self, deployment: Deployment) -> tuple[float, dict[str, Any]]:
        """Replicas, a fraction is rounded up; and what Serve shall keep for the next call: nothing."""
        by_load = deployment.total_num_requests / deployment.config.get_target_ongoing_requests()
        minute = int(self._now_s() // 60) % 1440
        expected = (
            replicas
            for start, end, replicas in self._peaks
            if (start <= minute < end if start < end else minute >= start or minute < end)
        )
        return max(by_load, *expected, 0), {}


def serve_policy(config: AutoscaleConfig) -> dict[str, Any] | None:
    """The `policy` of Serve's `autoscaling_config`; None for Serve's own rule.

    Raises UsageError for a policy that cannot be imported, is no class, or refuses its options.
    """
    if not config.policy:
        return None
    module, _, name = config.policy.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
        policy = kind(**config.policy_options)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"autoscale.policy '{config.policy}': {error}") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"autoscale.policy_options of '{config.policy}': {error}") from None
    if not isinstance(kind, type) or not callable(policy):
        raise UsageError(f"autoscale.policy '{config.policy}': must be a class whose instances can be called")
    return {"policy_function": config.policy, "policy_kwargs": config.policy_options}
