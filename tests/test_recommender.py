"""The default model as a whole: its stages, its losses, and that a saved one is the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tinyshop
import torch

from rayrec.catalogue import Catalogue
from rayrec.config import Config, TrainConfig
from rayrec.history import encode_history
from rayrec.model.candidates import FOLLOW_FEATURES
from rayrec.model.fusion import Candidates, Fusion
from rayrec.model.history_tensors import HistoryTensors
from rayrec.model.negatives import how_many
from rayrec.model.recommender import Lists, NextItems, Recommender, build
from rayrec.schema import ACTION_CODE

VIEW = ACTION_CODE["view"]


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.from_table(tinyshop.item_table(tinyshop.sequence_table()))


def make(catalogue: Catalogue, *settings: str) -> Recommender:
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    model = build(tinyshop.tiny(*settings), catalogue, np.array([1, 2, 3, 4, 5]), pixels)
    assert isinstance(model, Recommender)
    return model


def past(*visits: list[int]) -> HistoryTensors:
    items = [item for visit in visits for item in visit]
    offsets = np.cumsum([0, *map(len, visits)])
    return HistoryTensors.of(
        encode_history(items, np.full(len(items), VIEW), np.arange(len(items)), offsets, max_len=10, clock="time")
    )


def lists(model: Recommender) -> Lists:
    model.vector_ND = model.encode_items()
    candidate_BC = torch.tensor([[3, 12, 25, 0], [4, 9, 31, 32]])
    return Lists(
        past([1, 2], [3]),
        candidate_BC,
        torch.rand(2, 4, FOLLOW_FEATURES),
        torch.tensor([0, 3]),
        torch.tensor([ACTION_CODE["purchase"], VIEW]),
    )


def test_the_loss_is_over_positions_that_have_a_target(catalogue: Catalogue) -> None:
    model = make(catalogue, "model.dropout=0", "model.id_dropout=0").eval()
    model.refresh()
    one = model(NextItems(past([1, 2, 3]), torch.tensor([[2, 0, 0]])))
    other = model(NextItems(past([1, 2, 3]), torch.tensor([[0, 0, 4]])))
    both = model(NextItems(past([1, 2, 3]), torch.tensor([[2, 0, 4]])))
    torch.testing.assert_close(both, (one + other) / 2, atol=1e-5, rtol=1e-5)


def test_the_past_alone_decides(catalogue: Catalogue) -> None:
    """What comes after a position must not reach its loss: it is the answer."""
    model = make(catalogue, "model.dropout=0", "model.id_dropout=0").eval()
    model.refresh()
    target = torch.tensor([[2, 0, 0]])
    torch.testing.assert_close(
        model(NextItems(past([1, 2, 3]), target)), model(NextItems(past([1, 33, 17]), target)), atol=1e-5, rtol=1e-5
    )


def test_a_batch_without_targets_costs_nothing_and_reaches_every_parameter(catalogue: Catalogue) -> None:
    model = make(catalogue)
    loss = model(NextItems(past([1, 2]), torch.zeros(1, 2, dtype=torch.long)))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("sampled", [0, 16])
def test_both_losses_teach(catalogue: Catalogue, sampled: int) -> None:
    model = make(catalogue, f"train.negatives={sampled}", "model.dropout=0").train()
    optimizer = torch.optim.Adam(model.stage_parameters("retrieval"), lr=0.02)
    batch = NextItems(past([1, 2, 3], [11, 12]), torch.tensor([[2, 3, 4], [12, 13, 0]]))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_a_catalogue_is_as_big_as_its_items_with_events(catalogue: Catalogue) -> None:
    train = Config().train
    assert [how_many(n, train) for n in (15_000, 15_001)] == [0, 2048]
    assert how_many(100, TrainConfig(loss="gbce")) == 2048
    mostly_cold = dataclasses.replace(catalogue, n_train=np.isin(np.arange(len(catalogue) + 1), (1, 2, 3)) * 9)
    assert make(catalogue, "train.full_softmax_below=3").sampled
    assert not make(mostly_cold, "train.full_softmax_below=3").sampled


def test_a_big_catalogue_is_sampled_and_a_small_one_is_not(catalogue: Catalogue) -> None:
    assert make(catalogue).sampled == 0
    assert make(catalogue, "train.full_softmax_below=35").sampled == 2048
    assert make(catalogue, "train.negatives=7").sampled == 7


def test_the_fusion_trains_alone_on_a_still_first_stage(catalogue: Catalogue) -> None:
    model = make(catalogue)
    batch = lists(model)
    model.train()
    assert model.fusion.training
    assert not model.behaviour.training
    assert not model.item_encoder.training
    model(batch).backward()
    fusion = {id(p) for p in model.stage_parameters("fusion")}
    touched = {id(p) for p in model.parameters() if p.grad is not None}
    assert touched
    assert touched <= fusion
    assert {id(p) for p in model.stage_parameters("retrieval")}.isdisjoint(fusion)
    assert len(fusion) + len(list(model.stage_parameters("retrieval"))) == len(list(model.parameters()))


def test_padding_candidates_take_no_part(catalogue: Catalogue) -> None:
    model = make(catalogue)
    batch = lists(model)
    model.eval()
    whole = model(batch)
    wider = Lists(
        batch.history,
        torch.nn.functional.pad(batch.candidate_BC, (0, 3)),
        torch.nn.functional.pad(batch.follow_BCF, (0, 0, 0, 3)),
        batch.target_B,
        batch.action_B,
    )
    torch.testing.assert_close(model(wider), whole)


@pytest.mark.parametrize(
    ("actions", "taught"),
    [
        (("view", "click"), {"next", "view"}),
        (("view", "cart"), {"next", "view", "cart"}),
        (("favorite", "purchase"), {"next", "favorite", "purchase"}),
        (("rate", "share"), {"next"}),
    ],
)
def test_an_event_teaches_next_and_the_head_of_its_action(
    catalogue: Catalogue, actions: tuple[str, ...], taught: set[str]
) -> None:
    model = make(catalogue)
    codes = torch.tensor([ACTION_CODE[action] for action in actions])
    model(dataclasses.replace(lists(model), action_B=codes)).backward()
    for grad in (model.fusion.linear.weight.grad, model.fusion.out.weight.grad):
        assert grad is not None
        assert {head for head, row in zip(model.heads, grad, strict=True) if row.any()} == taught


def test_what_an_action_teaches_leaves_the_order_of_next_alone(catalogue: Catalogue) -> None:
    """Both lists are purchases of the last candidate; the shared part learns it once, not twice."""
    model = make(catalogue)
    bought = dataclasses.replace(lists(model), action_B=torch.tensor([ACTION_CODE["purchase"]] * 2))
    rated = dataclasses.replace(bought, action_B=torch.tensor([ACTION_CODE["rate"]] * 2))
    rows = []
    for batch in (bought, rated):
        model.eval().zero_grad()
        model(batch).backward()
        assert model.fusion.linear.weight.grad is not None
        rows.append(model.fusion.linear.weight.grad[0].clone())
    torch.testing.assert_close(*rows)


def test_a_model_from_saved_weights_is_the_same(catalogue: Catalogue) -> None:
    model = make(catalogue).eval()
    again = build(model.config, catalogue, weights=model.state_dict())
    assert isinstance(again, Recommender)
    vector_ND, history = model.encode_items(), past([1, 2])
    torch.testing.assert_close(again.eval().encode_users(history, vector_ND), model.encode_users(history, vector_ND))


def test_half_precision_trains_pictures(catalogue: Catalogue) -> None:
    model = make(catalogue).train()
    seen_M = torch.tensor([1, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):  # of the pictures alone: not every CPU has an LSTM in half precision
        image_MD = model.item_encoder.images(model.items, seen_M)
        model.item_encoder.refresh_images(model.items)
    assert image_MD.dtype == torch.float32
    image_MD.sum().backward()
    assert model.item_encoder.cnn is not None
    assert model.item_encoder.cnn.project.weight.grad.any()
    assert model.item_encoder.image_ND.dtype == torch.float32
    assert model.item_encoder.image_ND[seen_M].any(1).all()


def test_in_training_some_candidates_are_as_if_cold_but_none_that_the_visitor_met(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(catalogue, "model.cold_dropout=0.4")
    batch = lists(model)
    batch = dataclasses.replace(
        batch, candidate_BC=torch.arange(1, 33).expand(2, -1), follow_BCF=torch.rand(2, 32, FOLLOW_FEATURES)
    )
    ranked: list[Candidates] = []
    forward = Fusion.forward

    def watched(*given: Any) -> torch.Tensor:
        ranked.extend(one for one in given if isinstance(one, Candidates))
        return forward(*given)

    monkeypatch.setattr(Fusion, "forward", watched)
    model.train()(batch)
    model.eval()(batch)
    in_training, judged = ranked
    really_cold_BC = ~model.items.warm_N[batch.candidate_BC]
    assert torch.equal(judged.is_cold_BC, really_cold_BC)
    pretended_BC = in_training.is_cold_BC & ~really_cold_BC
    assert 0.2 < pretended_BC.float().mean() < 0.6
    assert not pretended_BC[0, :2].any()
    assert not pretended_BC[1, 2]
    item = int(in_training.item_BC[0][pretended_BC[0]][0])
    with_id, without = (model.item_encoder(model.items, torch.tensor([item]), with_ids=w)[0] for w in (True, False))
    assert not torch.allclose(with_id, without)
    torch.testing.assert_close(in_training.vector_BCD[0, item - 1], without)
    torch.testing.assert_close(judged.vector_BCD[0, item - 1], with_id)
