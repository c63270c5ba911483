"""Which event teaches which stage: each exactly once, and what is withheld never. Against a naive loop."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import tinyshop
from hypothesis import given
from hypothesis import strategies as st

from rayrec.data.cooccurrence import count_transitions
from rayrec.schema import ACTION_CODE, ACTIONS, SEQUENCE_SCHEMA
from rayrec.training.windows import (
    Flat,
    examples,
    first_stage_events,
    fusion_mask,
    next_item_windows,
    only_read,
    tail,
)

VIEW, CLICK, CART, FAVORITE, PURCHASE, RATE = (
    ACTION_CODE[name] for name in ("view", "click", "cart", "favorite", "purchase", "rate")
)
TARGETS = [f"{action}_{split}_at" for action in ("purchase", "cart") for split in ("valid", "test")]


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """Visitors of 0 to 14 events, each event an item of its own, with any split that prepare could write."""
    rows, item = [], 0
    for user in range(draw(st.integers(1, 6))):
        length = draw(st.integers(0, 14))
        kinds = st.sampled_from([VIEW, CLICK, CART, FAVORITE, PURCHASE, RATE])
        actions = draw(st.lists(kinds, min_size=length, max_size=length))
        n_train = draw(st.integers(0, length))
        withheld = []
        for wanted in (PURCHASE, CART):
            places = [place for place, action in enumerate(actions) if action == wanted and place]
            withheld += [-1, -1, *places][-2:] if draw(st.booleans()) else [-1, -1]
        rows.append(
            {
                "user_id": f"user {user}",
                "item": list(range(item + 1, item + length + 1)),
                "action": actions,
                "time_ms": [1000 * place for place in range(length)],
                "n_train": n_train,
                "valid_at": -1,
                "test_at": -1,
                **dict(zip(TARGETS, withheld, strict=True)),
            }
        )
        item += length
    return pa.Table.from_pylist(rows, schema=SEQUENCE_SCHEMA)


def trainable(row: dict[str, Any]) -> list[int]:
    withheld = [row[name] for name in TARGETS]
    return [place for place in range(1, row["n_train"]) if place not in withheld]


def naive_fusion(table: pa.Table, share: float) -> set[int]:
    """Items, which are events here, that teach the fusion, of the visitors that the mask chooses."""
    flat = Flat(table)
    chosen = {table["user_id"][u].as_py() for u in flat.visitor_A[fusion_mask(flat, table, share)]}
    found = set()
    for row in table.to_pylist():
        if row["user_id"] in chosen:
            places = trainable(row)
            for actions in ({*range(16)}, {VIEW, CLICK}, {CART}, {FAVORITE}, {PURCHASE}):
                those = [place for place in places if row["action"][place] in actions]
                found |= {row["item"][place] for place in those[-tail(len(those)) :]}
    return found


@given(tables(), st.integers(1, 6), st.sampled_from([0.0, 0.4, 0.999]))
def test_every_event_teaches_one_stage_once_and_what_is_withheld_none(
    table: pa.Table, max_len: int, share: float
) -> None:
    fusion = naive_fusion(table, share) if share else set()
    windows = next_item_windows(table, max_len, share).to_pylist()
    targets = Counter(target for row in windows for target in row["target"] if target)
    every = {row["item"][place] for row in table.to_pylist() for place in trainable(row)}
    assert targets == Counter(every - fusion)
    for row in windows:
        assert 1 <= len(row["item"]) <= max_len
        assert any(row["target"])
        assert len(row["item"]) == len(row["action"]) == len(row["time_ms"]) == len(row["target"])
        # items are numbered in order, so the next event of n is n + 1
        assert all(target in (0, item + 1) for item, target in zip(row["item"], row["target"], strict=True))
        assert row["item"] == list(range(row["item"][0], row["item"][0] + len(row["item"])))
    if share:
        taught = examples(table, max_len, share)["target"].to_pylist()
        assert Counter(taught) == Counter(fusion)


@given(tables(), st.integers(1, 6))
def test_examples_hold_the_newest_events_before_each_target(table: pa.Table, max_len: int) -> None:
    rows = examples(table, max_len).to_pylist()
    wanted = [
        {
            "item": row["item"][max(0, place - max_len) : place],
            "action": row["action"][max(0, place - max_len) : place],
            "time_ms": row["time_ms"][max(0, place - max_len) : place],
            "target": row["item"][place],
            "target_action": row["action"][place],
            "asked_ms": row["time_ms"][place],
        }
        for row in table.to_pylist()
        for place in trainable(row)
    ]
    assert rows == wanted


@given(tables(), st.sets(st.sampled_from(ACTIONS), min_size=1))
def test_sequences_of_some_actions_are_as_if_the_others_were_never_logged(table: pa.Table, read: set[str]) -> None:
    codes = {ACTION_CODE[action] for action in read}
    found = only_read(table, sorted(read))
    assert found.schema == SEQUENCE_SCHEMA
    for row, kept in zip(table.to_pylist(), found.to_pylist(), strict=True):
        places = [place for place, code in enumerate(row["action"]) if code in codes]
        for name in ("item", "action", "time_ms"):
            assert kept[name] == [row[name][place] for place in places]
        assert kept["user_id"] == row["user_id"]
        assert kept["n_train"] == sum(place < row["n_train"] for place in places)
        for name in ("valid_at", "test_at", *TARGETS):
            assert kept[name] == (places.index(row[name]) if row[name] in places else -1)
        # What was withheld from training is withheld still.
        taught = {kept["item"][place] for place in trainable(kept)}
        assert taught <= {row["item"][place] for place in trainable(row)}


def test_windows_are_cut_from_the_newest_event_backwards() -> None:
    row = {"user_id": "u", "item": [1, 2, 3, 4, 5, 6], "action": [VIEW] * 6, "time_ms": list(range(6)), "n_train": 6}
    row |= dict.fromkeys(["valid_at", "test_at", *TARGETS], -1)
    table = next_item_windows(pa.Table.from_pylist([row], schema=SEQUENCE_SCHEMA), 3, 0.0)
    assert sorted(zip(table["item"].to_pylist(), table["target"].to_pylist(), strict=True)) == [
        ([1, 2], [2, 3]),
        ([3, 4, 5], [4, 5, 6]),
    ]


def test_the_fusion_visitors_are_the_same_wherever_they_lie_and_about_the_share() -> None:
    table = tinyshop.sequence_table(users=400)
    flat = Flat(table)
    mask_A = fusion_mask(flat, table, 0.3)
    chosen = set(np.unique(flat.visitor_A[mask_A]).tolist())
    assert 0.2 < len(chosen) / 400 < 0.4
    reverse = table.take(pa.array(np.arange(400)[::-1]))
    flat_reverse = Flat(reverse)
    again = {399 - u for u in np.unique(flat_reverse.visitor_A[fusion_mask(flat_reverse, reverse, 0.3)]).tolist()}
    assert again == chosen
    more = set(np.unique(flat.visitor_A[fusion_mask(flat, table, 0.6)]).tolist())
    assert chosen < more


def test_transition_counts_of_the_first_stage_do_not_see_what_teaches_the_fusion() -> None:
    table = tinyshop.sequence_table()
    item_A, offsets = first_stage_events(table, 0.3)
    flat = Flat(table)
    mask_A = fusion_mask(flat, table, 0.3)
    assert mask_A.any()
    assert not item_A[mask_A].any()
    assert offsets[-1] == len(item_A) == len(flat.item_A)
    some = count_transitions(item_A, offsets, tinyshop.N_ITEMS).sum()
    every = count_transitions(*first_stage_events(table, 0.0), tinyshop.N_ITEMS).sum()
    assert 0 < some < every


def test_no_visitors_give_no_rows() -> None:
    nothing = pa.Table.from_pylist([], schema=SEQUENCE_SCHEMA)
    assert len(next_item_windows(nothing, 5, 0.3)) == len(examples(nothing, 5)) == 0
