"""Two versions before live visitors: who sees which, and what came of it.

In: an experiment, the shared state. Out: rates of both arms, their difference with an interval that may be looked at
any day, and whether the arms have as many visitors as they should. It must not know the web. Visitors are the unit:
they are assigned by a hash of their id, and what one visitor does on many lists is one observation.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from rayrec.errors import BundleError, ResourceError, UsageError
from rayrec.state.protocol import REPLICA_ALIVE_MS, Event, Shown, State, UserRecord

SETTING: Final = "experiment"
"""The setting that names the experiment which replicas run."""

ANSWER: Final = "experiment_answer"
"""The setting in which replicas say what came of it."""

LOOK_EVERY_S: Final = 0.25

OUTCOMES: Final = {"click": ("click", "view"), "cart": ("cart",), "purchase": ("purchase",)}
"""What is counted, and the actions that make it; logs call a click on a list by either name."""

CREDIT_MS: Final = 86_400_000
"""An act counts for a list that showed the item at most so long before."""

LEVEL: Final = 0.05
TIGHT_AT: Final = 5000
"""The number of visitors at which the interval is tightest for its kind; it is valid at any."""
SUSPICIOUS: Final = 0.001
"""A sample ratio less likely than this means that assignment or logging is broken."""

Arm: TypeAlias = Literal["control", "treatment"]
Doubles: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Experiment:
    """A share of the visitors is served by another version."""

    name: str
    version: str
    share: float
    since_ms: int

    def arm(self, visitor: str) -> Arm:
        """Always the same for a visitor; another experiment draws anew."""
        digest = hashlib.sha256(f"{self.name}:{visitor}".encode()).digest()
        return "treatment" if int.from_bytes(digest[:8], "big") < self.share * 2**64 else "control"

    def text(self) -> str:
        """As the setting holds it."""
        return json.dumps(asdict(self))


def running(state: State) -> Experiment | None:
    """The experiment that replicas are told to run. Raises StateError."""
    text = state.setting(SETTING)
    return Experiment(**json.loads(text)) if text else None


def start(state: State, name: str, version: str, share: float) -> Experiment:
    """Tell replicas to serve `version` to a share of the visitors. Raises UsageError if another one is running."""
    if not name or not 0 < share < 1:
        raise UsageError("an experiment needs a name, and a share above 0 and below 1")
    if (other := running(state)) is not None:
        raise UsageError(f"experiment '{other.name}' is running; stop it first: rayrec experiment stop")
    experiment = Experiment(name, version, share, time.time_ns() // 1_000_000)
    state.put_setting(SETTING, experiment.text())
    return experiment


def stop(state: State) -> None:
    """Serve everybody by the live version again."""
    state.put_setting(SETTING, "")


def reply(state: State, experiment: Experiment, refused: str = "") -> None:
    """Say that a replica runs it, or why one does not; a refusal stands, whatever the others say."""
    if refused or not replied(state, experiment):
        state.put_setting(ANSWER, json.dumps({"of": experiment.text(), "refused": refused}))


def replied(state: State, experiment: Experiment) -> str | None:
    """Why a replica refused it, "" if one runs it and none refused, None if none has said anything."""
    said = json.loads(state.setting(ANSWER) or "{}")
    return str(said["refused"]) if said.get("of") == experiment.text() else None


def taken_up(state: State, experiment: Experiment, within_s: float) -> bool:
    """Wait until a replica runs it; False if there is none to do so.

    Raises BundleError, and stops the experiment, if one refuses it; ResourceError if none answers in time.
    """
    deadline = time.monotonic() + within_s
    while state.replicas(REPLICA_ALIVE_MS):
        refused = replied(state, experiment)
        if refused:
            stop(state)
            raise BundleError(f"experiment '{experiment.name}' was refused, and is stopped: {refused}")
        if refused is not None:
            return True
        if time.monotonic() >= deadline:
            raise ResourceError(
                f"no replica has taken up experiment '{experiment.name}' within {within_s:g} s; see their logs, or "
                "stop it: rayrec experiment stop"
            )
        time.sleep(LOOK_EVERY_S)
    return False


# ---------------------------------------------------------------- the report


@dataclass(frozen=True)
class Seen:
    """One visitor of an experiment: lists shown, those that led to each of OUTCOMES, and lists of the other arm's."""

    arm: Arm
    lists: int
    hits: tuple[int, ...]
    crossed: int = 0


def report(state: State, experiment: Experiment) -> dict[str, Any]:
    """All there is to say of an experiment so far; see `summary`."""
    seen = (_seen(state.user(visitor), visitor, experiment) for visitor in state.visitors() if visitor)
    return {**asdict(experiment), **summary([one for one in seen if one.lists], experiment.share)}


def _seen(record: UserRecord, visitor: str, experiment: Experiment) -> Seen:
    arm = experiment.arm(visitor)
    lists = [shown for shown in record.shown if shown.time_ms >= experiment.since_ms]
    crossed = sum((shown.model == experiment.version) != (arm == "treatment") for shown in lists)
    return Seen(arm, len(lists), tuple(hits(lists, record.events, actions) for actions in OUTCOMES.values()), crossed)


