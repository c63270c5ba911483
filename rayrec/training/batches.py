"""Training rows to batches of tensors, shuffled and bucketed by length.

In: tables of `windows`. Out: what a model's `forward` takes. It must not know where tables come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

import numpy as np
import pyarrow as pa
import torch

from rayrec.history import HistoryBatch, encode_history
from rayrec.model.history_tensors import HistoryTensors
from rayrec.model.paper import Pairs
from rayrec.model.recommender import Lists, NextItems
from rayrec.model.scorer import Scorer

ROWS_A_CHUNK = 4096
"""Rows that are shuffled together."""

PAPER_NEGATIVES = 4


def minibatches(
    chunks: Iterable[pa.Table], batch_size: int, rng: np.random.Generator, *, bucket: bool = True
) -> Iterator[pa.Table]:
    """Shuffled slices of `batch_size` rows. With `bucket`, rows of like length go together, which saves padding.

    The number of batches depends on the number of rows alone, so that data-parallel workers stay in step.
    """
    for chunk in chunks:
        order = rng.permutation(len(chunk))
        if bucket:
            length = np.asarray(chunk["item"].combine_chunks().value_lengths())[order]
            order = order[np.argsort(length, kind="stable")]
        starts = np.arange(0, len(chunk), batch_size)
        for start in rng.permutation(starts):
            yield chunk.take(pa.array(order[start : start + batch_size]))


def history_of(rows: pa.Table, max_len: int, clock: str) -> HistoryBatch:
    """The histories of `rows` (lists item, action, time_ms; asked_ms, where it is told), by the one encoder."""
    columns = [rows[name].combine_chunks() for name in ("item", "action", "time_ms")]
    offsets = np.concatenate([[0], np.cumsum(np.asarray(columns[0].value_lengths(), np.int64))])
    item, action, time_ms = (np.asarray(column.flatten()) for column in columns)
    asked_ms = np.asarray(rows["asked_ms"], np.int64) if "asked_ms" in rows.column_names else None
    return encode_history(item, action, time_ms, offsets, max_len=max_len, clock=clock, asked_ms=asked_ms)


class NextItemCollate:
    """Rows of `next_item_windows` to `NextItems`."""

    def __init__(self, max_len: int, clock: str, device: torch.device, pin: bool) -> None:
        self.max_len, self.clock, self.device, self.pin = max_len, clock, device, pin

    def __call__(self, rows: pa.Table) -> NextItems:
        """A batch on the device."""
        history = history_of(rows, self.max_len, self.clock)
        tensors = HistoryTensors.of(history, self.device, self.pin)
        target_BL = np.zeros_like(history.item_BL)
        target_BL[history.item_BL > 0] = np.asarray(rows["target"].combine_chunks().flatten())
        target = torch.from_numpy(target_BL[:, : tensors.item_BL.shape[1]].copy())
        return NextItems(tensors, target.to(self.device, non_blocking=self.pin))


class ListCollate:
    """Rows of `examples` to `Lists`: what retrieval returns for each history, where it holds the target.

    A history whose target was not retrieved teaches the fusion nothing and is left out; `missed` counts them.
    """

    def __init__(self, scorer: Scorer, device: torch.device) -> None:
        self.scorer, self.device = scorer, device
        self.rows = self.missed = 0

    def __call__(self, rows: pa.Table) -> Lists:
        """A batch on the device; fewer lists than rows where targets were missed."""
        history = history_of(rows, self.scorer.max_len, self.scorer.clock)
        candidate_BC, follow_BCF = self.scorer.candidates(history)
        target_B = np.asarray(rows["target"], np.int64)
        hit_BC = candidate_BC == target_B[:, None]
        found_B = hit_BC.any(1)
        self.rows, self.missed = self.rows + len(rows), self.missed + int((~found_B).sum())
        kept = HistoryBatch(**{name: values[found_B] for name, values in vars(history).items()})

        def move(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values[found_B])).to(self.device)

        return Lists(
            HistoryTensors.of(kept, self.device),
            move(candidate_BC),
            move(follow_BCF),
            move(hit_BC.argmax(1)),
            move(np.asarray(rows["target_action"], np.int64)),
        )


KEPT_BYTES = 1 << 30


class KeptBatches:
    """Batches whose making is dear and that are the same in every epoch: made in the first, shuffled in the next ones.

    make: all batches once, by an epoch's randomness. passes: times that an epoch goes through them. What does not fit
    KEPT_BYTES, or was not asked to its end, is made anew each time.
    """

    def __init__(self, make: Callable[[np.random.Generator], Iterator[Lists]], passes: int = 1) -> None:
        self.make, self.passes = make, passes
        self.kept: list[Lists] | None = None

    def __call__(self, rng: np.random.Generator, skip: int = 0) -> Iterator[Lists]:
        """The epoch's batches, without the first `skip`."""
        passes = (self._once(rng) for _ in range(self.passes))
        return islice(chain.from_iterable(passes), skip, None)

    def catch_up(self, rng: np.random.Generator) -> None:
        """Be as after the first epoch, whose randomness `rng` was: for a training that goes on in a later one."""
        size_bytes = 0
        for batch in self._once(rng):
            size_bytes += batch.nbytes
            if size_bytes >= KEPT_BYTES:
                return

    def _once(self, rng: np.random.Generator) -> Iterator[Lists]:
        if self.kept is not None:
            yield from (self.kept[place] for place in rng.permutation(len(self.kept)))
            return
        kept: list[Lists] | None = []
        size_bytes = 0
        for batch in self.make(rng):
            size_bytes += batch.nbytes
            if kept is not None and size_bytes < KEPT_BYTES:
                kept.append(batch)
            else:
                kept = None
            yield batch
        self.kept = kept


class PairCollate:
    """Rows of `examples` to `Pairs`: the target, and items drawn uniformly, for each history.

    B rows give B * (1 + negatives) pairs, in shuffled batches of B.
    """

    def __init__(self, max_len: int, clock: str, n_items: int, negatives: int, device: torch.device) -> None:
        self.max_len, self.clock, self.n_items, self.device = max_len, clock, n_items, device
        self.negatives = negatives or PAPER_NEGATIVES

    def __call__(self, rows: pa.Table, rng: np.random.Generator) -> Iterator[Pairs]:
        """Batches on the device."""
        history = history_of(rows, self.max_len, self.clock)
        item_B1 = np.asarray(rows["target"], np.int64)[:, None]
        item_BM = np.concatenate([item_B1, rng.integers(1, self.n_items + 1, (len(rows), self.negatives))], 1)
        label_BM = np.zeros(item_BM.shape, np.float32)
        label_BM[:, 0] = 1
        for pair_P in np.split(rng.permutation(item_BM.size), item_BM.shape[1]):
            visitor_V, visitor_P = np.unique(pair_P // item_BM.shape[1], return_inverse=True)
            part = HistoryBatch(**{name: values[visitor_V] for name, values in vars(history).items()})
            arrays = (visitor_P, item_BM.ravel()[pair_P], label_BM.ravel()[pair_P])
            yield Pairs(
                HistoryTensors.of(part, self.device), *(torch.from_numpy(values).to(self.device) for values in arrays)
            )
