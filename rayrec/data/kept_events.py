"""Sequences with some of their events taken out: places move with their events.

In: a table of `schema.SEQUENCE_SCHEMA`, a mask over its events. Out: such a table. It must not know why they go.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrec.data.training_events import flat
from rayrec.schema import SEQUENCE_SCHEMA


def keep_events(sequences: pa.Table, kept_A: npt.NDArray[np.bool_]) -> pa.Table:
    """The rows of `sequences` with the events in `kept_A` ([A] bool, all rows' events end to end) alone.

    `n_train` counts what is left; a target whose event is gone is none (-1). A row may end up empty.
    """
    offsets = flat(sequences, "item")[1]
    kept_before = np.concatenate([[0], np.cumsum(kept_A)])
    start_U, new_offsets = offsets[:-1], kept_before[offsets]
    columns: dict[str, pa.Array] = {"user_id": sequences["user_id"]}
    for name in SEQUENCE_SCHEMA.names[1:]:
        kind = SEQUENCE_SCHEMA.field(name).type
        if pa.types.is_list(kind):
            values = pa.array(flat(sequences, name)[0][kept_A], kind.value_type)
            columns[name] = pa.ListArray.from_arrays(pa.array(new_offsets, pa.int32()), values)
            continue
        old_U = np.asarray(sequences[name], np.int64)
        new_U = kept_before[start_U + np.maximum(old_U, 0)] - new_offsets[:-1]
        if name != "n_train":
            real_U = old_U >= 0
            real_U[real_U] = kept_A[(start_U + old_U)[real_U]]
            new_U = np.where(real_U, new_U, -1)
        columns[name] = pa.array(new_U, kind)
    return pa.table(columns, schema=SEQUENCE_SCHEMA)
