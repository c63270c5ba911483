"""Losses against sums done by hand, and the sampler of negatives."""

from __future__ import annotations

import math

import pytest
import torch

from rayrec.model.losses import bpr_max, full_softmax, gbce, listwise, sampled_softmax
from rayrec.model.negatives import NegativeSampler


def test_full_softmax_by_hand() -> None:
    item_ND = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    user_PD = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    loss = full_softmax(user_PD, item_ND[[0, 0]], item_ND)
    by_hand = (math.log(1 + math.exp(0 - 2)) + math.log(1 + math.exp(3 - 0))) / 2
    assert math.isclose(float(loss), by_hand, rel_tol=1e-6)


def test_full_softmax_has_the_gradient_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    user_PD, item_ND = (torch.randn(n, 3, generator=generator, requires_grad=True) for n in (5, 7))
    target_P = torch.tensor([0, 6, 3, 3, 1])
    full_softmax(100 * user_PD, item_ND[target_P], item_ND).backward()  # scores whose exponentials overflow
    found = [user_PD.grad, item_ND.grad]
    user_PD.grad = item_ND.grad = None
    torch.nn.functional.cross_entropy(100 * user_PD @ item_ND.T, target_P).backward()
    for grad, right in zip(found, [user_PD.grad, item_ND.grad], strict=True):
        torch.testing.assert_close(grad, right)


def test_full_softmax_in_mixed_precision() -> None:
    user_PD, item_ND = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = full_softmax(user_PD, item_ND[:6], item_ND)
    loss.backward()
    assert loss.dtype == torch.float32
    right = full_softmax(user_PD.detach(), item_ND[:6].detach(), item_ND.detach())
    assert math.isclose(float(loss.detach()), float(right), rel_tol=0.05)
    assert user_PD.grad is not None
    assert user_PD.grad.dtype == torch.float32


def test_sampled_softmax_by_hand() -> None:
    log_q_N = torch.tensor([-30.0, math.log(0.5), math.log(0.3), math.log(0.2)])
    user_PD, negative_MD = torch.tensor([[1.0]]), torch.tensor([[0.7], [0.4]])
    loss = sampled_softmax(
        user_PD, torch.tensor([[2.0]]), negative_MD, torch.tensor([1]), torch.tensor([2, 3]), log_q_N
    )
    right, wrong = 2.0, [0.7 - math.log(2 * 0.3), 0.4 - math.log(2 * 0.2)]
    assert math.isclose(float(loss), math.log(sum(map(math.exp, [right, *wrong]))) - right, rel_tol=1e-6)


def test_sampled_softmax_has_the_gradient_of_its_formula() -> None:
    """As torch's own functions have it, also for a target that is all there was to draw."""
    generator = torch.Generator().manual_seed(0)
    user_PD, item_ND = (torch.randn(n, 3, generator=generator, requires_grad=True) for n in (5, 7))
    log_q_N = torch.randn(7, generator=generator)
    for negative_M in (torch.tensor([0, 3, 3, 6, 2]), torch.tensor([3, 3])):
        target_P = torch.tensor([0, 6, 3, 3, 1])
        vectors = (30 * user_PD, item_ND[target_P], item_ND[negative_M])
        sampled_softmax(*vectors, target_P, negative_M, log_q_N).backward()
        found = [user_PD.grad, item_ND.grad]
        user_PD.grad = item_ND.grad = None
        other_PM = 30 * user_PD @ item_ND[negative_M].T - log_q_N[negative_M] - math.log(len(negative_M))
        other_PM = other_PM.masked_fill(target_P[:, None] == negative_M, float("-inf"))
        positive_P1 = (30 * user_PD * item_ND[target_P]).sum(1, keepdim=True)
        score_P1M = torch.cat([positive_P1, other_PM], 1)
        torch.nn.functional.cross_entropy(score_P1M, torch.zeros(5, dtype=torch.int64)).backward()
        for grad, right in zip(found, [user_PD.grad, item_ND.grad], strict=True):
            torch.testing.assert_close(grad, right)
        user_PD.grad = item_ND.grad = None


def test_a_negative_that_is_the_target_does_not_count() -> None:
    log_q_N = torch.zeros(3)
    given = (torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[2.0], [2.0]]))
    assert float(sampled_softmax(*given, torch.tensor([1]), torch.tensor([1, 1]), log_q_N)) == 0.0


