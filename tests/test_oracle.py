"""What the oracle is asked in evaluation: each visitor's history, and the moment only where it is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import tinyshop

from rayrec.data.dataset import Dataset
from rayrec.data.sample_oracle import Oracle, Query
from rayrec.evaluation.oracle import oracle_figures


class Asked:
    """An oracle that knows one thing: what each visitor of the walks takes next."""

    def __init__(self) -> None:
        self.queries: list[Query] = []

    def scores_batch(self, queries: Sequence[Query], item_ids: Sequence[str]) -> np.ndarray:
        self.queries += queries
        place = {item_id: n for n, item_id in enumerate(item_ids)}
        scores = np.zeros((len(queries), len(item_ids)))
        for row, query in enumerate(queries):
            scores[row, tinyshop.after(place[query.item_ids[-1]] + 1) - 1] = 1.0
        return scores


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tinyshop.write(tmp_path_factory.mktemp("shop") / "dataset")


@pytest.mark.parametrize("is_told", [False, True])
def test_it_is_asked_for_the_last_event_of_each_visitor(dataset: Dataset, is_told: bool) -> None:
    oracle = Asked()
    figures: Any = oracle_figures(cast(Oracle, oracle), dataset, is_told=is_told)
    rows = {row["user_id"]: row for row in dataset.sequences().to_pylist()}
    assert {query.user_id for query in oracle.queries} == set(rows)
    for query in oracle.queries:
        *before, target = rows[query.user_id]["time_ms"]
        assert list(query.times_ms) == before
        assert query.next_time_ms == (target if is_told else None)
    assert figures["next"]["ndcg@10"] > 0.7, "one step in ten goes anywhere"
