"""What ranking asks of a model, and what it keeps of the answers.

In: histories and candidates. Out: visitors' vectors and scores. It must not know requests, rules or who the visitors
are: a history is known by what is in it, so that whatever a visitor does is asked anew; a score, by the moment as well,
where the model reads it.

Axes: B requests, C candidates, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.sparse as sp

from rayrec.catalogue import Catalogue
from rayrec.history import HistoryBatch
from rayrec.ranking.newest import Newest
from rayrec.ranking.retrieval import Bools, Floats, Ints


class Scorer(Protocol):
    """A trained model, as ranking sees it."""

    catalogue: Catalogue
    vectors_ND: Floats  # [N + 1, D], row 0 zeros
    cooccurrence: sp.csr_matrix  # [N + 1, N + 1], row i holds the weights of what follows i
    heads: tuple[str, ...]
    max_len: int
    clock: str
    actions: tuple[str, ...]  # what it reads of a history
    reads_moment: bool  # whether scores depend on when a visitor asks

    def user_vectors(self, history: HistoryBatch) -> Floats:
        """Vectors of B visitors. [B, D] float32."""

    def fuse(self, history: HistoryBatch, user_BD: Floats, candidates_BC: Ints, heads: Mapping[str, float]) -> Floats:
        """Scores of the candidates, 0..1. [B, C] float32; -inf where the candidate is 0 (padding).

        A score is of the history and the candidate alone, whatever else is in the list.
        heads: the scene's weights; it answers by its first head for one that it has not.
        """


@dataclass(frozen=True)
class _Scored:
    """What is known of a history. item_K: [K] int64, ascending, at least one. score_K: [K] float32."""

    item_K: Ints
    score_K: Floats

    def of(self, item_C: Ints) -> tuple[Floats, Bools]:
        """The score of each item, and whether it is known. [C] each."""
        place_C = np.searchsorted(self.item_K, item_C).clip(max=len(self.item_K) - 1)
        return self.score_K[place_C], self.item_K[place_C] == item_C


class Remembering:
    """A scorer's answers; those for the `size` newest histories are kept, and not computed again.

    One of these is for one scorer: another model, or a catalogue that changed, begins anew.
    """

    def __init__(self, scorer: Scorer, size: int) -> None:
        self._scorer = scorer
        self._vectors: Newest[Floats] = Newest(size)
        self._scores: Newest[_Scored] = Newest(size)

    def user_vectors(self, history: HistoryBatch) -> Floats:
        """See `Scorer`."""
        keys = history.digests()
        held = [self._vectors.get(key) for key in keys]
        new = [b for b, vector_D in enumerate(held) if vector_D is None]
        if len(new) == len(keys):
            vectors = self._scorer.user_vectors(history)
        elif new:
            vectors = self._scorer.user_vectors(history.take(new))
        for n, b in enumerate(new):
            held[b] = vectors[n]
            self._vectors.put(keys[b], vectors[n])
        return np.stack([vector_D for vector_D in held if vector_D is not None])

    def fuse(
        self, history: HistoryBatch, user_BD: Floats, candidates_BC: Ints, heads: Mapping[str, float]
    ) -> tuple[Floats, Bools]:
        """See `Scorer`; and of which requests all scores were known. [B, C] float32, [B] bool.

        candidates_BC: ascending in each row, padding at the end.
        """
        weighed = repr(sorted(heads.items())).encode()
        moments = history.moments() if self._scorer.reads_moment else [b""] * len(history)
        keys = [key + moment + weighed for key, moment in zip(history.digests(), moments, strict=True)]
        score_BC = np.full(candidates_BC.shape, -np.inf, np.float32)
        is_known_BC = candidates_BC == 0
        for b, key in enumerate(keys):
            if (held := self._scores.get(key)) is not None:
                score_C, is_held_C = held.of(candidates_BC[b])
                score_BC[b, is_held_C] = score_C[is_held_C]
                is_known_BC[b] |= is_held_C
        is_known_B: Bools = is_known_BC.all(1)
        if new := np.flatnonzero(~is_known_B).tolist():
            asked = [candidates_BC[b, ~is_known_BC[b]] for b in new]
            fresh_MC = self._scorer.fuse(history.take(new), user_BD[new], padded(asked), heads)
            for b, items, fresh_C in zip(new, asked, fresh_MC, strict=True):
                score_BC[b, ~is_known_BC[b]] = fresh_C[: len(items)]
                real_C = candidates_BC[b] > 0
                self._scores.put(keys[b], _Scored(candidates_BC[b, real_C], score_BC[b, real_C]))
        return score_BC, is_known_B


def padded(rows: Sequence[Ints]) -> Ints:
    """Rows of different lengths as one array, padded with 0 on the right. [B, C] int64."""
    padded_BC = np.zeros((len(rows), max((len(row) for row in rows), default=0)), np.int64)
    for b, row in enumerate(rows):
        padded_BC[b, : len(row)] = row
    return padded_BC
