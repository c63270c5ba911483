"""`rayrec bench cold`: what ids, attributes and pictures are worth for items that nobody has met, and for known ones.

In: a dataset, a folder, which share of the items to withhold. Out: in that folder the derived dataset, a file for each
run, `cold.json` and `cold.md`. A run whose file is there is not repeated. Cold items are ranked among themselves, as
Volkovs et al. (DropoutNet, 2017) and Zhu et al. (Heater, 2020) do, and beside that among all items.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayrec.bench.judged import PARTS, Run, cell, comparison, gains, judged_row, trained
from rayrec.bench.kept import Made, kept
from rayrec.catalogue import Catalogue
from rayrec.config import SCRATCH, Config, preset
from rayrec.data.dataset import Dataset
from rayrec.data.sample import Oracle
from rayrec.data.withheld import withhold
from rayrec.errors import UsageError
from rayrec.evaluation.judge import cold_items
from rayrec.evaluation.metrics import ndcg
from rayrec.evaluation.oracle import oracle_figures
from rayrec.progress import step
from rayrec.settings import with_settings

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
    rows = [judged_row(name, runs) for name, runs in found.items()]
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
            return trained(self.dataset, self.catalogue, self.sequences, config, keep=self.folder.parent / "pictures")

        place = self.folder.parent / "runs"
        place.mkdir(exist_ok=True)
        key = [self.folder.name, config.model_dump(mode="json")]
        body, answers = kept(place, variant.name.replace(" ", ""), key, seed, make)
        return Run(gains(answers, self.catalogue), body["train_s"])

    def oracle(self, raw: Path) -> dict[str, float | None]:
        """NDCG@10 of the one who knows the shop's rule, of cold items among cold."""
        found = oracle_figures(Oracle.open(raw), self.dataset, is_told=True)
        return {"cold": found["cold"]["ndcg@10"]}


def chance(n: int) -> float:
    """NDCG@10 that is expected of `n` items in random order."""
    return float(ndcg(np.arange(1, n + 1), 10).mean()) if n else 0.0


# ---------------------------------------------------------------- the tables


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
        cells = [row["variant"], str(row["seeds"]), *(cell(row[part]) for part in PARTS)]
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
