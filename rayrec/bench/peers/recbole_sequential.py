"""RecBole's GRU4Rec and SASRec, by cross-entropy over all items; RecBole's own validation keeps the best epoch."""

import json
import os
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
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.data.utils import get_dataloader
from recbole.utils import get_model, get_trainer, init_seed

LENGTH, BATCH = 100, 256
VALIDATION_USERS = 5000
data, out, settings = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), json.loads(sys.argv[3])
os.chdir(out)  # RecBole leaves logs where it runs
minutes, name = settings.pop("minutes"), settings.pop("model")
curve, paces = [], []


class TimeIsUpError(Exception):
    """Training has had its minutes; the best weights so far are on disk."""


def out_of_time() -> bool:
    """Whether training has had its minutes of CPU."""
    return bool(minutes) and time.process_time() - started > 60 * minutes


def end_in_time(epoch: int, score: float) -> None:
    """RecBole calls this after each epoch's validation, when the better weights are on disk."""
    curve.append((time.process_time() - started, score))
    print(f"epoch {epoch}: {score:.4f} after {curve[-1][0]:.0f} s of CPU", file=sys.stderr)
    if out_of_time():
        raise TimeIsUpError


# Only training events: RecBole makes a row of every prefix, as the authors of GRU4Rec's improvement do.
train = pd.read_parquet(data / "train.parquet")[["user_id", "item", "place"]]
folder = out / "shop"
folder.mkdir(parents=True, exist_ok=True)
train.columns = ["user_id:token", "item_id:token", "timestamp:float"]
train.to_csv(folder / "shop.inter", sep="\t", index=False)

given = {
    "data_path": str(out), "checkpoint_dir": str(out / "saved"), "use_gpu": False, "show_progress": False,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "train_neg_sample_args": None, "loss_type": "CE",
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
    "metrics": ["NDCG"], "topk": [10], "valid_metric": "NDCG@10", "eval_batch_size": 256, **settings,
}  # fmt: skip
sys.argv = sys.argv[:1]
config = Config(model=name, dataset="shop", config_dict=given)
init_seed(config["seed"], config["reproducibility"])
dataset = SequentialDataset(config)
dataset._change_feat_format()  # what `build` does before it would cut off each user's last two events
code_of = {int(token): code for token, code in dataset.field2token_id["item_id"].items() if token != "[PAD]"}
item_of = np.array([0, *(int(token) for token in dataset.field2id_token["item_id"][1:])])


def histories(items: pd.Series) -> dict[str, torch.Tensor]:
    """The newest events of each history as RecBole has them: its own codes, padded behind."""
    longest = config["MAX_ITEM_LIST_LENGTH"]
    codes = [[code_of[item] for item in past if item in code_of][-longest:] for past in items]
    padded = torch.zeros(len(codes), longest, dtype=torch.int64)
    for row, past in enumerate(codes):
        padded[row, : len(past)] = torch.tensor(past, dtype=torch.int64)
    return {"item_id_list": padded, "item_length": torch.tensor([max(1, len(past)) for past in codes])}


asked = {split: pd.read_parquet(data / f"ask-{split}.parquet") for split in ("valid", "test")}
known = asked["valid"][asked["valid"]["target"].isin(list(code_of))]
known = known.sample(min(VALIDATION_USERS, len(known)), random_state=0)
right = {"item_id": torch.tensor([code_of[item] for item in known["target"]]), "user_id": torch.ones(len(known)).long()}
valid = dataset.copy(Interaction({**histories(known["items"]), **right}))
train_data = get_dataloader(config, "train")(config, dataset, None, shuffle=True)
valid_data = get_dataloader(config, "valid")(config, valid, None, shuffle=False)
model = get_model(name)(config, dataset)
trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)


class InTime(type(train_data)):
    """The training batches until the minutes are over: then RecBole validates, and keeps the better weights."""

    def __iter__(self):
        """Stops between two batches; notes the rows of an epoch, each of which is one event to tell, and its time."""
        n, begun, begun_cpu = 0, time.monotonic(), time.process_time()
        for batch in super().__iter__():
            if out_of_time():
                return
            n += len(batch)
            yield batch
        paces.append((n, time.monotonic() - begun, time.process_time() - begun_cpu))


train_data.__class__ = InTime
started = time.process_time()
with suppress(TimeIsUpError):
    trainer.fit(train_data, valid_data, saved=True, show_progress=False, callback_fn=end_in_time)
fitted = time.process_time()
model.load_state_dict(torch.load(trainer.saved_model_file, weights_only=False)["state_dict"])
model.eval()
spent_s = 0.0
for split, table in asked.items():
    items, scores = [], []
    for start in range(0, len(table), BATCH):
        past = table["items"][start : start + BATCH]
        begun = time.monotonic()
        with torch.no_grad():
            found = model.full_sort_predict(Interaction(histories(past)))
        found[:, 0] = -torch.inf
        for row, history in enumerate(past):
            found[row, [code_of[item] for item in history if item in code_of]] = -torch.inf
        best = found.topk(min(LENGTH, found.shape[1]))
        spent_s += time.monotonic() - begun
        items += item_of[best.indices.numpy()].tolist()
        scores += best.values.tolist()
    pd.DataFrame({"user_id": table["user_id"], "items": items, "scores": scores}).to_parquet(
        out / f"lists-{split}.parquet"
    )
facts = {
    "version": f"recbole {version('recbole')}",
    "train_cpu_s": fitted - started,
    "curve": curve,
    "paces": paces,
    "lists_s": spent_s,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}
(out / "facts.json").write_text(json.dumps(facts))
