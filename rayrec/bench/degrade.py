"""`rayrec bench degrade`: how NDCG@10 falls with missing and noisy data, and what the remedies win back.

In: a dataset, kinds and shares of damage, a folder. Out: in that folder a file for each run, a table and a picture. A
run whose file is there is not repeated. Every model is asked the same: the test questions of the clean dataset, with
the clean histories; only what it learned from differs. What is damaged, and what never is: see `damage`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rayrec.bench import damage
from rayrec.bench.damage import Damage, Goods, free_events
from rayrec.bundle import Bundle
from rayrec.cluster import connect
from rayrec.config import PrepareConfig, preset
from rayrec.data.dataset import Dataset
from rayrec.data.pipelines import prepare
from rayrec.errors import UsageError
from rayrec.evaluation import ReplaySettings, replay, summarise
from rayrec.evaluation.replay import users_at_once
from rayrec.history import Ints
from rayrec.progress import step
from rayrec.serving.scorer import load_scorer
from rayrec.settings import from_dict, with_settings
from rayrec.training.trainer import train

CLEAN = "clean"
FIGURES = ("metrics", "next")


OFF = "off"
WAYS = (OFF, "on")


@dataclass(frozen=True)
class Kind:
    """A kind of damage, the settings of prepare and train without any remedy, and those of each remedy by its name."""

    damage: Damage
    remedies: dict[str, tuple[str, ...]]
    off: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "lost-events": Kind(damage.lose_events, {"id dropout": ("model.id_dropout=0.3",)}),
    "broken-events": Kind(damage.break_events, {"filter": ("clean.expected=[value]", "clean.max_missing=0.5")}),
    "bots": Kind(
        damage.add_bots, {"bot removal": ("clean.bot_events_per_hour=1000",)}, off=("clean.bot_events_per_hour=0",)
    ),
    "lost-attributes": Kind(
        damage.lose_attributes,
        {
            "filling": ("price.fill=median", "category.fill=mode", "brand.fill=mode"),
            "attribute dropout": ("model.attribute_dropout=0.2",),
        },
        off=("price.fill=none", "category.fill=none", "brand.fill=none"),
    ),
    "shuffled-attributes": Kind(
        damage.shuffle_attributes,
        {"price filter": ("price.smooth=median",), "attribute dropout": ("model.attribute_dropout=0.2",)},
    ),
    "lost-images": Kind(damage.lose_images, {"image dropout": ("model.image_dropout=0.2",)}),
    "noisy-images": Kind(
        damage.noise_images,
        {"image filter": ("images.denoise=median",), "image dropout": ("model.image_dropout=0.2",)},
    ),
}


@dataclass(frozen=True)
class Plan:
    """One run: what is damaged, with which remedy (or OFF), under which seed, trained with which settings."""

    kind: str
    share: float
    remedy: str
    seed: int
    settings: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of its file; other settings have another."""
        digest = hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:8]
        return f"{self.kind}-{self.share:g}-{self.remedy.replace(' ', '-')}-{self.seed}-{digest}"


def plans(kinds: Sequence[str], shares: Sequence[float], seeds: int, settings: Sequence[str]) -> Iterator[Plan]:
    """All runs, seed by seed, the clean one first. Raises UsageError for an unknown kind, or no share of a whole."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"unknown kind {', '.join(unknown)}: choose among {', '.join(KINDS)}")
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise UsageError(f"--shares {', '.join(map(str, wrong))}: give shares above 0 and up to 1")
    for seed in range(seeds):
        yield Plan(CLEAN, 0.0, OFF, seed, tuple(settings))
        for kind in kinds:
            of_kind = KINDS[kind]
            for share in shares:
                for remedy, chosen in {OFF: (), **of_kind.remedies}.items():
                    yield Plan(kind, share, remedy, seed, (*of_kind.off, *chosen, *settings))


def divided(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings of prepare, and those of train: `model...` and `train...`."""
    of_train = [setting for setting in settings if setting.startswith(("model.", "train."))]
    return [setting for setting in settings if setting not in of_train], of_train


def run(
    dataset: str, out: Path, kinds: Sequence[str], shares: Sequence[float], seeds: int, settings: Sequence[str]
) -> dict[str, Any]:
    """Run what is missing, and write `table.md` and `degrade.png` into `out`; answers the table's rows.

    settings: of prepare (`price...`, `images...`) or of train (`model...`, `train...`), for every run.
    Raises UsageError for a dataset that is not split by leave-one-out: its training events could not be told.
    """
    wanted = list(plans(kinds, shares, seeds, settings))
    of_prepare, of_train = divided(settings)
    with_settings(PrepareConfig(), of_prepare)
    with_settings(preset("small"), of_train)
    bench = Bench(Dataset.open(dataset), out)
    results = [{**asdict(plan), **bench.run(plan)} for plan in wanted]
    rows = summary(results)
    (out / "table.md").write_text(table(rows))
    draw(rows, out / "degrade.png")
    step(table(rows))
    return {"bench": "degrade", "dataset": bench.dataset.path, "rows": rows}


