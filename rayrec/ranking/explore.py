"""Exploration: now and then show what is not believed best, with the exact probability written down.

In: an order, a rate, a generator. Out: the list to show and its propensities. It must not know items or
scores.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


def explore(order_M: Ints, k: int, rate: float, rng: np.random.Generator) -> tuple[Ints, Doubles]:
    """Choose k of the M ordered items; each comes with its propensity. [min(k, M)] each.

    Slot by slot: with probability `rate` any of the R items still left, each alike; else the first of them.
    The propensity of an item is its probability of taking this slot given the slots above: 1 - rate + rate / R
    for the first one left, rate / R for any other. Their product is the probability of the whole list.
    """
    k = min(k, len(order_M))
    if rate <= 0:
        return order_M[:k], np.ones(k)
    left = order_M.tolist()
    shown, propensity = [], []
    for _ in range(k):
        pick = int(rng.integers(len(left))) if rng.random() < rate else 0
        propensity.append(slot_propensity(pick, len(left), rate))
        shown.append(left.pop(pick))
    return np.array(shown, np.int64), np.array(propensity)


def slot_propensity(pick: int, left: int, rate: float) -> float:
    """Probability that the item `pick` of `left` ordered ones takes the slot."""
    return rate / left + (1 - rate if pick == 0 else 0.0)
