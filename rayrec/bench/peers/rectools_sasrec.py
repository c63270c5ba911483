"""RecTools' SASRec: a causal transformer, by the softmax over all items or gBCE."""

import json
import resource
import sys
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

LENGTH = 100
data, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
seed, minutes = settings.pop("seed"), settings.pop("minutes")
pl.seed_everything(seed)


def dataset(user_id: pd.Series, item: pd.Series, place: pd.Series) -> Dataset:
    """Interactions whose times are their places."""
    columns = {
        Columns.User: user_id,
        Columns.Item: item.astype(np.int64),
        Columns.Datetime: pd.to_datetime(place, unit="s"),
    }
    return Dataset.construct(pd.DataFrame(columns).assign(**{Columns.Weight: 1.0}))


def trainer() -> pl.Trainer:
    """Stops after the epochs, or the minutes."""
    limit = timedelta(minutes=minutes) if minutes else None
    return pl.Trainer(
        max_epochs=settings["epochs"], max_time=limit, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


train = pd.read_parquet(data / "train.parquet")
model = SASRecModel(**settings, get_trainer_func=trainer, recommend_torch_device="cpu")
started = time.monotonic()
model.fit(dataset(train["user_id"], train["item"], train["place"]))
fitted = time.monotonic()
for split in ("valid", "test"):
    asked = pd.read_parquet(data / f"ask-{split}.parquet")
    past = asked.explode("items", ignore_index=True)
    past = past[past["items"].isin(train["item"].unique())]
    place = past.groupby("user_id").cumcount()
    found = model.recommend(
        past["user_id"].unique(), dataset(past["user_id"], past["items"], place), k=LENGTH, filter_viewed=True,
        on_unsupported_targets="ignore",
    )  # fmt: skip
    found = found.sort_values([Columns.User, Columns.Rank])
    lists = found.groupby(Columns.User, sort=False)[Columns.Item].agg(list).reset_index()
    lists.columns = ["user_id", "items"]
    lists.to_parquet(out / f"lists-{split}.parquet")
facts = {
    "version": version("rectools"),
    "train_s": fitted - started,
    "lists_s": time.monotonic() - fitted,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}
(out / "facts.json").write_text(json.dumps(facts))