# ---------------------------------------------------------------- runs


@dataclass
class Bench:
    """A clean dataset, and the folder in which the bench keeps its runs."""

    dataset: Dataset
    out: Path
    goods: Goods = field(init=False)

    def __post_init__(self) -> None:
        config = self.dataset.manifest["config"]
        if config["split"] != "loo":
            raise UsageError(
                f"{self.dataset.path}: split={config['split']}; this bench needs one prepared with split=loo"
            )
        owner = self.out / "dataset.json"
        facts = {"files": self.dataset.manifest["files"], "config": config}
        if owner.exists() and json.loads(owner.read_text()) != facts:
            raise UsageError(f"{self.out}: holds runs on another dataset; name another --out")
        (self.out / "runs").mkdir(parents=True, exist_ok=True)
        owner.write_text(json.dumps(facts))
        events = self.dataset.table("events").sort_by([("user_id", "ascending"), ("time_ms", "ascending")])
        items = self.dataset.table("items").sort_by("item_index")
        self.goods = Goods(events.combine_chunks(), items.combine_chunks(), self.dataset.images())
        self.config: PrepareConfig = from_dict(PrepareConfig, config)

    def run(self, plan: Plan) -> dict[str, Any]:
        """The figures of a run as kept, or anew."""
        kept = self.out / "runs" / f"{plan.name}.json"
        if not kept.exists():
            step(f"degrade: {plan.kind} {plan.share:g}, remedy {plan.remedy}, seed {plan.seed}")
            with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as scratch:
                figures = self._figures(plan, Path(scratch))
            part = kept.with_suffix(".part")
            part.write_text(json.dumps({**asdict(plan), "figures": figures}, indent=1) + "\n")
            part.replace(kept)
        return {"figures": json.loads(kept.read_text())["figures"]}

    def _figures(self, plan: Plan, scratch: Path) -> dict[str, Any]:
        connect()
        of_prepare, of_train = divided(plan.settings)
        self._write(self._damaged(plan), scratch / "raw")
        own = (f"clock={self.dataset.clock}", "clean.k_core=0")
        report = prepare(
            str(scratch / "raw"), str(scratch / "dataset"), with_settings(self.config, [*own, *of_prepare])
        )
        config = with_settings(preset("small"), [f"train.seed={plan.seed}", "train.tracker=[]", *of_train])
        bundle = train(str(scratch / "dataset"), str(scratch / "bundles"), config)
        return {**self.judged(bundle), "events": {name: report["events"][name] for name in ("read", "kept")}}

    def _damaged(self, plan: Plan) -> Goods:
        """The remedy has no part in what is damaged."""
        if plan.kind == CLEAN:
            return self.goods
        rng = np.random.default_rng([plan.seed, zlib.crc32(plan.kind.encode()), round(plan.share * 1e6)])
        free = free_events(self.goods.events, self.config.sequences.actions)
        return KINDS[plan.kind].damage(self.goods, plan.share, free, rng)

    def _write(self, goods: Goods, raw: Path) -> None:
        """Write a raw folder. Every item is in its catalogue, so that the models are asked about the same items."""
        raw.mkdir()
        pq.write_table(goods.events.rename_columns({"time_ms": "timestamp"}), raw / "events.parquet")
        path_of: dict[int, str] = {}
        clean = dict(zip(self.goods.images.item_M.tolist(), self.goods.images.pixels_MHWC, strict=True))
        for item, pixels_HWC in zip(goods.images.item_M.tolist(), goods.images.pixels_MHWC, strict=True):
            # A picture that nothing happened to is written once for all runs.
            folder = self.out / "pictures" if np.array_equal(pixels_HWC, clean[item]) else raw / "pictures"
            folder.mkdir(exist_ok=True)
            file = (folder / f"{item}.png").absolute()
            path_of[item] = str(file)
            if not file.exists():
                Image.fromarray(pixels_HWC).save(file.with_suffix(".part"), "PNG")
                file.with_suffix(".part").replace(file)
        image = [path_of.get(item) for item in goods.items["item_index"].to_pylist()]
        items = goods.items.select(["item_id", "title", "category", "brand", "price"])
        pq.write_table(items.append_column("image", pa.array(image, pa.string())), raw / "items.parquet")

    def judged(self, bundle: Bundle) -> dict[str, Any]:
        """NDCG@10, its interval and HR@10 of a bundle, asked the questions of the clean dataset's test split."""
        catalogue, sequences = bundle.catalogue, self.dataset.sequences()
        ids = ["", *self.goods.items["item_id"].to_pylist()]
        index_N = np.array([catalogue.index.get(item_id, 0) for item_id in ids])
        asked = renumbered(sequences, index_N)
        batch = users_at_once(len(catalogue))
        max_len = bundle.config.model.max_len
        settings = ReplaySettings("test", len(catalogue), self.dataset.clock, max_len, batch, FIGURES)
        body = summarise(replay({"model": load_scorer(bundle)}, asked, settings), catalogue, settings)
        names = ("users", "ndcg@10", "ndcg@10_95", "hr@10")
        return {protocol: {name: body[protocol][name] for name in names} for protocol in FIGURES}