def hits(lists: Sequence[Shown], events: Iterable[Event], actions: Sequence[str]) -> int:
    """How many lists led to one of the actions: that which the event names, else the latest that showed its item."""
    led: set[str] = set()
    names = {shown.request_id for shown in lists}
    for event in events:
        if event.action not in actions:
            continue
        if event.request_id in names:
            led.add(str(event.request_id))
            continue
        before = [
            shown
            for shown in lists
            if shown.time_ms <= event.time_ms <= shown.time_ms + CREDIT_MS and event.item_id in shown.item_ids
        ]
        if event.request_id is None and before:
            led.add(max(before, key=lambda shown: shown.time_ms).request_id)
    return len(led)


def summary(seen: Sequence[Seen], share: float) -> dict[str, Any]:
    """Visitors and lists of both arms, the check of their ratio, and each outcome's rates with their difference.

    "interval" is of the difference, treatment less control, at 95% however often it is looked at; None where an arm has
    fewer than two visitors. "crossed": lists of the other arm's version, as while a replica loads one.
    """
    treated_U = np.array([one.arm == "treatment" for one in seen], bool)
    lists_U = np.array([one.lists for one in seen], float)
    n_treated, n = int(treated_U.sum()), len(seen)
    p = sample_ratio_p(n_treated, n, share)
    body: dict[str, Any] = {
        "visitors": {"control": n - n_treated, "treatment": n_treated},
        "lists": {"control": int(lists_U[~treated_U].sum()), "treatment": int(lists_U[treated_U].sum())},
        "crossed": sum(one.crossed for one in seen),
        "sample_ratio": {"p": p, "suspicious": p < SUSPICIOUS},
        "outcomes": {},
    }
    for column, outcome in enumerate(OUTCOMES):
        hits_U = np.array([one.hits[column] for one in seen], float)
        body["outcomes"][outcome] = compared(hits_U, lists_U, treated_U)
    return body


def sample_ratio_p(treated: int, n: int, share: float) -> float:
    """How likely so uneven arms are by chance (chi-square, one degree of freedom; 1 without visitors)."""
    if not n:
        return 1.0
    spread = n * share * (1 - share)
    return float(chi2.sf((treated - n * share) ** 2 / spread, 1))


def compared(hits_U: Doubles, lists_U: Doubles, treated_U: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Hits a list in both arms, and their difference with its interval. Arrays are by visitor: [U]."""
    rates: dict[str, float] = {}
    influence_U, n = np.zeros(len(hits_U)), len(hits_U)
    for arm, chosen_U, sign in (("control", ~treated_U, -1.0), ("treatment", treated_U, 1.0)):
        if lists := lists_U[chosen_U].sum():
            rates[arm] = float(hits_U[chosen_U].sum() / lists)
            # A ratio of sums, made linear in each visitor (the delta method): visitors are the clusters.
            influence_U[chosen_U] = sign * n * (hits_U[chosen_U] - rates[arm] * lists_U[chosen_U]) / lists
    row: dict[str, Any] = {"control": None, "treatment": None, **rates, "difference": None, "interval": None}
    if min(int(treated_U.sum()), int((~treated_U).sum())) >= 2:
        difference = rates["treatment"] - rates["control"]
        reach = anytime_reach(float(influence_U.std()), n)
        row |= {"difference": difference, "interval": [difference - reach, difference + reach]}
    return row


def anytime_reach(deviation: float, n: int, level: float = LEVEL, tight_at: int = TIGHT_AT) -> float:
    """Half the width of an interval for a mean of `n` observations that holds at all times at once.

    The asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (2021), tuned to be tightest
    at `tight_at`: wider than one that is looked at once, and right however often it is looked at.
    """
    rho2 = (-2 * math.log(level) + math.log(-2 * math.log(level) + 1)) / tight_at
    scale = n * rho2 + 1
    return deviation * math.sqrt(2 * scale / (n**2 * rho2) * math.log(math.sqrt(scale) / level))


def table(found: dict[str, Any]) -> str:
    """A report for people."""
    lines = [
        f"experiment {found['name']}: version {found['version']} to {found['share']:.0%} of the visitors",
        "visitors: {control} control, {treatment} treatment".format(**found["visitors"])
        + f"; a ratio so uneven has a chance of {found['sample_ratio']['p']:.3g}",
    ]
    if found["sample_ratio"]["suspicious"]:
        lines.append("THE ARMS ARE TOO UNEVEN: assignment or logging is broken, and no figure below can be trusted")
    if found["crossed"]:
        lines.append(f"{found['crossed']} lists were of the other arm's version")
    for outcome, row in found["outcomes"].items():
        rates = [("–" if row[arm] is None else f"{row[arm]:.4f}") for arm in ("control", "treatment")]
        line = f"{outcome:>9} a list: control {rates[0]}, treatment {rates[1]}"
        if row["interval"]:
            low, high = row["interval"]
            sure = " (sure)" if low > 0 or high < 0 else ""
            line += f", difference {row['difference']:+.4f}, 95% at any time {low:+.4f} to {high:+.4f}{sure}"
        lines.append(line)
    return "\n".join(lines)
