"""The replay over a Ray cluster: users in blocks, a pool of actors that each hold the rankers.

In: a dataset, makers of rankers, settings. Out: the same answers as `replay`, in any order.
It must not know what is asked. Ray must be running, or may be started by Ray Data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, cast

import pyarrow as pa
import ray
import ray.data

from rayrec.cluster import quiet_data
from rayrec.data.dataset import Dataset
from rayrec.evaluation.floors import Ranker
from rayrec.evaluation.replay import ANSWER_SCHEMA, ReplaySettings, replay
from rayrec.files import filesystem
from rayrec.progress import Task

Makers: TypeAlias = dict[str, Callable[[], Ranker]]

BATCHES_AT_ONCE = 4
ACTOR_CPUS = 0.5
"""Less than a CPU each, so that the tasks that read find room on a small machine."""


class Replayer:
    """An actor's state: the rankers, made once."""

    def __init__(self, makers: ray.ObjectRef[Makers], settings: ReplaySettings) -> None:
        self._rankers = {name: make() for name, make in ray.get(makers).items()}
        self._settings = settings

    def __call__(self, sequences: pa.Table) -> pa.Table:
        """Answers about one block of users."""
        return replay(self._rankers, sequences, self._settings)


def replay_in_shards(dataset: Dataset, makers: Makers, settings: ReplaySettings) -> pa.Table:
    """Every ranker's answers about every tested user of the dataset. Rows of ANSWER_SCHEMA, in no fixed order."""
    if not ray.is_initialized():
        ray.init()
    resources = cast(Callable[[], dict[str, float]], ray.cluster_resources)  # Ray leaves it untyped
    quiet_data()
    actors = max(int(resources().get("CPU", 1)), 1)
    fs, root = filesystem(dataset.path)
    held = ray.put(makers)  # once in the object store, however many actors read it
    sequences = ray.data.read_parquet(f"{root}/sequences", filesystem=fs)
    # One block a call, each small: a whole file in one block would keep all actors but one idle.
    answers = sequences.repartition(target_num_rows_per_block=BATCHES_AT_ONCE * settings.batch).map_batches(
        Replayer,
        fn_constructor_args=(held, settings),
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=ACTOR_CPUS,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
    )
    parts = []
    with Task("evaluate (answers)") as task:
        for part in cast("Iterable[Any]", answers.iter_batches(batch_format="pyarrow", batch_size=None)):
            parts.append(part.select(ANSWER_SCHEMA.names).cast(ANSWER_SCHEMA))
            task.advance(len(part))
    return pa.concat_tables(parts) if parts else ANSWER_SCHEMA.empty_table()
