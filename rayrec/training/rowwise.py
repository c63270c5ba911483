"""Row-wise Adagrad for tables of which a step reads a few rows. In: sparse gradients. Out: those rows, moved.

It must not know models or workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 1e-8


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad (Duchi et al. 2011) with one number of state a row: the sum of its mean squared gradients.

    That is the exact row-wise Adagrad of FBGEMM and TorchRec (`EXACT_ROWWISE_ADAGRAD`; Mudigere et al. 2022, section
    4.1.4): what a row got of several places in a batch is summed before it is squared. A row without a gradient does
    not move; decoupled weight decay shrinks a row in the steps that read it, and no other.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        for table_ND in parameters:
            self.state[table_ND]["sum_N"] = torch.zeros(len(table_ND), device=table_ND.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the rows that have a gradient. Gradients are sparse, or None."""
        assert closure is None
        for group in self.param_groups:
            for table_ND in group["params"]:
                if table_ND.grad is not None:
                    row_R, grad_RD = rows_of(table_ND.grad.coalesce())
                    _move(table_ND, self.state[table_ND]["sum_N"], row_R, grad_RD, group)


def _move(table_ND: Tensor, sum_N: Tensor, row_R: Tensor, grad_RD: Tensor, group: dict[str, Any]) -> None:
    sum_R = sum_N[row_R] + grad_RD.square().mean(1)
    sum_N[row_R] = sum_R
    kept_RD = table_ND[row_R] * (1 - group["lr"] * group["weight_decay"])
    table_ND[row_R] = kept_RD - group["lr"] * grad_RD / (sum_R.sqrt() + EPSILON)[:, None]


def rows_of(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and their gradients of one that is coalesced, not copied: [R] int64, [R, D]."""
    return grad.indices()[0], grad.values()


def dense_part(grad: Tensor) -> Tensor:
    """What of a gradient is stored, not copied; of a sparse one, which must be coalesced, the rows that have any."""
    return rows_of(grad)[1] if grad.is_sparse else grad
