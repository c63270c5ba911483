"""Histories as a model reads them: the arrays of a `HistoryBatch` as tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rayrec.history import UNKNOWN, HistoryBatch


@dataclass(frozen=True)
class HistoryTensors:
    """A `HistoryBatch` on a device, trimmed to its longest history (at least one column)."""

    item_BL: Tensor
    action_BL: Tensor
    gap_s_BL: Tensor
    hour_BL: Tensor
    seen_BL: Tensor
    length_B: Tensor
    since_s_B: Tensor
    now_hour_B: Tensor

    @classmethod
    def of(cls, batch: HistoryBatch, device: torch.device | str = "cpu", pin: bool = False) -> HistoryTensors:
        """Tensors that share the arrays' memory on the CPU; `pin` prepares them for an asynchronous copy."""
        longest = max(1, int(batch.length_B.max(initial=0)))

        def move(values: npt.NDArray[Any]) -> Tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(values))
            return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=pin)

        columns = (batch.item_BL, batch.action_BL, batch.gap_s_BL, batch.hour_BL, batch.seen_BL)
        item, action, gap_s, hour, seen = (move(values[:, :longest]) for values in columns)
        return cls(item, action, gap_s, hour, seen, move(batch.length_B), move(batch.since_s_B), move(batch.now_hour_B))

    def forgetting(self, share: float) -> HistoryTensors:
        """The same, of a random `share` of the visitors without the moment at which they ask."""
        is_hidden_B = torch.rand(len(self.length_B), device=self.length_B.device) < share
        hidden = {name: getattr(self, name).masked_fill(is_hidden_B, UNKNOWN) for name in ("since_s_B", "now_hour_B")}
        return replace(self, **hidden)
