"""Encoders of behaviour behind one interface: causal, blind to padding and to the company in a batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rayrec.config import ModelConfig
from rayrec.history import HistoryBatch
from rayrec.model.behaviour import Behaviour, EventDropout, Recurrent, VariationalDropout, last_BD
from rayrec.model.history_tensors import HistoryTensors

ENCODERS = ("lstm", "gru", "transformer")
WIDTH = 8


def behaviour(encoder: str, **settings: object) -> Behaviour:
    torch.manual_seed(0)
    given = {"width": WIDTH, "hidden_width": 16, "layers": 2, "max_len": 12, "encoder": encoder, **settings}
    return Behaviour(ModelConfig.model_validate(given)).eval()


def histories(*lengths: int, longest: int = 12) -> HistoryTensors:
    rng = np.random.default_rng(1)
    shape = (len(lengths), longest)
    real_BL = np.arange(longest) < np.array(lengths)[:, None]
    return HistoryTensors.of(
        HistoryBatch(
            item_BL=rng.integers(1, 30, shape) * real_BL,
            action_BL=rng.integers(1, 5, shape) * real_BL,
            gap_s_BL=rng.integers(0, 9999, shape).astype(np.float32) * real_BL,
            hour_BL=rng.integers(0, 24, shape).astype(np.float32) * real_BL,
            seen_BL=np.zeros(shape, bool),
            length_B=np.array(lengths, np.int64),
            since_s_B=np.array([60.0 * 2**n for n in range(len(lengths))], np.float32),
            now_hour_B=np.arange(len(lengths), dtype=np.float32),
        )
    )


def vectors(history: HistoryTensors) -> torch.Tensor:
    table_ND = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(2))
    table_ND[0] = 0
    return table_ND[history.item_BL]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_comes_later_changes_nothing_before(encoder: str) -> None:
    model, history = behaviour(encoder), histories(12, 12)
    item_BLD = vectors(history)
    before = model(item_BLD, history)
    changed = item_BLD.clone()
    changed[:, 7] = -changed[:, 7]
    after = model(changed, history)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-5, "every later state remembers it"


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("lengths", [(12, 11, 10), (12, 1, 2), (12, 3, 0)], ids=["full", "packed", "with an empty one"])
def test_a_history_means_the_same_alone_and_in_company(encoder: str, lengths: tuple[int, ...]) -> None:
    model, history = behaviour(encoder), histories(*lengths)
    together_BD = last_BD(model(vectors(history), history), history.length_B)
    for row, length in enumerate(lengths):
        fields = {f.name: getattr(history, f.name)[row : row + 1] for f in dataclasses.fields(history)}
        trimmed = {name: value[:, : max(1, length)] if value.ndim == 2 else value for name, value in fields.items()}
        alone = HistoryTensors(**trimmed)
        alone_BD = last_BD(model(vectors(alone), alone), alone.length_B)
        torch.testing.assert_close(together_BD[row : row + 1], alone_BD, atol=1e-5, rtol=1e-4)
        assert bool(together_BD[row].any()) == (length > 0)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("field", ["action_BL", "gap_s_BL"])
def test_actions_and_gaps_are_read(encoder: str, field: str) -> None:
    model, history = behaviour(encoder), histories(5)
    other = dataclasses.replace(history, **{field: getattr(history, field).roll(1, dims=1)})
    assert not torch.allclose(model(vectors(history), history), model(vectors(history), other))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_batch_of_empty_histories_is_no_error(encoder: str) -> None:
    history = histories(0, 0)
    assert not last_BD(behaviour(encoder)(vectors(history), history), history.length_B).any()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_it_learns_the_order_of_events(encoder: str) -> None:
    """Whether item 1 or item 2 came first decides what is wanted: the last item alone, or the set of items, cannot."""
    model = behaviour(encoder, dropout=0.0, layer_norm=True, hidden_width=32).train()
    table_ND = torch.eye(WIDTH)
    item_BL = torch.tensor([[1, 2, 3], [2, 1, 3]])
    plain = torch.zeros_like(item_BL)
    moment_B = torch.full((2,), -1.0)
    history = HistoryTensors(
        *(item_BL, plain, plain.float(), plain.float(), plain.bool(), torch.tensor([3, 3]), moment_B, moment_B)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        score_BN = last_BD(model(table_ND[item_BL], history), history.length_B) @ table_ND.T
        loss = torch.nn.functional.cross_entropy(score_BN, torch.tensor([4, 5]))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_variational_dropout_drops_the_same_at_every_step() -> None:
    dropped = VariationalDropout(0.5).train()(torch.ones(4, 9, 200))
    assert (dropped == dropped[:, :1]).all()
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    torch.testing.assert_close(dropped[dropped > 0], torch.full_like(dropped[dropped > 0], 2.0))


def test_event_dropout_hides_whole_events() -> None:
    hidden = EventDropout(0.25).train()(torch.ones(50, 40, 3))
    shown_BL = hidden.any(-1)
    assert (hidden.sum(-1) == 3 * shown_BL).all()
    assert 0.7 < shown_BL.float().mean() < 0.8


@pytest.mark.parametrize("dropout", [VariationalDropout(0.5), EventDropout(0.5)])
def test_nothing_is_dropped_when_it_serves(dropout: torch.nn.Module) -> None:
    assert (dropout.eval()(torch.ones(2, 3, 4)) == 1).all()


def test_only_mixed_lengths_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    pack = torch.nn.utils.rnn.pack_padded_sequence
    monkeypatch.setattr(
        "rayrec.model.behaviour.pack_padded_sequence", lambda *a, **how: packed.append(1) or pack(*a, **how)
    )
    model = Recurrent(ModelConfig(width=WIDTH))
    model(torch.randn(3, 12, WIDTH), torch.tensor([12, 9, 8]))
    assert not packed
    model(torch.randn(3, 12, WIDTH), torch.tensor([12, 1, 2]))
    assert packed


def test_a_transformer_wants_a_width_that_its_heads_divide() -> None:
    with pytest.raises(ValueError, match=r"model\.width 8 must be a multiple of model\.heads 3"):
        behaviour("transformer", heads=3)