def renumbered(sequences: pa.Table, index_N: Ints) -> pa.Table:
    """The sequences with item n called index_N[n]."""
    lists = sequences["item"].combine_chunks()
    offsets = np.r_[0, np.cumsum(np.asarray(lists.value_lengths(), np.int64))].astype(np.int32)
    item = pa.ListArray.from_arrays(offsets, pa.array(index_N[np.asarray(lists.flatten())], pa.int32()))
    return sequences.set_column(sequences.schema.get_field_index("item"), "item", item)


# ---------------------------------------------------------------- the table


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a kind, share and remedy: NDCG@10, mean over seeds, with the remedy off and on, and of the clean data."""

    def means(kind: str, share: float, remedy: str) -> dict[str, float]:
        found = [
            one["figures"] for one in results if (one["kind"], one["share"], one["remedy"]) == (kind, share, remedy)
        ]
        return {protocol: float(np.mean([one[protocol]["ndcg@10"] for one in found])) for protocol in FIGURES}

    keys = dict.fromkeys((one["kind"], one["share"], one["remedy"]) for one in results)
    seeds, clean = len({one["seed"] for one in results}), means(CLEAN, 0.0, OFF)
    rows: list[dict[str, Any]] = [{"kind": CLEAN, "share": 0.0, "remedy": None, OFF: clean}]
    rows += [
        {"kind": kind, "share": share, "remedy": remedy, OFF: means(kind, share, OFF), "on": means(kind, share, remedy)}
        for kind, share, remedy in keys
        if remedy != OFF
    ]
    return [{**row, CLEAN: clean, "seeds": seeds} for row in rows]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows as Markdown: NDCG@10, and in brackets the share of the clean data's."""
    lines = [
        "| damage | share | remedy | next new item: off, on | next item: off, on |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ways = [] if row["kind"] == CLEAN else WAYS
        cells = [
            ", ".join(_cell(row[way][protocol], row[CLEAN][protocol]) for way in ways) or f"{row[CLEAN][protocol]:.4f}"
            for protocol in FIGURES
        ]
        lines.append(f"| {row['kind']} | {row['share']:.0%} | {row['remedy'] or '–'} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def _cell(value: float, clean: float) -> str:
    return f"{value:.4f}" + (f" ({value / clean:.0%})" if clean else "")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """NDCG@10 (next new item) over the share of damage, a panel for each kind, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [kind for kind in dict.fromkeys(row["kind"] for row in rows) if kind != CLEAN]
    figure = Figure(figsize=(3.2 * max(1, len(kinds)), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(kinds)), squeeze=False, sharey=True)[0]
    for axis, kind in zip(axes, kinds, strict=False):
        chosen = [row for row in rows if row["kind"] == kind]
        lines = {"no remedy": {row["share"]: row[OFF]["metrics"] for row in chosen}}
        for row in chosen:
            lines.setdefault(row["remedy"], {})[row["share"]] = row["on"]["metrics"]
        clean = chosen[0][CLEAN]["metrics"]
        for (label, points), colour in zip(lines.items(), ("#8a8f98", "#c44e00", "#2a6f97"), strict=False):
            axis.plot([0.0, *points], [clean, *points.values()], "o-", color=colour, label=label)
        axis.axhline(clean, color="#c8ccd2", linestyle=":")
        axis.set_title(kind)
        axis.set_xlabel("share")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("NDCG@10, next new item")
    axes[0].set_ylim(bottom=0)
    figure.savefig(str(path), dpi=110)
