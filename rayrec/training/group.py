"""Workers of a torch process group: what they share with each other. It must not know who started them, or Ray."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayrec.training.rowwise import rows_of

ROWS_AT_ONCE = 1 << 17


class Group:
    """A worker of `world`; alone it needs no process group."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world, self.device = rank, world, device

    def wrap(self, model: nn.Module, apart: Sequence[nn.Parameter] = ()) -> nn.Module:
        """See `fit.Peers`."""
        if self.world == 1:
            return model
        # DDP would need sparse sums of the back end, which nccl lacks; `average` brings these gradients together.
        tables = {id(table) for table in apart}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in tables]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        ids = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.13 announces another argument, which 2.9 lacks, and which would copy buffers once: workers that
            # share pictures have different ones.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            # A batch without pictures leaves the CNN unused.
            return nn.parallel.DistributedDataParallel(
                model, device_ids=ids, find_unused_parameters=True, broadcast_buffers=False
            )

    def average(self, table: nn.Parameter) -> Tensor | None:
        """See `parts.Sharing`. Each worker hears the rows of all: no more is sent than was read."""
        if self.world == 1:
            return table.grad
        nothing = (torch.zeros(0, dtype=torch.int64, device=self.device), table.new_zeros(0, table.shape[1]))
        row_S, grad_SD = self.exchange(*(nothing if table.grad is None else rows_of(table.grad.coalesce())))
        if not len(row_S):
            return None
        return torch.sparse_coo_tensor(row_S[None], grad_SD / self.world, table.shape, check_invariants=False)

    def exchange(self, row_R: Tensor, value_RD: Tensor) -> tuple[Tensor, Tensor]:
        """See `fit.Peers`."""
        if self.world == 1:
            return row_R, value_RD
        n_W = self._gather(torch.tensor([len(row_R)], device=self.device))
        spare = int(torch.cat(n_W).max()) - len(row_R)  # collectives take equal shapes
        row_WR = self._gather(F.pad(row_R, (0, spare)))
        value_WRD = self._gather(F.pad(value_RD, (0, 0, 0, spare)))
        rows = [(row_R[:n], value_RD[:n]) for row_R, value_RD, n in zip(row_WR, value_WRD, n_W, strict=True)]
        row_S, value_SD = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return row_S, value_SD

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each worker; shapes are equal."""
        gathered = [torch.empty_like(tensor) for _ in range(self.world)]
        torch.distributed.all_gather(gathered, tensor.contiguous())
        return gathered

    def send(self, given_W: Sequence[Tensor]) -> list[Tensor]:
        """See `parts.Sharing`."""
        if self.world == 1:
            return list(given_W)
        n_W = torch.tensor([len(given) for given in given_W], device=self.device)
        got_n_W = torch.empty_like(n_W)
        torch.distributed.all_to_all_single(got_n_W, n_W)
        lengths = got_n_W.tolist()
        got = given_W[0].new_empty(sum(lengths), *given_W[0].shape[1:])
        torch.distributed.all_to_all_single(got, torch.cat(list(given_W)), lengths, n_W.tolist())
        return list(got.split(lengths))

    def whole(self, part_KX: Tensor) -> Tensor | None:
        """See `parts.Sharing`. In pieces, lest the first worker's device should hold all of it."""
        if self.world == 1:
            return part_KX.cpu()
        of_W: list[list[Tensor]] = [[] for _ in range(self.world)]
        for piece in part_KX.split(ROWS_AT_ONCE):
            piece = piece.to(self.device).contiguous()
            into = [torch.empty_like(piece) for _ in of_W] if self.rank == 0 else None
            torch.distributed.gather(piece, into, dst=0)
            for got, pieces in zip(into or [], of_W, strict=False):
                pieces.append(got.cpu())
        return torch.cat([piece for pieces in of_W for piece in pieces]) if self.rank == 0 else None

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


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_up_alike(threads: int) -> None:
    """Have this process compute with so many CPU threads, whose sums come out alike each time, to the last bit."""
    torch.set_num_threads(threads)
    # Otherwise they add gradients to the rows of a table in whatever order they get there. It costs no time.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
