"""Retrieval sources on a shop where the nearest, the following, the popular and the new are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
from shopfake import STYLES, FakeScorer, catalogue

from rayrec.catalogue import Catalogue
from rayrec.ranking.retrieval import Asked, Candidates, Retriever

SCORER = FakeScorer(catalogue(per_style=5, new_per_style=1))  # red-4, green-4, blue-4 are new
RETRIEVER = Retriever(SCORER.catalogue, SCORER.vectors_ND, SCORER.cooccurrence, 1000)


def rows(*item_ids: str) -> np.ndarray:
    return np.array([SCORER.catalogue.index[item_id] for item_id in item_ids], np.int64)


def ids(found: Candidates) -> list[str]:
    return SCORER.catalogue.ids[found.item_C].tolist()


def asked(taste: str | None = None, recent: tuple[str, ...] = (), anchors: tuple[str, ...] = ()) -> Asked:
    user_D = np.zeros(3, np.float32) if taste is None else np.eye(3, dtype=np.float32)[STYLES.index(taste)]
    return Asked(user_D[None], np.array([taste is not None]), [rows(*recent)], [rows(*anchors)])


def retrieve(what: Asked, *sources: str, n: int = 5, only: np.ndarray | None = None) -> Candidates:
    return RETRIEVER.retrieve(what, sources, n, None if only is None else [only])[0]


def test_model_finds_the_nearest() -> None:
    assert set(ids(retrieve(asked("green"), "model"))) == {f"green-{n}" for n in range(5)}


def test_model_has_nothing_for_an_unknown_visitor_or_without_vectors() -> None:
    assert ids(retrieve(asked(None), "model")) == []
    assert ids(retrieve(replace(asked("red"), user_BD=None), "model")) == []


def test_cooccurrence_finds_what_follows_newest_first() -> None:
    what = asked("red", recent=("red-0", "blue-1"))
    assert set(ids(retrieve(what, "cooccurrence"))) == {"red-1", "blue-2"}
    assert ids(retrieve(what, "cooccurrence", n=1)) == ["red-1"], "what follows the newest item weighs more"
    assert ids(retrieve(asked("red"), "cooccurrence")) == []


def test_popular_is_by_training_events() -> None:
    assert set(ids(retrieve(asked(), "popular", n=4))) == {"blue-0", "green-0", "red-0", "blue-1"}


def test_new_items_are_those_with_few_events_nearest_first() -> None:
    assert set(ids(retrieve(asked(), "new"))) == {"red-4", "green-4", "blue-4"}
    assert ids(retrieve(asked("green"), "new", n=1)) == ["green-4"]


def test_related_is_near_to_the_item_at_hand_and_follows_it() -> None:
    found = retrieve(asked("blue", anchors=("red-2",)), "related", n=3)
    assert "red-3" in ids(found)
    assert all(item_id.startswith("red") for item_id in ids(found))
    assert ids(retrieve(asked("blue"), "related")) == []


def test_merging_keeps_each_item_once_with_all_its_sources() -> None:
    found = retrieve(asked("red", recent=("red-0",)), "cooccurrence", "model", "popular", n=15)
    names = dict(zip(ids(found), map(found.names, found.source_C.tolist()), strict=True))
    assert len(names) == len(found.item_C) == 15
    assert names["red-1"] == ["cooccurrence", "model", "popular"]
    assert names["blue-0"] == ["model", "popular"]


def test_a_mask_narrows_every_source() -> None:
    only = np.zeros(len(SCORER.catalogue) + 1, bool)
    only[rows("red-1", "blue-4")] = True
    what = asked("red", recent=("red-0",), anchors=("red-0",))
    found = retrieve(what, "model", "cooccurrence", "popular", "new", "related", only=only)
    assert sorted(ids(found)) == ["blue-4", "red-1"]


def changed(items: Catalogue, **columns: list[object]) -> Catalogue:
    table = items.table
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    return Catalogue.from_table(table)


def test_items_that_left_the_catalogue_are_never_proposed() -> None:
    items = changed(SCORER.catalogue, in_catalogue=[n != 0 for n in range(15)])
    retriever = Retriever(items, SCORER.vectors_ND, SCORER.cooccurrence, 1000)
    what = asked("red", anchors=("red-1",))
    found = retriever.retrieve(what, ["model", "popular", "related"], 50)[0]
    assert "red-0" not in ids(found)
    assert len(found.item_C) == 14


def test_logs_without_a_catalogue_propose_everything() -> None:
    items = changed(SCORER.catalogue, in_catalogue=[False] * 15)
    retriever = Retriever(items, SCORER.vectors_ND, SCORER.cooccurrence, 1000)
    assert len(retriever.retrieve(asked(), ["popular"], 50)[0].item_C) == 15


def test_nan_vectors_come_last() -> None:
    vectors = SCORER.vectors_ND.copy()
    vectors[rows("red-0")] = np.nan
    found = Retriever(SCORER.catalogue, vectors, SCORER.cooccurrence, 1000).retrieve(asked("red"), ["model"], 14)[0]
    assert "red-0" not in ids(found)
