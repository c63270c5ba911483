"""`rayrec bench quality`: rayrec and other recommenders on the same split, before the same judge.

In: datasets, models, seeds, a folder. Out: in that folder a file for each run, a table and a picture. A run whose file
is there is not repeated, so that a bench of hours can be stopped and gone on with. Settings are chosen on validation,
with the first seed; the test split is only looked at. What a peer computes is its own business: see `peers`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayrec.bench.intervals import interval, ratio_interval
from rayrec.bench.kept import Made, kept
from rayrec.bench.measure import measured
from rayrec.bundle import Bundle
from rayrec.config import preset
from rayrec.data.dataset import Dataset
from rayrec.data.training_events import training_mask
from rayrec.errors import UsageError
from rayrec.evaluation.floors import Ranker
from rayrec.evaluation.judge import floor_makers
from rayrec.evaluation.lists import answers_of_lists
from rayrec.evaluation.metrics import ndcg
from rayrec.evaluation.replay import ReplaySettings, Split, replay
from rayrec.progress import step
from rayrec.serving.scorer import load_scorer

US = "rayrec"
SPLITS: tuple[Split, ...] = ("valid", "test")
SCORES_AT_ONCE = 20_000_000
Settings = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A recommender of another library: its script in `peers`, what pip must install, and settings to choose among."""

    script: str
    requirements: tuple[str, ...]
    grid: tuple[Settings, ...]


_BEFORE_NUMPY_2 = ("numpy<2", "pandas<3", "pyarrow>=14,<21", "torch<2.14")
_RECBOLE = ("recbole>=1.2,<1.3", *_BEFORE_NUMPY_2)
_RECTOOLS = ("rectools[torch]>=0.13,<1", *_BEFORE_NUMPY_2)
PEERS: dict[str, Peer] = {
    "implicit-bm25": Peer(
        "implicit_neighbours",
        ("implicit>=0.7,<0.8", "pandas", "pyarrow>=14"),
        tuple({"kind": "BM25Recommender", "neighbours": k} for k in (20, 100, 500)),
    ),
    "rectools-sasrec": Peer(
        "rectools_sasrec",
        _RECTOOLS,
        tuple(
            {"n_factors": width, "session_max_len": 50, "lr": lr, "epochs": 30, "dropout_rate": 0.2}
            for width, lr in ((64, 1e-3), (128, 1e-3), (128, 3e-3))
        ),
    ),
    "recbole-gru4rec": Peer(
        "recbole_sequential",
        _RECBOLE,
        tuple({"model": "GRU4Rec", "epochs": 100, "learning_rate": lr} for lr in (1e-3, 3e-3)),
    ),
    "recbole-sasrec": Peer(
        "recbole_sequential",
        _RECBOLE,
        tuple({"model": "SASRec", "epochs": 100, "learning_rate": lr} for lr in (1e-3, 3e-3)),
    ),
}
FLOORS = ("popular", "markov")


def run(datasets: Sequence[str], out: Path, models: Sequence[str], seeds: int, minutes: float) -> dict[str, Any]:
    """Run what is missing, and write `table.md` and `quality.png` into `out`; answers the table's rows.

    models: of `US`, FLOORS and PEERS. minutes: of training for each run of a peer; 0 is no limit.
    Raises UsageError for an unknown model, or datasets of one name.
    """
    known = (US, *FLOORS, *PEERS)
    if unknown := [model for model in models if model not in known]:
        raise UsageError(f"unknown model {', '.join(unknown)}: choose among {', '.join(known)}")
    names = [Path(path).name for path in datasets]
    if len(set(names)) < len(names):
        raise UsageError(f"{', '.join(names)}: runs are kept by the name of the dataset's folder; give each its own")
    rows: list[Row] = []
    for path, name in zip(datasets, names, strict=True):
        shop = Shop(Dataset.open(path), out / name, minutes)
        for model in models:
            rows += _rows(shop, model, seeds)
    _compare(rows)
    (out / "table.md").write_text(table(rows))
    draw(rows, out / "quality.png")
    step(table(rows))
    return {"bench": "quality", "rows": [row.body() for row in rows]}


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """One training judged: NDCG@10 and HR@10 on both splits, what it cost, and each test user's rank."""

    settings: Settings
    seed: int
    figures: dict[str, dict[str, float]]
    cost: dict[str, float]
    user_U: npt.NDArray[np.object_]
    rank_U: npt.NDArray[np.int64]


