"""Shops at the edge of sense, through the whole path: a clear refusal or a sound bundle, never a NaN."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinyshop
from PIL import Image

from rayrec.bundle import Bundle, default_state
from rayrec.config import Config, PrepareConfig, preset
from rayrec.data import pipelines
from rayrec.data.dataset import Dataset
from rayrec.errors import DataError, RayrecError
from rayrec.evaluation import evaluate
from rayrec.evaluation.report import render
from rayrec.serving.offline import recommend
from rayrec.serving.scorer import scorer_maker
from rayrec.settings import with_settings
from rayrec.training.local import train_alone
from rayrec.training.publish import write_bundle
from rayrec.training.survey import survey

START_S = 1_700_000_000
Row = tuple[str, str, object, str]
Item = dict[str, str]


def walks(users: int = 6, items: int = 5, length: int = 6) -> list[Row]:
    """Visitors in step: each item followed by the next, every third event a purchase."""
    return [
        (f"u{user}", f"i{(user + n) % items}", START_S + 1000 * user + 60 * n, "purchase" if n % 3 == 2 else "view")
        for user in range(users)
        for n in range(length)
    ]


def catalogue(items: int = 5, **columns: Callable[[int], str]) -> list[Item]:
    """Items i0, i1, ...; `columns` say what stands in each column of the n-th."""
    plain: dict[str, Callable[[int], str]] = {
        "title": lambda n: f"thing {n}",
        "category": lambda n: f"c{n % 2}",
        "brand": lambda n: f"b{n % 2}",
        "price": lambda n: str(n + 1),
    }
    return [
        {"item_id": f"i{n}", **{name: make(n) for name, make in {**plain, **columns}.items()}} for n in range(items)
    ]


def picture(n: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (40 * n % 256, 200, 90)).save(stream, "PNG")
    return stream.getvalue()


def write(folder: Path, events: list[Row], items: list[Item] | None, images: dict[str, bytes]) -> Path:
    raw = folder / "raw"
    (raw / "images").mkdir(parents=True)
    lines = ["user_id,item_id,timestamp,action", *(",".join(map(str, row)) for row in events)]
    (raw / "events.csv").write_text("\n".join(lines) + "\n")
    if items is not None:
        lines = [",".join(items[0]), *(",".join(item.values()) for item in items)]
        (raw / "items.csv").write_text("\n".join(lines) + "\n")
    for name, content in images.items():
        (raw / "images" / f"{name}.png").write_bytes(content)
    return raw


PICTURES = {f"i{n}": picture(n) for n in range(5)}
SHOPS: dict[str, tuple[list[Row], list[Item] | None, dict[str, bytes]]] = {
    "one item": (walks(items=1), catalogue(1), {"i0": picture(0)}),
    "one item without catalogue": (walks(items=1), None, {}),
    "two events a user": (walks(length=2), catalogue(), PICTURES),
    "all at one time": ([(u, i, START_S, a) for u, i, _, a in walks()], catalogue(), PICTURES),
    "a category an item": (walks(), catalogue(category=lambda n: f"only {n}"), PICTURES),
    "one category": (walks(), catalogue(category=lambda n: "all", brand=lambda n: "one"), PICTURES),
    "some prices NaN": (walks(), catalogue(price=lambda n: "NaN" if n % 2 else "3"), PICTURES),
    "all prices NaN": (walks(), catalogue(price=lambda n: "nan"), PICTURES),
    "infinite prices": (walks(), catalogue(price=lambda n: ("inf", "1e308", "3")[n % 3]), PICTURES),
    "prices of one value": (walks(), catalogue(price=lambda n: "9.99"), PICTURES),
    "no attribute at all": (walks(), [{"item_id": f"i{n}"} for n in range(5)], {}),
    "identical pictures": (walks(), catalogue(), {f"i{n}": picture(0) for n in range(5)}),
    "one picture": (walks(), catalogue(), {"i2": picture(2)}),
    "two users": (walks(users=2), catalogue(), PICTURES),
    "one user": (walks(users=1), catalogue(), PICTURES),
    "items nobody met": (walks(), catalogue(60), PICTURES),
    "items missing in the catalogue": ([(u, "x" + i, t, a) for u, i, t, a in walks()], catalogue(), PICTURES),
    "one very long user": ([*walks(1, 5, 12_000), *walks(2)], catalogue(), PICTURES),
    "one item again and again": ([("u0", "i0", START_S + n, "view") for n in range(50)], catalogue(), PICTURES),
    "order numbers from below zero": ([(u, i, (t - START_S) - 3000, a) for u, i, t, a in walks()], catalogue(), {}),
    "only purchases": ([(u, i, t, "purchase") for u, i, t, _ in walks()], catalogue(), PICTURES),
    "gaps of decades": ([(u, i, 1e9 + 3e8 * (n % 3), a) for n, (u, i, _, a) in enumerate(walks())], catalogue(), {}),
}

HOPELESS: dict[str, tuple[list[Row], list[Item] | None, dict[str, bytes]]] = {
    "one event": (walks(users=1, length=1), None, {}),
    "one event a user": (walks(length=1), catalogue(), PICTURES),
    "three events": (walks(users=1, length=3), catalogue(), {}),
}
LONELY_PAIR = (walks(users=1, length=2), None, {})


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same stages of prepare, one by one in this process; pictures of losses, a second each, are left out."""
    monkeypatch.setattr("rayrec.training.publish.draw_curves", lambda history, path: path.touch())
    monkeypatch.setattr(pipelines, "connect", lambda **options: None)
    monkeypatch.setattr(pipelines, "quiet_data", lambda: None)
    monkeypatch.setattr("rayrec.data.source.cpus", lambda: 2)
    monkeypatch.setattr(pipelines, "each", lambda title, work, n: map(work, range(n)))


