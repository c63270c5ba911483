"""What the first stage learns from, a batch at a time, for benches that time its steps or count its events.

In: sequences, settings. Out: batches, in the same order each time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from rayrec.config import Config
from rayrec.model.recommender import NextItems
from rayrec.training.batches import NextItemCollate, minibatches
from rayrec.training.windows import stage_rows


def batches(sequences: pa.Table, clock: str, config: Config) -> Iterator[NextItems]:
    """An epoch. sequences: schema.SEQUENCE_SCHEMA, of a dataset with that clock."""
    rows = stage_rows(sequences, "retrieval", config).combine_chunks()
    collate = NextItemCollate(config.model.max_len, clock, torch.device("cpu"), pin=False)
    return map(collate, minibatches([rows], config.train.batch_size, np.random.default_rng(0)))
