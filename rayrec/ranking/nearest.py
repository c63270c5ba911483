"""Nearest items by inner product: exact while the catalogue is small, by an inverted-file index (faiss) above that.

In: item vectors, queries, which items may be found. Out: rows, best first. It must not know whose vectors they are.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

faiss: Any = import_module("faiss") if find_spec("faiss") else None  # an extra
log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

LISTS_PER_ROOT: Final = 4  # lists of the index, by the root of the number of items (Johnson et al. 2017)
POINTS_PER_LIST: Final = 40
PROBES: Final = 32
"""Lists that are read for a query: recall of the nearest 200 is above .99 with 100,000 items and with a million."""
FEW: Final = 0.05
"""Where fewer of the items may be found, or changed since the index was made, they are all compared."""


class Nearest:
    """Searches the rows of `vectors_ND`. Approximate from `exact_below` rows on, if faiss is installed."""

    def __init__(self, vectors_ND: Floats, exact_below: int) -> None:
        self._vectors_ND, self._index = vectors_ND, None
        self._changed_N = np.zeros(len(vectors_ND), bool)
        if len(vectors_ND) < exact_below:
            return
        if faiss is None:
            log.warning("%d items are searched one by one: pip install 'rayrec[ann]' searches faster", len(vectors_ND))
            return
        self._index = _built(np.ascontiguousarray(vectors_ND, np.float32))

    @property
    def approximate(self) -> bool:
        """Whether an index is used."""
        return self._index is not None

    def over(self, vectors_ND: Floats, row_R: Ints) -> Nearest:
        """The same after some rows ([R] int64) have changed, some of them new: these are compared one by one."""
        later = copy.copy(self)
        later._vectors_ND = vectors_ND
        later._changed_N = np.concatenate([self._changed_N, np.zeros(len(vectors_ND) - len(self._changed_N), bool)])
        later._changed_N[row_R] = True
        if self._index is not None and later._changed_N.mean() > FEW:
            return Nearest(vectors_ND, 0)
        return later

    def search(self, query_BD: Floats, masks: Sequence[Bools], n: int) -> list[Ints]:
        """The `n` nearest rows to each query within its mask ([N] bool), best first; ties by row."""
        if self._index is None:
            scores_BN = query_BD @ self._vectors_ND.T
            return [best(scores_BN[b], masks[b], n) for b in range(len(query_BD))]
        return [self._find(query_D, mask_N, n) for query_D, mask_N in zip(query_BD, masks, strict=True)]

    def _find(self, query_D: Floats, mask_N: Bools, n: int) -> Ints:
        if np.count_nonzero(mask_N) < FEW * len(mask_N):
            return self._of(np.flatnonzero(mask_N), query_D, n)
        allowed_N = mask_N & ~self._changed_N
        found = _probed(self._index, query_D, allowed_N, n)
        return self._of(np.concatenate([found, np.flatnonzero(mask_N & self._changed_N)]), query_D, n)

    def _of(self, rows: Ints, query_D: Floats, n: int) -> Ints:
        rows = np.sort(rows)
        return rows[order(self._vectors_ND[rows] @ query_D, n)]


def _built(vectors_ND: Floats) -> Any:
    n_lists = int(LISTS_PER_ROOT * len(vectors_ND) ** 0.5)
    width = vectors_ND.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, n_lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.seed = 8, 0
    some = np.random.default_rng(0).permutation(len(vectors_ND))[: n_lists * POINTS_PER_LIST]
    index.train(vectors_ND[some])
    index.add(vectors_ND)
    return index


def _probed(index: Any, query_D: Floats, allowed_N: Bools, n: int) -> Ints:
    bits = np.packbits(allowed_N[: index.ntotal], bitorder="little")
    how = faiss.SearchParametersIVF(nprobe=PROBES, sel=faiss.IDSelectorBitmap(bits))
    _, row_1n = index.search(np.ascontiguousarray(query_D[None], np.float32), n, params=how)
    found: Ints = row_1n[0][row_1n[0] >= 0]
    return found


def best(scores_N: Floats, mask_N: Bools, n: int) -> Ints:
    """The `n` highest scores within the mask, best first; ties by row."""
    rows = np.flatnonzero(mask_N)
    return rows[order(scores_N[rows], n)]


def order(scores: Floats, n: int) -> Ints:
    """Places of the `n` highest scores, best first; NaN counts as lowest; ties by place."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    places: Ints = np.arange(len(scores))
    if 0 < n < len(scores):
        # torch selects in a quarter of numpy's time, but chooses among ties as it likes: all of them stand in line.
        least = torch.from_numpy(scores).topk(n, sorted=False).values.min()
        places = np.flatnonzero(scores >= float(least))
    ordered: Ints = places[np.lexsort((places, -scores[places]))]
    return ordered[:n]
