"""Sequences to training rows. In: tables of `schema.SEQUENCE_SCHEMA`. Out: tables of equal meaning for every row.

Which events teach which stage is decided here and nowhere else. It must not know tensors or Ray.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrec.config import Config
from rayrec.data.kept_events import keep_events
from rayrec.data.training_events import flat as laid_flat
from rayrec.data.training_events import training_mask
from rayrec.history import Ints, is_read
from rayrec.schema import ACTION_CODE, HEAD_ACTIONS

FUSION_TAIL = 5
"""How many of a fusion visitor's last events, and of the last of each head's actions, teach the fusion at most."""

Mask = npt.NDArray[np.bool_]


def only_read(sequences: pa.Table, actions: Sequence[str]) -> pa.Table:
    """The sequences without the events that a model of `model.actions` does not read, as `encode_history` drops them.

    They teach it nothing and are no one's target. What is withheld stays so: the places move with their events.
    """
    kept_A = is_read(laid_flat(sequences, "action")[0], actions)
    return sequences if kept_A.all() else keep_events(sequences, kept_A)


def stages(config: Config) -> tuple[str, ...]:
    """The stages of a training, in order. Each has rows of its own."""
    if config.model.kind == "paper":
        return ("pairs",)
    return ("retrieval", "fusion", "refit") if config.train.refit_epochs else ("retrieval", "fusion")


def stage_rows(sequences: pa.Table, stage: str, config: Config) -> pa.Table:
    """The rows that teach a stage of `stages`, from what the model reads: windows, or examples."""
    read, max_len, share = only_read(sequences, config.model.actions), config.model.max_len, config.train.fusion_holdout
    if stage in ("retrieval", "refit"):
        return next_item_windows(read, max_len, share if stage == "retrieval" else 0.0)
    return examples(read, max_len, share if stage == "fusion" else None)


class Flat:
    """A sequence table laid end to end: arrays [A] over all events, `start_U` and `length_U` per visitor."""

    def __init__(self, sequences: pa.Table) -> None:
        lists = sequences["item"].combine_chunks()
        self.length_U = np.asarray(lists.value_lengths(), np.int64)
        self.start_U = np.cumsum(self.length_U) - self.length_U
        self.visitor_A = np.repeat(np.arange(len(self.length_U)), self.length_U)
        self.place_A = np.arange(len(self.visitor_A)) - self.start_U[self.visitor_A]
        self.item_A = np.asarray(lists.flatten(), np.int64)
        self.action_A = np.asarray(sequences["action"].combine_chunks().flatten(), np.int64)
        self.time_ms_A = np.asarray(sequences["time_ms"].combine_chunks().flatten(), np.int64)
        self.n_train_U = np.asarray(sequences["n_train"], np.int64)
        # A target needs at least one event before it.
        self.trainable_A = training_mask(sequences) & (self.place_A > 0)

    def last(self, mask_A: Mask) -> Mask:
        """Of the events in `mask_A`, the last `tail` of each visitor."""
        limit_U = tail(np.bincount(self.visitor_A[mask_A], minlength=len(self.length_U)))
        after_A: Ints = np.cumsum(mask_A[::-1])[::-1] - mask_A
        end_U = self.start_U + self.length_U
        after_visitor_A = np.concatenate([after_A + mask_A, [0]])[end_U[self.visitor_A]]
        return mask_A & (after_A - after_visitor_A < limit_U[self.visitor_A])


def tail(n: npt.ArrayLike) -> Ints:
    """How many of `n` events are withheld for the fusion: three in ten, at least one, at most FUSION_TAIL."""
    return np.clip(np.asarray(n, np.int64) * 3 // 10, 1, FUSION_TAIL)


def fusion_mask(flat: Flat, sequences: pa.Table, share: float) -> Mask:
    """The events that teach the fusion and not the first stage. [A] bool.

    They are the last training events, and the last that teach each head (so that rare actions teach), of a share of
    the visitors, chosen by a hash of their id.
    Kept from the first stage and from the transition counts, they show the fusion how both do on events that they
    have not seen; otherwise it would learn to trust what the first stage knows by heart (stacking, Wolpert 1992).
    """
    ids = sequences["user_id"].to_pylist()
    chosen_U = np.fromiter((zlib.crc32(name.encode()) % 1000 < 1000 * share for name in ids), bool, len(ids))
    candidates_A = flat.trainable_A & chosen_U[flat.visitor_A]
    mask_A = flat.last(candidates_A)
    for actions in HEAD_ACTIONS.values():
        mask_A |= flat.last(candidates_A & np.isin(flat.action_A, [ACTION_CODE[action] for action in actions]))
    return mask_A


def next_item_windows(sequences: pa.Table, max_len: int, fusion_share: float) -> pa.Table:
    """Rows of at most `max_len` events, with the item that came next after each of them.

    -> item, action, time_ms, target: lists of one length; target is 0 where the next event is withheld. Every
    training event is the target of one row at most; windows are cut from the newest event backwards.
    """
    flat = Flat(sequences)
    allowed_A = flat.trainable_A & ~fusion_mask(flat, sequences, fusion_share) if fusion_share else flat.trainable_A
    target_A = np.where(allowed_A, flat.item_A, 0)

    n_input_U = np.maximum(flat.n_train_U - 1, 0)
    windows_U = -(-n_input_U // max_len)
    visitor_W = np.repeat(np.arange(len(windows_U)), windows_U)
    back_W = np.arange(len(visitor_W)) - np.repeat(np.cumsum(windows_U) - windows_U, windows_U)
    end_W = n_input_U[visitor_W] - back_W * max_len
    start_W = np.maximum(end_W - max_len, 0)
    event_X, offsets = _ranges(flat.start_U[visitor_W] + start_W, end_W - start_W)
    table = _lists(flat, event_X, offsets).append_column("target", _list(target_A[event_X + 1], offsets, pa.int32()))
    taught_W = np.add.reduceat(target_A[event_X + 1] > 0, offsets[:-1]) > 0 if len(visitor_W) else np.empty(0, bool)
    return table.filter(pa.array(taught_W))


def examples(sequences: pa.Table, max_len: int, fusion_share: float | None = None) -> pa.Table:
    """One row a target: the newest `max_len` events before it, the item, and what was done with it.

    fusion_share: only the events that teach the fusion of that share of visitors; None: every training event.
    -> item, action, time_ms (lists), target (int32), target_action (int8, schema.ACTION_CODE), asked_ms: when it came.
    """
    flat = Flat(sequences)
    chosen_A = flat.trainable_A if fusion_share is None else fusion_mask(flat, sequences, fusion_share)
    event_T = np.nonzero(chosen_A)[0]
    length_T = np.minimum(flat.place_A[event_T], max_len)
    event_X, offsets = _ranges(event_T - length_T, length_T)
    table = _lists(flat, event_X, offsets)
    table = table.append_column("target", pa.array(flat.item_A[event_T], pa.int32()))
    table = table.append_column("target_action", pa.array(flat.action_A[event_T], pa.int8()))
    return table.append_column("asked_ms", pa.array(flat.time_ms_A[event_T]))


def first_stage_events(sequences: pa.Table, fusion_share: float) -> tuple[Ints, Ints]:
    """Items that the transition counts of the first stage may see, end to end, and the visitors' offsets.

    A withheld event is 0 (unknown): it keeps its place and counts for nothing.
    """
    flat = Flat(sequences)
    seen_A = training_mask(sequences) & ~fusion_mask(flat, sequences, fusion_share)
    return np.where(seen_A, flat.item_A, 0), np.concatenate([flat.start_U, [len(flat.item_A)]])


def _ranges(start_R: Ints, length_R: Ints) -> tuple[Ints, Ints]:
    """The numbers start, start + 1, ... of each range end to end, and the ranges' offsets."""
    offsets = np.concatenate([[0], np.cumsum(length_R)]).astype(np.int64)
    return np.repeat(start_R - offsets[:-1], length_R) + np.arange(offsets[-1]), offsets


def _lists(flat: Flat, event_X: Ints, offsets: Ints) -> pa.Table:
    return pa.table(
        {
            "item": _list(flat.item_A[event_X], offsets, pa.int32()),
            "action": _list(flat.action_A[event_X], offsets, pa.int8()),
            "time_ms": _list(flat.time_ms_A[event_X], offsets, pa.int64()),
        }
    )


def _list(values: Ints, offsets: Ints, kind: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))
