from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from evaluation_shop import random_shop, sequence_table, write_dataset

from rayrec.evaluation.floors import Popular
from rayrec.evaluation.judge import evaluate

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.mark.parametrize("users", [None, 15])
def test_the_cluster_answers_as_one_process_does(tmp_path: Path, users: int | None) -> None:
    sequences, items = random_shop(0, users=90, n_items=25)
    dataset = write_dataset(tmp_path / "shop", sequences, items, shards=3)
    make = partial(Popular, dataset.catalogue().n_train)
    here = evaluate(make, dataset, "test", max_len=10, batch=8, users=users, parallel=False)
    there = evaluate(make, dataset, "test", max_len=10, batch=8, users=users, parallel=True)
    assert here["users"] == (users or there["users"]) > 10
    assert there == here


def test_the_cluster_has_nobody_to_ask(tmp_path: Path) -> None:
    sequences = sequence_table([1, 2], [2])
    _, items = random_shop(0, users=5, n_items=3)
    dataset = write_dataset(tmp_path / "shop", sequences, items, shards=1)
    result = evaluate(partial(Popular, dataset.catalogue().n_train), dataset, "test", max_len=10)
    assert result["users"] == 0
