"""One pass over a dataset's sequences before training: what follows what, and how many rows each stage has.

In: a dataset and settings. Out: what a `Job` needs. It must not know models or Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import scipy.sparse as sp

from rayrec.config import Config
from rayrec.data.cooccurrence import count_followers
from rayrec.data.dataset import Dataset
from rayrec.data.training_events import TrainingEvents
from rayrec.errors import DataError
from rayrec.files import filesystem
from rayrec.followers import Followers
from rayrec.progress import Task, step
from rayrec.training.windows import first_stage_events, only_read, stage_rows, stages


@dataclass(frozen=True)
class Survey:
    """rows: training rows of each stage. first_stage: counts without the events that teach the fusion.

    everything: counts of all training events, for serving. Of both the strongest only, so that the fusion learns from
    the counts that it will be served with. shards: paths of what was read, see `read_shards`.
    """

    rows: dict[str, int]
    first_stage: Followers
    everything: Followers
    shards: tuple[str, ...]


def read_shards(
    dataset: Dataset, skip: bool = False, shards: Sequence[str] = (), columns: list[str] | None = None
) -> Iterator[tuple[str, pa.Table]]:
    """Each shard of sequences with its path within its file system, in order of the paths.

    shards: the paths of those to read, if not all. columns: likewise.
    Raises DataError that names one which cannot be read, unless such are to be skipped: then it is said.
    """
    fs, root = filesystem(dataset.path)
    infos = [] if shards else fs.get_file_info(pafs.FileSelector(f"{root}/sequences"))
    for path in sorted(shards or (info.path for info in infos if info.path.endswith(".parquet"))):
        try:
            table = pq.read_table(path, columns=columns, filesystem=fs, partitioning=None)
        except (pa.ArrowException, OSError) as error:
            what = f"{path}: this shard cannot be read ({str(error).splitlines()[0]})"
            if not skip:
                raise DataError(f"{what}; prepare again, or leave it out: --set train.bad_shards=skip") from None
            step(f"train: {what} and is left out")
        else:
            yield path, table


def survey(dataset: Dataset, n_items: int, config: Config) -> Survey:
    """Read every shard of sequences once; memory holds one shard and the counts.

    Raises DataError for a shard that cannot be read (see `TrainConfig.bad_shards`), or if nothing can be learned: no
    visitor has two training events, or all that have teach the fusion.
    """
    empty = sp.csr_array((n_items + 1, n_items + 1))
    first_stage = everything = Followers(empty, empty)
    paper = config.model.kind == "paper"
    rows = dict.fromkeys(stages(config), 0)
    share = config.train.fusion_holdout
    # How long a history is changes the number of windows, not that of examples.
    brief = config.model_copy(update={"model": config.model.model_copy(update={"max_len": 1})})
    shards = []
    with Task("survey (shards)") as task:
        for path, sequences in read_shards(dataset, skip=config.train.bad_shards == "skip"):
            shards.append(path)
            table = only_read(sequences, config.model.actions)
            events = TrainingEvents.of(table)
            everything = everything + count_followers(events.item_E, events.offsets, n_items)
            if not paper:
                first_stage = first_stage + count_followers(*first_stage_events(table, share), n_items)
            for stage in rows:
                rows[stage] += len(stage_rows(table, stage, brief if stage in ("pairs", "fusion") else config))
            task.advance()
    if not next(iter(rows.values())):
        raise DataError(f"{dataset.path}: nothing to learn from: {_why_nothing(rows, share)}")
    return Survey(rows, first_stage.kept(), everything.kept(), tuple(shards))


def _why_nothing(rows: dict[str, int], share: float) -> str:
    if rows.get("fusion"):
        return (
            f"train.fusion_holdout={share} keeps every event that could teach the first stage for the fusion; "
            "lower it (--set train.fusion_holdout=0.001), or bring more events"
        )
    return (
        "no visitor has two training events (a visitor's last two are kept for validation and test, and with "
        "split=time all after the cut); bring more events a visitor, and see report.json for what prepare rejected"
    )
