"""A day that is added gives the dataset that a run over all days gives, and repeats none of the old work."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayrec.config import PrepareConfig
from rayrec.data.catalogue_files import RawCatalogue, overlaid
from rayrec.data.dataset import Dataset
from rayrec.data.intake import Intake, Taken, unknown
from rayrec.data.items import CATALOGUE_SCHEMA
from rayrec.data.pipelines import add, prepare
from rayrec.data.readers import RawFile
from rayrec.errors import DataError, UsageError
from rayrec.schema import REJECT_SCHEMA
from rayrec.settings import with_settings

HEADER = "event_id,user_id,item_id,timestamp,action,price,quantity"
DAY = 1_700_000_000
SETTINGS = ("images.size=8", "clean.bot_events_per_hour=20", "clean.bot_min_events=20")


# ---------------------------------------------------------------- which files are new


def a_file(folder: Path, name: str, text: str) -> RawFile:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    info = pafs.LocalFileSystem().get_file_info(str(folder / name))
    return RawFile(str(folder / name), name, "csv", False, info.size, info.mtime_ns)


def test_files_are_known_by_place_and_time_or_by_content(tmp_path: Path) -> None:
    fs = pafs.LocalFileSystem()
    old = a_file(tmp_path / "day-1", "events.csv", "one")
    taken = [Taken.of(fs, old)]
    assert unknown(fs, [old], taken, str(tmp_path / "day-1")) == []
    copy = a_file(tmp_path / "copy", "events.csv", "one")
    assert unknown(fs, [copy], taken, str(tmp_path / "copy")) == []
    other = a_file(tmp_path / "day-2", "events.csv", "two")
    (new,) = unknown(fs, [other], taken, str(tmp_path / "day-2"))
    assert (new.name, new.path) == ("events.csv (day-2)", other.path)
    taken.append(Taken.of(fs, new))
    assert unknown(fs, [other], taken, str(tmp_path / "day-2")) == []
    third = a_file(tmp_path / "x", "events.csv", "ten")
    assert [file.name for file in unknown(fs, [third], taken, "/elsewhere/x")] == ["events.csv (x)"]
    with pytest.raises(DataError, match=r"another file was taken in as events.csv \(day-2\)"):
        unknown(fs, [third], taken, "/elsewhere/day-2")
    with pytest.raises(DataError, match="has changed since it was taken in"):
        unknown(fs, [a_file(tmp_path / "day-1", "events.csv", "one\nmore")], taken, str(tmp_path / "day-1"))


def a_catalogue(file: str, **price_of: float) -> RawCatalogue:
    rows = [{"item_id": item, "price": price, "image": f"{item}.png"} for item, price in price_of.items()]
    account = {"read": len(rows), "kept": len(rows), "collapsed": 0, "rejected": {}}
    return RawCatalogue(
        items=pa.Table.from_pylist(rows, CATALOGUE_SCHEMA),
        files=pa.array([file] * len(rows)),
        images=[(row["item_id"], row["image"], file, n) for n, row in enumerate(rows, 1)],
        rejects=pa.Table.from_pylist([{"file": file, "row": 9, "reason": "no_item_id", "raw": ""}], REJECT_SCHEMA),
        repairs={"price.unparsable": 1},
        report={**account, "files": {file: account}},
    )


def test_a_later_catalogue_lies_on_top_or_stands_in_for_the_earlier_one() -> None:
    old, new = a_catalogue("items.csv", a=1, b=2), a_catalogue("items.csv (day-2)", b=3, c=4)
    both = overlaid(old, new, set())
    assert dict(zip(both.items["item_id"].to_pylist(), both.items["price"].to_pylist(), strict=True)) == {
        "a": 1, "b": 3, "c": 4,
    }  # fmt: skip
    assert both.report["files"]["items.csv"] == {"read": 2, "kept": 1, "collapsed": 1, "rejected": {}}
    assert (both.report["read"], both.report["kept"], both.report["collapsed"]) == (4, 3, 1)
    assert [image[0] for image in both.images] == ["b", "c", "a", "b"]
    assert (len(both.rejects), both.repairs) == (2, {"price.unparsable": 2})
    instead = overlaid(old, a_catalogue("items.csv", b=3), {"items.csv"})
    assert instead.items["item_id"].to_pylist() == ["b"]
    assert (instead.report["kept"], len(instead.rejects), len(instead.images)) == (1, 1, 1)


# ---------------------------------------------------------------- the whole


def lines(rng: np.random.Generator, start: int, n: int) -> list[str]:
    """Views and purchases in order of time, cancellations, repeats with and without event ids, and rows of dirt."""
    rows = []
    for k in range(n):
        user, item, when = rng.integers(0, 30), int(rng.pareto(1.0) * 3) % 40, start + k * 40
        event = f"e{rng.integers(0, 4 * n)}" if rng.random() < 0.3 else ""
        action = ["view", "cart", "purchase", "cancel"][int(rng.choice(4, p=[0.6, 0.2, 0.15, 0.05]))]
        price, quantity = ("-1" if rng.random() < 0.02 else "2.5"), -1 if action == "cancel" else rng.integers(1, 4)
        rows.append(
            f"{event},u{user},{item:03d},{'never' if rng.random() < 0.02 else when},{action},{price},{quantity}"
        )
        if rng.random() < 0.05:
            rows.append(rows[-1])
    return rows


def write_day(raw: Path, name: str, rows: list[str], header: str = HEADER) -> None:
    raw.mkdir(exist_ok=True)
    (raw / name).write_text("\n".join([header, *rows]) + "\n")


def picture(raw: Path, name: str, colour: str) -> None:
    (raw / "images").mkdir(exist_ok=True)
    Image.new("RGB", (9, 9), colour).save(raw / "images" / name)


def two_days(raw: Path) -> Path:
    """The first day. A robot is one only with the second day's events; a purchase is cancelled on the second."""
    rng = np.random.default_rng(0)
    late = DAY + 86_400 - 600
    half = [f",robot,{n:03d},{late + n * 30},view,," for n in range(15)]
    soon = int(time.time()) + 30 * 3600  # lies in the future today, and does not tomorrow
    ahead = [f"x{n},u1,005,{soon + n},{'cancel' if n else 'view'},1,-1" for n in range(2)]
    bought = [f",u2,007,{late},purchase,3,5"]
    write_day(raw, "events-1.csv", [*lines(rng, DAY, 1500), *half, *ahead, *bought, "broken", ",u9,9,99,view,1,1"])
    (raw / "items.csv").write_text("item_id,category,price\n000,a|b,3\n001,c,4\n,c,4\n")
    for n in range(4):
        picture(raw, f"{n:03d}.png", "red")
    (raw / "images" / "004.png").write_text("text")
    picture(raw, "later.png", "green")  # of an item that nobody knows yet
    return raw


