"""The bench of damaged data: every run asks the same, kept runs are not repeated, and the table adds up."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tinyshop
from PIL import Image

from rayrec.bench import degrade
from rayrec.bench.degrade import KINDS, Bench, draw, plans, renumbered, run, summary, table
from rayrec.bundle import Bundle
from rayrec.config import Config, PrepareConfig
from rayrec.data import pipelines
from rayrec.data.dataset import Dataset
from rayrec.errors import UsageError
from rayrec.settings import from_dict, with_settings
from rayrec.training.local import train_alone
from rayrec.training.publish import write_bundle
from rayrec.training.survey import survey

TINY = (*(setting for setting in tinyshop.TINY if "epochs" not in setting), "train.epochs=1", "train.fusion_epochs=1")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[Dataset]:
    """Prepare and train in this process; answers the datasets that were trained on."""
    trained: list[Dataset] = []

    def train(path: str, bundles: str, config: Config) -> Bundle:
        dataset, checkpoint = Dataset.open(path), Path(path).parent / "checkpoint"
        checkpoint.mkdir()
        train_alone(dataset, config, checkpoint)
        facts = survey(dataset, len(dataset.catalogue()), config)
        dataset.sequences()  # before it is gone
        trained.append(dataset)
        return write_bundle(checkpoint, bundles, dataset, dataset.catalogue(), config, facts.everything)

    monkeypatch.setattr(degrade, "connect", lambda: None)
    monkeypatch.setattr(degrade, "train", train)
    monkeypatch.setattr(pipelines, "connect", lambda **options: None)
    monkeypatch.setattr(pipelines, "quiet_data", lambda: None)
    monkeypatch.setattr("rayrec.data.source.cpus", lambda: 2)
    monkeypatch.setattr(pipelines, "each", lambda title, work, n: map(work, range(n)))
    return trained


@pytest.fixture
def dataset(tmp_path: Path, alone: list[Dataset]) -> str:
    """Forty visitors who walk along ten items."""
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = [
        f"u{user},i{(user + n) % 10},{1_700_000_000 + 1000 * user + 60 * n},{'purchase' if n % 4 == 3 else 'view'}"
        for user in range(40)
        for n in range(3 + user % 10)
    ]
    (raw / "events.csv").write_text("user_id,item_id,timestamp,action\n" + "\n".join(rows) + "\n")
    lines = [f"i{n},c{n % 2},b{n % 3},{n + 1}" for n in range(10)]
    (raw / "items.csv").write_text("item_id,category,brand,price\n" + "\n".join(lines) + "\n")
    (raw / "images").mkdir()
    for n in range(10):
        (raw / "images" / f"i{n}.png").write_bytes(picture(n))
    config = with_settings(PrepareConfig(), ["images.size=16"])
    pipelines.prepare(str(raw), str(tmp_path / "dataset"), config)
    return str(tmp_path / "dataset")


def picture(n: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (20 * n, 100, 50)).save(stream, "PNG")
    return stream.getvalue()


def test_runs_are_kept_and_the_table_is_written(dataset: str, alone: list[Dataset], tmp_path: Path) -> None:
    out = tmp_path / "out"
    wanted = ["lost-events", "noisy-images"]
    result = run(dataset, out, wanted, [0.5], 1, TINY)
    assert len(alone) == 6, "clean, two kinds without a remedy, the first with its one and the second with its two"
    again = run(dataset, out, wanted, [0.5], 1, TINY)
    assert len(alone) == 6
    assert again == result
    (out / "runs" / sorted(path.name for path in (out / "runs").iterdir())[0]).unlink()
    run(dataset, out, wanted, [0.5], 1, TINY)
    assert len(alone) == 7, "what is missing is run"
    assert (out / "table.md").read_text() == table(result["rows"])
    assert (out / "degrade.png").stat().st_size > 1000
    figures = [json.loads(path.read_text())["figures"] for path in (out / "runs").glob("*.json")]
    assert {one["next"]["users"] for one in figures} == {40}, "everybody is asked, whatever was lost"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_is_never_learned(kind: str, dataset: str, tmp_path: Path) -> None:
    """Every visitor of the clean data keeps its last two events and their places in the split, whatever the damage."""
    bench = Bench(Dataset.open(dataset), tmp_path / "out")
    (plan,) = [plan for plan in plans([kind], [1.0], 1, ()) if plan.kind == kind and plan.remedy == "off"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    bench._write(bench._damaged(plan), scratch / "raw")
    settings = [setting for setting in plan.settings if not setting.startswith("model.")]
    config = with_settings(from_dict(PrepareConfig, bench.dataset.manifest["config"]), settings)
    pipelines.prepare(str(scratch / "raw"), str(scratch / "dataset"), config)
    assert targets(Dataset.open(str(scratch / "dataset"))) == targets(bench.dataset)


def targets(dataset: Dataset) -> dict[str, dict[str, tuple[str, int] | None]]:
    ids, found = dataset.catalogue().ids, {}
    for row in dataset.sequences().to_pylist():
        if row["user_id"].startswith("bot-"):
            continue
        names = ("valid_at", "test_at", "purchase_valid_at", "purchase_test_at")
        found[row["user_id"]] = {
            name: None if row[name] < 0 else (ids[row["item"][row[name]]], row["time_ms"][row[name]]) for name in names
        }
        assert row["n_train"] <= len(row["item"]) - 2
    return found


def test_the_remedy_has_no_part_in_the_damage(dataset: str, tmp_path: Path) -> None:
    bench = Bench(Dataset.open(dataset), tmp_path / "out")
    off, on = [plan for plan in plans(["lost-events"], [0.5], 1, ()) if plan.kind == "lost-events"]
    assert bench._damaged(off).events.equals(bench._damaged(on).events)
    other = next(plan for plan in plans(["lost-events"], [0.5], 2, ()) if plan.seed == 1 and plan.kind == "lost-events")
    assert not bench._damaged(off).events.equals(bench._damaged(other).events)


def test_broken_events_are_filtered_where_the_remedy_is_on(dataset: str, tmp_path: Path) -> None:
    result = run(dataset, tmp_path / "out", ["broken-events"], [0.5], 1, TINY)
    runs = [json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").glob("broken*.json")]
    events = {one["remedy"]: one["figures"]["events"] for one in runs}
    free = len(degrade.free_events(Dataset.open(dataset).table("events"), PrepareConfig().sequences.actions))
    assert events["filter"]["read"] - events["filter"]["kept"] == round(free / 2)
    assert events["off"]["read"] - events["off"]["kept"] <= 1
    assert [row["kind"] for row in result["rows"]] == ["clean", "broken-events"]


def test_items_are_asked_for_by_the_numbers_of_the_model() -> None:
    sequences = pa.table({"user_id": ["a", "b", "c"], "item": [[1, 2], [], [3, 1, 1]]})
    asked = renumbered(sequences, np.array([0, 30, 20, 10]))
    assert asked["item"].to_pylist() == [[30, 20], [], [10, 30, 30]]
    assert asked["user_id"].equals(sequences["user_id"])


def one(kind: str, share: float, remedy: str, seed: int, value: float) -> dict[str, Any]:
    body = {"ndcg@10": value}
    return {
        "kind": kind, "share": share, "remedy": remedy, "seed": seed, "figures": {"metrics": body, "next": body},
    }  # fmt: skip


def test_the_table_adds_up(tmp_path: Path) -> None:
    results = [
        one("clean", 0.0, "off", 0, 0.2), one("clean", 0.0, "off", 1, 0.4),
        one("bots", 0.1, "off", 0, 0.1), one("bots", 0.1, "off", 1, 0.2),
        one("bots", 0.1, "a", 0, 0.3), one("bots", 0.1, "a", 1, 0.3),
        one("bots", 0.1, "b", 0, 0.0), one("bots", 0.1, "b", 1, 0.3),
    ]  # fmt: skip
    rows = summary(results)
    assert rows[1]["off"]["metrics"] == pytest.approx(0.15)
    assert table(rows).splitlines()[2:] == [
        "| clean | 0% | – | 0.3000 | 0.3000 |",
        "| bots | 10% | a | 0.1500 (50%), 0.3000 (100%) | 0.1500 (50%), 0.3000 (100%) |",
        "| bots | 10% | b | 0.1500 (50%), 0.1500 (50%) | 0.1500 (50%), 0.1500 (50%) |",
    ]
    draw(rows, tmp_path / "degrade.png")
    draw(rows[:1], tmp_path / "nothing but clean.png")


def test_wrong_usage_is_said_before_any_work(dataset: str, alone: list[Dataset], tmp_path: Path) -> None:
    for kinds, shares, settings, words in (
        (["rust"], [0.1], (), "unknown kind rust: choose among lost-events"),
        (["bots"], [1.5], (), "above 0 and up to 1"),
        (["bots"], [0.1], ("train.epoch=1",), "did you mean 'epochs'"),
    ):
        with pytest.raises(UsageError, match=words):
            run(dataset, tmp_path / "out", kinds, shares, 1, settings)
    assert not alone
    run(dataset, tmp_path / "out", [], [], 1, TINY)
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["files"]["report.json"] = "changed"
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="another dataset"):
        run(str(other), tmp_path / "out", [], [], 1, TINY)
    manifest["config"]["split"] = "time:0.1"
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="split=loo"):
        run(str(other), tmp_path / "elsewhere", [], [], 1, TINY)
