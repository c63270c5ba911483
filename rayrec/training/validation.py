"""What decides which epoch of a training is best: some visitors' validation events, and a figure.

In: a dataset, settings. Out: the sequences to judge on. It must not know models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from rayrec.config import TrainConfig
from rayrec.data.dataset import Dataset
from rayrec.schema import SEQUENCE_SCHEMA
from rayrec.training.survey import read_shards


def judged_visitors(dataset: Dataset, train: TrainConfig, shards: Sequence[str] = ()) -> pa.Table:
    """Sequences of a seeded sample of the visitors that have a validation event: `train.valid_users` of them.

    Memory holds a shard at a time, and a number of every visitor. shards: as of `read_shards`, which says what is
    raised.
    """
    skip = train.bad_shards == "skip"
    targets = {path: table["valid_at"].to_numpy() for path, table in read_shards(dataset, skip, shards, ["valid_at"])}
    first = np.cumsum([0, *map(len, targets.values())])
    tested = np.flatnonzero(np.concatenate([*targets.values(), np.empty(0, np.int64)]) >= 0)
    chosen = np.sort(np.random.default_rng(train.seed).permutation(tested)[: train.valid_users])
    begins = dict(zip(targets, first, strict=False))
    parts = [SEQUENCE_SCHEMA.empty_table()]
    wanted = {path: chosen[(chosen >= at) & (chosen < at + len(targets[path]))] - at for path, at in begins.items()}
    asked = [path for path, rows in wanted.items() if len(rows)]
    for path, table in read_shards(dataset, skip, asked) if asked else ():
        parts.append(table.select(SEQUENCE_SCHEMA.names).take(pa.array(wanted[path])))
    return pa.concat_tables(parts)


def score(metrics: dict[str, float]) -> float:
    """The mean NDCG@10 of the protocols, new items and all items."""
    return sum(metrics.values()) / len(metrics)