def test_log_q_undoes_the_bias_of_sampling() -> None:
    """With it the optimum of the sampled loss is the truth; without it what is sampled often is underrated."""
    truth_N = torch.tensor([0.0, 0.5, 0.3, 0.15, 0.05])
    sampler = NegativeSampler(truth_N * 1000, alpha=1.0)
    generator = torch.Generator().manual_seed(0)
    target_P = truth_N.repeat(1, 1).multinomial(4000, True, generator=generator).squeeze(0)

    def learned(log_q_N: torch.Tensor) -> torch.Tensor:
        score_N = torch.zeros(5, requires_grad=True)
        optimizer = torch.optim.Adam([score_N], lr=0.05)
        for _ in range(250):
            negative_M = sampler(200, generator)
            optimizer.zero_grad()
            one_P = torch.ones(len(target_P), 1)
            sampled_softmax(
                one_P, score_N[target_P, None], score_N[negative_M, None], target_P, negative_M, log_q_N
            ).backward()
            optimizer.step()
        return score_N.detach()[1:].softmax(0)

    assert (learned(sampler.log_q_N) - truth_N[1:]).abs().max() < 0.05
    assert (learned(torch.zeros(5)) - truth_N[1:]).abs().max() > 0.1


def test_listwise_by_hand_and_weighted() -> None:
    score_BC = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    target_B = torch.tensor([1, 1])
    first, second = math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))
    assert math.isclose(float(listwise(score_BC, target_B, torch.ones(2))), (first + second) / 2, rel_tol=1e-6)
    assert math.isclose(float(listwise(score_BC, target_B, torch.tensor([0.0, 1.0]))), second, rel_tol=1e-6)


def test_listwise_of_nothing_is_zero() -> None:
    score_BC = torch.randn(2, 3)
    assert float(listwise(score_BC, torch.tensor([0, 1]), torch.zeros(2))) == 0.0
    assert float(listwise(score_BC[:0], torch.zeros(0, dtype=torch.long), torch.zeros(0))) == 0.0


def test_the_sampler_knows_only_items_with_training_events() -> None:
    sampler = NegativeSampler(torch.tensor([0, 4, 0, 1, 0, 16, 0]))
    drawn = sampler(20_000, torch.Generator().manual_seed(1))
    share = drawn.bincount(minlength=7) / len(drawn)
    assert set(drawn.tolist()) == {1, 3, 5}
    torch.testing.assert_close(share[[1, 3, 5]], torch.tensor([2 / 7, 1 / 7, 4 / 7]), atol=0.02, rtol=0)
    torch.testing.assert_close(sampler.log_q_N[[1, 3, 5]].exp(), torch.tensor([2 / 7, 1 / 7, 4 / 7]))


def test_the_greatest_draw_is_an_item_with_training_events(monkeypatch) -> None:
    """Rounding leaves the last of the cumulated shares a little under one."""
    sampler = NegativeSampler(torch.tensor([0, *[3] * 9, 0, 0]))
    monkeypatch.setattr(torch, "rand", lambda n, **how: torch.full((n,), 1 - 2**-53, dtype=torch.float64))
    assert sampler(1).item() == 9
    monkeypatch.setattr(torch, "rand", lambda n, **how: torch.zeros(n, dtype=torch.float64))
    assert sampler(1).item() == 1


def test_bpr_max_by_hand() -> None:
    user_PD, target_PD, negative_MD = torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[1.0], [0.0]])
    loss = bpr_max(user_PD, target_PD, negative_MD, torch.tensor([3]), torch.tensor([1, 2]), penalty=0.5)
    heavy = math.exp(1) / (math.exp(1) + 1)
    won = heavy / (1 + math.exp(-1)) + (1 - heavy) / (1 + math.exp(-2))
    assert math.isclose(float(loss), -math.log(won) + 0.5 * heavy, rel_tol=1e-5)


def test_gbce_by_hand() -> None:
    user_PD, target_PD, negative_MD = torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[1.0], [0.0]])
    given = (user_PD, target_PD, negative_MD, torch.tensor([3]), torch.tensor([1, 2]))
    wrong = math.log(1 + math.exp(1)) + math.log(2)
    right = math.log(1 + math.exp(-2))
    assert math.isclose(float(gbce(*given, n_items=5, calibration=0.0)), right + wrong, rel_tol=1e-5)
    assert math.isclose(float(gbce(*given, n_items=5, calibration=1.0)), 0.5 * right + wrong, rel_tol=1e-5)


@pytest.mark.parametrize("loss", ["bpr_max", "gbce"])
def test_a_negative_that_is_the_target_teaches_nothing(loss: str) -> None:
    user_PD, negative_MD = torch.tensor([[1.0]]), torch.tensor([[0.5], [3.0]], requires_grad=True)
    given = (user_PD, torch.tensor([[2.0]]), negative_MD, torch.tensor([3]), torch.tensor([1, 3]))
    (bpr_max(*given) if loss == "bpr_max" else gbce(*given, n_items=9)).backward()
    assert negative_MD.grad is not None
    assert negative_MD.grad[0].abs() > 1e-3
    assert negative_MD.grad[1].abs() < 1e-6
