"""`rayrec bench quality`: rayrec and other recommenders on the same split, before the same judge.

In: datasets, models, seeds, a folder. Out: in that folder a file for each run, a table and a picture. A run whose file
is there is not repeated, so that a bench of hours can be stopped and gone on with. Settings are chosen on validation,
with the first seed; the test split is only looked at. What a peer computes is its own business: see `peers`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.bench.measure import measured
from rayrec.bench.mixing import WEIGHTS, mixed, scale
from rayrec.bench.peer_runs import PEERS, SPLITS, Settings, run_peer
from rayrec.bench.quality_table import Row, Run, compare, draw, table
from rayrec.bundle import Bundle
from rayrec.config import preset
from rayrec.data.dataset import Dataset
from rayrec.errors import UsageError
from rayrec.evaluation.floors import Ranker
from rayrec.evaluation.judge import floor_makers
from rayrec.evaluation.lists import answers_of_lists
from rayrec.evaluation.metrics import Scores, ndcg
from rayrec.evaluation.replay import Question, ReplaySettings, Split, Visitors, replay, target_places, users_at_once
from rayrec.history import HistoryBatch, Ints
from rayrec.progress import step
from rayrec.serving.scorer import load_scorer
from rayrec.settings import with_settings

US = "rayrec"
ON_EQUAL_TERMS = ("model.use_moment=false",)
"""The others are not told when a visitor asks."""
FLOORS = ("popular", "markov")
MIXED = " + markov"
LENGTH = 100
"""Of the lists; a rank beyond is kept as one more."""

Answers = dict[Split, pa.Table]
Cost = dict[str, Any]


def run(
    datasets: Sequence[str], out: Path, models: Sequence[str], seeds: int, minutes: float, settings: int = 0,
    ours: Sequence[str] = (), peer_seeds: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run what is missing, and write `table.md` and `quality.png` into `out`; answers the table's rows.

    models: of `US`, FLOORS and PEERS. minutes: of CPU for each training of a peer, 0 is no limit: a busy machine takes
    none away, and a second thread gives none. settings: of each peer at most so many; 0 is all. ours: `path=value` for
    rayrec's trainings. peer_seeds: of the others; None is as many as ours. Raises UsageError for an unknown model or
    setting, or datasets of one name.
    """
    known = (US, *FLOORS, *PEERS)
    if unknown := [model for model in models if model not in known]:
        raise UsageError(f"unknown model {', '.join(unknown)}: choose among {', '.join(known)}")
    with_settings(preset("small"), ours)
    names = [Path(path).name for path in datasets]
    if len(set(names)) < len(names):
        raise UsageError(f"{', '.join(names)}: runs are kept by the name of the dataset's folder; give each its own")
    rows: list[Row] = []
    for path, name in zip(datasets, names, strict=True):
        shop = Shop(Dataset.open(path), out / name, minutes)
        grids = {model: PEERS[model].grid[: settings or None] for model in models if model in PEERS}
        grids[US] = (dict(setting.split("=", 1) for setting in ours),)
        of_peers = seeds if peer_seeds is None else peer_seeds
        rows += [_row(shop, one, grids.get(one, ({},)), seeds if one == US else of_peers) for one in models]
        rows += _mixed_row(shop, [row for row in rows if row.shop == name])
        compare(rows, US)
        (out / "table.md").write_text(table(rows))
        draw(rows, US, out / "quality.png")
    step(table(rows))
    return {"bench": "quality", "rows": [row.body() for row in rows]}


def _row(shop: Shop, model: str, grid: Sequence[Settings], seeds: int) -> Row:
    try:
        first = [shop.run(model, choice, 0) for choice in grid]
        best = max(first, key=_on_validation)
        others = [] if model in FLOORS else [shop.run(model, best.settings, seed) for seed in range(1, seeds)]
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:  # a peer that fails must not end the others
        step(f"{model}: {error}")
        return Row(shop.folder.name, shop.n_items, model, [], note=" ".join(str(error).replace("|", "/").split()))
    return Row(shop.folder.name, shop.n_items, model, [best, *others], note=_note(model, [best, *others], shop.minutes))


def _mixed_row(shop: Shop, rows: Sequence[Row]) -> Iterator[Row]:
    """The best peer's lists with the Markov floor mixed in; best, as all is, on validation."""
    peers = [row for row in rows if row.model in PEERS and row.runs and shop.has_lists(row.model, row.runs[0])]
    if not peers:
        return
    best = max(peers, key=lambda row: _on_validation(row.runs[0]))
    runs = [shop.run_mixed(best.model, run) for run in best.runs]
    weights = ", ".join(str(run.settings["weight"]) for run in runs)
    yield Row(shop.folder.name, shop.n_items, best.model + MIXED, runs, note=f"weight {weights}")


