"""RecTools' SASRec: a causal transformer, by the softmax over all items or gBCE; the best epoch is kept."""

import copy
import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

LENGTH = 100
PATIENCE, PATIENT_STEPS = 5, 1000  # an epoch of few long sequences has few steps
VALIDATION_USERS, BATCH = 5000, 256
data, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
seed, minutes = settings.pop("seed"), settings.pop("minutes")
curve, paces = [], []
pl.seed_everything(seed)


def dataset(user_id: pd.Series, item: pd.Series, place: pd.Series) -> Dataset:
    """Interactions whose times are their places."""
    columns = {
        Columns.User: user_id,
        Columns.Item: item.astype(np.int64),
        Columns.Datetime: pd.to_datetime(place, unit="s"),
    }
    return Dataset.construct(pd.DataFrame(columns).assign(**{Columns.Weight: 1.0}))


class KeepBest(pl.Callback):
    """NDCG@10 of some users' validation events after each epoch, or what there was of it; the best weights win."""

    def __init__(self) -> None:
        self.best, self.weights, self.step, self.worse, self.best_step = -1.0, None, 0, 0, 0

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin to count the events to tell, and their time."""
        self.told, self.begun, self.begun_cpu = 0, time.monotonic(), time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, module: object, outputs: object, batch: dict, n: int) -> None:
        """Stop where the minutes of CPU are over: Lightning's own limit is of the wall clock."""
        self.told += int((batch["y"] > 0).sum())
        if minutes and time.process_time() - started > 60 * minutes:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look, keep, and stop where it gets no better."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        paces.append((self.told, time.monotonic() - self.begun, time.process_time() - self.begun_cpu))
        found = self.ndcg(module)
        curve.append((time.process_time() - started, found))
        print(f"epoch {trainer.current_epoch}: {found:.4f} after {curve[-1][0]:.0f} s of CPU", file=sys.stderr)
        if found > self.best:
            self.best, self.weights, self.worse = found, copy.deepcopy(module.state_dict()), 0
            self.best_step = self.step
            return
        self.worse += 1
        stuck = self.worse >= PATIENCE and self.step - self.best_step >= PATIENT_STEPS
        trainer.should_stop = trainer.should_stop or stuck

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The minutes may end amid an epoch."""
        self.on_train_epoch_end(trainer, module)
        module.load_state_dict(self.weights)

    def ndcg(self, module: pl.LightningModule) -> float:
        """Mean NDCG@10 of the next event among what the user has not seen."""
        codes = module.data_preparator.item_id_map.to_internal
        asked = pd.read_parquet(data / "ask-valid.parquet")
        asked = asked[asked["target"].isin(codes.index)]
        asked = asked.sample(min(VALIDATION_USERS, len(asked)), random_state=0)
        longest, net = module.data_preparator.session_max_len, module.torch_model
        was_training = net.training
        net.eval()
        gains = []
        with torch.no_grad():
            items = net.item_model.get_all_embeddings()
            for start in range(0, len(asked), BATCH):
                rows = asked[start : start + BATCH]
                pasts = [codes.reindex(past).dropna().astype(int).tolist() for past in rows["items"]]
                x = torch.zeros(len(rows), longest, dtype=torch.int64)
                for row, past in enumerate(pasts):
                    x[row, longest - len(past[-longest:]) :] = torch.tensor(past[-longest:], dtype=torch.int64)
                scores = net.encode_sessions({"x": x}, items)[:, -1] @ items.T
                scores[:, 0] = -torch.inf
                for row, past in enumerate(pasts):
                    scores[row, past] = -torch.inf
                right = scores.gather(1, torch.tensor(codes[rows["target"]].to_numpy())[:, None])
                rank = 1 + (scores > right).sum(1)
                gains.append(torch.where(rank <= 10, 1 / torch.log2(1.0 + rank), 0.0))
        net.train(was_training)
        return float(torch.cat(gains).mean())


def trainer() -> pl.Trainer:
    """Stops after the epochs, or the minutes."""
    return pl.Trainer(
        max_epochs=settings["epochs"], accelerator="cpu",
        callbacks=[KeepBest()], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


train = pd.read_parquet(data / "train.parquet")
model = SASRecModel(**settings, get_trainer_func=trainer, recommend_torch_device="cpu")
started = time.process_time()
model.fit(dataset(train["user_id"], train["item"], train["place"]))
fitted = time.process_time()
spent_s = 0.0
for split in ("valid", "test"):
    asked = pd.read_parquet(data / f"ask-{split}.parquet")
    past = asked.explode("items", ignore_index=True)
    past = past[past["items"].isin(train["item"].unique())]
    place = past.groupby("user_id").cumcount()
    histories = dataset(past["user_id"], past["items"], place)
    begun = time.monotonic()
    found = model.recommend(
        past["user_id"].unique(), histories, k=LENGTH, filter_viewed=True, on_unsupported_targets="ignore"
    )
    spent_s += time.monotonic() - begun
    lists = found.sort_values([Columns.User, Columns.Rank]).groupby(Columns.User, sort=False)
    lists = lists[[Columns.Item, Columns.Score]].agg(list).reset_index()
    lists.columns = ["user_id", "items", "scores"]
    lists.to_parquet(out / f"lists-{split}.parquet")
facts = {
    "version": f"rectools {version('rectools')}",
    "train_cpu_s": fitted - started,
    "curve": curve,
    "paces": paces,
    "lists_s": spent_s,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}
(out / "facts.json").write_text(json.dumps(facts))
