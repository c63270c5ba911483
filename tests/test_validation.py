"""Whom a training is judged on: the same sample however the visitors lie in shards, and what a broken shard does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tinyshop

from rayrec.config import TrainConfig
from rayrec.data.dataset import Dataset
from rayrec.errors import DataError
from rayrec.training.survey import read_shards
from rayrec.training.validation import judged_visitors


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return tinyshop.write(tmp_path / "dataset", users=40)


def test_it_is_a_seeded_sample_of_those_with_a_target_in_their_order(dataset: Dataset) -> None:
    whole = dataset.sequences()
    tested = whole.filter(np.asarray(whole["valid_at"]) >= 0)
    everybody = judged_visitors(dataset, TrainConfig(valid_users=1000))
    assert everybody == tested
    some = judged_visitors(dataset, TrainConfig(valid_users=12))
    users = tested["user_id"].to_pylist()
    places = [users.index(user) for user in some["user_id"].to_pylist()]
    assert len(places) == 12
    assert places == sorted(places)
    assert min(places) < 20 <= max(places), "of both shards"
    assert some == judged_visitors(dataset, TrainConfig(valid_users=12))
    assert some != judged_visitors(dataset, TrainConfig(valid_users=12, seed=1))


def test_of_named_shards_only_these(dataset: Dataset) -> None:
    paths = [path for path, _ in read_shards(dataset)]
    theirs = dataset.sequences(shards=paths[1:])
    some = judged_visitors(dataset, TrainConfig(valid_users=1000), paths[1:])
    assert some == theirs.filter(np.asarray(theirs["valid_at"]) >= 0)


def test_a_shard_that_broke_since_is_named_or_left_out(dataset: Dataset) -> None:
    paths = [path for path, _ in read_shards(dataset)]
    whole = Path(paths[0]).read_bytes()
    Path(paths[0]).write_bytes(whole[:-200])
    with pytest.raises(DataError, match=r"0[.]parquet: this shard cannot be read"):
        judged_visitors(dataset, TrainConfig(), paths)
    left = judged_visitors(dataset, TrainConfig(bad_shards="skip"), paths)
    Path(paths[0]).write_bytes(whole)
    assert left == judged_visitors(dataset, TrainConfig(), paths[1:])


def test_of_nobody_with_a_target_it_is_empty(tmp_path: Path) -> None:
    nobody = tinyshop.sequence_table(users=4)
    place = nobody.schema.get_field_index("valid_at")
    field = nobody.schema.field(place)
    untested = nobody.set_column(place, field, pa.array([-1] * 4, field.type))
    dataset = tinyshop.write(tmp_path / "dataset", sequences=untested)
    assert len(judged_visitors(dataset, TrainConfig())) == 0
