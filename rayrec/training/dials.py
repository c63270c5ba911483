"""The dials of a search: which settings are turned, between what, and which turns are tried.

In: dials as text, a seed. Out: lists of settings as `--set` takes them. It must not know what a setting does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rayrec.config import Config
from rayrec.errors import UsageError
from rayrec.settings import with_settings

SMALL_DIALS = (
    "train.lr=1e-3..1e-2",
    "train.batch_size=16,32,64,128",
    "train.weight_decay=1e-3..1e-1",
    "model.dropout=0.1..0.6",
    "model.event_dropout=0,0.1,0.2",
    "model.width=32,64,128",
    "model.hidden_width=64,128,256",
)
"""What moves the figures of the fusion model most, around its presets."""
PAPER_DIALS = ("train.lr=1e-4..1e-2", "train.batch_size=16,32,64,128", "train.negatives=1,4,8")
STEEP = 10.0
"""A range whose end is so many times its start is drawn evenly in the logarithm."""


@dataclass(frozen=True)
class Dial:
    """A setting and what it may be: one of `choices`, or a number between `low` and `high`."""

    path: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    def turned(self, share: float) -> str:
        """The setting at `share` (0 to 1) of its way."""
        if self.choices:
            return f"{self.path}={self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]}"
        if self.low > 0 and self.high / self.low >= STEEP:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return f"{self.path}={round(value)}" if self.whole else f"{self.path}={value:.3g}"

    def ends(self) -> Iterable[str]:
        """Settings that must be valid for all of the dial to be: every choice, or both ends."""
        if self.choices:
            return [f"{self.path}={choice}" for choice in self.choices]
        return [self.turned(0.0), self.turned(1.0)]


def parse(text: str, config: Config) -> Dial:
    """A dial from `path=LOW..HIGH` or `path=A,B,C`. Raises UsageError for what cannot be read or set in `config`.

    >>> parse("train.lr=1e-3..1e-2", Config()).turned(0.5)
    'train.lr=0.00316'
    """
    path, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not values:
        raise UsageError(f"--dial {text}: write it as path=LOW..HIGH or path=A,B,C")
    low, dots, high = values.partition("..")
    if dots:
        dial = _between(path, low.strip(), high.strip(), text)
    else:
        dial = Dial(path, tuple(value.strip() for value in values.split(",") if value.strip()))
    for setting in dial.ends():
        with_settings(config, [setting])
    return dial


def _between(path: str, low: str, high: str, text: str) -> Dial:
    try:
        ends = float(low), float(high)
    except ValueError:
        raise UsageError(f"--dial {text}: {low!r} and {high!r} must be numbers") from None
    if not (math.isfinite(ends[0]) and math.isfinite(ends[1]) and ends[0] < ends[1]):
        raise UsageError(f"--dial {text}: {low} must be below {high}")
    whole = all(end.lstrip("-").isdigit() for end in (low, high))
    return Dial(path, low=ends[0], high=ends[1], whole=whole)


def turns(dials: Sequence[Dial], n: int, seed: int) -> list[list[str]]:
    """`n` lists of settings: none first, so that the preset itself is among them, then a Latin hypercube.

    Each dial is tried once in each of n - 1 equal parts of its way (McKay, Beckman and Conover 1979): a few trials
    cover every dial, which independent draws do not.
    """
    rng = np.random.default_rng(seed)
    drawn = n - 1
    ways = [(dial, (rng.permutation(drawn) + rng.random(drawn)) / max(1, drawn)) for dial in dials]
    return [[], *([dial.turned(share_T[t]) for dial, share_T in ways] for t in range(drawn))]
