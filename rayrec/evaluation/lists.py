"""Recorded lists before the judge: whoever made them, and wherever, their ranks are counted as everyone else's.

In: lists of items for users, and a dataset. Out: rows of replay.ANSWER_SCHEMA under `metrics`. It must not know who
made the lists.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from rayrec.evaluation.metrics import SHOWN
from rayrec.evaluation.replay import ANSWER_SCHEMA, ReplaySettings, Visitors, target_places
from rayrec.history import Ints

LIST_SCHEMA = pa.schema([pa.field("user_id", pa.string()), pa.field("items", pa.list_(pa.int64()))])
"""items: item indices, the best first. More columns, as the items' scores, are not read."""


def answers_of_lists(lists: Mapping[str, pa.Table], sequences: pa.Table, settings: ReplaySettings) -> pa.Table:
    """The answers that rankers gave by lists, one row a ranker and tested user; only `metrics` can be judged so.

    Items that the user has seen, unknown ones (0) and repetitions are taken out of a list. A target that is not in
    it, or a user without a list, has the last rank: the number of items.
    """
    visitors = Visitors.of(sequences)
    place_U = target_places(sequences, visitors, settings)["metrics"]
    row_Q = np.flatnonzero(place_U >= 0)
    target_Q = visitors.at(row_Q, place_U[row_Q])
    parts = []
    for name, table in lists.items():
        given = dict(zip(table["user_id"].to_pylist(), table["items"].to_pylist(), strict=True))
        rank_Q = np.full(len(row_Q), settings.n_items, np.int64)
        shown_QK = np.zeros((len(row_Q), SHOWN), np.int64)
        for asked, (row, target) in enumerate(zip(row_Q, target_Q, strict=True)):
            start = visitors.offsets[row]
            unseen = _unseen(given.get(visitors.user_U[row], []), visitors.item_A[start : start + place_U[row]])
            shown_QK[asked, : len(unseen[:SHOWN])] = unseen[:SHOWN]
            if target in unseen:
                rank_Q[asked] = unseen.index(target) + 1
        parts.append(_rows(name, visitors.user_U[row_Q], target_Q, place_U[row_Q], rank_Q, shown_QK))
    return pa.concat_tables(parts) if parts else ANSWER_SCHEMA.empty_table()


def _unseen(items: list[int], seen: Ints) -> list[int]:
    taken = {0, *seen.tolist()}
    return [item for item in dict.fromkeys(items) if item not in taken]


def _rows(name: str, user_Q: object, target_Q: Ints, length_Q: Ints, rank_Q: Ints, shown_QK: Ints) -> pa.Table:
    n = len(target_Q)
    columns = [
        pa.array([name] * n, pa.string()),
        pa.array(["metrics"] * n, pa.string()),
        pa.array(user_Q, pa.string()),
        pa.array(target_Q),
        pa.array(length_Q),
        pa.array(rank_Q),
        pa.ListArray.from_arrays(np.arange(n + 1, dtype=np.int32) * SHOWN, shown_QK.ravel()),
        pa.ListArray.from_arrays(np.zeros(n + 1, np.int32), np.empty(0)),
    ]
    return pa.table(columns, schema=ANSWER_SCHEMA)
