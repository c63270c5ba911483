"""The moment of asking: what a model reads of it, that it matters where it decides, and not where it is not known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tinyshop
import torch

from rayrec.catalogue import Catalogue
from rayrec.history import MAX_GAP_S, encode_history
from rayrec.model.candidates import FOLLOW_FEATURES
from rayrec.model.encoders import ItemTable
from rayrec.model.fusion import Candidates, Fusion
from rayrec.model.history_tensors import HistoryTensors
from rayrec.model.moment import HOUR_CODES, SINCE_CODES, Moment, asked
from rayrec.settings import with_settings

MINUTE_MS, DAY_MS = 60_000, 86_400_000
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


def test_a_moment_that_was_never_met_is_one_that_is_not_known() -> None:
    moment = Moment(4)
    with torch.no_grad():
        moment.since.weight[1:5].normal_()
    code = torch.tensor([0, 1, SINCE_CODES - 1])
    vector_BD = moment((code, torch.zeros_like(code)))
    assert vector_BD.any(1).tolist() == [False, True, False]


@pytest.fixture(scope="module")
def items() -> ItemTable:
    catalogue = Catalogue.from_table(tinyshop.item_table(tinyshop.sequence_table()))
    return ItemTable(catalogue, np.empty(0, np.int64), torch.empty(0, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("use_moment", [True, False])
def test_the_fusion_learns_what_is_wanted_at_once_and_what_another_day(items: ItemTable, use_moment: bool) -> None:
    """The last item again within minutes, another one a day later: of the same history and candidates."""
    torch.manual_seed(0)
    config = with_settings(tinyshop.tiny(), [f"model.use_moment={use_moment}"]).model
    fusion, newest = Fusion(config), int(TIMES_MS[-1])
    vector_ND = torch.randn(tinyshop.N_ITEMS + 1, config.width)
    last, other = len(TIMES_MS), 20
    candidate_BC = torch.arange(1, 31).expand(3, -1)
    history = past(newest + 1000, newest + DAY_MS, newest + 300 * DAY_MS)

    def logits() -> torch.Tensor:
        candidates = Candidates.of(items, candidate_BC, vector_ND, torch.ones(3, 30, FOLLOW_FEATURES))
        past_BLD = vector_ND[history.item_BL]
        logit_BCH: torch.Tensor = fusion(items, history, torch.ones(3, config.width), candidates, past_BLD)
        return logit_BCH[..., 0]

    optimizer = torch.optim.Adam(fusion.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits()[:2], torch.tensor([last - 1, other - 1])).backward()
        optimizer.step()
    fusion.eval()
    found_BC = logits().detach()
    if use_moment:
        assert candidate_BC[0, found_BC[:2].argmax(1)].tolist() == [last, other]
        history = dataclasses.replace(history, since_s_B=torch.full((3,), -1.0))
        torch.testing.assert_close(found_BC[2], logits().detach()[2])
    else:
        torch.testing.assert_close(found_BC[0], found_BC[1])
