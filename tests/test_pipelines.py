"""Prepare end to end, on a real cluster: what is written, what is refused, and that nothing half-done stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from rayrec.cluster import require_absolute
from rayrec.config import PrepareConfig
from rayrec.data.dataset import Dataset
from rayrec.data.mapping import Mapping
from rayrec.data.pipelines import prepare
from rayrec.data.sample import SampleConfig, write_shop
from rayrec.data.sources import import_source
from rayrec.errors import DataError, ResourceError, UsageError
from rayrec.schema import EVENT_SCHEMA, ITEM_SCHEMA, REJECT_SCHEMA, SEQUENCE_SCHEMA
from rayrec.settings import with_settings

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

HEADER = "user_id,item_id,timestamp,action,price,colour"
DAY = 1_700_000_000


def run(raw: Path | str, dataset: Path, *settings: str, mapping: Mapping | None = None) -> dict[str, Any]:
    return prepare(str(raw), str(dataset), with_settings(PrepareConfig(), settings), mapping)


def write_events(raw: Path, *lines: str, header: str = HEADER) -> Path:
    raw.mkdir(exist_ok=True)
    (raw / "events.csv").write_text("\n".join([header, *lines]) + "\n")
    return raw


def a_line(user: int, item: int, n: int, action: str = "view") -> str:
    return f"u{user},{item:03d},{DAY + n},{action},1.5,red"


def rejects(dataset: Path, kind: str = "events") -> list[tuple[str, int, str]]:
    tables = [pq.read_table(path) for path in sorted((dataset / "rejects" / kind).glob("*.parquet"))]
    assert all(table.schema == REJECT_SCHEMA for table in tables)
    return sorted((r["file"], r["row"], r["reason"]) for table in tables for r in table.to_pylist())


def check(dataset: Path, report: dict[str, Any]) -> Dataset:
    """What holds for every dataset: the books balance, the files agree with each other and with the report."""
    for kind in ("events", "items", "images"):
        for account in [report[kind], *report[kind]["files"].values()]:
            assert account["read"] == account["kept"] + account["collapsed"] + sum(account["rejected"].values())
        assert Counter(reason for _, _, reason in rejects(dataset, kind)) == Counter(report[kind]["rejected"])
    opened = Dataset.open(str(dataset))
    events, items, sequences = opened.table("events"), opened.table("items"), opened.sequences()
    assert events.schema == EVENT_SCHEMA
    assert items.schema == ITEM_SCHEMA
    assert sequences.schema == SEQUENCE_SCHEMA
    assert len(events) == report["events"]["kept"] == sum(report["actions"].values())
    assert len(sequences) == report["sequences"]
    assert len(opened.images().item_M) == report["images"]["kept"] == items["has_image"].to_numpy().sum()
    catalogue = opened.catalogue()
    ids = {
        user: [catalogue.ids[n] for n in row]
        for user, row in zip(sequences["user_id"].to_pylist(), sequences["item"].to_pylist(), strict=True)
    }
    for user in list(ids)[:50]:
        mine = events.filter(pa.compute.equal(events["user_id"], user))
        assert ids[user] == mine["item_id"].to_pylist()[-len(ids[user]) :]
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted(
        str(path.relative_to(dataset)) for path in dataset.rglob("*") if path.is_file() and path.name != "manifest.json"
    )
    assert json.loads((dataset / "report.json").read_text()) == report
    assert not list(dataset.parent.glob(f"{dataset.name}.*"))
    return opened


# ---------------------------------------------------------------- the main road


def test_a_dirty_log_is_cleaned_to_the_row(tmp_path: Path) -> None:
    good = [a_line(user, item, 10 * user + item) for user in range(5) for item in range(4)]
    raw = write_events(
        tmp_path / "raw", *good, good[0], ",1,1700000000,view,,", "u1,,1700000000,view,,", "u1,1,soon,view,,",
        "u1,1,99,view,,", "u1,1,1700000000,dance,,", "u1,1,1700000000,view,-1,", "u1,1", 'u1,"1,1700000000,view,1,',
    )  # fmt: skip
    (raw / "items.csv").write_text("item_id,category,price\n000,a|b,3\n000,a|b,3\n009,c,4\n,c,4\n")
    report = run(raw, tmp_path / "ds")
    dataset = check(tmp_path / "ds", report)
    reasons = [
        "no_user", "no_item", "bad_time", "time_out_of_window", "unknown_action", "impossible_price", "truncated_line",
        "broken_quote",
    ]  # fmt: skip
    assert rejects(tmp_path / "ds") == sorted(("events.csv", 22 + n, reason) for n, reason in enumerate(reasons))
    assert (report["events"]["kept"], report["events"]["collapsed"]) == (20, 1)
    assert report["ignored_columns"] == ["colour"]
    assert (report["users"], report["sessions"], report["clock"]) == (5, 0, "time")
    assert report["items"]["collapsed"] == 1
    assert rejects(tmp_path / "ds", "items") == [("items.csv", 4, "no_item_id")]
    assert sorted(dataset.catalogue().ids[1:]) == ["000", "001", "002", "003", "009"]
    assert dataset.vocab("categories")[0] == ""
    assert dataset.catalogue().n_train.sum() == 5 * 2


def test_the_dirt_of_the_sample_shop_is_found_and_nothing_else(tmp_path: Path) -> None:
    made = write_shop(tmp_path / "shop", SampleConfig(users=120, items=40, events=4000, dirty=True, image_size=32))
    report = run(tmp_path / "shop", tmp_path / "ds", "images.size=16")
    check(tmp_path / "ds", report)
    dirt = made.dirt
    assert report["events"]["read"] == made.rows
    assert report["events"]["collapsed"] == dirt["duplicate"]
    assert report["events"]["kept"] == made.events
    assert report["events"]["rejected"] == {
        "bad_time": dirt["bad_time"], "bot": dirt["bot"], "impossible_price": dirt["bad_price"],
        "impossible_quantity": dirt["bad_quantity"], "no_item": dirt["empty_item"], "no_time": dirt["empty_time"],
        "no_user": dirt["empty_visitor"], "time_out_of_window": dirt["future_time"] + dirt["ancient_time"],
        "truncated_line": dirt["truncated_line"], "unknown_action": dirt["unknown_action"],
    }  # fmt: skip
    assert report["sessions"] == made.anonymous
    assert sum(report["images"]["rejected"].values()) == dirt["image_cut_short"] + dirt["image_is_text"]


def test_the_form_of_the_input_does_not_matter(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [a_line(*rng.integers(0, (40, 30, 5000)), "purchase" if n % 9 == 0 else "view") for n in range(3000)]
    whole = write_events(tmp_path / "csv", *lines)
    table = pacsv.read_csv(
        whole / "events.csv", convert_options=pacsv.ConvertOptions(column_types={"item_id": pa.string()})
    )
    for name in ("parquet", "jsonl", "shards"):
        (tmp_path / name).mkdir()
    pq.write_table(table, tmp_path / "parquet" / "events.parquet", row_group_size=500)
    (tmp_path / "jsonl" / "events.jsonl").write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    for n in range(7):
        part = lines[n * 3000 // 7 : (n + 1) * 3000 // 7]
        (tmp_path / "shards" / f"events-{n}.csv").write_text("\n".join([HEADER, *part]))
    datasets = {}
    for name in ("csv", "parquet", "jsonl", "shards"):
        report = run(tmp_path / name, tmp_path / f"{name}.ds", "shards=3")
        datasets[name] = check(tmp_path / f"{name}.ds", report)
    for name in ("parquet", "jsonl", "shards"):
        for folder in ("events", "items", "sequences"):
            assert datasets[name].table(folder).equals(datasets["csv"].table(folder)), (name, folder)


def test_repeated_event_ids_count_once_wherever_they_are(tmp_path: Path) -> None:
    header = "event_id,user_id,item_id,timestamp,action"
    (tmp_path / "raw").mkdir()
    for shard, rows in enumerate([["e1,a", "e2,b", ",c", ",c"], ["e2,a", "e1,a", "e3,c", "e3,d"]]):
        text = "\n".join([header, *(f"{row},x,{DAY + shard},view" for row in rows)])
        (tmp_path / "raw" / f"events-{shard}.csv").write_text(text)
    report = run(tmp_path / "raw", tmp_path / "ds", "shards=4")
    check(tmp_path / "ds", report)
    assert rejects(tmp_path / "ds") == [("events-1.csv", row, "repeated_event_id") for row in (1, 2, 4)]
    assert report["events"]["files"]["events-0.csv"] == {"read": 4, "kept": 3, "collapsed": 1, "rejected": {}}


def test_mapping_order_clock_and_settings_of_the_raw_folder(tmp_path: Path) -> None:
    raw = write_events(tmp_path / "raw", *(f"{n % 3},{n},{n},kauf" for n in range(12)), header="kunde,ware,zeit,was")
    columns = {"user_id": "kunde", "item_id": "ware", "timestamp": "zeit", "action": "was"}
    mapping = Mapping(columns=columns, actions={"kauf": "purchase"})
    (raw / "prepare.yaml").write_text("sequences.max_events: 3\n")
    report = run(raw, tmp_path / "ds", mapping=mapping)
    check(tmp_path / "ds", report)
    assert (report["clock"], report["actions"]) == ("order", {"purchase": 12})
    assert report["repairs"]["events_beyond_max_events"] == 3
    with pytest.raises(UsageError, match="order numbers"):
        run(raw, tmp_path / "ds2", "split=time:0.2", mapping=mapping)


def test_split_by_time_and_k_core(tmp_path: Path) -> None:
    lines = [a_line(user, item, user + 100 * item) for user in range(10) for item in range(10)]
    raw = write_events(tmp_path / "raw", *lines, "rare,001,1700000500,view,,", "u1,rare,1700000500,view,,")
    report = run(raw, tmp_path / "ds", "split=time:0.2", "clean.k_core=2", "shards=2")
    sequences = check(tmp_path / "ds", report).sequences()
    assert report["events"]["rejected"] == {"k_core": 2}
    assert set(sequences["test_at"].to_pylist()) == {8}
    assert set(sequences["valid_at"].to_pylist()) == {6}
    assert set(sequences["n_train"].to_pylist()) == {6}


def test_images_good_and_bad(tmp_path: Path) -> None:
    raw = write_events(tmp_path / "raw", *(a_line(user, item, item) for user in range(2) for item in range(4)))
    (raw / "images").mkdir()
    Image.new("RGB", (20, 10), "red").save(raw / "images" / "000.png")
    Image.new("RGB", (20, 10), "red").save(raw / "images" / "stranger.jpg")
    (raw / "images" / "001.jpg").write_text("this is text")
    Image.new("RGB", (5, 5), "blue").save(raw / "two.png")
    Image.new("RGB", (5, 5), "blue").save(tmp_path / "outside.png")
    (raw / "items.csv").write_text("item_id,image\n002,two.png\n003,../outside.png\n004,none.png\n000,two.png\n")
    report = run(raw, tmp_path / "ds", "images.size=8")
    dataset = check(tmp_path / "ds", report)
    assert report["images"]["rejected"] == {
        "missing_file": 1, "not_an_image": 1, "outside_the_raw_folder": 1, "unknown_item": 1,
    }  # fmt: skip
    assert report["images"]["collapsed"] == 1
    images, catalogue = dataset.images(), dataset.catalogue()
    assert sorted(catalogue.ids[images.item_M]) == ["000", "002"]
    assert images.pixels_MHWC[list(catalogue.ids[images.item_M]).index("002"), 4, 4].tolist() == [0, 0, 255]
    assert ("images/001.jpg", 1, "not_an_image") in rejects(tmp_path / "ds", "images")


def test_uris_are_as_good_as_paths(tmp_path: Path) -> None:
    raw = write_events(tmp_path / "raw", *(a_line(0, item, item) for item in range(4)))
    report = prepare(f"file://{raw}", f"file://{tmp_path}/ds", PrepareConfig())
    check(tmp_path / "ds", report)


def test_a_dataset_is_replaced_only_on_success(tmp_path: Path) -> None:
    raw = write_events(tmp_path / "raw", *(a_line(0, item, item) for item in range(4)))
    run(raw, tmp_path / "ds")
    write_events(raw, *(f"u,{n},never,view,," for n in range(3)))
    before = (tmp_path / "ds" / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="every row was rejected"):
        run(raw, tmp_path / "ds")
    assert (tmp_path / "ds" / "manifest.json").read_bytes() == before
    write_events(raw, *(a_line(0, item, item) for item in range(7)))
    check(tmp_path / "ds", run(raw, tmp_path / "ds"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ds", "raw"]


# ---------------------------------------------------------------- bad input


def test_what_is_wrong_with_the_input_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        run(tmp_path / "none", tmp_path / "ds")
    raw = write_events(tmp_path / "raw", "a,1,2,view", header="who,item_id,timestamp,action")
    with pytest.raises(DataError, match=r"events\.csv: no column user_id or session_id; it has: who"):
        run(raw, tmp_path / "ds")
    write_events(raw)
    with pytest.raises(DataError, match=r"events\.csv: a header and no rows"):
        run(raw, tmp_path / "ds")
    (raw / "events.csv").write_bytes(b"")
    with pytest.raises(DataError, match=r"events\.csv: empty"):
        run(raw, tmp_path / "ds")
    write_events(raw, "u,1,soon,view,,", "u,1,1700000000,dance,,")
    with pytest.raises(DataError, match=r"every row was rejected \(bad_time: 1, unknown_action: 1\)"):
        run(raw, tmp_path / "ds")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_an_error_in_a_later_shard_comes_out_of_the_cluster_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for n in range(8):
        header = HEADER if n < 7 else HEADER.replace("user_id", "who")
        (tmp_path / "raw" / f"events-{n}.csv").write_text(f"{header}\n{a_line(0, n, n)}\n")
    with pytest.raises(DataError, match=r"events-7\.csv: no column user_id"):
        run(tmp_path / "raw", tmp_path / "ds")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_outputs_that_must_not_be_or_cannot_be_written(tmp_path: Path) -> None:
    raw = write_events(tmp_path / "raw", *(a_line(0, item, item) for item in range(4)))
    with pytest.raises(UsageError, match="holds files and is no dataset"):
        run(raw, raw)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        run(raw, tmp_path / "file")
    with pytest.raises(ResourceError, match="cannot write there"):
        run(raw, tmp_path / "file" / "ds")
    with pytest.raises(ResourceError, match="cannot write there"):
        run(raw, Path("/proc/ds"))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_events(tmp_path / "raw", *(a_line(0, item, item) for item in range(4)))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rayrec.data.staging.Folder.sha256", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        run(raw, tmp_path / "ds")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_a_cluster_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    raw = write_events(tmp_path / "raw", a_line(0, 0, 0))
    code = "import sys; from rayrec.config import PrepareConfig; from rayrec.data.pipelines import prepare\n"
    code += "prepare(sys.argv[1], sys.argv[2], PrepareConfig())"
    child = subprocess.run(
        [sys.executable, "-c", code, str(raw), str(tmp_path / "ds")],
        capture_output=True, env={**os.environ, "RAY_ADDRESS": "127.0.0.1:9"}, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "ResourceError: no Ray cluster at 127.0.0.1:9 (RAY_ADDRESS)" in child.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_a_relative_path_is_refused_in_a_submitted_job(monkeypatch: pytest.MonkeyPatch) -> None:
    require_absolute("relative/raw")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    require_absolute("/abs", "s3://bucket/x")
    with pytest.raises(UsageError, match="relative/raw: a relative path"):
        require_absolute("/abs", "relative/raw")


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    raw = write_events(tmp_path / "raw", *(a_line(n % 999, n % 99, n) for n in range(300_000)))
    code = "import sys; from rayrec.config import PrepareConfig; from rayrec.data.pipelines import prepare\n"
    code += "prepare(sys.argv[1], sys.argv[2], PrepareConfig())"
    address = ray.get_runtime_context().gcs_address
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(raw), str(tmp_path / "ds")],
        stderr=subprocess.PIPE, env={**os.environ, "RAY_ADDRESS": address}, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("ds.part-*/work/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(tmp_path.glob("ds.part-*"))
    child.send_signal(signal.SIGINT)
    errors = child.communicate(timeout=60)[1]
    assert child.returncode != 0, errors
    assert "KeyboardInterrupt" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


# ---------------------------------------------------------------- real data


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("taobao_ub815", ["clean.after=2017-11-25T00:00:00+08:00", "clean.before=2017-12-04T00:00:00+08:00"],
         {"read": 84476, "kept": 84440, "collapsed": 0, "rejected": {"no_time": 1, "time_out_of_window": 35}}),
        ("beauty", [], {"read": 198502, "kept": 198502, "collapsed": 0, "rejected": {}}),
        ("hm_day1", ["images.size=32"], {"read": 10000, "kept": 9089, "collapsed": 911, "rejected": {}}),
    ],
)  # fmt: skip
def test_real_sets(
    tmp_path: Path, shared_data: Callable[[str], Path], name: str, settings: list[str], expected: dict[str, Any]
) -> None:
    report = run(shared_data(name), tmp_path / "ds", *settings)
    dataset = check(tmp_path / "ds", report)
    assert {key: report["events"][key] for key in expected} == expected
    if name == "hm_day1":
        assert (report["clock"], report["images"]["kept"]) == ("date", 4898)
        assert all(len(user) == 64 for user in dataset.sequences()["user_id"].to_pylist())
        assert sum(item.startswith("0") for item in dataset.catalogue().ids) == 4903


@pytest.mark.realdata
def test_posters(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for file in ("events.parquet", "items.csv"):
        shutil.copy(shared_data("ml1m_posters") / file, raw)
    report = run(raw, tmp_path / "ds")
    sequences = Dataset.open(str(tmp_path / "ds")).sequences()
    assert report["events"]["kept"] == 999_611
    assert (report["users"], report["clock"], report["catalogue"]) == (6040, "order", 3883)
    assert min(len(items) for items in sequences["item"].to_pylist()) == 18


@pytest.mark.realdata
def test_daily_shards_of_invoices(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    import_source("online_retail", shared_data("online_retail") / "by-day.tar.gz", tmp_path / "raw")
    report = run(tmp_path / "raw", tmp_path / "ds")
    check(tmp_path / "ds", report)
    events = report["events"]
    assert (events["read"], len(events["files"])) == (541_909, 305)
    assert (report["users"], report["sessions"]) == (4328, 2189)
    assert events["rejected"]["impossible_quantity"] == 1336
    assert events["rejected"]["unknown_action"] == 3
    assert events["rejected"]["cancels_a_purchase"] + events["rejected"]["cancel_without_purchase"] == 9251
    assert report["repairs"]["float_to_id:user_id"] == 406_829
