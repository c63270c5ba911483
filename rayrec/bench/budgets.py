"""`rayrec bench budgets`: how many pictures a step should encode: accuracy and rows a second, from none to all.

In: a dataset with pictures, a folder, budgets. Out: in that folder a file for each run, `budgets.json` and
`budgets.md`. A run whose file is there is not repeated. Beside the budgets stand a model without pictures, and the
naive form: a picture encoded for every event row of the batch, repeated as it may be. Its vectors and gradients are
those of `all`, so it is timed and not trained to the end.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from rayrec.bench.first_stage import batches
from rayrec.bench.judged import PARTS, Run, cell, comparison, gains, judged_row, trained
from rayrec.bench.kept import Made, kept, kept_body
from rayrec.catalogue import Catalogue
from rayrec.config import Config, preset
from rayrec.data.dataset import Dataset, Images
from rayrec.errors import UsageError
from rayrec.model.encoders import Fresh
from rayrec.model.recommender import NextItems, Recommender, build
from rayrec.progress import step
from rayrec.settings import with_settings
from rayrec.training.loop import Learner

WITHOUT, NAIVE = "without", "naive"
BUDGETS = ("0", "12", "48", "192", "all")
CPU = torch.device("cpu")
UNTIMED = 2
"""Steps before the clock starts: the first ones find their memory."""


class BesideRows(Recommender):
    """The same model, which encodes the picture of each event row of a batch, and of each item that might have been."""

    def forward(self, batch: Any, scale_K: Tensor | None = None) -> Tensor:
        """As the model's, of `NextItems`."""
        self.n_read = batch.history.item_BL.numel()
        return super().forward(batch, scale_K)

    def _pictures(self, used_P: Tensor, other_M: Tensor) -> tuple[Fresh | None, Fresh | None]:
        read_P, target_P = used_P[: self.n_read], used_P[self.n_read :].unique()
        # A target is the next event that is read: it has a row of its own at a history's end alone.
        event_E = torch.cat([read_P, target_P[~torch.isin(target_P, read_P)], other_M])
        event_E = event_E[self.items.image_row_N[event_E] >= 0]
        item_M, place_E, n_M = event_E.unique(return_inverse=True, return_counts=True)
        vector_ED = self.item_encoder.images(self.items, event_E)
        sum_MD = torch.zeros(len(item_M), vector_ED.shape[1]).index_add(0, place_E, vector_ED)
        vector_MD = sum_MD / n_M[:, None]  # of equal ones: their gradients add up
        self.item_encoder.cache(item_M, vector_MD)
        return Fresh(item_M, vector_MD), Fresh(item_M, vector_MD)


