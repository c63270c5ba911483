"""The moment of asking: what a model reads of it, that it matters where it decides, and not where it is not known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tinyshop
import torch

from rayrec.catalogue import Catalogue
from rayrec.config import ModelConfig, saved_config
from rayrec.history import MAX_GAP_S, encode_history
from rayrec.model.behaviour import Behaviour, last_BD
from rayrec.model.candidates import FOLLOW_FEATURES
from rayrec.model.encoders import ItemTable
from rayrec.model.fusion import Fusion
from rayrec.model.history_tensors import HistoryTensors
from rayrec.model.moment import HOUR_CODES, SINCE_CODES, Moment, after_each, asked

MINUTE_MS, DAY_MS = 60_000, 86_400_000
WIDTH = 8
TIMES_MS = np.array([0, 10, 100, 3000, 3001]) * MINUTE_MS
"""An evening and two days later."""


def past(*asked_ms: int | None, events: int = len(TIMES_MS), clock: str = "time") -> HistoryTensors:
    """The same history of each visitor, who asks at another time."""
    n, told = len(asked_ms), [moment for moment in asked_ms if moment is not None]
    times = np.tile(TIMES_MS[:events], n)
    items = np.tile(1 + np.arange(events), n)
    return HistoryTensors.of(
        encode_history(
            items,
            np.ones_like(items),
            times,
            np.arange(n + 1) * events,
            max_len=8,
            clock=clock,
            asked_ms=told or None,
        )
    )


def test_every_moment_has_a_code() -> None:
    newest = int(TIMES_MS[-1])
    moments = [newest, newest + MINUTE_MS, newest + 3 * MINUTE_MS, newest + 50 * 365 * DAY_MS]
    since_B, hour_B = asked(past(*moments))
    assert since_B.tolist() == [1, 2, 3, SINCE_CODES - 1]
    assert hour_B.tolist() == [1 + moment // (60 * MINUTE_MS) % 24 for moment in moments]
    assert int(hour_B.max()) < HOUR_CODES
    assert MAX_GAP_S == 365 * 86_400


@pytest.mark.parametrize("clock", ["time", "date", "order"])
def test_what_is_not_told_has_code_zero(clock: str) -> None:
    since_B, hour_B = asked(past(None, clock=clock))
    assert since_B.tolist() == hour_B.tolist() == [0]
    told_B, told_hour_B = asked(past(int(TIMES_MS[-1]), clock=clock))
    assert told_B.tolist() == [0 if clock == "order" else 1]
    assert (told_hour_B > 0).tolist() == [clock == "time"]


def test_after_each_event_it_is_the_moment_of_the_next_one() -> None:
    now = int(TIMES_MS[-1]) + 7 * MINUTE_MS
    since_BL, hour_BL = after_each(past(now))
    for place, moment in enumerate([*TIMES_MS[1:].tolist(), now]):
        since_B, hour_B = asked(past(moment, events=place + 1))
        assert since_BL[0, place] == since_B[0]
        assert hour_BL[0, place] == hour_B[0]
    assert not any(code_BL.any() for code_BL in after_each(past(None))), (
        "training hides all moments of a visitor at once"
    )


def test_a_moment_that_was_never_met_is_one_that_is_not_known() -> None:
    moment = Moment(4)
    with torch.no_grad():
        moment.since.weight[1:5].normal_()
    code = torch.tensor([0, 1, SINCE_CODES - 1])
    vector_BD = moment((code, torch.zeros_like(code)))
    assert vector_BD.any(1).tolist() == [False, True, False]


def learned(model: Behaviour, history: HistoryTensors, target_B: list[int]) -> torch.Tensor:
    """Scores of the items after training on these rows. [B, WIDTH]."""
    table_ND = torch.eye(WIDTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(120):
        optimizer.zero_grad()
        score_BN = last_BD(model(table_ND[history.item_BL], history), history.length_B) @ table_ND.T
        torch.nn.functional.cross_entropy(score_BN, torch.tensor(target_B)).backward()
        optimizer.step()
    return score_BN.detach()


@pytest.mark.parametrize("encoder", ["lstm", "gru", "transformer"])
def test_it_learns_what_is_wanted_at_once_and_what_another_day(encoder: str) -> None:
    torch.manual_seed(0)
    given = {"width": WIDTH, "hidden_width": 16, "max_len": 8, "encoder": encoder, "dropout": 0.0}
    newest = int(TIMES_MS[-1])
    history = past(newest + 1000, newest + DAY_MS)
    told = learned(Behaviour(ModelConfig.model_validate(given)).train(), history, [6, 7])
    assert told.argmax(1).tolist() == [6, 7]
    without = Behaviour(ModelConfig.model_validate({**given, "use_moment": False})).train()
    untold = learned(without, history, [6, 7])
    torch.testing.assert_close(untold[0], untold[1])


def test_the_fusion_turns_an_order_around_by_the_moment() -> None:
    torch.manual_seed(0)
    config = tinyshop.tiny().model
    catalogue = Catalogue.from_table(tinyshop.item_table(tinyshop.sequence_table()))
    items = ItemTable(catalogue, np.empty(0, np.int64), torch.empty(0, 3, 8, 8, dtype=torch.uint8))
    fusion = Fusion(config).eval()
    assert fusion.moment is not None
    newest, vector_ND = int(TIMES_MS[-1]), torch.randn(tinyshop.N_ITEMS + 1, config.width)
    history = past(newest, newest + DAY_MS, newest + DAY_MS)
    history = dataclasses.replace(history, since_s_B=history.since_s_B * torch.tensor([1, 1, -1]))

    def logits() -> torch.Tensor:
        candidate_BC, follow_BCF = torch.arange(1, 21).expand(3, -1), torch.ones(3, 20, FOLLOW_FEATURES)
        logit_BCH: torch.Tensor = fusion(
            items, history, torch.ones(3, config.width), candidate_BC, vector_ND, follow_BCF
        )
        return logit_BCH[..., 0]

    with torch.no_grad():
        fusion.out.weight.normal_()
        untrained = logits()
        fusion.moment.since.weight[1:].normal_(std=3)
        trained = logits()
    torch.testing.assert_close(untrained[0], untrained[1])
    assert trained[0].argsort().tolist() != trained[1].argsort().tolist()
    torch.testing.assert_close(trained[2], untrained[2])


def test_settings_of_before_have_no_moment() -> None:
    tree = tinyshop.tiny().model_dump(mode="json")
    assert saved_config(tree).model.use_moment
    del tree["model"]["use_moment"]
    assert not saved_config(tree).model.use_moment
