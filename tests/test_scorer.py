"""The scorer that judges and serves: what its scores promise."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import tinyshop
import torch

from rayrec.catalogue import Catalogue
from rayrec.config import PRESETS
from rayrec.followers import Followers
from rayrec.history import HistoryBatch, encode_history
from rayrec.model.recommender import Recommender, build
from rayrec.model.scorer import Scorer
from rayrec.schema import ACTION_CODE

VIEW = ACTION_CODE["view"]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    torch.manual_seed(3)
    catalogue = Catalogue.from_table(tinyshop.item_table(tinyshop.sequence_table()))
    model = build(tinyshop.tiny("model.candidates=10"), catalogue)
    assert isinstance(model, Recommender)
    with torch.no_grad():
        for parameter in model.fusion.out.parameters():
            parameter.normal_()
        model.fusion.calibration_H2.copy_(torch.tensor([[0.5, -1.0], [2.0, 0.5], [1.0, 0.0], [0.7, 0.1], [1.5, -2.0]]))
    return Scorer(model, catalogue, model.encode_items().numpy(), followers(), "time")


def followers() -> Followers:
    """Every item is followed by the next of its colour."""
    follows = sp.lil_array((tinyshop.N_ITEMS + 1, tinyshop.N_ITEMS + 1), dtype=np.float32)
    for item in range(1, tinyshop.N_ITEMS):
        if item % tinyshop.PER_COLOUR:
            follows[item, tinyshop.after(item)] = 3
    return Followers(sp.csr_array(follows), sp.csr_array(follows))


def histories(*visits: list[int]) -> HistoryBatch:
    items = [item for visit in visits for item in visit]
    offsets = np.cumsum([0, *map(len, visits)])
    return encode_history(
        items, np.full(len(items), VIEW), np.arange(len(items)) * 60_000, offsets, max_len=10, clock="time"
    )


def test_candidates_rank_above_all_others_in_the_order_of_the_fusion(scorer: Scorer) -> None:
    history = histories([1, 2, 3], [33], [])
    scores_BN = scorer.rank_all(history, "next")
    assert scores_BN.shape == (3, tinyshop.N_ITEMS + 1)
    assert np.isneginf(scores_BN[:, 0]).all()
    assert np.isfinite(scores_BN[:, 1:]).all()
    model_BN = scorer.user_vectors(history) @ scorer.vectors_ND.T
    candidate_BC, _ = scorer.candidates(history)
    fused_BC = scorer.fuse(history, scorer.user_vectors(history), candidate_BC, {"next": 1.0})
    for row in range(3):
        chosen = candidate_BC[row][candidate_BC[row] > 0]
        others = np.setdiff1d(np.arange(1, tinyshop.N_ITEMS + 1), chosen)
        assert len(others)
        assert scores_BN[row, chosen].min() > scores_BN[row, others].max()
        fused = fused_BC[row][candidate_BC[row] > 0]
        assert (chosen[np.argsort(-fused)] == chosen[np.argsort(-scores_BN[row, chosen])]).all()
        # the others stay in the order of retrieval
        assert (
            np.argsort(model_BN[row, others], kind="stable") == np.argsort(scores_BN[row, others], kind="stable")
        ).all()


def test_without_the_fusion_the_inner_product_ranks_and_the_cold_come_last(scorer: Scorer) -> None:
    plain = Scorer(scorer.model, scorer.catalogue, scorer.vectors_ND, followers(), "time", fused=False)
    history = histories([1, 2])
    (expected_N,) = plain.user_vectors(history) @ plain.vectors_ND.T
    (score_N,) = plain.rank_all(history, "next")
    warm_N = np.flatnonzero(scorer.catalogue.n_train > 0)
    cold_N = np.setdiff1d(np.arange(1, len(score_N)), warm_N)
    assert len(cold_N) > 1
    np.testing.assert_allclose(score_N[warm_N], expected_N[warm_N], rtol=1e-4, atol=1e-6)
    assert score_N[cold_N].max() < score_N[warm_N].min()
    assert (np.argsort(score_N[cold_N]) == np.argsort(expected_N[cold_N])).all()
    assert np.isneginf(score_N[0])


def test_fused_scores_are_probabilities_and_padding_is_last(scorer: Scorer) -> None:
    history = histories([1, 2], [])
    candidate_BC = np.array([[3, 0, 40, 11], [5, 6, 0, 0]])
    scores_BC = scorer.fuse(history, scorer.user_vectors(history), candidate_BC, {"next": 0.7, "purchase": 0.3})
    assert scores_BC.dtype == np.float32
    assert np.isneginf(scores_BC[candidate_BC == 0]).all()
    real = scores_BC[candidate_BC > 0]
    assert ((real > 0) & (real < 1)).all()


def test_heads_are_mixed_by_their_weights(scorer: Scorer) -> None:
    history = histories([1, 2])
    user_BD, candidate_BC = scorer.user_vectors(history), np.array([[3, 4, 25]])
    following, bought = (scorer.fuse(history, user_BD, candidate_BC, {head: 1.0}) for head in ("next", "purchase"))
    assert not np.allclose(following, bought)
    mixed = scorer.fuse(history, user_BD, candidate_BC, {"next": 3.0, "purchase": 1.0})
    np.testing.assert_allclose(mixed, 0.75 * following + 0.25 * bought, rtol=1e-5)
    np.testing.assert_array_equal(scorer.score(history, candidate_BC, "purchase"), bought)


def test_an_unknown_head_is_answered_by_next(scorer: Scorer) -> None:
    history = histories([1, 2])
    user_BD, candidate_BC = scorer.user_vectors(history), np.array([[3, 4, 25]])
    np.testing.assert_array_equal(
        scorer.fuse(history, user_BD, candidate_BC, {"share": 1.0}),
        scorer.fuse(history, user_BD, candidate_BC, {"next": 1.0}),
    )


@pytest.mark.parametrize("heads", [{}, {"next": 0.0}])
def test_no_weight_is_an_error(scorer: Scorer, heads: dict[str, float]) -> None:
    history = histories([1])
    with pytest.raises(ValueError, match="add up to more than 0"):
        scorer.fuse(history, scorer.user_vectors(history), np.array([[1]]), heads)


def test_the_company_in_a_batch_changes_nothing(scorer: Scorer) -> None:
    together = scorer.rank_all(histories([1, 2, 3], [21, 22, 23, 24, 25, 26, 27], []), "next")
    for row, visit in enumerate(([1, 2, 3], [21, 22, 23, 24, 25, 26, 27], [])):
        np.testing.assert_allclose(scorer.rank_all(histories(visit), "next")[0, 1:], together[row, 1:], atol=1e-4)


def test_a_visitor_without_history_has_a_ranking(scorer: Scorer) -> None:
    history = histories([])
    assert not scorer.user_vectors(history).any()
    assert np.isfinite(scorer.rank_all(history, "next")[0, 1:]).all()


def test_calibration_keeps_the_order(scorer: Scorer) -> None:
    history, candidate_BC = histories([1, 2, 3]), np.arange(1, 41)[None]
    logit_BCH = scorer.logits(history, candidate_BC)
    for head, name in enumerate(scorer.heads):
        probability = scorer.score(history, candidate_BC, name)[0]
        assert (np.diff(probability[np.argsort(logit_BCH[0, :, head])]) >= 0).all()


def test_the_papers_model_ranks_by_its_logit() -> None:
    torch.manual_seed(0)
    catalogue = Catalogue.from_table(tinyshop.item_table(tinyshop.sequence_table()))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), np.uint8)
    model = build(PRESETS["paper"], catalogue, np.array([1, 2, 11]), pixels).eval()
    empty = sp.csr_array((tinyshop.N_ITEMS + 1, tinyshop.N_ITEMS + 1), dtype=np.float32)
    scorer = Scorer(model, catalogue, model.encode_items().numpy(), Followers(empty, empty), "time")
    history, candidate_BC = histories([1, 2], [3]), np.array([[1, 2, 11, 0]] * 2)
    logit_BN = scorer.rank_all(history, "purchase")
    scores_BC = scorer.score(history, candidate_BC, "purchase")
    np.testing.assert_allclose(scores_BC[:, :3], 1 / (1 + np.exp(-logit_BN[:, [1, 2, 11]])), rtol=1e-5)
    assert np.isneginf(scores_BC[:, 3]).all()
    assert np.isneginf(logit_BN[:, 0]).all()
