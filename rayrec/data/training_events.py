"""Which events may be learned from: the one rule that counts, floors and training share.

In: a table of `schema.SEQUENCE_SCHEMA`. Out: flat arrays and a mask over them. It must not know who counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrec.history import Ints
from rayrec.schema import TARGET_ACTIONS

_TARGETS = tuple(f"{action}_{split}_at" for action in TARGET_ACTIONS for split in ("valid", "test"))


@dataclass(frozen=True)
class TrainingEvents:
    """The training events of U visitors, laid end to end, oldest first within a visitor.

    item_E   [E] int64      item index
    offsets  [U + 1] int64  visitor u's events are offsets[u] : offsets[u + 1]
    """

    item_E: Ints
    offsets: Ints

    @classmethod
    def of(cls, sequences: pa.Table) -> TrainingEvents:
        """The training events of all rows; needs COLUMNS."""
        item_A, offsets = flat(sequences, "item")
        mask_A = training_mask(sequences)
        kept_before = np.concatenate([[0], np.cumsum(mask_A)])
        return cls(item_A[mask_A], kept_before[offsets])


COLUMNS = ("item", "n_train", *_TARGETS)
"""What `TrainingEvents.of` reads of a sequence table."""


def flat(sequences: pa.Table, column: str) -> tuple[Ints, Ints]:
    """One list column laid end to end: its values [A] int64 and the rows' offsets [U + 1] into them."""
    lists = sequences[column].combine_chunks()
    length_U = np.asarray(lists.value_lengths(), np.int64)
    return np.asarray(lists.flatten(), np.int64), np.concatenate([[0], np.cumsum(length_U)])


def training_mask(sequences: pa.Table) -> npt.NDArray[np.bool_]:
    """Whether each event, all rows' lists laid end to end, may be learned from. [A] bool.

    An event may be if it lies in the row's first `n_train` and is no target of the cart or purchase protocol: with
    leave-one-out the last purchase often lies before the last event, and counting it would give the answer away.
    """
    lists = sequences["item"].combine_chunks()
    length_U = np.asarray(lists.value_lengths(), np.int64)
    start_U = np.cumsum(length_U) - length_U
    n_train_U = np.asarray(sequences["n_train"], np.int64)
    place_A = np.arange(length_U.sum()) - np.repeat(start_U, length_U)
    mask_A: npt.NDArray[np.bool_] = place_A < np.repeat(n_train_U, length_U)
    for name in _TARGETS:
        place_U = np.asarray(sequences[name], np.int64)
        mask_A[(start_U + place_U)[place_U >= 0]] = False
    return mask_A
