"""Batches: every row once, in step with the other workers, and the same histories that serving sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import tinyshop
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrec.data.dataset import Dataset
from rayrec.history import encode_history
from rayrec.model.recommender import Lists, Recommender, build
from rayrec.model.scorer import Scorer
from rayrec.schema import ACTION_CODE, ACTIONS
from rayrec.training.batches import KeptBatches, ListCollate, NextItemCollate, PairCollate, history_of, minibatches
from rayrec.training.survey import survey
from rayrec.training.windows import examples, next_item_windows, only_read

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tinyshop.write(tmp_path_factory.mktemp("shop") / "dataset")


@pytest.fixture(scope="module")
def scorer(dataset: Dataset) -> Scorer:
    torch.manual_seed(0)
    catalogue = dataset.catalogue()
    model = build(tinyshop.tiny(), catalogue).eval()
    assert isinstance(model, Recommender)
    followers = survey(dataset, len(catalogue), tinyshop.tiny()).first_stage
    return Scorer(model, catalogue, model.encode_items().numpy(), followers, dataset.clock)


def rows_of(lengths: list[int]) -> pa.Table:
    return pa.table({"row": range(len(lengths)), "item": [[1] * n for n in lengths]})


@settings(max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_every_row_comes_once_and_the_number_of_batches_depends_on_their_number_alone(
    lengths: list[int], batch_size: int, bucket: bool, seed: int
) -> None:
    table = rows_of(lengths)
    batches = list(minibatches([table], batch_size, np.random.default_rng(seed), bucket=bucket))
    assert Counter(row for batch in batches for row in batch["row"].to_pylist()) == Counter(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)


def test_rows_of_like_length_go_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 400).tolist()
    batches = list(minibatches([rows_of(lengths)], 50, np.random.default_rng(1)))
    spread = [np.ptp([len(items) for items in batch["item"].to_pylist()]) for batch in batches]
    assert max(spread) < 15
    mean = [np.mean([len(items) for items in batch["item"].to_pylist()]) for batch in batches]
    assert mean != sorted(mean), "but the batches come in any order"


def test_the_order_is_that_of_the_seed() -> None:
    def order(seed: int) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return [batch["row"].to_pylist() for batch in minibatches([rows_of([1] * 20)], 4, rng)]

    assert order(1) == order(1) != order(2)


def test_targets_lie_under_their_events(dataset: Dataset) -> None:
    rows = next_item_windows(dataset.sequences(), 6, 0.3)
    batch = NextItemCollate(6, "time", CPU, pin=False)(rows)
    assert len(batch) == len(rows)
    for row, item_L, target_L in zip(rows.to_pylist(), batch.history.item_BL, batch.target_BL, strict=True):
        length = len(row["item"])
        assert item_L[:length].tolist() == row["item"]
        assert target_L[:length].tolist() == row["target"]
        assert not target_L[length:].any()


def test_a_slice_of_rows_gives_its_own_histories(dataset: Dataset) -> None:
    rows = examples(dataset.sequences(), 5)
    whole, part = history_of(rows, 5, "time"), history_of(rows[7:11], 5, "time")
    np.testing.assert_array_equal(whole.item_BL[7:11], part.item_BL)
    np.testing.assert_array_equal(whole.gap_s_BL[7:11], part.gap_s_BL)


@pytest.mark.parametrize(("actions", "at_least"), [(ACTIONS, 50), (("purchase",), 15)])
def test_a_visitor_has_the_same_vector_in_training_and_in_serving(
    dataset: Dataset, scorer: Scorer, actions: tuple[str, ...], at_least: int
) -> None:
    """The newest window of training, and the whole history cut by the encoder as a server would."""
    codes = [ACTION_CODE[action] for action in actions]
    sequences = only_read(dataset.sequences(), actions)
    max_len = 6
    windows = next_item_windows(sequences, max_len, 0.0)
    batch = NextItemCollate(max_len, dataset.clock, CPU, pin=False)(windows)
    model = scorer.model
    assert isinstance(model, Recommender)
    vector_ND = torch.from_numpy(np.array(scorer.vectors_ND))
    with torch.no_grad():
        state_BLD = model.behaviour(vector_ND[batch.history.item_BL], batch.history)
    trained = {}
    for row, state_LD in zip(windows.to_pylist(), state_BLD, strict=True):
        trained[(row["time_ms"][-1], row["item"][-1])] = state_LD[len(row["item"]) - 1].numpy()
    compared = 0
    for row in dataset.sequences().to_pylist():
        read = [place for place, code in enumerate(row["action"][: row["n_train"]]) if code in codes]
        if len(read) < 2:
            continue
        end = read[-1]  # the last training event that is read is a target
        events = [row[name][:end] for name in ("item", "action", "time_ms")]
        served = encode_history(*events, [0, end], max_len=max_len, clock=dataset.clock, actions=actions)
        key = (row["time_ms"][read[-2]], row["item"][read[-2]])
        if key in trained:
            np.testing.assert_allclose(scorer.user_vectors(served)[0], trained[key], atol=1e-5)
            compared += 1
    assert compared > at_least


def test_a_list_holds_its_target(dataset: Dataset, scorer: Scorer) -> None:
    rows = examples(dataset.sequences(), 10, 0.3)
    collate = ListCollate(scorer, CPU)
    batch = collate(rows)
    assert collate.rows == len(rows) == len(batch) + collate.missed
    assert len(batch) > 0
    placed = batch.candidate_BC[torch.arange(len(batch)), batch.target_B].tolist()
    history = history_of(rows, 10, "time")
    candidate_BC, follow_BCF = scorer.candidates(history)
    found = [n for n, target in enumerate(rows["target"].to_pylist()) if target in candidate_BC[n]]
    assert placed == [rows["target"][n].as_py() for n in found]
    assert batch.action_B.tolist() == [rows["target_action"][n].as_py() for n in found]
    np.testing.assert_array_equal(batch.follow_BCF.numpy(), follow_BCF[found])
    np.testing.assert_array_equal(
        batch.history.item_BL.numpy(), history.item_BL[found][:, : batch.history.item_BL.shape[1]]
    )


def test_a_batch_whose_targets_were_all_missed_teaches_nothing_and_breaks_nothing(
    dataset: Dataset, scorer: Scorer
) -> None:
    rows = examples(dataset.sequences(), 10, 0.3)[:3]
    found_BC, _ = scorer.candidates(history_of(rows, 10, "time"))
    others = [next(n for n in range(1, tinyshop.N_ITEMS) if n not in row) for row in found_BC]
    missed = rows.set_column(rows.schema.get_field_index("target"), "target", pa.array(others, pa.int32()))
    batch = ListCollate(scorer, CPU)(missed)
    assert len(batch) == 0
    model = scorer.model
    assert isinstance(model, Recommender)
    model.vector_ND = torch.from_numpy(np.array(scorer.vectors_ND))
    loss = model(batch)
    loss.backward()
    model.vector_ND = None
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.fusion.parameters())


def test_pairs_are_the_target_and_items_at_random(dataset: Dataset) -> None:
    rows = examples(dataset.sequences(), 10)[:8]
    batches = list(PairCollate(10, "time", tinyshop.N_ITEMS, 0, CPU)(rows, np.random.default_rng(0)))
    assert [len(batch) for batch in batches] == [8] * 5  # four negatives a positive
    histories = history_of(rows, 10, "time").item_BL
    right = Counter()
    for batch in batches:
        assert all(1 <= item <= tinyshop.N_ITEMS for item in batch.item_P.tolist())
        for visitor, item, label in zip(batch.visitor_P, batch.item_P, batch.label_P, strict=True):
            past = batch.history.item_BL[visitor].numpy()
            if label:
                length = int(batch.history.length_B[visitor])
                same = (histories[:, : len(past)] == past).all(1) & ((histories > 0).sum(1) == length)
                right[int(np.flatnonzero(same)[0]), int(item)] += 1
    assert right == Counter(enumerate(rows["target"].to_pylist()))
    assert len(next(PairCollate(10, "time", 40, 2, CPU)(rows, np.random.default_rng(0)))) == 8


# ---------------------------------------------------------------- kept batches


@pytest.fixture
def made(dataset: Dataset, scorer: Scorer) -> tuple[KeptBatches, list[int]]:
    """Batches of lists, and how many were made in each epoch."""
    rows, counts = examples(dataset.sequences(), 6, 0.3), list[int]()
    collate = ListCollate(scorer, CPU)

    def make(rng: np.random.Generator) -> Iterator[Lists]:
        counts.append(0)
        for part in minibatches([rows], 8, rng):
            counts[-1] += 1
            yield collate(part)

    return KeptBatches(make), counts


def order(batches: KeptBatches, epoch: int) -> list[int]:
    return [id(batch) for batch in batches(np.random.default_rng(epoch))]


def test_kept_batches_are_made_once_and_come_in_another_order(made: tuple[KeptBatches, list[int]]) -> None:
    batches, counts = made
    first, second, third = (order(batches, epoch) for epoch in range(3))
    assert sorted(first) == sorted(second) == sorted(third)
    assert len({*map(tuple, (first, second, third))}) == 3
    assert counts == [len(first)]


def test_an_epoch_of_several_passes_goes_through_what_was_made_once(made: tuple[KeptBatches, list[int]]) -> None:
    once, counts = made
    batches = KeptBatches(once.make, passes=3)
    first, second = order(batches, 0), order(batches, 1)
    n = counts[0]
    assert len(first) == len(second) == 3 * n
    assert counts == [n]
    passes = [first[start : start + n] for start in range(0, 3 * n, n)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert len({*map(tuple, passes)}) == 3


def test_batches_that_do_not_fit_are_made_anew(
    made: tuple[KeptBatches, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, counts = made
    size_bytes = next(batches(np.random.default_rng(0))).nbytes
    monkeypatch.setattr("rayrec.training.batches.KEPT_BYTES", 2 * size_bytes)
    assert len(order(batches, 0)) == len(order(batches, 1)) == counts[-1] > 2


def test_an_epoch_cut_short_keeps_nothing(made: tuple[KeptBatches, list[int]]) -> None:
    batches, counts = made
    next(batches(np.random.default_rng(0)))
    whole = order(batches, 1)
    assert counts == [1, len(whole)]
