"""One pass over a dataset's sequences before training: what follows what, and how many rows each stage has.

In: a dataset and settings. Out: what a `Job` needs. It must not know models or Ray.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow.dataset as pads
import scipy.sparse as sp

from rayrec.config import Config
from rayrec.data.cooccurrence import count_followers
from rayrec.data.dataset import Dataset
from rayrec.data.training_events import TrainingEvents
from rayrec.errors import DataError
from rayrec.files import filesystem
from rayrec.followers import Followers
from rayrec.progress import Task
from rayrec.training.windows import first_stage_events, only_read, stage_rows, stages


@dataclass(frozen=True)
class Survey:
    """rows: training rows of each stage. first_stage: counts without the events that teach the fusion.

    everything: counts of all training events, for serving. Of both the strongest only, so that the fusion learns from
    the counts that it will be served with.
    """

    rows: dict[str, int]
    first_stage: Followers
    everything: Followers


def survey(dataset: Dataset, n_items: int, config: Config) -> Survey:
    """Read every shard of sequences once; memory holds one shard and the counts.

    Raises DataError if nothing can be learned: no visitor has two training events, or all that have teach the fusion.
    """
    empty = sp.csr_array((n_items + 1, n_items + 1))
    first_stage = everything = Followers(empty, empty)
    paper = config.model.kind == "paper"
    rows = dict.fromkeys(stages(config), 0)
    share = config.train.fusion_holdout
    # How long a history is changes the number of windows, not that of examples.
    brief = config.model_copy(update={"model": config.model.model_copy(update={"max_len": 1})})
    fs, root = filesystem(dataset.path)
    shards = list(pads.dataset(f"{root}/sequences", filesystem=fs, format="parquet").get_fragments())
    with Task("survey (shards)", len(shards)) as task:
        for shard in shards:
            table = only_read(shard.to_table(), config.model.actions)
            events = TrainingEvents.of(table)
            everything = everything + count_followers(events.item_E, events.offsets, n_items)
            if not paper:
                first_stage = first_stage + count_followers(*first_stage_events(table, share), n_items)
            for stage in rows:
                rows[stage] += len(stage_rows(table, stage, brief if stage in ("pairs", "fusion") else config))
            task.advance()
    if not next(iter(rows.values())):
        raise DataError(f"{dataset.path}: nothing to learn from: {_why_nothing(rows, share)}")
    return Survey(rows, first_stage.kept(), everything.kept())


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