@dataclass
class Shop:
    """A dataset with what the bench keeps of it in `folder`."""

    dataset: Dataset
    folder: Path
    minutes: float
    sequences: pa.Table = field(init=False)
    n_items: int = field(init=False)

    def __post_init__(self) -> None:
        self.sequences = self.dataset.sequences()
        self.n_items = len(self.dataset.catalogue())
        self.folder.mkdir(parents=True, exist_ok=True)

    def judging(self, split: Split, max_len: int = 1) -> ReplaySettings:
        """How every model is asked."""
        batch = max(1, min(256, SCORES_AT_ONCE // (self.n_items + 1)))
        return ReplaySettings(split, self.n_items, self.dataset.clock, max_len, batch, ("metrics",))

    def run(self, model: str, settings: Settings, seed: int) -> Run:
        """The run as kept, or anew."""

        def make() -> Made:
            step(f"{self.folder.name}: {model} {json.dumps(settings)} seed {seed}")
            answers, cost = self._answers(model, settings, seed)
            figures = {split: _figures(table["rank"].to_numpy()) for split, table in answers.items()}
            body = {"model": model, "settings": settings, "seed": seed, "figures": figures, "cost": cost}
            return body, pa.concat_tables(answers.values())

        body, table = kept(self.folder, model, [settings, self.minutes], seed, make)
        test = table.filter(pc.equal(table["ranker"], "test")).sort_by("user_id")
        ranks = test["user_id"].to_numpy(zero_copy_only=False), test["rank"].to_numpy()
        return Run(settings, seed, body["figures"], body["cost"], *ranks)

    def _answers(self, model: str, settings: Settings, seed: int) -> tuple[dict[Split, pa.Table], dict[str, float]]:
        """Each split's answers, named after the split, and the costs."""
        if model in FLOORS:
            ranker = floor_makers(self.sequences, self.dataset.catalogue())[model]()
            return {split: self._ask(ranker, split) for split in SPLITS}, {}
        with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as scratch:
            if model == US:
                return self._ours(Path(scratch), settings, seed)
            return self._peer(PEERS[model], Path(scratch), {**settings, "seed": seed, "minutes": self.minutes})

    def _ours(self, scratch: Path, settings: Settings, seed: int) -> tuple[dict[Split, pa.Table], dict[str, float]]:
        choices = [
            word for name, value in settings.items() if name != "preset" for word in ("--set", f"{name}={value}")
        ]
        command = [sys.executable, "-m", "rayrec", "train", self.dataset.path, str(scratch), "--seed", str(seed)]
        cost = measured([*command, "--preset", settings.get("preset", "small"), *choices]).figures()
        bundle = Bundle.open(str(scratch))
        scorer, max_len = load_scorer(bundle), bundle.config.model.max_len
        return {split: self._ask(scorer, split, max_len) for split in SPLITS}, cost

    def _peer(self, peer: Peer, scratch: Path, settings: Settings) -> tuple[dict[Split, pa.Table], dict[str, float]]:
        python = environment(self.folder.parent / "environments", peer)
        script = Path(__file__).parent / "peers" / f"{peer.script}.py"
        data, lists = scratch / "data", scratch / "lists"
        export(self.sequences, data)
        lists.mkdir()
        # Nothing of ours is in the peer's way.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        cost = measured([str(python), str(script), str(data), str(lists), json.dumps(settings)], env).figures()
        cost |= json.loads((lists / "facts.json").read_text())
        found = {split: pq.read_table(lists / f"lists-{split}.parquet") for split in SPLITS}
        return {
            split: answers_of_lists({split: table}, self.sequences, self.judging(split))
            for split, table in found.items()
        }, cost

    def _ask(self, ranker: Ranker, split: Split, max_len: int | None = None) -> pa.Table:
        settings = self.judging(split, max_len or preset("small").model.max_len)
        return replay({split: ranker}, self.sequences, settings)


def _figures(rank_U: npt.NDArray[np.int64]) -> dict[str, float]:
    return {"ndcg@10": float(ndcg(rank_U, 10).mean()), "hr@10": float((rank_U <= 10).mean())}


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
        pq.write_table(asked.rename_columns(["user_id", "items"]), folder / f"ask-{split}.parquet")


def environment(folder: Path, peer: Peer) -> Path:
    """The Python of the peer's virtual environment, which is made if it is not there. Raises RuntimeError."""
    home = folder / hashlib.sha256(json.dumps(peer.requirements).encode()).hexdigest()[:8]
    python = home / "bin" / "python"
    if (home / "done").exists():
        return python
    shutil.rmtree(home, ignore_errors=True)
    step(f"installing {', '.join(peer.requirements)}")
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", *peer.requirements], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"cannot install {', '.join(peer.requirements)}: {done.stderr.strip().splitlines()[-1]}")
    (home / "done").touch()
    return python


# ---------------------------------------------------------------- the table


@dataclass
class Row:
    """A model on a data set: its runs with the settings chosen, or why there are none; and what we are to it."""

    shop: str
    model: str
    runs: list[Run]
    trouble: str = ""
    ahead: dict[str, Any] = field(default_factory=dict)

    def mean(self, figure: str, split: Split = "test") -> float:
        """Over seeds."""
        return statistics.fmean(run.figures[split][figure] for run in self.runs)

    def gain_U(self) -> npt.NDArray[np.float64]:
        """Each test user's NDCG@10, mean over seeds. [U]"""
        return np.mean([ndcg(run.rank_U, 10) for run in self.runs], axis=0)

    def body(self) -> dict[str, Any]:
        """As JSON."""
        if not self.runs:
            return {"shop": self.shop, "model": self.model, "trouble": self.trouble}
        return {
            "shop": self.shop,
            "model": self.model,
            "settings": self.runs[0].settings,
            "seeds": [run.seed for run in self.runs],
            **{f"{split}_{name}": self.mean(name, split) for split in SPLITS for name in ("ndcg@10", "hr@10")},
            "spread": spread(self.runs),
            "interval": interval(self.gain_U()),
            "cost": {name: _median(self.runs, name) for name in ("wall_s", "cpu_s", "peak_mib")},
            **self.ahead,
        }


def _rows(shop: Shop, model: str, seeds: int) -> Iterator[Row]:
    grid: tuple[Settings, ...] = PEERS[model].grid if model in PEERS else ({},)
    try:
        first = [shop.run(model, settings, 0) for settings in grid]
        best = max(first, key=lambda run: run.figures["valid"]["ndcg@10"])
        others = [] if model in FLOORS else [shop.run(model, best.settings, seed) for seed in range(1, seeds)]
        yield Row(shop.folder.name, model, [best, *others])
    except (RuntimeError, subprocess.CalledProcessError) as error:  # a peer that fails must not end the others
        step(f"{model}: {error}")
        yield Row(shop.folder.name, model, [], trouble=str(error))


def _compare(rows: list[Row]) -> None:
    """Ours over each of the others: the ratio of NDCG@10, and its interval by users drawn in pairs."""
    for row in rows:
        ours = next((one for one in rows if one.shop == row.shop and one.model == US), None)
        if ours and ours.runs and row.runs and row is not ours:
            row.ahead = {"ratio": ours.mean("ndcg@10") / max(row.mean("ndcg@10"), 1e-12)}
            row.ahead["ratio_interval"] = ratio_interval(ours.gain_U(), row.gain_U())


def spread(runs: Sequence[Run]) -> float:
    """Standard deviation of NDCG@10 over seeds; 0 of one."""
    return statistics.stdev(run.figures["test"]["ndcg@10"] for run in runs) if len(runs) > 1 else 0.0


def _median(runs: Sequence[Run], name: str) -> float | None:
    known = [run.cost[name] for run in runs if name in run.cost]
    return statistics.median(known) if known else None


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown."""
    lines = [
        "| set | model | seeds | NDCG@10 | 95% of users | HR@10 | validation | rayrec is | 95%, paired | CPU s | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row.runs:
            lines.append(f"| {row.shop} | {row.model} | | {row.trouble} | | | | | | | |")
            continue
        body = row.body()
        low, high = body["interval"]
        cells = [
            row.shop, row.model, str(len(row.runs)),
            f"{body['test_ndcg@10']:.4f}" + (f" ± {body['spread']:.4f}" if len(row.runs) > 1 else ""),
            f"{low:.4f} to {high:.4f}", f"{body['test_hr@10']:.4f}", f"{body['valid_ndcg@10']:.4f}",
            f"{body['ratio']:.2f} times" if "ratio" in body else "",
            "{:.2f} to {:.2f}".format(*body["ratio_interval"]) if "ratio" in body else "",
            _whole(body["cost"]["cpu_s"]), _whole(body["cost"]["peak_mib"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """NDCG@10 of every model with its interval over users, a panel for each data set, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shops = list(dict.fromkeys(row.shop for row in rows))
    figure = Figure(figsize=(6 * max(1, len(shops)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, shop in zip(figure.subplots(1, max(1, len(shops)), squeeze=False)[0], shops, strict=True):
        chosen = [row for row in rows if row.shop == shop and row.runs][::-1]
        means = np.array([row.mean("ndcg@10") for row in chosen])
        edges = np.array([interval(row.gain_U()) for row in chosen]).reshape(-1, 2).T
        colours = ["#c44e00" if row.model == US else "#8a8f98" for row in chosen]
        axis.barh([row.model for row in chosen], means, xerr=np.abs(edges - means), color=colours, capsize=3)
        axis.set_title(f"{shop}: NDCG@10, test")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(str(path), dpi=110)