def second_day(raw: Path) -> None:
    rng = np.random.default_rng(1)
    late = DAY + 86_400
    rows = [f",robot,{n:03d},{late + n * 30},view,,,home" for n in range(15)]
    rows += [f"{line},home" for line in lines(rng, late, 400)]
    rows += [f",u2,007,{late},cancel,3,-2,", f"e3,new,later,{late},view,,,"]
    write_day(raw, "events-2.csv", rows, header=f"{HEADER},scene")
    # A file that sorts before the others: its event ids were there first.
    write_day(raw, "events-0.csv", [f"e{n},u{n % 7},{n % 20:03d},{late + n},view,1,1" for n in range(0, 600, 9)])
    (raw / "items.csv").write_text("item_id,category,price\n000,a|b,5\n002,d,4\n")
    picture(raw, "001.png", "blue")
    picture(raw, "005.png", "blue")


def same(one: Path, other: Path) -> None:
    """The same dataset but for times and hashes, row by row; rejects may lie in other shards."""
    left, right = Dataset.open(str(one)), Dataset.open(str(other))
    for folder in ("events", "sequences", "items", "images", "intake/events"):
        mine, theirs = left.table(folder), right.table(folder)
        if folder == "intake/events":  # in any order
            mine, theirs = (table.select(sorted(table.column_names)).sort_by("origin") for table in (mine, theirs))
        assert mine.equals(theirs), folder
    for kind in ("events", "items", "images"):
        rows = [
            sorted((row["file"], row["row"], row["reason"]) for path in (ds / "rejects" / kind).glob("*.parquet")
                   for row in pq.read_table(path).to_pylist())
            for ds in (one, other)
        ]  # fmt: skip
        assert rows[0] == rows[1], kind
    for name in ("categories", "brands", "encoder"):
        assert left.vocab(name) == right.vocab(name)
    reports = [json.loads((ds / "report.json").read_text()) for ds in (one, other)]
    assert {**reports[0], "seconds": 0} == {**reports[1], "seconds": 0}
    facts = [{**ds.manifest, "created": "", "files": sorted(ds.manifest["files"])} for ds in (left, right)]
    for fact in facts:
        fact["files"] = [name for name in fact["files"] if not name.startswith("rejects/")]
        fact["intake"] = {**fact["intake"], "catalogue": {**fact["intake"]["catalogue"], "batches": []}}
    assert facts[0] == facts[1]


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("more", [("shards=3",), ("shards=3", "clean.k_core=2", "split=time:0.1")])
def test_a_day_that_is_added_comes_out_as_in_a_run_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    raw, grown, full = two_days(tmp_path / "raw"), tmp_path / "grown", tmp_path / "full"
    config = with_settings(PrepareConfig(), [*SETTINGS, *more])
    first = prepare(str(raw), str(grown), config)
    assert "bot" not in first["events"]["rejected"]
    assert first["events"]["rejected"]["time_out_of_window"] == 3
    second_day(raw)
    day = 86_400_000
    monkeypatch.setattr("rayrec.data.events.now_ms", lambda: int(time.time() * 1000) + day)  # read when rules are made
    report = add(str(raw), str(grown))
    assert prepare(str(raw), str(full), config)["events"] == report["events"]
    assert report["events"]["rejected"]["bot"] == 30
    assert report["events"]["rejected"]["time_out_of_window"] == 1
    same(grown, full)
    before = (grown / "manifest.json").read_bytes()
    assert add(str(raw), str(grown)) == report
    assert (grown / "manifest.json").read_bytes() == before, "nothing was new"


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_what_was_taken_in_is_neither_read_nor_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, dataset = two_days(tmp_path / "day-1"), tmp_path / "ds"
    prepare(str(first), str(dataset), with_settings(PrepareConfig(), [*SETTINGS, "shards=2"]))
    shutil.rmtree(first)
    day = tmp_path / "day-2"
    write_day(day, "events-1.csv", [f",u1,later,{DAY + n},view,1,1" for n in range(3)])
    picture(day, "001.png", "blue")
    (day / "items.csv").write_text("item_id,category,price\n001,z,9\n")
    report = add(str(day), str(dataset))
    assert "images: 1 decoded, 4 as they were" in capsys.readouterr().err
    assert report["events"]["files"]["events-1.csv (day-2)"]["kept"] == 3
    assert report["images"]["rejected"] == {"not_an_image": 1, "missing_file": 1}  # later.png went with its day
    opened = Dataset.open(str(dataset))
    catalogue, images = opened.catalogue(), opened.images()
    pixels = dict(zip(catalogue.ids[images.item_M].tolist(), images.pixels_MHWC[:, 4, 4].tolist(), strict=True))
    assert (pixels["001"], pixels["002"]) == ([0, 0, 255], [255, 0, 0])
    listed = catalogue.table.filter(catalogue.table["in_catalogue"])
    assert sorted(zip(listed["item_id"].to_pylist(), listed["price"].to_pylist(), strict=True)) == [
        ("000", 3),
        ("001", 9),
    ]
    before = (dataset / "manifest.json").read_bytes()
    write_day(tmp_path / "day-3", "events-3.csv", [f",u1,1,{DAY},view,1,1"])

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rayrec.data.pipelines.Run._finish", fails)
    with pytest.raises(KeyboardInterrupt):
        add(str(tmp_path / "day-3"), str(dataset))
    assert (dataset / "manifest.json").read_bytes() == before
    assert not list(tmp_path.glob("ds.*"))
    with pytest.raises(UsageError, match="was prepared otherwise"):
        add(str(day), str(dataset), ["images.size=16"])
    write_day(tmp_path / "dates", "events-d.csv", [f",u{n},1,2023-11-1{n},view,1,1" for n in range(5)])
    with pytest.raises(DataError, match=r"times of kind 'date', where .* has 'time'"):
        add(str(tmp_path / "dates"), str(dataset))
    facts: dict[str, Any] = json.loads((dataset / "manifest.json").read_text())
    (dataset / "manifest.json").write_text(json.dumps({**facts, "rayrec": "0.0.1"}))
    with pytest.raises(DataError, match=r"made by rayrec 0\.0\.1"):
        Intake.of(str(dataset))
