"""What visitors do now: which items are popular, and which follow which, counted from the newest events.

In: what happened, as the state tells it. Out: counts over a catalogue. It must not know visitors, models or scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from rayrec.catalogue import Catalogue
from rayrec.state.protocol import KEEP_HAPPENINGS, Happening

Ints = npt.NDArray[np.int64]
HOUR_MS = 3_600_000


@dataclass(frozen=True)
class Trend:
    """What is on over one catalogue.

    popular: [P] int64, items that were met, most met first. follows: [N + 1, N + 1] csr float32, how often item j came
    right after item i.
    """

    popular: Ints
    follows: sp.csr_matrix


class Trends:
    """The newest events within a window, at most KEEP_HAPPENINGS of them. hours: length of the window; 0: none."""

    def __init__(self, hours: float) -> None:
        self._window_ms = hours * HOUR_MS
        self.seq: int | None = None
        self._n = 0
        self._event_E3 = np.empty((2 * KEEP_HAPPENINGS, 3), np.int64)  # item and the one before, as codes; time
        self._code: dict[str, int] = {}
        self._ids: list[str] = []
        self._rows: tuple[Catalogue | None, Ints] = (None, np.empty(0, np.int64))

    def add(self, happenings: Sequence[Happening]) -> None:
        """Take in what happened since `seq`."""
        newest = happenings[-KEEP_HAPPENINGS:]
        if not newest:
            return
        self.seq = newest[-1].seq
        if self._n + len(newest) > len(self._event_E3):
            self._forget()
        told = [(self._coded(one.item_id), self._coded(one.after), one.time_ms) for one in newest]
        self._event_E3[self._n : self._n + len(told)] = told
        self._n += len(told)

    def over(self, catalogue: Catalogue, now_ms: int) -> Trend:
        """What is on in `catalogue`; events of items that it has not, or from outside the window, count for nothing."""
        item_E, before_E, time_E = self._event_E3[max(0, self._n - KEEP_HAPPENINGS) : self._n].T
        on_E = time_E >= now_ms - self._window_ms
        row_C = self._rows_in(catalogue)
        item_E, before_E = row_C[item_E[on_E]], row_C[before_E[on_E]]
        size = len(catalogue) + 1
        item_P, count_P = np.unique(item_E[item_E > 0], return_counts=True)  # a catalogue is far longer than a trend
        pair_E = (before_E > 0) & (item_E > 0) & (before_E != item_E)
        cells = (before_E[pair_E], item_E[pair_E])
        return Trend(
            popular=item_P[np.argsort(-count_P, kind="stable")],
            follows=sp.csr_matrix((np.ones(len(cells[0]), np.float32), cells), shape=(size, size)),
        )

    def _coded(self, item_id: str | None) -> int:
        """A number for the id, -1 for none."""
        if item_id is None:
            return -1
        code = self._code.setdefault(item_id, len(self._ids))
        if code == len(self._ids):
            self._ids.append(item_id)
        return code

    def _rows_in(self, catalogue: Catalogue) -> Ints:
        """The row of each code, 0 where there is none; the last one is that of no item. [codes + 1]"""
        known, row_C = self._rows
        if known is not catalogue:
            row_C = np.empty(0, np.int64)
        new = [catalogue.index.get(item_id, 0) for item_id in self._ids[len(row_C) :]]
        row_C = np.concatenate([row_C, np.array(new, np.int64)])
        self._rows = catalogue, row_C
        return np.append(row_C, 0)

    def _forget(self) -> None:
        """Drop all but the newest events, and the codes of items that are in none of them."""
        kept = self._event_E3[max(0, self._n - KEEP_HAPPENINGS) : self._n].copy()
        used = np.unique(kept[:, :2])
        used = used[used >= 0]
        self._ids = [self._ids[code] for code in used.tolist()]
        self._code = {item_id: code for code, item_id in enumerate(self._ids)}
        kept[:, :2] = np.where(kept[:, :2] >= 0, np.searchsorted(used, kept[:, :2]), -1)
        self._event_E3[: len(kept)], self._n = kept, len(kept)
        self._rows = None, np.empty(0, np.int64)


def nothing(catalogue: Catalogue) -> Trend:
    """Of a catalogue in which nothing happens."""
    size = len(catalogue) + 1
    return Trend(np.empty(0, np.int64), sp.csr_matrix((size, size), dtype=np.float32))
