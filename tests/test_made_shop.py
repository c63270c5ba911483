"""The shop that benches serve: its bundle opens and serves, its state is one that the service reads."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from rayrec.bench.made_shop import fill_state, item_id, make_bundle, user_id
from rayrec.bundle import Bundle
from rayrec.config import ServeConfig
from rayrec.ranking.pipeline import Ranker
from rayrec.ranking.requests import Request
from rayrec.serving.editing import editor
from rayrec.serving.scorer import load_scorer
from rayrec.state import open_state
from rayrec.state.protocol import ItemEdit


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "bundles"
    make_bundle(folder, 3000)
    return folder


def test_its_model_answers_from_every_source(bundles: Path, tmp_path: Path) -> None:
    fill_state(tmp_path / "state.db", users=5, events=60, items=3000)
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    scorer = load_scorer(Bundle.open(bundles))
    assert scorer.vectors_ND.shape == (3001, 64)
    (answer,) = Ranker(scorer, ServeConfig()).recommend([Request(user_id(3))], state)
    assert (answer.served_by, len(answer.items), answer.without) == ("model", 10, ())
    assert answer.candidates["model"] == answer.candidates["popular"] == ServeConfig().per_source
    assert answer.candidates["cooccurrence"] > 100
    assert answer.candidates["new"] == 15
    state.close()


def test_its_items_can_be_edited(bundles: Path) -> None:
    bundle = Bundle.open(bundles)
    assert bundle.catalogue.ids[1:].tolist() == [item_id(n) for n in range(3000)], "most popular first"
    edit = ItemEdit(1, item_id(7), {"price": 9.5}, 0)
    scorer, rows = editor(bundle)(load_scorer(bundle), [edit], {})
    assert (rows.tolist(), scorer.catalogue.price[8]) == ([8], 9.5)


def test_the_state_is_as_if_events_had_come_one_by_one(tmp_path: Path) -> None:
    fill_state(tmp_path / "state.db", users=7, events=30, items=100)
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    assert state.counts() == {"events": 210, "shown": 0, "erased": 0}
    assert sorted(state.visitors()) == [user_id(n) for n in range(7)]
    (history,) = state.histories([user_id(2)], 100)
    assert len(history.acts) == 30
    assert list(history.acts) == sorted(history.acts, key=lambda act: act.time_ms)
    assert {act.item_id for act in history.acts} <= {item_id(n) for n in range(100)}
    state.close()
    fresh = open_state(f"sqlite:///{tmp_path}/fresh.db")
    fresh.close()
    schemas = []
    for name in ("state.db", "fresh.db"):
        with sqlite3.connect(tmp_path / name) as db:
            schemas.append(set(db.execute("SELECT name, sql FROM sqlite_master").fetchall()))
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        db.close()
    assert schemas[0] == schemas[1]


def test_it_is_seeded(bundles: Path, tmp_path: Path) -> None:
    again = make_bundle(tmp_path / "again", 3000)
    np.testing.assert_array_equal(again.vectors_ND, Bundle.open(bundles).vectors_ND)
    assert again.catalogue.table == Bundle.open(bundles).catalogue.table
