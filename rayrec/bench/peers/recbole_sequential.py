"""RecBole's GRU4Rec and SASRec, by cross-entropy over all items, stopped early by RecBole's own validation."""

import json
import resource
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed
from recbole.utils.case_study import full_sort_topk

LENGTH, SPARE = 100, 100
data, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
minutes, name = settings.pop("minutes"), settings.pop("model")
asked = {split: pd.read_parquet(data / f"ask-{split}.parquet") for split in ("valid", "test")}


class TimeIsUpError(Exception):
    """Training has had its minutes; the best weights so far are on disk."""


# RecBole cuts off the last event of a user for its test and the one before for validation. The last event is made up
# here, so that it validates on the validation event and never sees the test.
past = asked["test"].explode("items", ignore_index=True)
made_up = asked["test"].assign(items=asked["test"]["items"].str[-1])
events = pd.concat([past, made_up], ignore_index=True)
events["place"] = events.groupby("user_id").cumcount()
folder = out / "shop"
folder.mkdir(parents=True, exist_ok=True)
events.columns = ["user_id:token", "item_id:token", "timestamp:float"]
events.to_csv(folder / "shop.inter", sep="\t", index=False)

given = {
    "data_path": str(out), "checkpoint_dir": str(out / "saved"), "use_gpu": False, "show_progress": False,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "train_neg_sample_args": None, "loss_type": "CE",
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
    "metrics": ["NDCG", "Hit"], "topk": [10], "valid_metric": "NDCG@10", "eval_batch_size": 1024, **settings,
}  # fmt: skip
sys.argv = sys.argv[:1]
config = Config(model=name, dataset="shop", config_dict=given)
init_seed(config["seed"], True)
dataset = create_dataset(config)
train_data, valid_data, test_data = data_preparation(config, dataset)
model = get_model(name)(config, train_data.dataset)
trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
started = time.monotonic()


def watch(epoch: int, score: float) -> None:
    """End a training that has had its minutes."""
    if minutes and time.monotonic() - started > 60 * minutes:
        raise TimeIsUpError


with suppress(TimeIsUpError):
    trainer.fit(train_data, valid_data, saved=True, show_progress=False, callback_fn=watch)
fitted = time.monotonic()
model.load_state_dict(torch.load(trainer.saved_model_file, weights_only=False)["state_dict"])
model.eval()
for split, loader in (("valid", valid_data), ("test", test_data)):
    users, lists = asked[split]["user_id"].astype(str).tolist(), []
    for start in range(0, len(users), 1024):
        codes = dataset.token2id("user_id", users[start : start + 1024])
        _, best = full_sort_topk(codes, model, loader, k=LENGTH + SPARE, device="cpu")
        lists += dataset.id2token("item_id", best).tolist()
    kept = []
    for history, items in zip(asked[split]["items"], lists, strict=True):
        seen = set(history.tolist())
        kept.append([item for item in map(int, np.char.replace(items, "[PAD]", "0")) if item not in seen][:LENGTH])
    table = pd.DataFrame({"user_id": asked[split]["user_id"], "items": kept})
    table.to_parquet(out / f"lists-{split}.parquet")
facts = {
    "version": version("recbole"),
    "train_s": fitted - started,
    "lists_s": time.monotonic() - fitted,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}
(out / "facts.json").write_text(json.dumps(facts))