def _on_validation(run: Run) -> float:
    return run.figures["valid"]["ndcg@10"]


def _note(model: str, runs: Sequence[Run], minutes: float) -> str:
    notes = [str(run.cost["note"]) for run in runs if run.cost.get("note")]
    spent = max((run.cost.get("cpu_s", 0.0) for run in runs), default=0.0) / 60
    if model == US and minutes and spent > minutes:
        notes.append(f"took {spent:.1f} minutes of CPU; the others trained for {minutes:g} at most")
    return "; ".join(dict.fromkeys(notes))


# ---------------------------------------------------------------- runs


@dataclass
class Shop:
    """A dataset with what the bench keeps of it in `folder`."""

    dataset: Dataset
    folder: Path
    minutes: float
    sequences: pa.Table = field(init=False)
    n_items: int = field(init=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        self.sequences = self.dataset.sequences()
        self.digest = digest_of(self.sequences)
        self.n_items = len(self.dataset.catalogue())
        self.folder.mkdir(parents=True, exist_ok=True)

    def judging(self, split: Split, max_len: int = 1) -> ReplaySettings:
        """How every model is asked."""
        batch = users_at_once(self.n_items)
        return ReplaySettings(split, self.n_items, self.dataset.clock, max_len, batch, ("metrics",))

    def run(self, model: str, settings: Settings, seed: int) -> Run:
        """The run as kept, or anew."""
        return self._kept(model, settings, seed, lambda: (settings, *self._answers(model, settings, seed)))

    def run_mixed(self, model: str, run: Run) -> Run:
        """A peer's run with the Markov floor mixed in, with the weight that is best on validation."""

        def make() -> tuple[Settings, Answers, Cost]:
            tables = [(weight, self._mixed(model, run, "valid", weight)) for weight in WEIGHTS]
            weight, valid = max(tables, key=lambda pair: _figures(pair[1])["ndcg@10"])
            return {**run.settings, "weight": weight}, {
                "valid": valid, "test": self._mixed(model, run, "test", weight)
            }, {}  # fmt: skip

        return self._kept(model + MIXED, run.settings, run.seed, make)

    def has_lists(self, model: str, run: Run) -> bool:
        """Whether the lists of a peer's run are there, or what was mixed of them."""
        lists = self._lists(self._name(model, run.settings, run.seed), "test")
        mixed = self.folder / f"{self._name(model + MIXED, run.settings, run.seed)}.json"
        return mixed.exists() or (lists.exists() and "scores" in pq.read_schema(lists).names)

    def _name(self, model: str, settings: Settings, seed: int) -> str:
        minutes = 0 if model in (US, *FLOORS) else self.minutes
        digest = hashlib.sha256(json.dumps([self.digest, settings, minutes], sort_keys=True).encode()).hexdigest()[:8]
        return f"{model.replace(' + ', '-')}-{digest}-{seed}"

    def _lists(self, name: str, split: Split) -> Path:
        return self.folder.parent / "lists" / self.folder.name / f"{name}-{split}.parquet"

    def _kept(
        self, model: str, settings: Settings, seed: int, make: Callable[[], tuple[Settings, Answers, Cost]]
    ) -> Run:
        """A run by its name: from its files, which `make` fills if they are not there."""
        name = self._name(model, settings, seed)
        body_path, ranks_path = self.folder / f"{name}.json", self.folder / f"{name}.parquet"
        if not body_path.exists():
            step(f"{self.folder.name}: {model} {json.dumps(settings)} seed {seed}")
            chosen, answers, cost = make()
            rank_U = answers["test"].sort_by("user_id")["rank"].to_numpy()
            kept = pa.table({"rank": pa.array(np.minimum(rank_U, LENGTH + 1).astype(np.int8))})
            pq.write_table(kept, ranks_path, compression="zstd")
            figures = {split: _figures(table) for split, table in answers.items()}
            body = {"model": model, "settings": chosen, "seed": seed, "minutes": self.minutes, "users": len(rank_U)}
            body_path.write_text(json.dumps({**body, "figures": figures, "cost": cost}, indent=1) + "\n")
        body = json.loads(body_path.read_text())
        rank_U = pq.read_table(ranks_path)["rank"].to_numpy().astype(np.int64)
        return Run(body["settings"], seed, body["figures"], body["cost"], rank_U)

    def _answers(self, model: str, settings: Settings, seed: int) -> tuple[Answers, Cost]:
        """Each split's answers, and the costs."""
        if model in FLOORS:
            return self._ask(floor_makers(self.sequences, self.dataset.catalogue())[model]())
        with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as scratch:
            if model == US:
                return self._ours(Path(scratch), settings, seed)
            return self._peer(model, Path(scratch), settings, seed)

    def _ours(self, scratch: Path, settings: Settings, seed: int) -> tuple[Answers, Cost]:
        given = [*ON_EQUAL_TERMS, *(f"{name}={value}" for name, value in settings.items())]
        choices = [word for setting in given for word in ("--set", setting)]
        command = [sys.executable, "-m", "rayrec", "train", self.dataset.path, str(scratch), "--seed", str(seed)]
        cost: Cost = dict(measured([*command, *choices]).figures())
        bundle = Bundle.open(str(scratch))
        cost["curve"] = [
            (line["cpu_s"], line["valid_metrics_ndcg@10"])
            for line in bundle.json("metrics.json")["training"]
            if line.get("kept", True)
        ]
        answers, asking = self._ask(load_scorer(bundle), bundle.config.model.max_len)
        return answers, {**cost, **asking}

    def _peer(self, model: str, scratch: Path, settings: Settings, seed: int) -> tuple[Answers, Cost]:
        asked = {**settings, "seed": seed, "minutes": self.minutes}
        environments = self.folder.parent / "environments"
        log = self._lists(self._name(model, settings, seed), "test").with_suffix(".log")
        found, cost = run_peer(PEERS[model], self.dataset, self.sequences, asked, environments, scratch, log)
        answers = {}
        for split, lists in found.items():
            path = self._lists(self._name(model, settings, seed), split)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(scratch / "lists" / f"lists-{split}.parquet", path)
            answers[split] = answers_of_lists({split: lists}, self.sequences, self.judging(split))
        return answers, cost

    def _ask(self, ranker: Ranker, max_len: int | None = None) -> tuple[Answers, Cost]:
        timed = Timed(ranker)
        length = max_len or preset("small").model.max_len
        answers = {split: replay({split: timed}, self.sequences, self.judging(split, length)) for split in SPLITS}
        return answers, {"list_ms": 1000 * timed.seconds / max(1, timed.users)}

    def _mixed(self, model: str, run: Run, split: Split, weight: float) -> pa.Table:
        """Answers of a peer's lists with the floor mixed in."""
        lists = pq.read_table(self._lists(self._name(model, run.settings, run.seed), split))
        row_of = {user: row for row, user in enumerate(lists["user_id"].to_pylist())}
        items, scores = lists["items"].to_pylist(), lists["scores"].to_pylist()
        unit = scale(scores)
        floor = floor_makers(self.sequences, self.dataset.catalogue())["markov"]()
        settings = self.judging(split, preset("small").model.max_len)
        visitors = Visitors.of(self.sequences)
        place_U = target_places(self.sequences, visitors, settings)["metrics"]
        row_Q = np.flatnonzero(place_U >= 0)
        users, found = [], []
        for start in range(0, len(row_Q), settings.batch):
            row_B = row_Q[start : start + settings.batch]
            question = Question.ask(visitors, row_B, place_U[row_B], settings)
            share_BN = floor.rank_all(question.history, "next").astype(np.float64)
            share_BN[question.row_S, question.item_S] = -np.inf
            place_B = [row_of.get(user, -1) for user in question.user_B]
            listed = [([], []) if place < 0 else (items[place], scores[place]) for place in place_B]
            best = mixed([a for a, _ in listed], [b for _, b in listed], unit, share_BN, weight, LENGTH)
            users += question.user_B.tolist()
            found += best.tolist()
        table = pa.table([users, found], names=["user_id", "items"])
        return answers_of_lists({split: table}, self.sequences, settings)


def digest_of(sequences: pa.Table) -> str:
    """What runs are kept by: who did what, what is learned from and what is asked; not how shards and files lie."""
    whole = sequences.select(["user_id", "item", "n_train", "valid_at", "test_at"]).sort_by("user_id")
    digest = hashlib.sha256()
    for row in whole.to_pylist():
        digest.update(json.dumps(list(row.values())).encode())
    return digest.hexdigest()


class Timed:
    """A ranker, and the seconds it takes for a score of every item."""

    def __init__(self, ranker: Ranker) -> None:
        self._ranker, self.heads, self.actions = ranker, ranker.heads, ranker.actions
        self.seconds, self.users = 0.0, 0

    def rank_all(self, history: HistoryBatch, head: str) -> Scores:
        """See `floors.Ranker`."""
        started = time.perf_counter()
        scores_BN = self._ranker.rank_all(history, head)
        self.seconds += time.perf_counter() - started
        self.users += len(history)
        return scores_BN

    def score(self, history: HistoryBatch, candidates_BC: Ints, head: str) -> Scores:
        """See `floors.Ranker`."""
        return self._ranker.score(history, candidates_BC, head)


def _figures(answers: pa.Table) -> dict[str, float]:
    rank_U = answers["rank"].to_numpy()
    return {"ndcg@10": float(ndcg(rank_U, 10).mean()), "hr@10": float((rank_U <= 10).mean())}
