"""Weights of which each worker holds a part: the table of ids, where workers share it (`train.id_held`).

In: a model's and a learner's state. Out: the same, whole, as checkpoints and bundles have it, or this worker's part.
It must not know what is learned. Where nothing is shared each state is what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rayrec.model.shared_ids import SharedIds
from rayrec.training.loop import Together

TABLE = "item_encoder.id.weight"
SUMS = "sum_N"
"""What row-wise Adagrad keeps of each row."""


class Sharing(Together, Protocol):
    """Workers with tables that a data-parallel wrapper does not bring together."""

    def average(self, table: nn.Parameter) -> Tensor | None:
        """The mean over the workers of a table's sparse gradients, of which each has all rows; None if none."""

    def send(self, given_W: Sequence[Tensor]) -> list[Tensor]:
        """What each worker gives to this one, in turn; this one gives `given_W[w]` to worker w. Rows, or none."""

    def whole(self, part_KX: Tensor) -> Tensor | None:
        """The parts of all workers, one after the other, in the main memory of the first; None on the others."""


@dataclass(frozen=True)
class Parts:
    """What this worker holds of what `ids` is a part of, if of anything."""

    peers: Sharing
    ids: SharedIds | None = None

    def own(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """This worker's part of whole weights."""
        return weights if self.ids is None else {**weights, TABLE: self.ids.part_of(weights[TABLE])}

    def whole(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole weights, on the first worker; the others' are not. Every worker calls it at the same place."""
        return weights if self.ids is None else {**weights, TABLE: self._joined(self.ids, weights[TABLE])}

    def own_learner(self, state: dict[str, Any]) -> dict[str, Any]:
        """This worker's part of `Learner.state`."""
        return state if self.ids is None else _with_sums(state, self.ids.part_of)

    def whole_learner(self, state: dict[str, Any]) -> dict[str, Any]:
        """`Learner.state`, whole on the first worker. Every worker calls it at the same place."""
        ids = self.ids
        return state if ids is None else _with_sums(state, lambda part_K: self._joined(ids, part_K))

    def average(self, table: nn.Parameter) -> Tensor | None:
        """See `Learner.average`."""
        return self.peers.average(table) if self.ids is None else self.ids.gradient()

    def norm_of_all(self, norm: Tensor) -> Tensor:
        """See `Learner.norm_of_all`."""
        if self.ids is None:
            return norm
        return torch.tensor(self.peers.sum([float(norm) ** 2])[0] ** 0.5, device=norm.device)

    def _joined(self, ids: SharedIds, part_KX: Tensor) -> Tensor:
        whole_NX = self.peers.whole(part_KX)
        return part_KX if whole_NX is None else whole_NX[: ids.n_rows]


def _with_sums(state: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Another `Learner.state`, whose sums of the table's rows are changed; one without a table has none."""
    if "rowwise" not in state:
        return state
    rowwise = state["rowwise"]
    changed = {row: {**one, SUMS: change(one[SUMS])} for row, one in rowwise["state"].items()}
    return {**state, "rowwise": {**rowwise, "state": changed}}
