"""`rayrec bench cold`: what ids, attributes and pictures are worth for items that nobody has met, and for known ones.

In: a dataset, a folder, which share of the items to withhold. Out: in that folder the derived dataset, a file for each
run, `cold.json` and `cold.md`. A run whose file is there is not repeated. Cold items are ranked among themselves, as
Volkovs et al. (DropoutNet, 2017) and Zhu et al. (Heater, 2020) do, and beside that among all items.
"""

from __future__ import annotations

import json
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

from rayrec.bench.kept import Made, kept
from rayrec.catalogue import Catalogue
from rayrec.config import SCRATCH, Config, preset, with_settings
from rayrec.data.dataset import Dataset
from rayrec.data.sample import Oracle
from rayrec.data.withheld import withhold
from rayrec.errors import UsageError
from rayrec.evaluation.judge import cold_items
from rayrec.evaluation.metrics import ndcg
from rayrec.evaluation.oracle import oracle_figures
from rayrec.evaluation.paired import interval, p_value
from rayrec.evaluation.replay import ReplaySettings, replay, users_at_once
from rayrec.model.recommender import build
from rayrec.model.scorer import Scorer
from rayrec.progress import step
from rayrec.training.local import train_alone
from rayrec.training.survey import survey

PARTS = {
    "cold": "cold items, among cold",
    "cold_in_all": "cold items, among all",
    "known": "known items, among all",
}
ITEM_SEED = 0
Settings = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """What a model may see of an item. without: the variant that differs by pictures alone."""

    name: str
    settings: Settings
    without: str | None = None


def variants(backbones: Sequence[str]) -> list[Variant]:
    """Without pictures, and with them by each of `backbones` (values of model.image_backbone)."""
    no_id, no_attributes, no_image = ({f"model.use_{name}": False} for name in ("id", "attributes", "image"))
    found = [
        Variant("id", no_attributes | no_image),
        Variant("attributes", no_id | no_image),
        Variant("id + attributes", no_image),
    ]
    for backbone in backbones:
        how = {} if backbone == SCRATCH else {"model.image_backbone": backbone}
        name = f"image ({Path(backbone).name})"
        found += [
            Variant(name, no_id | no_attributes | how),
            Variant(f"{name} + attributes", no_id | how, without="attributes"),
            Variant(f"{name} + id + attributes", how, without="id + attributes"),
        ]
    return found


