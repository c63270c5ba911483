"""Losses over scores. In: scores and targets. Out: a scalar. They must not know where scores come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _LogSumExp(torch.autograd.Function):
    """The log of the sum of exp(user . item + offset) over items: [P, D], [N, D], [N] -> [P] float32.

    One matrix of P x N in all: the scores turn into exponentials where they lie, and the gradients are products with
    those. Built of torch's own functions it would be five, which is most of a step where catalogues are large.
    `without` are places ([E], [E]) of the matrix that do not count; with none left the sum is as good as nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, user_PD: Tensor, item_ND: Tensor, offset_N: Tensor | None, without: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        score_PN = user_PD @ item_ND.T
        kind = score_PN.dtype  # bf16 under autocast: what is kept, and the products of the backward pass
        score_PN = score_PN.float()
        if offset_N is not None:
            score_PN += offset_N
        if without is not None:
            score_PN[without] = float("-inf")
        most_P1 = score_PN.amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
        exp_PN = score_PN.sub_(most_P1).exp_()
        sum_P1 = exp_PN.sum(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)  # at least 1 if any counts
        ctx.save_for_backward(user_PD, item_ND, exp_PN.to(kind), sum_P1)
        return (most_P1 + sum_P1.log()).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        user_PD, item_ND, exp_PN, sum_P1 = ctx.saved_tensors
        share_P1 = grads[0][:, None] / sum_P1
        user_grad_PD = (exp_PN @ item_ND.to(exp_PN.dtype)) * share_P1
        item_grad_ND = exp_PN.T @ (user_PD * share_P1).to(exp_PN.dtype)
        return user_grad_PD.to(user_PD.dtype), item_grad_ND.to(item_ND.dtype), None, None


def _log_sum_exp(
    user_PD: Tensor, item_ND: Tensor, offset_N: Tensor | None = None, without: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    sum_P: Tensor = _LogSumExp.apply(user_PD, item_ND, offset_N, without)  # type: ignore[no-untyped-call]
    return sum_P


def full_softmax(user_PD: Tensor, target_PD: Tensor, item_ND: Tensor) -> Tensor:
    """Cross-entropy over all of `item_ND`, mean over positions.

    target_PD: vectors of the right items, which are among `item_ND` but may differ by dropout. Items without training
    events are best left out of `item_ND`: they would be taught to be bad. With cross-entropy over many negatives
    recurrent models compete with transformers (Hidasi and Karatzoglou 2018; Klenitskiy and Vasilev 2023).
    """
    return (_log_sum_exp(user_PD, item_ND) - (user_PD * target_PD).sum(1)).mean()


def sampled_softmax(
    user_PD: Tensor, target_PD: Tensor, negative_MD: Tensor, target_P: Tensor, negative_M: Tensor, log_q_N: Tensor
) -> Tensor:
    """Cross-entropy over the target and M negatives shared by the batch, corrected by log Q (Bengio and Senecal 2008).

    log_q_N: [N + 1] log probability with which an item is sampled. Each negative stands for 1 / (M q) items, so that
    their sum estimates that of all others without bias; the target is there for certain and stands for itself. A
    negative equal to the target does not count.
    """
    positive_P = (user_PD * target_PD).sum(1)
    offset_M = -log_q_N[negative_M] - math.log(len(negative_M))
    others_P = _log_sum_exp(user_PD, negative_MD, offset_M, places_of(target_P, negative_M))
    return (torch.logaddexp(positive_P, others_P) - positive_P).mean()


def places_of(target_P: Tensor, negative_M: Tensor) -> tuple[Tensor, Tensor]:
    """Where a target is among the negatives: ([E], [E]) places in `target_P` and in `negative_M`.

    Few are, so that to compare each with each, a matrix of P x M, would cost more than all of it.

    >>> places_of(torch.tensor([7, 3, 5]), torch.tensor([5, 1, 7, 5]))
    (tensor([0, 2, 2]), tensor([2, 0, 3]))
    """
    sorted_M, order_M = negative_M.sort(stable=True)
    first_P = torch.searchsorted(sorted_M, target_P)
    n_P = torch.searchsorted(sorted_M, target_P, right=True) - first_P
    target_E = torch.repeat_interleave(n_P)
    before_E = (n_P.cumsum(0) - n_P)[target_E]
    within_E = torch.arange(len(target_E), device=target_E.device) - before_E
    return target_E, order_M[first_P[target_E] + within_E]


def bpr_max(
    user_PD: Tensor, target_PD: Tensor, negative_MD: Tensor, target_P: Tensor, negative_M: Tensor, penalty: float = 0.5
) -> Tensor:
    """The chance of beating the hardest of M shared negatives, softly (BPR-max, Hidasi and Karatzoglou 2018).

    Each negative weighs as a softmax over the negatives' scores; `penalty` keeps those scores small.
    """
    positive_P1 = (user_PD * target_PD).sum(1, keepdim=True)
    negative_PM = user_PD @ negative_MD.T
    same_PM = target_P[:, None] == negative_M
    weight_PM = negative_PM.masked_fill(same_PM, -1e4).softmax(1)
    won_P = (weight_PM * torch.sigmoid(positive_P1 - negative_PM)).sum(1)
    return (penalty * (weight_PM * negative_PM**2).sum(1) - torch.log(won_P + 1e-12)).mean()


def gbce(
    user_PD: Tensor,
    target_PD: Tensor,
    negative_MD: Tensor,
    target_P: Tensor,
    negative_M: Tensor,
    n_items: int,
    calibration: float = 0.75,
) -> Tensor:
    """Binary cross-entropy whose positive is weakened to undo the overconfidence that few negatives teach.

    gBCE (Petrov and Macdonald 2023) for M negatives drawn uniformly from `n_items`; calibration t: 0 is plain BCE,
    1 keeps probabilities as the full softmax would have them.
    """
    share = min(1.0, len(negative_M) / max(1, n_items - 1))
    beta = share * (calibration * (1 - 1 / share) + 1 / share)
    positive_P = F.logsigmoid((user_PD * target_PD).sum(1)) * beta
    wrong_PM = F.logsigmoid(-(user_PD @ negative_MD.T)).masked_fill(target_P[:, None] == negative_M, 0.0)
    return -(positive_P + wrong_PM.sum(1)).mean()


def listwise(score_BC: Tensor, target_B: Tensor, weight_B: Tensor) -> Tensor:
    """Softmax cross-entropy over each list, weighted mean (ListNet, Cao et al. 2007). target_B: place in the list."""
    loss_B = F.cross_entropy(score_BC, target_B, reduction="none")
    return (loss_B * weight_B).sum() / weight_B.sum().clamp(min=1e-6)


def nothing(module: nn.Module, but: Sequence[nn.Parameter] = ()) -> Tensor:
    """A loss of zero whose gradient, zero too, reaches every parameter, `but` a few."""
    left_out = {id(parameter) for parameter in but}
    return sum((p.sum() * 0 for p in module.parameters() if id(p) not in left_out), torch.zeros(()))
