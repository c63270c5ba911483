"""A table of ids that no worker holds whole: each has a part of the rows, and asks the others for what it reads.

In: ids, a way to send tensors to the other workers. Out: their rows, and the gradients of the own part. It must not
know how tensors travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Send = Callable[[Sequence[Tensor]], list[Tensor]]
"""From what this worker gives to each, to what each gives to this one. Every worker calls it at the same place."""


class SharedIds(nn.Module):
    """Rows `first : first + K` of a table [N + 1, D], in the place of an `nn.Embedding` of all of it.

    Row-wise sharding, as TorchRec has it (Mudigere et al. 2022, section 4.2.3): ids go to whoever holds the row, rows
    come back, and after the backward pass gradients go the same way, so that a row has one owner, who alone moves it.
    Row 0 is padding: zeros that nobody asks for. Workers hold K rows each; the last ones' may end with rows that stand
    for nothing.
    """

    sparse = True

    def __init__(self, whole_ND: Tensor, rank: int, world: int, send: Send) -> None:
        super().__init__()
        self.n_rows, self.held, self.world = len(whole_ND), -(-len(whole_ND) // world), world
        self.first = rank * self.held
        self.weight = nn.Parameter(self.part_of(whole_ND.detach()))
        self._send = send
        self._due: list[tuple[Tensor, Tensor]] = []  # ids that were read, and their rows, which gather gradients

    def part_of(self, whole_NX: Tensor) -> Tensor:
        """This worker's rows of a table of all, as a copy. [N + 1, ...] -> [K, ...]."""
        part_KX = whole_NX.new_zeros(self.held, *whole_NX.shape[1:])
        own = whole_NX[self.first : self.first + self.held]
        part_KX[: len(own)] = own
        return part_KX

    def forward(self, row_R: Tensor) -> Tensor:
        """The rows, wherever they are. [R] int64 -> [R, D]. Every worker calls it at the same place, if with none."""
        distinct_U, place_R = row_R.unique(return_inverse=True)
        asked_U = distinct_U[distinct_U > 0]
        row_UD = self._fetched(asked_U)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self._due.append((asked_U, row_UD.requires_grad_()))
        padding = row_UD.new_zeros(len(distinct_U) - len(asked_U), row_UD.shape[1])
        return torch.cat([padding, row_UD])[place_R]

    @torch.no_grad()
    def _fetched(self, row_U: Tensor) -> Tensor:
        wanted_W = self._send(self._by_owner(row_U, row_U))
        return torch.cat(self._send([self.weight[row - self.first] for row in wanted_W]))

    def _by_owner(self, row_U: Tensor, value_UX: Tensor) -> list[Tensor]:
        """Values in parts, one for each worker. row_U: ascending."""
        ends_W = torch.arange(1, self.world, device=row_U.device) * self.held
        return list(value_UX.tensor_split(torch.searchsorted(row_U, ends_W).tolist()))

    @torch.no_grad()
    def gradient(self) -> Tensor | None:
        """The mean over the workers of what was learned of the own rows since this was last called; None if nothing.

        Sparse, [K, D]. Every worker calls it at the same place.
        """
        device, width = self.weight.device, self.weight.shape[1]
        due, self._due = self._due, []
        read = [(row_U, leaf_UD.grad) for row_U, leaf_UD in due if leaf_UD.grad is not None]
        nothing = (torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, width, device=device))
        row_T, grad_TD = (torch.cat(parts) for parts in zip(nothing, *read, strict=True))
        row_U, place_T = row_T.unique(return_inverse=True)
        grad_UD = grad_TD.new_zeros(len(row_U), width).index_add_(0, place_T, grad_TD)
        rows, grads = (torch.cat(self._send(self._by_owner(row_U, values))) for values in (row_U, grad_UD))
        if not len(rows):
            return None
        shape = self.weight.shape
        place_1S, mean_SD = (rows - self.first)[None], grads / self.world
        return torch.sparse_coo_tensor(place_1S, mean_SD, shape, check_invariants=False).coalesce()

    def takes_no_part(self, times: int) -> None:
        """Answer the others, who read `times` times in a step for which this worker has no batch."""
        nothing = torch.zeros(0, dtype=torch.int64, device=self.weight.device)
        for _ in range(times):
            self(nothing)
