"""A dataset with cold items on purpose: a share of the items is taken out of all that is learned from.

In: a dataset, a share, a seed. Out: another dataset folder. It must not know who is trained on it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayrec.data.dataset import Dataset
from rayrec.data.kept_events import keep_events
from rayrec.data.training_events import TrainingEvents, flat
from rayrec.errors import DataError
from rayrec.files import filesystem
from rayrec.history import Ints
from rayrec.schema import ITEM_SCHEMA, SEQUENCE_SCHEMA

TARGETS = tuple(name for name in SEQUENCE_SCHEMA.names if name.endswith("_at"))


def withhold(dataset: Dataset, folder: Path, share: float, seed: int) -> Dataset:
    """Write `folder`: the dataset in which a seeded `share` of the items with training events has none any more.

    Their events among a visitor's first `n_train` are gone, also from histories; later ones stay, as what is to be
    foreseen or was just met. A target that loses its whole history is none any more. The manifest names the items.
    Raises DataError if the share is of no item.
    """
    catalogue, sequences = dataset.catalogue(), dataset.sequences()
    known = np.flatnonzero(catalogue.n_train > 0)
    cold = np.sort(np.random.default_rng(seed).permutation(known)[: round(share * len(known))])
    if not len(cold):
        raise DataError(f"{dataset.path}: {share:.0%} of {len(known)} items with training events is no item")
    left = without_training_events(sequences, cold)
    count_N = np.bincount(TrainingEvents.of(left).item_E, minlength=len(catalogue) + 1)
    items = catalogue.table.set_column(
        ITEM_SCHEMA.get_field_index("n_train"), ITEM_SCHEMA.field("n_train"), pa.array(count_N[1:], pa.int64())
    )
    fs, root = filesystem(dataset.path)
    for name in ("images", "vocab"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        if dataset.has(name):
            pafs.copy_files(
                f"{root}/{name}",
                str(folder / name),
                source_filesystem=fs,
                destination_filesystem=pafs.LocalFileSystem(),
            )
    for name, table in {"sequences": left, "items": items}.items():
        (folder / name).mkdir(exist_ok=True)
        pq.write_table(table, folder / name / "0.parquet")
    named = {"share": share, "seed": seed, "from": dataset.path, "items": catalogue.ids[cold].tolist()}
    facts = {name: fact for name, fact in dataset.manifest.items() if name != "intake"}  # nothing can be added to it
    (folder / "manifest.json").write_text(json.dumps({**facts, "withheld": named}))  # last: now it exists
    return Dataset.open(str(folder))


def without_training_events(sequences: pa.Table, cold: Ints) -> pa.Table:
    """The sequences (SEQUENCE_SCHEMA) without the events of the items `cold` among each row's first `n_train`.

    A target that has no history left is none, and a row without events is gone.
    """
    item_A, offsets = flat(sequences, "item")
    length_U = np.diff(offsets)
    place_A = np.arange(len(item_A)) - np.repeat(offsets[:-1], length_U)
    n_train_A = np.repeat(np.asarray(sequences["n_train"], np.int64), length_U)
    left = keep_events(sequences, ~(np.isin(item_A, cold) & (place_A < n_train_A)))
    for name in TARGETS:
        place_U = np.asarray(left[name], np.int64)
        at = SEQUENCE_SCHEMA.get_field_index(name)
        left = left.set_column(at, SEQUENCE_SCHEMA.field(at), pa.array(np.where(place_U > 0, place_U, -1), pa.int32()))
    return left.filter(pc.greater(pc.list_value_length(left["item"]), 0))
