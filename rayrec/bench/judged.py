"""A model trained in this process and asked on the test split, for benches that compare trainings.

In: a dataset, settings. Out: what the training took, and the answers. It must not know which trainings are compared.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.torch import load_file

from rayrec.bench.kept import Made
from rayrec.catalogue import Catalogue
from rayrec.config import Config
from rayrec.data.dataset import Dataset
from rayrec.evaluation.judge import cold_items
from rayrec.evaluation.metrics import ndcg
from rayrec.evaluation.paired import interval, p_value
from rayrec.evaluation.replay import ReplaySettings, replay, users_at_once
from rayrec.model.recommender import build
from rayrec.model.scorer import Scorer
from rayrec.training.local import train_alone
from rayrec.training.survey import survey

PARTS = {
    "cold": "cold items, among cold",
    "cold_in_all": "cold items, among all",
    "known": "known items, among all",
}


@dataclass(frozen=True)
class Run:
    """One training judged: each user's NDCG@10 in each of PARTS, by user, and what the training took."""

    gain: dict[str, dict[str, float]]
    train_s: float


def trained(
    dataset: Dataset, catalogue: Catalogue, sequences: pa.Table, config: Config, keep: Path | None = None
) -> Made:
    """Train, and ask each user of the test split for the next new item, and for a cold one among cold ones.

    keep: see `fit.Job`.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as scratch:
        folder = Path(scratch)
        train_alone(dataset, config, folder, keep=keep)
        took_s = time.monotonic() - started
        model = build(config, catalogue, weights=load_file(folder / "model.safetensors"))
        vectors_ND = np.load(folder / "vectors.npy", allow_pickle=False)
    followers = survey(dataset, len(catalogue), config).everything
    scorer = Scorer(model, catalogue, vectors_ND, followers, dataset.clock)
    settings = ReplaySettings(
        "test", len(catalogue), dataset.clock, config.model.max_len,
        batch=users_at_once(len(catalogue)),
        protocols=("metrics", "cold"), cold=cold_items(catalogue),
    )  # fmt: skip
    body: dict[str, Any] = {"settings": config.model_dump(mode="json"), "train_s": round(took_s, 1)}
    return body, replay({"model": scorer}, sequences, settings)


def gains(answers: pa.Table, catalogue: Catalogue) -> dict[str, dict[str, float]]:
    """NDCG@10 of each user in each of PARTS."""
    found: dict[str, dict[str, float]] = {}
    for part in PARTS:
        protocol = "cold" if part == "cold" else "metrics"
        rows = answers.filter(pc.equal(answers["protocol"], protocol)).sort_by("user_id")
        cold_U = catalogue.n_train[rows["target"].to_numpy()] == 0
        chosen_U = ~cold_U if part == "known" else cold_U
        users = rows["user_id"].to_numpy(zero_copy_only=False)[chosen_U].tolist()
        found[part] = dict(zip(users, ndcg(rows["rank"].to_numpy()[chosen_U], 10).tolist(), strict=True))
    return found


def _mean_U(runs: Sequence[Run], part: str) -> npt.NDArray[np.float64]:
    """Each user's gain, mean over seeds; users in one order. [U]"""
    return np.mean([list(run.gain[part].values()) for run in runs], axis=0)


def judged_row(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """A variant's gain in each part, its seeds, and how long a training took."""
    row: dict[str, Any] = {"variant": name, "seeds": len(runs)}
    row["train_s"] = statistics.median(run.train_s for run in runs)
    for part in PARTS:
        gain_U = _mean_U(runs, part)
        row[part] = {"users": len(gain_U), "ndcg@10": None, "interval": None}
        if len(gain_U):
            row[part] |= {"ndcg@10": float(gain_U.mean()), "interval": interval(gain_U)}
    return row


def comparison(name: str, without: str, found: dict[str, list[Run]]) -> dict[str, Any]:
    """What the pictures of a variant add, user by user, in each part that somebody is in."""
    row: dict[str, Any] = {"variant": name, "without": without}
    for part in PARTS:
        ours_U, theirs_U = _mean_U(found[name], part), _mean_U(found[without], part)
        if len(ours_U):
            row[part] = {
                "difference": float((ours_U - theirs_U).mean()),
                "interval": interval(ours_U - theirs_U),
                "p": p_value(ours_U, theirs_U),
            }
    return row


def cell(part: dict[str, Any]) -> str:
    """A part of `judged_row` in a table."""
    if part["ndcg@10"] is None:
        return "–"
    low, high = part["interval"]
    return f"{part['ndcg@10']:.4f} ({low:.4f} to {high:.4f}), {part['users']} users"