def run(
    dataset_path: str, out: Path, *, budgets: Sequence[str] = BUDGETS, seeds: int = 1, steps: int = 20,
    rounds: int = 3, settings: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Run what is missing, and write `budgets.json` and `budgets.md` into `out`; answers what is in `budgets.json`.

    budgets: values of train.image_budget. steps: that are timed of each, in each round. settings: `path=value` for
    every training. Raises UsageError for a dataset without pictures, a budget that is none, or the paper's model.
    """
    base = with_settings(preset("small"), settings)
    if base.model.kind == "paper":
        raise UsageError("the paper's model encodes every picture of a batch; it has no budget")
    configs = {WITHOUT: with_settings(base, ["model.use_image=false"])}
    configs |= {budget: with_settings(base, [f"train.image_budget={budget}"]) for budget in budgets}
    shop = Shop.open(dataset_path, out)
    configs_timed = {**configs, NAIVE: with_settings(base, ["train.image_budget=all"])}
    paces: dict[str, list[Pace]] = {name: [] for name in configs_timed}
    for round_ in range(rounds):  # in turn: what else the machine does meets all alike
        for name, config in configs_timed.items():
            paces[name].append(shop.pace(name, config, steps, round_))
    found = {name: [shop.run(name, config, seed) for seed in range(seeds)] for name, config in configs.items()}
    result = {
        "bench": "budgets",
        "dataset": dataset_path,
        "pictures": len(shop.pictures.item_M),
        "threads": torch.get_num_threads(),
        "rows": [_row(name, paces[name], found.get(name)) for name in configs_timed],
        "against": [comparison(name, WITHOUT, found) for name in budgets],
    }
    (out / "budgets.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    (out / "budgets.md").write_text(text)
    step(text)
    return result


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class Pace:
    """Steps of the first stage: rows a second and a CPU second; pictures a step with gradient, and for the cache."""

    rows_per_s: float
    rows_per_cpu_s: float
    taught: float
    refreshed: float


@dataclass(frozen=True)
class Shop:
    """A dataset in memory, and where its runs are kept."""

    dataset: Dataset
    catalogue: Catalogue
    sequences: pa.Table
    pictures: Images
    folder: Path
    fingerprint: str

    @classmethod
    def open(cls, path: str, out: Path) -> Shop:
        """Raises UsageError for a dataset without pictures."""
        dataset = Dataset.open(path)
        if not dataset.has("images"):
            raise UsageError(f"{path} has no pictures: there is nothing to budget")
        out.mkdir(parents=True, exist_ok=True)
        return cls(
            dataset, dataset.catalogue(), dataset.sequences(), dataset.images(), out / "runs", dataset.fingerprint()
        )

    def run(self, name: str, config: Config, seed: int) -> Run:
        """A training and its answers, as kept or anew."""
        config = with_settings(config, [f"train.seed={seed}"])

        def make() -> Made:
            step(f"budget {name}, seed {seed}")
            return trained(self.dataset, self.catalogue, self.sequences, config, keep=self.folder.parent / "pictures")

        self.folder.mkdir(exist_ok=True)
        body, answers = kept(self.folder, name, [self.fingerprint, config.model_dump(mode="json")], seed, make)
        return Run(gains(answers, self.catalogue), body["train_s"])

    def pace(self, name: str, config: Config, steps: int, round_: int) -> Pace:
        """Timed steps, as kept or anew."""

        def make() -> dict[str, float]:
            found = asdict(self._pace(name, config, steps))
            step(f"budget {name}, round {round_ + 1}: {found['rows_per_s']:.0f} rows/s")
            return found

        key = [self.fingerprint, config.model_dump(mode="json"), steps]
        return Pace(**kept_body(self.folder, f"pace-{name}", key, round_, make))

    def _pace(self, name: str, config: Config, steps: int) -> Pace:
        torch.manual_seed(0)
        images = self.pictures if config.model.use_image else None
        item_M, pixels_MHWC = (images.item_M, images.pixels_MHWC) if images else (None, None)
        model = build(config, self.catalogue, item_M, pixels_MHWC, keep=self.folder.parent / "pictures")
        assert isinstance(model, Recommender)
        if name == NAIVE:
            model = beside_rows(model, self.catalogue)
        return pace(model, self._batches(config, UNTIMED + steps))

    def _batches(self, config: Config, n: int) -> list[NextItems]:
        """The same for every budget."""
        return list(islice(batches(self.sequences, self.dataset.clock, config), n))


def beside_rows(model: Recommender, catalogue: Catalogue) -> BesideRows:
    """The naive form of `model`, with its weights."""
    naive = BesideRows(model.config, model.items, torch.from_numpy(catalogue.n_train))
    naive.load_state_dict(model.state_dict())
    return naive


def pace(model: Recommender, batches: Sequence[NextItems]) -> Pace:
    """Take a step on each batch; all but the first UNTIMED count."""
    encoded = {True: 0, False: 0}
    learner = Learner(
        model, list(model.stage_parameters("retrieval")), model.config.train, len(batches), CPU,
        slow=model.slow_parameters(), tables=model.sparse_parameters(),
    )  # fmt: skip
    model.train()
    model.refresh()
    if model.item_encoder.cnn is not None:

        def count(module: Any, given: tuple[Tensor], vector_MD: Tensor) -> None:
            encoded[torch.is_grad_enabled()] += len(vector_MD)

        model.item_encoder.cnn.register_forward_hook(count)
    for batch in batches[:UNTIMED]:
        learner.train_step(batch)
    encoded.update({True: 0, False: 0})
    started, started_cpu = time.perf_counter(), time.process_time()
    for batch in batches[UNTIMED:]:
        learner.train_step(batch)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    steps = len(batches) - UNTIMED
    rows = sum(len(batch) for batch in batches[UNTIMED:])
    return Pace(rows / seconds, rows / cpu_s, encoded[True] / steps, encoded[False] / steps)


# ---------------------------------------------------------------- the table


def _row(name: str, paces: Sequence[Pace], runs: Sequence[Run] | None) -> dict[str, Any]:
    row = judged_row(name, runs) if runs else {"variant": name, "seeds": 0}
    return row | {
        key: statistics.median(getattr(one, key) for one in paces) for key in [one.name for one in fields(Pace)]
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    trained_rows = [row for row in result["rows"] if row["seeds"]]
    parts = [part for part in PARTS if any(row[part]["users"] for row in trained_rows)]
    titles = [
        "pictures a step",
        "taught",
        "refreshed",
        "rows/s",
        "rows a CPU s",
        *(f"NDCG@10, {PARTS[part]}" for part in parts),
    ]
    lines = [
        f"{result['pictures']} pictures, {result['threads']} threads; 95% intervals over users; rows a second of the "
        "first stage. Taught and refreshed: pictures encoded a step with gradient, and for the cache.",
        "",
        f"| {' | '.join([*titles, 'seeds', 'train s'])} |",
        "|---" * (len(titles) + 2) + "|",
    ]
    for row in result["rows"]:
        cells = [row["variant"], f"{row['taught']:.0f}", f"{row['refreshed']:.0f}", f"{row['rows_per_s']:.0f}"]
        cells.append(f"{row['rows_per_cpu_s']:.0f}")
        if row["seeds"]:
            cells += [*(cell(row[part]) for part in parts), str(row["seeds"]), f"{row['train_s']:.0f}"]
        else:
            cells += [*("as all" for _ in parts), "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| pictures a step | part | against no pictures | 95%, paired | p |", "|---|---|---|---|---|"]
    for row in result["against"]:
        for part in parts:
            low, high = row[part]["interval"]
            cells = [row["variant"], PARTS[part], f"{row[part]['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}"]
            lines.append(f"| {' | '.join([*cells, format(row[part]['p'], '.4f')])} |")
    return "\n".join(lines) + "\n"
