"""The fusion's features by hand, and what it must not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tinyshop
import torch

from rayrec.catalogue import Catalogue
from rayrec.history import encode_history
from rayrec.model.candidates import FOLLOW_FEATURES, NOTHING_FOLLOWED
from rayrec.model.encoders import ItemTable
from rayrec.model.fusion import DECAYS, N_FEATURES, TOUCHES, Candidates, Fusion
from rayrec.model.history_tensors import HistoryTensors
from rayrec.schema import ACTION_CODE, HEADS

WIDTH = 16
NAMES = (
    "dot",
    *(f"follow_{n}" for n in range(FOLLOW_FEATURES)),
    *("popularity", "seen", "recency", "times", "price", "like_last", "attended", "cold"),
    "length",
    *TOUCHES,
    *(f"{name}_{decay}" for decay in DECAYS for name in ("price_gap", "category", "brand", "title")),
)  # fmt: skip
COLUMN = {name: place for place, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def items() -> ItemTable:
    catalogue = Catalogue.from_table(tinyshop.item_table(tinyshop.sequence_table()))
    return ItemTable(catalogue, np.empty(0, np.int64), torch.empty(0, 3, 8, 8, dtype=torch.uint8))


@pytest.fixture(scope="module")
def vector_ND() -> torch.Tensor:
    torch.manual_seed(0)
    vectors = torch.randn(tinyshop.N_ITEMS + 1, WIDTH)
    vectors[0] = 0
    return vectors


def past(*visits: list[tuple[int, str]]) -> HistoryTensors:
    events = [event for visit in visits for event in visit]
    actions = [ACTION_CODE[action] for _, action in events]
    offsets = np.cumsum([0, *map(len, visits)])
    return HistoryTensors.of(
        encode_history([i for i, _ in events], actions, np.arange(len(events)) * 1000, offsets, max_len=8, clock="time")
    )


def features(
    items: ItemTable, vector_ND: torch.Tensor, history: HistoryTensors, candidate_BC: torch.Tensor
) -> torch.Tensor:
    torch.manual_seed(0)
    fusion = Fusion(tinyshop.tiny().model)
    user_BD = torch.full((len(candidate_BC), WIDTH), 0.5)
    follow_BCF = torch.arange(float(FOLLOW_FEATURES)).expand(*candidate_BC.shape, -1)
    candidates = Candidates.of(items, candidate_BC, vector_ND, follow_BCF)
    with torch.no_grad():
        return fusion.features(items, history, user_BD, candidates, vector_ND[history.item_BL])


def logits(
    fusion: Fusion, items: ItemTable, vector_ND: torch.Tensor, history: HistoryTensors, candidate_BC: torch.Tensor,
    user_BD: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    candidates = Candidates.of(items, candidate_BC, vector_ND, torch.rand(*candidate_BC.shape, FOLLOW_FEATURES))
    return fusion(items, history, user_BD, candidates, vector_ND[history.item_BL])


def test_the_features_by_hand(items: ItemTable, vector_ND: torch.Tensor) -> None:
    history = past([(1, "view"), (2, "cart"), (1, "purchase"), (11, "view")])
    row = features(items, vector_ND, history, torch.tensor([[1, 10]]))[0]
    assert row.shape == (2, len(NAMES)) == (2, N_FEATURES)
    got = {name: float(row[0, place]) for name, place in COLUMN.items()}
    expected = {
        "dot": float(vector_ND[1].sum() / 2),
        "follow_0": 0.0,
        "follow_6": 6.0,
        "popularity": float(items.log_popularity_N[1]),
        "seen": 1.0,
        "recency": 1 / 2,  # one step back
        "times": math.log(3),
        "price": -1.0,
        "like_last": float(torch.cosine_similarity(vector_ND[1], vector_ND[11], dim=0)),
        "cold": 0.0,
        "length": math.log(5) / 4,
        "view": 1.0,
        "click": 0.0,
        "cart": 0.0,
        "favorite": 0.0,
        "purchase": 1.0,
    }
    weight = np.array([0.5**3, 0.5**2, 0.5, 1]) / (1 + 0.5 + 0.25 + 0.125)
    price = np.array([0, 1, 0, 0]) / 4.5 - 1
    expected["price_gap_0.5"] = abs(-1 - float(weight @ price))
    expected["category_0.5"] = float(weight[:3].sum())  # the last is green
    expected["brand_0.5"] = float(weight[[0, 2, 3]].sum())  # even places are of one brand
    red, place = math.log(41 / 11) ** 2, math.log(41 / 5) ** 2  # ten of forty are red, four are first of their colour
    expected["title_0.5"] = float(weight[:3].sum() * red + weight[[0, 2, 3]].sum() * place) / (red + place)
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    cold = row[1]
    assert [float(cold[COLUMN[name]]) for name in ("cold", "seen", "recency", "times", "view")] == [1, 0, 0, 0, 0]


def test_as_if_cold_a_candidate_is_known_by_its_attributes_and_vector_alone(
    items: ItemTable, vector_ND: torch.Tensor
) -> None:
    """What is true of a cold item is said of it, in the very numbers; all else stays."""
    torch.manual_seed(0)
    fusion, history = Fusion(tinyshop.tiny().model), past([(1, "view"), (2, "cart")])
    candidates = Candidates.of(items, torch.tensor([[3, 10]]), vector_ND, torch.rand(1, 2, FOLLOW_FEATURES))
    assert candidates.is_cold_BC.tolist() == [[False, True]]
    as_cold = candidates.as_cold(torch.tensor([[True, True]]), torch.ones(2, WIDTH), items)
    assert as_cold.is_cold_BC.all()
    assert (as_cold.popularity_BC == items.log_popularity_N[10]).all()
    assert (as_cold.follow_BCF == torch.tensor(NOTHING_FOLLOWED)).all()
    with torch.no_grad():
        row, cold = (
            fusion.features(items, history, torch.ones(1, WIDTH), one, vector_ND[history.item_BL])[0, 0]
            for one in (candidates, as_cold)
        )
    assert float(cold[COLUMN["dot"]]) == WIDTH
    others = [place for name, place in COLUMN.items() if name.split("_")[0] in ("price", "category", "brand", "title")]
    assert torch.equal(row[others], cold[others])


def test_the_attention_is_over_real_events_only(items: ItemTable, vector_ND: torch.Tensor) -> None:
    candidate_BC = torch.tensor([[1, 5, 12]])
    alone = features(items, vector_ND, past([(3, "view"), (4, "view")]), candidate_BC)
    beside = past([(3, "view"), (4, "view")], [(n, "view") for n in range(21, 28)])
    together = features(items, vector_ND, beside, candidate_BC.expand(2, -1))
    torch.testing.assert_close(together[0], alone[0], atol=1e-5, rtol=1e-5)
    assert alone[0, :, COLUMN["attended"]].any()


def test_a_visitor_without_history_has_finite_features(items: ItemTable, vector_ND: torch.Tensor) -> None:
    row = features(items, vector_ND, past([], [(1, "view")]), torch.tensor([[1, 0], [1, 2]]))[0]
    assert row.isfinite().all()
    told = ("seen", "recency", "times", "like_last", "attended", "length", *TOUCHES, "category_0.9", "brand_0.5")
    assert not row[0, [COLUMN[name] for name in told]].any()


def test_it_starts_from_the_order_of_retrieval(items: ItemTable, vector_ND: torch.Tensor) -> None:
    torch.manual_seed(0)
    fusion = Fusion(tinyshop.tiny().model).eval()
    history, candidate_BC = past([(1, "view"), (2, "view")]), torch.tensor([[3, 14, 25, 36]])
    user_BD = torch.randn(1, WIDTH)
    logit_BCH = logits(fusion, items, vector_ND, history, candidate_BC, user_BD)
    assert logit_BCH.shape == (1, 4, len(HEADS))
    for head in range(len(HEADS)):
        torch.testing.assert_close(logit_BCH[0, :, head], vector_ND[candidate_BC[0]] @ user_BD[0])


def test_a_head_that_never_learned_answers_as_next(items: ItemTable, vector_ND: torch.Tensor) -> None:
    torch.manual_seed(0)
    fusion = Fusion(tinyshop.tiny().model).eval()
    with torch.no_grad():
        for layer in (fusion.out, fusion.linear):
            layer.weight[[0, HEADS.index("cart")]] += torch.randn(2, layer.in_features)
    history, candidate_BC = past([(1, "view"), (2, "view")]), torch.tensor([[3, 14, 25, 36]])
    logit_BCH = logits(fusion, items, vector_ND, history, candidate_BC, torch.randn(1, WIDTH))
    for head, name in enumerate(HEADS):
        assert torch.equal(logit_BCH[..., head], logit_BCH[..., 0]) == (name != "cart"), name


def test_taste_changes_the_order_of_items(items: ItemTable, vector_ND: torch.Tensor) -> None:
    torch.manual_seed(0)
    fusion = Fusion(tinyshop.tiny().model).eval()
    with torch.no_grad():
        for parameter in fusion.out.parameters():
            parameter.normal_()
    candidate_BC = torch.arange(1, 31)[None].expand(2, -1)
    history = past([(1, "view"), (2, "cart")], [(35, "purchase")])
    logit_BCH = logits(fusion, items, vector_ND, history, candidate_BC, torch.randn(2, WIDTH))
    assert logit_BCH[0, :, 0].argsort().tolist() != logit_BCH[1, :, 0].argsort().tolist()


def test_a_score_does_not_depend_on_the_other_candidates(items: ItemTable, vector_ND: torch.Tensor) -> None:
    history = past([(1, "view"), (2, "cart"), (3, "view")])
    many = features(items, vector_ND, history, torch.tensor([[4, 17, 0, 30]]))
    one = features(items, vector_ND, history, torch.tensor([[17]]))
    torch.testing.assert_close(many[:, 1:2], one, atol=1e-6, rtol=1e-5)


def test_what_an_action_teaches_does_not_pull_at_next(items: ItemTable, vector_ND: torch.Tensor) -> None:
    torch.manual_seed(0)
    fusion = Fusion(tinyshop.tiny().model)
    with torch.no_grad():
        fusion.out.weight.normal_()
    history, candidate_BC = past([(1, "view"), (2, "cart")]), torch.arange(1, 21)[None]
    logit_BCH = logits(fusion, items, vector_ND, history, candidate_BC, torch.randn(1, WIDTH))
    logit_BCH[0, 3, 1:].sum().backward()
    moved = {name: p.grad for name, p in fusion.named_parameters() if p.grad is not None and p.grad.any()}
    assert set(moved) == {"linear.weight", "linear.bias", "out.weight", "out.bias"}
    for grad in moved.values():
        assert not grad[0].any()
        assert grad[1:].any()
