"""Workers of a torch process group: what they share with each other. It must not know who started them, or Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Group:
    """A worker of `world`; alone it needs no process group."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world, self.device = rank, world, device

    def wrap(self, model: nn.Module) -> nn.Module:
        """See `fit.Peers`."""
        if self.world == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        # A batch without pictures leaves the CNN unused.
        return nn.parallel.DistributedDataParallel(
            model, device_ids=ids, find_unused_parameters=True, broadcast_buffers=False
        )

    def agree(self, value: dict[str, Any] | None) -> dict[str, Any]:
        """See `fit.Peers`."""
        if self.world == 1:
            assert value is not None
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0, device=self.device)
        assert held[0] is not None
        return held[0]

    def sum(self, values: Sequence[float]) -> list[float]:
        """See `loop.Together`."""
        if self.world == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return [float(value) for value in summed.tolist()]
