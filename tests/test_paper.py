"""The founding model to the letter, and what its last layer makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tinyshop
import torch
import torch.nn.functional as F
from torch import nn

from rayrec.catalogue import Catalogue
from rayrec.config import PRESETS
from rayrec.history import encode_history
from rayrec.model.encoders import as_float
from rayrec.model.history_tensors import HistoryTensors
from rayrec.model.paper import Pairs, PaperModel, ReluLSTM
from rayrec.model.recommender import Recommender, build
from rayrec.schema import ACTION_CODE

VIEW, CART, FAVORITE, PURCHASE = (ACTION_CODE[name] for name in ("view", "cart", "favorite", "purchase"))


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.from_table(tinyshop.item_table(tinyshop.sequence_table()))


@pytest.fixture(scope="module")
def model(catalogue: Catalogue) -> PaperModel:
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), np.uint8)
    built = build(PRESETS["paper"], catalogue, np.array([1, 2, 11]), pixels)
    assert isinstance(built, PaperModel)
    return built.eval()


def histories(*visits: list[tuple[int, int]], gap_ms: int = 90_000) -> HistoryTensors:
    item, action = zip(*[event for visit in visits for event in visit], strict=True)
    offsets = np.cumsum([0, *map(len, visits)])
    time_ms = 6 * 3_600_000 + np.arange(len(item)) * gap_ms
    return HistoryTensors.of(encode_history(item, action, time_ms, offsets, max_len=50, clock="time"))


def test_the_layers(model: PaperModel) -> None:
    kinds = [type(layer) for layer in model.image]
    conv = [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    assert kinds == [*conv, *conv, nn.Flatten, nn.Linear, nn.ReLU]
    assert [tuple(model.image[n].weight.shape) for n in (0, 3, 7)] == [
        (32, 3, 3, 3),
        (64, 32, 3, 3),
        (1024, 64 * 30 * 30),
    ]
    assert [model.image[n].kernel_size for n in (2, 5)] == [2, 2]
    assert (model.lstm.input.in_features, model.lstm.hidden) == (10, 128)
    assert [(layer.in_features, layer.out_features) for layer in model.behaviour if isinstance(layer, nn.Linear)] == [
        (128, 128),
        (128, 1024),
    ]
    assert (model.out.in_features, model.out.out_features) == (2048, 1)


def test_the_number_of_parameters(model: PaperModel) -> None:
    convolutions = 3 * 32 * 9 + 32 + 32 * 64 * 9 + 64
    lstm = 4 * 128 * (10 + 128 + 1)
    dense = (57_600 + 1) * 1024 + (128 + 1) * 128 + (128 + 1) * 1024 + 2048 + 1
    assert sum(p.numel() for p in model.parameters()) == convolutions + lstm + dense == 59_224_641


def test_the_preset() -> None:
    paper = PRESETS["paper"]
    assert (paper.model.kind, paper.model.max_len, paper.model.image_size) == ("paper", 50, 128)
    assert (paper.train.epochs, paper.train.batch_size, paper.train.weight_decay) == (10, 32, 0.0)


def test_a_step_of_the_relu_lstm_by_hand() -> None:
    lstm = ReluLSTM(1, 1)
    with torch.no_grad():
        lstm.input.weight.copy_(torch.tensor([[0.5], [-1.0], [2.0], [1.0]]))
        lstm.input.bias.copy_(torch.tensor([0.1, 0.2, -0.3, 0.4]))
        lstm.recurrent.weight.copy_(torch.tensor([[0.3], [0.6], [-0.2], [0.7]]))

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    h = c = 0.0
    for x in (1.0, 0.5):
        i, f, o = sigmoid(0.5 * x + 0.1 + 0.3 * h), sigmoid(-x + 0.2 + 0.6 * h), sigmoid(x + 0.4 + 0.7 * h)
        c = f * c + i * max(0.0, 2 * x - 0.3 - 0.2 * h)
        h = o * max(0.0, c)
    state = lstm(torch.tensor([[[1.0], [0.5], [99.0]]]), torch.tensor([[True, True, False]]))
    assert math.isclose(state.item(), h, rel_tol=1e-5)
    assert h > 0


def test_the_ten_numbers_in_order(model: PaperModel, catalogue: Catalogue) -> None:
    past = histories([(1, VIEW), (2, CART), (3, FAVORITE), (1, PURCHASE)])
    numbers = model.behaviour_numbers(past)[0]
    assert numbers.shape == (4, 10)
    assert numbers[:, :4].tolist() == torch.eye(4).tolist()
    assert numbers[:, 4].tolist() == pytest.approx([0.0, *[math.log1p(90)] * 3])
    hour = [6 + n * 90 // 1 / 3600 for n in range(4)]
    assert numbers[:, 5].tolist() == pytest.approx([math.sin(2 * math.pi * h / 24) for h in hour], abs=1e-5)
    assert numbers[:, 6].tolist() == pytest.approx([math.cos(2 * math.pi * h / 24) for h in hour], abs=1e-5)
    z_score = (catalogue.price - np.nanmean(catalogue.price[1:])) / np.nanstd(catalogue.price[1:])
    assert numbers[:, 7].tolist() == pytest.approx(z_score[[1, 2, 3, 1]].tolist(), abs=1e-5)
    popularity = np.log1p(catalogue.n_train[1:])
    z_score = (popularity - popularity.mean()) / popularity.std()
    assert numbers[:, 8].tolist() == pytest.approx(z_score[[0, 1, 2, 0]].tolist(), abs=1e-5)
    assert numbers[:, 9].tolist() == [0.0, 0.0, 0.0, 1.0]


def test_without_a_time_of_day_the_hour_is_nothing(model: PaperModel) -> None:
    past = HistoryTensors.of(encode_history([1, 2], [VIEW, VIEW], [0, 1], [0, 2], max_len=5, clock="order"))
    assert not model.behaviour_numbers(past)[..., 4:7].any()


@torch.no_grad()
def test_the_logit_is_one_dense_layer_over_the_concatenation(model: PaperModel) -> None:
    past = histories([(1, VIEW), (2, CART)])
    image = model.image(as_float(model.items.picture_MX[model.items.image_row_N[[11]]]))
    behaviour = model.behaviour(model.lstm(model.behaviour_numbers(past), past.item_BL > 0))
    to_the_letter = model.out(torch.cat([image, behaviour], 1)).item()
    vector_ND = model.encode_items()
    ours = (model.encode_users(past, vector_ND) @ vector_ND[11]).item()
    assert math.isclose(ours, to_the_letter, rel_tol=1e-4, abs_tol=1e-5)
    pairs = Pairs(past, torch.tensor([0]), torch.tensor([11]), torch.tensor([1.0]))
    assert math.isclose(model(pairs).item(), F.softplus(torch.tensor(-to_the_letter)).item(), rel_tol=1e-4)


def test_each_distinct_picture_and_history_of_a_batch_is_encoded_once(model: PaperModel) -> None:
    seen: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
        for module in (model.image, model.lstm)
    ]
    past = histories([(1, VIEW)], [(2, VIEW)])
    with torch.no_grad():
        model(Pairs(past, torch.tensor([0, 1, 0, 1, 0]), torch.tensor([2, 2, 1, 11, 2]), torch.zeros(5)))
    for hook in hooks:
        hook.remove()
    assert seen == [3, 2]


@torch.no_grad()
def test_every_visitor_gets_the_same_order_under_paper_and_not_under_small(
    model: PaperModel, catalogue: Catalogue
) -> None:
    past = histories([(1, VIEW), (2, CART)], [(33, PURCHASE)], [(14, VIEW), (15, VIEW), (16, VIEW)])
    torch.manual_seed(0)
    small = build(tinyshop.tiny(), catalogue).eval()
    assert isinstance(small, Recommender)
    orders = {}
    for name, one in {"paper": model, "small": small}.items():
        vector_ND = one.encode_items()
        scores_BN = one.encode_users(past, vector_ND) @ vector_ND.T
        pictured = torch.tensor([1, 2, 11]) if name == "paper" else torch.arange(1, tinyshop.N_ITEMS + 1)
        orders[name] = {tuple(row.argsort(stable=True).tolist()) for row in scores_BN[:, pictured]}
        assert len({round(float(value), 6) for value in scores_BN[:, 1]}) == 3, "visitors differ in the level"
    assert len(orders["paper"]) == 1
    assert len(orders["small"]) == 3


@torch.no_grad()
def test_an_item_without_a_picture_is_a_black_one(model: PaperModel) -> None:
    black = model.image(torch.full((1, 3, 128, 128), -1.0)) @ model.out.weight[0, :1024]
    vector_ND = model.encode_items()
    torch.testing.assert_close(vector_ND[5, :1], black, atol=1e-5, rtol=1e-4)
    assert not vector_ND[0].any()
    assert vector_ND[1, 0] != vector_ND[5, 0]


def test_the_one_stage_trains_everything(model: PaperModel) -> None:
    assert sum(1 for _ in model.stage_parameters("pairs")) == sum(1 for _ in model.parameters())
    assert model.heads == ("next",)