def run(
    dataset_path: str, out: Path, *, share: float, seeds: int, backbones: Sequence[str], only: Sequence[str] = (),
    raw: Path | None = None, settings: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Run what is missing, and write `cold.json` and `cold.md` into `out`; answers what is in `cold.json`.

    only: names of variants; none is all. raw: the sample shop that the dataset was made of: its oracle is judged too.
    settings: `path=value` for every training. Raises UsageError for an unknown variant.
    """
    base = with_settings(preset("small"), settings)
    chosen = variants(backbones)
    if unknown := set(only) - {variant.name for variant in chosen}:
        raise UsageError(
            f"unknown variant {', '.join(sorted(unknown))}: choose among {', '.join(one.name for one in chosen)}"
        )
    shop = Shop.open(dataset_path, out, share, base)
    found = {
        variant.name: [shop.run(variant, seed) for seed in range(seeds)]
        for variant in chosen
        if not only or variant.name in only
    }
    rows = [_row(name, runs) for name, runs in found.items()]
    result = {
        "bench": "cold",
        "dataset": dataset_path,
        "share": share,
        "cold_items": len(cold_items(shop.catalogue)),
        "withheld": len(shop.dataset.manifest["withheld"]["items"]),
        "chance": chance(len(cold_items(shop.catalogue))),
        "oracle": shop.oracle(raw) if raw else {},
        "rows": rows,
        "pictures": [
            comparison(variant.name, variant.without, found)
            for variant in chosen
            if variant.without and variant.without in found and variant.name in found
        ],
    }
    (out / "cold.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    (out / "cold.md").write_text(text)
    step(text)
    return result


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """One training judged: each user's NDCG@10 in each part, by user, and what the training took."""

    gain: dict[str, dict[str, float]]
    train_s: float


@dataclass(frozen=True)
class Shop:
    """The derived dataset, and where its runs are kept."""

    dataset: Dataset
    catalogue: Catalogue
    sequences: pa.Table
    folder: Path
    base: Config

    @classmethod
    def open(cls, path: str, out: Path, share: float, base: Config) -> Shop:
        """Withhold the items, if that was not done before. Raises UsageError if `out` has another dataset's."""
        folder = out / f"without-{share:g}"
        source = Dataset.open(path)
        if (folder / "manifest.json").exists():
            dataset = Dataset.open(str(folder))
            if dataset.manifest["withheld"]["from"] != source.path:
                raise UsageError(f"{out} holds runs of {dataset.manifest['withheld']['from']}; name another folder")
        else:
            dataset = withhold(source, folder, share, ITEM_SEED)
        return cls(dataset, dataset.catalogue(), dataset.sequences(), folder, base)

    def run(self, variant: Variant, seed: int) -> Run:
        """The run as kept, or anew."""
        config = with_settings(self.base, [f"{name}={json.dumps(value)}" for name, value in variant.settings.items()])
        config = with_settings(config, [f"train.seed={seed}"])

        def make() -> Made:
            step(f"{self.folder.parent.name}: {variant.name}, seed {seed}")
            return self._train(config)

        place = self.folder.parent / "runs"
        place.mkdir(exist_ok=True)
        key = [self.folder.name, config.model_dump(mode="json")]
        body, answers = kept(place, variant.name.replace(" ", ""), key, seed, make)
        return Run(_gains(answers, self.catalogue), body["train_s"])

    def _train(self, config: Config) -> Made:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as scratch:
            folder = Path(scratch)
            train_alone(self.dataset, config, folder, keep=self.folder.parent / "pictures")
            took_s = time.monotonic() - started
            model = build(config, self.catalogue, weights=load_file(folder / "model.safetensors"))
            vectors_ND = np.load(folder / "vectors.npy", allow_pickle=False)
        followers = survey(self.dataset, len(self.catalogue), config).everything
        scorer = Scorer(model, self.catalogue, vectors_ND, followers, self.dataset.clock)
        answers = replay({"model": scorer}, self.sequences, self._judging(config.model.max_len))
        return {"settings": config.model_dump(mode="json"), "train_s": round(took_s, 1)}, answers

    def _judging(self, max_len: int) -> ReplaySettings:
        n_items = len(self.catalogue)
        return ReplaySettings(
            "test", n_items, self.dataset.clock, max_len,
            batch=users_at_once(n_items),
            protocols=("metrics", "cold"), cold=cold_items(self.catalogue),
        )  # fmt: skip

    def oracle(self, raw: Path) -> dict[str, float | None]:
        """NDCG@10 of the one who knows the shop's rule, of cold items among cold."""
        found = oracle_figures(Oracle.open(raw), self.dataset)
        return {"cold": found["cold"]["ndcg@10"]}


def _gains(answers: pa.Table, catalogue: Catalogue) -> dict[str, dict[str, float]]:
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


def chance(n: int) -> float:
    """NDCG@10 that is expected of `n` items in random order."""
    return float(ndcg(np.arange(1, n + 1), 10).mean()) if n else 0.0


# ---------------------------------------------------------------- the tables


def _mean_U(runs: Sequence[Run], part: str) -> npt.NDArray[np.float64]:
    """Each user's gain, mean over seeds; users in one order. [U]"""
    return np.mean([list(run.gain[part].values()) for run in runs], axis=0)


def _row(name: str, runs: Sequence[Run]) -> dict[str, Any]:
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


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    oracle = result["oracle"]
    titles = ["sees", "seeds", *PARTS.values(), *(["of oracle, cold"] if oracle.get("cold") else []), "train s"]
    lines = [
        f"NDCG@10 on test, {result['cold_items']} cold items ({result['withheld']} of them withheld), 95% intervals "
        f"over users. Chance among cold items: {result['chance']:.4f}."
        + "".join(f" Oracle, {PARTS[part]}: {value:.4f}." for part, value in oracle.items() if value is not None),
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    for row in result["rows"]:
        cells = [row["variant"], str(row["seeds"]), *(_cell(row[part]) for part in PARTS)]
        if oracle.get("cold"):
            cells.append(f"{(row['cold']['ndcg@10'] or 0) / oracle['cold']:.0%}")
        cells.append(f"{row['train_s']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| with pictures | against | part | difference | 95%, paired | p |", "|---|---|---|---|---|---|"]
    for row in result["pictures"]:
        for part, title in PARTS.items():
            if part in row:
                low, high = row[part]["interval"]
                cells = [
                    row["variant"], row["without"], title, f"{row[part]['difference']:+.4f}",
                    f"{low:+.4f} to {high:+.4f}", f"{row[part]['p']:.4f}",
                ]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(part: dict[str, Any]) -> str:
    if part["ndcg@10"] is None:
        return "–"
    low, high = part["interval"]
    return f"{part['ndcg@10']:.4f} ({low:.4f} to {high:.4f}), {part['users']} users"
