"""How often somebody may call: a token bucket for each. In: who, and when. Out: whether. It must not know requests.

Each replica counts for itself: the limit of a service is that of a replica times their number.
"""

from __future__ import annotations

import time
from collections import OrderedDict

MOST_CALLERS = 100_000
"""Beyond so many the one who was quiet for longest is forgotten."""


class Limiter:
    """`rate` calls a second for each caller, and twice as many at once. A rate of 0 is no limit."""

    def __init__(self, rate: float) -> None:
        self.rate, self.burst = rate, max(1.0, 2 * rate)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def admits(self, caller: str, now_s: float | None = None) -> bool:
        """Count a call; whether it is within the limit."""
        if not self.rate:
            return True
        now_s = time.monotonic() if now_s is None else now_s
        left, then_s = self._left.pop(caller, (self.burst, now_s))
        left = min(self.burst, left + (now_s - then_s) * self.rate)
        admitted = left >= 1
        self._left[caller] = (left - admitted, now_s)
        if len(self._left) > MOST_CALLERS:
            self._left.popitem(last=False)
        return admitted