def prepared(shop: str, folder: Path, *settings: str) -> Dataset:
    raw = write(folder, *{**SHOPS, **HOPELESS, "lonely pair": LONELY_PAIR}[shop])
    config = with_settings(PrepareConfig(), ["images.size=16", *settings])
    pipelines.prepare(str(raw), str(folder / "dataset"), config)
    return Dataset.open(str(folder / "dataset"))


def trained(dataset: Dataset, config: Config, folder: Path) -> Bundle:
    """As `trainer.train` does it, in this process."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    train_alone(dataset, config, checkpoint)
    items = dataset.catalogue()
    everything = survey(dataset, len(items), config).everything
    return write_bundle(checkpoint, str(folder / "bundles"), dataset, items, config, everything)


def numbers(value: Any) -> Iterator[float]:
    """All floats in a JSON body."""
    if isinstance(value, float):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from numbers(part)


def must_be_sound(bundle: Bundle, dataset: Dataset) -> dict[str, Any]:
    """Every number in the bundle and in its judgement is one, and anybody gets a list; answers the judgement."""
    for name, tensor in bundle.tensors().items():
        assert tensor.isfinite().all(), name
    assert np.isfinite(bundle.vectors_ND).all()
    for matrix in (bundle.followers.next, bundle.followers.near):
        assert np.isfinite(matrix.data).all()
    assert all(map(math.isfinite, numbers(bundle.json("metrics.json"))))
    result: dict[str, Any] = {}
    for split in ("valid", "test"):
        max_len = bundle.config.model.max_len
        result = evaluate(scorer_maker(str(bundle.path)), dataset, split, max_len=max_len, parallel=False)  # type: ignore[arg-type]
        assert all(map(math.isfinite, numbers(json.loads(json.dumps(result)))))
    assert "nan" not in render(result, {}, datetime.now(timezone.utc)).lower().split()
    state = default_state(str(bundle.path))
    known = dataset.sequences()["user_id"][0].as_py()
    for user, history in ((known, dataset.path), ("stranger", None)):
        for scene, item in (("home", None), ("item", dataset.catalogue().ids[1])):
            answer = recommend(str(bundle.path), state, user, scene, 10, item, history)
            scores = [shown["score"] for shown in answer["items"]]
            assert all(0 <= score <= 1 for score in scores)
            assert len(scores) == len({shown["item_id"] for shown in answer["items"]})
            if user == "stranger" and scene == "home":
                assert len(scores) == min(10, int(dataset.catalogue().listed.sum())), answer["removed"]
    return result


@pytest.mark.parametrize("shop", SHOPS)
def test_a_sound_bundle(shop: str, tmp_path: Path) -> None:
    dataset = prepared(shop, tmp_path)
    must_be_sound(trained(dataset, tinyshop.tiny("train.epochs=1"), tmp_path), dataset)


@pytest.mark.parametrize("kind", ["small", "paper"])
@pytest.mark.parametrize("shop", HOPELESS)
def test_nothing_to_learn_from_is_said(shop: str, kind: str, tmp_path: Path) -> None:
    dataset = prepared(shop, tmp_path, "images.size=128")
    with pytest.raises(DataError, match=r"nothing to learn from: no visitor has two training events.*report\.json"):
        trained(dataset, preset(kind), tmp_path)


def test_events_that_all_teach_the_fusion(tmp_path: Path) -> None:
    """The message must name the setting that took them, for there are two training events."""
    dataset = prepared("lonely pair", tmp_path)
    with pytest.raises(DataError, match=r"--set train\.fusion_holdout"):
        trained(dataset, tinyshop.tiny("train.fusion_holdout=0.999"), tmp_path)
    shutil.rmtree(tmp_path / "checkpoint")
    must_be_sound(trained(dataset, tinyshop.tiny("train.fusion_holdout=0.001"), tmp_path), dataset)


def test_items_that_the_catalogue_lacks_are_counted(tmp_path: Path) -> None:
    report = json.loads(
        (Path(prepared("items missing in the catalogue", tmp_path / "a").path) / "report.json").read_text()
    )
    assert (report["catalogue"], report["unlisted_items"]) == (10, 5)
    report = json.loads((Path(prepared("one item without catalogue", tmp_path / "b").path) / "report.json").read_text())
    assert (report["catalogue"], report["unlisted_items"]) == (1, 0), "without a catalogue all items are recommended"


def test_absurd_prices_are_unknown(tmp_path: Path) -> None:
    dataset = prepared("infinite prices", tmp_path)
    assert dataset.table("items")["price"].drop_null().to_pylist() == [3.0]


FAMILIES = {
    "gru": ["model.encoder=gru"],
    "transformer": ["model.encoder=transformer"],
    "bpr_max": ["train.loss=bpr_max"],
    "gbce": ["train.loss=gbce"],
    "sampled softmax": ["train.negatives=3"],
    "attributes alone": ["model.use_id=false", "model.use_image=false"],
    "pictures alone": ["model.use_id=false", "model.use_attributes=false"],
    "batches of one": ["train.batch_size=1", "train.fusion_batch_size=1"],
}
SMALLEST = ("one item", "infinite prices")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shop", SMALLEST)
def test_every_family_is_sound(shop: str, family: str, tmp_path: Path) -> None:
    dataset = prepared(shop, tmp_path)
    config = tinyshop.tiny("train.epochs=1", *FAMILIES[family])
    must_be_sound(trained(dataset, config, tmp_path), dataset)


def test_the_papers_model_is_sound(tmp_path: Path) -> None:
    dataset = prepared("infinite prices", tmp_path, "images.size=128")
    config = with_settings(preset("paper"), ["train.epochs=1", "train.max_samples=4", "train.batch_size=4"])
    must_be_sound(trained(dataset, config, tmp_path), dataset)


BY_TIME = {
    "one item": "",
    "all at one time": "too few or too coarse",
    "two users": "",
    "order numbers from below zero": "order numbers, not times",
    "one very long user": "",
    "gaps of decades": "",
    "one event": "too few to split",
    "three events": "nothing to learn from",
}


@pytest.mark.parametrize(("shop", "refusal"), BY_TIME.items())
def test_a_split_by_time(shop: str, refusal: str, tmp_path: Path) -> None:
    def run() -> None:
        dataset = prepared(shop, tmp_path, "split=time:0.2")
        must_be_sound(trained(dataset, tinyshop.tiny("train.epochs=1"), tmp_path), dataset)

    if not refusal:
        run()
        return
    with pytest.raises(RayrecError, match=refusal):
        run()
