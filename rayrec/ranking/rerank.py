"""Re-ranking: a good list is not the best items one by one.

In: relevance, item vectors, limits, pinned items. Out: an order. It must not know where they came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_LAST = 1e6  # no mix of relevance and similarity comes near it
_NEVER = 1e9


def diversify(score_BM: Floats, unit_BMD: Floats, diversity_B: Floats, k: int) -> Ints:
    """The order in which to show k of M candidates. [B, min(k, M)] int64 places.

    Maximal marginal relevance (Carbonell and Goldstein 1998): again and again take the candidate with the
    highest (1 - diversity) * relevance - diversity * (cosine to the most similar one taken), relevance being
    the score scaled to 0..1 within the request.

    score_BM: higher is better; NaN comes after every number; -inf is padding and comes after everything.
    unit_BMD: item vectors of length 1. diversity_B: 0 leaves the order of the scores. Ties: the lower place.
    """
    padding_BM = np.isneginf(score_BM)
    unsure_BM = np.isnan(score_BM)
    relevance_BM = _scaled(score_BM, ~(padding_BM | unsure_BM)) - _LAST * unsure_BM - _NEVER * padding_BM
    weight_B1 = diversity_B.astype(np.float64)[:, None]
    # On penalised rows the weight must not shrink the penalty, so it stands outside the mix.
    mix_BM = np.where(relevance_BM < 0, relevance_BM, (1 - weight_B1) * relevance_BM)
    alike_BMM = weight_B1[:, :, None] * (unit_BMD @ unit_BMD.transpose(0, 2, 1))

    rows_B = np.arange(len(score_BM))
    nearest_BM = np.zeros(score_BM.shape)
    order_BK = np.empty((len(score_BM), min(k, score_BM.shape[1])), np.int64)
    for place in range(order_BK.shape[1]):
        taken_B = (mix_BM - nearest_BM).argmax(axis=1)
        order_BK[:, place] = taken_B
        mix_BM[rows_B, taken_B] = -np.inf
        np.maximum(nearest_BM, alike_BMM[rows_B, taken_B], out=nearest_BM)
    return order_BK


def capped(item_M: Ints, caps: Mapping[str, tuple[Ints, int]]) -> tuple[Ints, dict[str, int]]:
    """Places of the items, in order, that no limit leaves out, and how many each left out. [<= M]

    caps: by reason, codes of all items ([N + 1] int64, 0: of no group) and how many of one code there may be. An item
    that is left out counts for no other limit.
    """
    taken: dict[str, dict[int, int]] = {reason: {} for reason in caps}
    removed: dict[str, int] = {}
    places = []
    for place, item in enumerate(item_M.tolist()):
        codes = {reason: int(code_N[item]) for reason, (code_N, _) in caps.items()}
        full = [r for r, (_, limit) in caps.items() if codes[r] and taken[r].get(codes[r], 0) >= limit]
        if full:
            removed[full[0]] = removed.get(full[0], 0) + 1
            continue
        places.append(place)
        for reason, code in codes.items():
            taken[reason][code] = taken[reason].get(code, 0) + 1
    return np.array(places, np.int64), removed


def with_pinned(place_K: Ints, pinned: Sequence[tuple[int, int]], k: int) -> Ints:
    """The first k places of a list in which each of `pinned` (its place in the list, what stands there) has its own.

    Where the list is too short for a pinned one, it comes last.

    >>> with_pinned(np.array([7, 8, 9]), [(0, 5), (2, 6)], 4).tolist()
    [5, 7, 6, 8]
    """
    shown: list[int] = [place for place in place_K.tolist() if place not in {what for _, what in pinned}]
    for at, what in sorted(pinned):
        shown.insert(at, what)
    return np.array(shown[:k], np.int64)


def _scaled(score_BM: Floats, real_BM: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Scores of real candidates moved to 0..1 within each row; 0 elsewhere."""
    low_B1 = np.min(score_BM, axis=1, where=real_BM, initial=np.inf, keepdims=True)
    high_B1 = np.max(score_BM, axis=1, where=real_BM, initial=-np.inf, keepdims=True)
    width_B1 = np.where(high_B1 > low_B1, high_B1 - low_B1, 1.0)
    return np.where(real_BM, (np.where(real_BM, score_BM, 0.0) - low_B1) / width_B1, 0.0).astype(np.float64)
