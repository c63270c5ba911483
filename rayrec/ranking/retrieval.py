"""Candidates: which few hundred items are worth scoring for a visitor, and which source proposed each.

In: visitors' vectors, their newest items, the items at hand. Out: merged candidates with their sources.
It must not know requests, rules or scores. Every source returns its best first.

Axes: B requests, C candidates, N + 1 catalogue rows (0 is padding), D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from rayrec.catalogue import Catalogue
from rayrec.followers import Reached, merged
from rayrec.ranking.nearest import Nearest, order
from rayrec.ranking.newest import Newest
from rayrec.ranking.trends import nothing

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float32]
Bools: TypeAlias = npt.NDArray[np.bool_]

NEW_BELOW: Final = 5  # training events: an item with fewer is new
RECENT: Final = 10  # newest distinct items that co-occurrence starts from
FADE: Final = 0.8  # weight of each older one, relative to the next newer


@dataclass(frozen=True)
class Asked:
    """What retrieval knows of B requests.

    user_BD: visitors' vectors, None if the model failed. known_B: the visitor has a history.
    recent: newest distinct items of each visitor, newest first. anchors: the items at hand (on the page,
    in the cart). matches: what a query means, best first, with a score 0..1; None where nothing is searched.
    """

    user_BD: Floats | None
    known_B: Bools
    recent: Sequence[Ints]
    anchors: Sequence[Ints]
    matches: Sequence[tuple[Ints, Floats]] | None = None

    def __len__(self) -> int:
        return len(self.known_B)

    def take(self, rows: Sequence[int]) -> Asked:
        """Only the requests `rows`."""
        return Asked(
            user_BD=None if self.user_BD is None else self.user_BD[list(rows)],
            known_B=self.known_B[list(rows)],
            recent=[self.recent[row] for row in rows],
            anchors=[self.anchors[row] for row in rows],
            matches=None if self.matches is None else [self.matches[row] for row in rows],
        )


@dataclass(frozen=True)
class Candidates:
    """Items proposed for one request, ascending, each once.

    item_C [C] int64; source_C [C] int64: bit s is set if `sources[s]` proposed the item.
    """

    item_C: Ints
    source_C: Ints
    sources: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """How many items each source proposed."""
        return {name: int(np.count_nonzero(self.source_C >> s & 1)) for s, name in enumerate(self.sources)}

    def adding(self, items: Ints, source: str) -> Candidates:
        """These, and `items` of one more source."""
        item_C = np.union1d(self.item_C, items)
        source_C = np.zeros(len(item_C), np.int64)
        source_C[np.searchsorted(item_C, self.item_C)] = self.source_C
        source_C[np.searchsorted(item_C, np.unique(items))] |= 1 << len(self.sources)
        return Candidates(item_C, source_C, (*self.sources, source))

    def names(self, bits: int) -> list[str]:
        """The sources that `bits` stands for."""
        return [name for s, name in enumerate(self.sources) if bits >> s & 1]


class Retriever:
    """All sources over one catalogue. Items that left the catalogue are never proposed.

    remembered: of so many visitors' vectors the nearest items are kept.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        vectors_ND: Floats,
        cooccurrence: sp.csr_matrix,
        exact_below: int,
        remembered: int = 0,
    ) -> None:
        self._remembered = remembered
        self._set(catalogue, vectors_ND, cooccurrence)
        self._nearest, self._alike = Nearest(vectors_ND, exact_below), Nearest(self.unit_ND, exact_below)

    def over(self, catalogue: Catalogue, vectors_ND: Floats, cooccurrence: sp.csr_matrix, row_R: Ints) -> Retriever:
        """The same after changes of some rows ([R] int64), some of them new."""
        later = copy.copy(self)
        later._set(catalogue, vectors_ND, cooccurrence)
        later._nearest, later._alike = self._nearest.over(vectors_ND, row_R), self._alike.over(later.unit_ND, row_R)
        return later

    def _set(self, catalogue: Catalogue, vectors_ND: Floats, cooccurrence: sp.csr_matrix) -> None:
        self.vectors_ND, self.cooccurrence = vectors_ND, cooccurrence
        length_N = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        self.unit_ND: Floats = (vectors_ND / np.maximum(length_N, 1e-12)).astype(np.float32)
        self._listed_N = catalogue.listed
        by_events = np.argsort(-catalogue.n_train, kind="stable")
        self.popular = by_events[self._listed_N[by_events]]
        self._new = np.flatnonzero(self._listed_N & (catalogue.n_train < NEW_BELOW))
        self._near: Newest[Ints] = Newest(self._remembered)
        self.trend = nothing(catalogue)
        """What visitors do now; may be set to another at any time."""

    def retrieve(
        self, asked: Asked, sources: Sequence[str], n: int, only: Sequence[Bools] | None = None
    ) -> list[Candidates]:
        """Up to `n` items of each source for each request, merged. `only`: a mask [N + 1] of each request."""
        masks = [self._listed_N] * len(asked) if only is None else [self._listed_N & mask for mask in only]
        found = [SOURCES[name](self, asked, n, masks) for name in sources]
        return [_merge([items[b] for items in found], tuple(sources)) for b in range(len(asked))]

    def _nearest_to_user(self, asked: Asked, n: int, masks: Sequence[Bools]) -> list[Ints]:
        if asked.user_BD is None:
            return [_NONE] * len(asked)
        found = [_NONE] * len(asked)
        new, keys = [], {}
        for b in np.flatnonzero(asked.known_B).tolist():
            if masks[b] is self._listed_N:  # what may be found is not this request's own
                keys[b] = asked.user_BD[b].tobytes() + n.to_bytes(8, "little")
            held = self._near.get(keys[b]) if b in keys else None
            if held is None:
                new.append(b)
            else:
                found[b] = held
        for b, near in zip(new, self._nearest.search(asked.user_BD[new], [masks[b] for b in new], n), strict=True):
            found[b] = near
            if b in keys:
                self._near.put(keys[b], near)
        return found

    def _following(self, asked: Asked, n: int, masks: Sequence[Bools]) -> list[Ints]:
        return self._strongest(asked.recent, masks, n)

    def _strongest(self, recent: Sequence[Ints], masks: Sequence[Bools], n: int) -> list[Ints]:
        """The `n` items within each mask that follow each visitor's newest items most strongly, best first."""
        ways, n_rows, found = self.following(recent), len(self._listed_N), []
        for b, mask_N in enumerate(masks):
            items, weights = merged(ways, b, n_rows)
            keep = mask_N[items] & (weights > 0)
            found.append(items[keep][order(weights[keep], n)])
        return found

    def following(self, recent: Sequence[Ints]) -> list[Reached]:
        """What follows each visitor's newest items, older ones faded: of old, and by what visitors do now."""
        item_E = np.concatenate([*recent, _NONE])
        bound_B = np.concatenate([[0], np.cumsum([len(items) for items in recent], dtype=np.int64)])
        age_E = np.arange(len(item_E)) - np.repeat(bound_B[:-1], np.diff(bound_B))
        start = Reached(item_E, (FADE**age_E).astype(np.float32), bound_B)
        follows = self.trend.follows
        return [start.through(counts) for counts in (self.cooccurrence, *([follows] if follows.nnz else []))]

    def strength(self, earlier: Ints, items: Ints) -> Floats:
        """How strongly each of K items follows each of P earlier ones, of old and by what visitors do now. [P, K]."""
        of_old_PK: Floats = self.cooccurrence[earlier][:, items].toarray()
        follows = self.trend.follows
        return of_old_PK + follows[earlier][:, items].toarray() if follows.nnz else of_old_PK

    def _most_popular(self, asked: Asked, n: int, masks: Sequence[Bools]) -> list[Ints]:
        return [_first(self.popular, mask, n) for mask in masks]

    def _trending(self, asked: Asked, n: int, masks: Sequence[Bools]) -> list[Ints]:
        return [_first(self.trend.popular, mask, n) for mask in masks]

    def _newcomers(self, asked: Asked, n: int, masks: Sequence[Bools]) -> list[Ints]:
        """New items: those nearest to the visitor, or the latest rows of the catalogue for an unknown one."""
        found = []
        for b, mask in enumerate(masks):
            new = self._new[mask[self._new]]
            if asked.user_BD is not None and asked.known_B[b]:
                found.append(new[order(self.vectors_ND[new] @ asked.user_BD[b], n)])
            else:
                found.append(new[::-1][:n])
        return found

    def _together(self, asked: Asked, n: int, masks: Sequence[Bools]) -> list[Ints]:
        """What follows the items at hand; nothing that is merely like them."""
        return self._strongest(asked.anchors, masks, n)

    def _matching(self, asked: Asked, n: int, masks: Sequence[Bools]) -> list[Ints]:
        if asked.matches is None:
            return [_NONE] * len(asked)
        return [items[mask[items]][:n] for (items, _), mask in zip(asked.matches, masks, strict=True)]

    def _related(self, asked: Asked, n: int, masks: Sequence[Bools]) -> list[Ints]:
        """Nearest to the items at hand by vector and by co-occurrence, half and half."""
        follows, found = self._strongest(asked.anchors, masks, n // 2), []
        for b, anchors in enumerate(asked.anchors):
            if not len(anchors):
                found.append(_NONE)
                continue
            near = self._alike.search(self.unit_ND[anchors].mean(axis=0)[None], [masks[b]], n)[0]
            found.append(np.concatenate([follows[b], near[: n - len(follows[b])]]))
        return found


Source: TypeAlias = Callable[[Retriever, Asked, int, Sequence[Bools]], list[Ints]]

SOURCES: Final[dict[str, Source]] = {
    "model": Retriever._nearest_to_user,
    "cooccurrence": Retriever._following,
    "popular": Retriever._most_popular,
    "trending": Retriever._trending,
    "new": Retriever._newcomers,
    "related": Retriever._related,
    "together": Retriever._together,
    "query": Retriever._matching,
}
"""Every source by the name that scenes use."""

INDEXED: Final = frozenset({"model", "related", "query"})
"""Those that search an index."""

_NONE: Final = np.empty(0, np.int64)


def _first(rows: Ints, mask_N: Bools, n: int) -> Ints:
    """The first `n` of the rows within the mask; seldom is it necessary to look at all."""
    head = rows[: 4 * n]
    found = head[mask_N[head]][:n]
    return found if len(found) == n else rows[mask_N[rows]][:n]


def _merge(found: Sequence[Ints], sources: tuple[str, ...]) -> Candidates:
    item_E = np.concatenate([*found, _NONE])
    bit_E = np.repeat(1 << np.arange(len(found)), [len(items) for items in found])
    item_C, place_E = np.unique(item_E, return_inverse=True)
    source_C = np.zeros(len(item_C), np.int64)
    np.bitwise_or.at(source_C, place_E, bit_E)
    return Candidates(item_C, source_C, sources)
