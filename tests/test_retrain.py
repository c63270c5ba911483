"""A night's retraining on a tiny shop: a worse candidate is refused, an ended run goes on, a good one is published."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tinyshop

from rayrec.bundle import Bundle, BundleWriter, current_version, publish
from rayrec.config import Config, PrepareConfig
from rayrec.data.dataset import Dataset
from rayrec.data.intake import Intake
from rayrec.data.pipelines import add, forget, prepare
from rayrec.errors import ResourceError, UsageError
from rayrec.retrain import job
from rayrec.retrain.alone import alone
from rayrec.retrain.comparison import Rule, verdict
from rayrec.retrain.exports import Exports
from rayrec.retrain.job import NO_NEWS, PUBLISHED, REFUSED, Places, line, retrain
from rayrec.serving.live import ACTIVE_MODEL
from rayrec.settings import with_settings
from rayrec.state import open_state
from rayrec.state.protocol import Event
from rayrec.training.lineage import LINEAGE, VERDICT, lineage
from rayrec.training.listing import line as listing_line
from rayrec.training.listing import listing

ALWAYS, STRICT = Rule(margin=1.0, least=10), Rule(margin=0.0, least=10)


@pytest.fixture
def places(tiny_dataset: Path, tiny_bundles: Path, tmp_path: Path) -> Places:
    """A shop that is served: its visitors have done a little since, and its owner has put an item."""
    shutil.copytree(tiny_dataset, tmp_path / "dataset")
    shutil.copytree(tiny_bundles, tmp_path / "bundles", ignore=shutil.ignore_patterns(".runs"))
    url = f"sqlite:///{tmp_path}/state.db"
    state = open_state(url)
    table = Dataset.open(str(tiny_dataset)).sequences(["user_id", "item"])
    ids = Bundle.open(tiny_bundles).catalogue.ids
    hour_ago = int(time.time() * 1000) - 3_600_000
    for user, items in zip(table["user_id"].to_pylist()[:40], table["item"].to_pylist(), strict=False):
        state.append_events([Event(user, ids[item], "view", hour_ago + n * 1000) for n, item in enumerate(items[:4])])
    state.put_item("new-here", {"title": "Red shoes", "price": 3.0, "listed": True})
    state.append_events([Event("somebody", "new-here", "view", hour_ago)])
    state.close()
    return Places(str(tmp_path / "bundles"), str(tmp_path / "dataset"), url, str(tmp_path / "exports"))


def active(places: Places) -> str | None:
    state = open_state(places.state)
    try:
        return state.setting(ACTIVE_MODEL)
    finally:
        state.close()


def held(places: Places) -> int:
    state = open_state(places.state)
    try:
        return state.counts()["events"]
    finally:
        state.close()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_night(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    first = current_version(places.bundles)

    refused = retrain(places, ["train.lr=3", "train.refit_epochs=0"], STRICT)
    assert (refused["verdict"], refused["live"], refused["against"]) == (REFUSED, first, first)
    assert refused["exported"]["events"] == held(places)
    assert refused["candidate"] < refused["current"]
    assert refused["users"] == 40, "of the newest day, though the dataset has more visitors with a target"
    assert current_version(places.bundles) == first, "what serve --watch looks at"
    assert active(places) is None
    again = retrain(places, ["train.lr=3", "train.refit_epochs=0"], STRICT)
    assert (again["verdict"], again["exported"]["events"]) == (NO_NEWS, 0)
    assert refused["version"] in again["reason"]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "compare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            retrain(places, [], ALWAYS)
    assert current_version(places.bundles) == first
    with monkeypatch.context() as patch:
        patch.setattr(job, "train", interrupted)  # it is trained already
        published = retrain(places, [], ALWAYS)
    assert published["verdict"] == PUBLISHED
    assert current_version(places.bundles) == active(places) == published["version"] == published["live"]

    bundle = Bundle.open(places.bundles)
    assert "new-here" in bundle.catalogue.index
    origin = bundle.json(LINEAGE)
    assert origin["parent"]["version"] == first
    assert origin[VERDICT]["users"] == 40
    rows = {row["version"]: row for row in listing(places.bundles)}
    assert [rows[version][VERDICT]["passed"] for version in (refused["version"], published["version"])] == [False, True]
    assert rows[published["version"]]["live"]
    assert rows[refused["version"]]["config"] != rows[published["version"]]["config"] == rows[first]["config"]

    state = open_state(places.state)
    state.put_setting(ACTIVE_MODEL, first or "")  # as after a run that was ended between both
    state.close()
    assert retrain(places, [], ALWAYS)["verdict"] == NO_NEWS
    assert active(places) == published["version"]


# ---------------------------------------------------------------- the order of the steps, without Ray


class Shop:
    """Bundles without a model on a dataset that grows by `news`; `passes` is what the judge will say."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        url = f"sqlite:///{folder}/state.db"
        open_state(url).close()
        self.places = Places(str(folder / "bundles"), str(folder / "ds"), url, str(folder / "raw"))
        self.dataset = tinyshop.write(folder / "ds", users=3)
        self.passes, self.trained, self.days = True, 0, 0
        (folder / "bundles").mkdir()
        publish(self.train(self.places.dataset, self.places.bundles, tinyshop.tiny()))
        monkeypatch.setattr(job, "_take_in", lambda places: {})
        monkeypatch.setattr(job, "train", self.train)
        monkeypatch.setattr(job, "compare", self.judge)

    def news(self) -> None:
        self.days += 1
        (Path(self.dataset.path) / "manifest.json").write_text(json.dumps({**self.dataset.manifest, "day": self.days}))

    def train(self, dataset: str, bundles: str, config: Config, **given: Any) -> Bundle:
        self.trained += 1
        parent = Bundle.open(given["start_from"]) if "start_from" in given else None
        with BundleWriter(bundles, f"v{self.trained}") as writer:
            writer.json("config.json", config.model_dump(mode="json"))
            writer.json("metrics.json", {})
            writer.json(LINEAGE, lineage(Dataset.open(dataset), parent))
            return writer.commit(clock="time", items=1, created="now")

    def judge(self, candidate: Bundle, current: Bundle, *_: object) -> dict[str, Any]:
        found = verdict(np.full(4, float(self.passes)), np.full(4, 0.5), 0.0)
        return {**found, "against": current.version, "since": "then"}

    def run(self, *settings: str) -> tuple[str, str | None, str | None]:
        """The verdict, CURRENT, and what the service is told to serve."""
        found = retrain(self.places, settings, STRICT)["verdict"]
        return found, current_version(self.places.bundles), active(self.places)

    def tell(self, version: str) -> None:
        state = open_state(self.places.state)
        state.put_setting(ACTIVE_MODEL, version)
        state.close()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return Shop(tmp_path, monkeypatch)


def test_without_news_nothing_is_trained(shop: Shop) -> None:
    assert shop.run() == (NO_NEWS, "v1", None)
    assert shop.trained == 1


def test_night_after_night(shop: Shop) -> None:
    shop.news()
    assert shop.run() == (PUBLISHED, "v2", "v2")
    assert shop.run() == (NO_NEWS, "v2", "v2")
    shop.passes = False
    shop.news()
    assert shop.run() == (REFUSED, "v2", "v2")
    assert shop.run() == (NO_NEWS, "v2", "v2"), "the same would be refused again"
    shop.passes = True
    assert shop.run("train.lr=0.01") == (PUBLISHED, "v4", "v4"), "other settings are another candidate"
    rows = listing(shop.places.bundles)
    assert [row["live"] for row in rows] == [False, False, False, True]
    assert [(row["parent"] or {}).get("version") for row in rows] == [None, "v1", "v2", "v2"]
    assert "refused: next item 0.0000, 0.5000 before, 4 visitors" in listing_line(rows[2])


@pytest.mark.parametrize("step", ["compare", "_noted", "publish", "_tell"])
def test_a_run_that_was_ended_goes_on_where_it_was(shop: Shop, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    shop.news()
    with monkeypatch.context() as patch:
        patch.setattr(job, step, ended)
        with pytest.raises(KeyboardInterrupt):
            shop.run()
    _, current, told = shop.run()
    assert (current, told, shop.trained) == ("v2", "v2", 2)


def test_a_version_that_was_published_meanwhile_stays(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(candidate: Bundle, *given: Any) -> dict[str, Any]:
        publish(shop.train(shop.places.dataset, shop.places.bundles, tinyshop.tiny()))
        return shop.judge(candidate, *given)

    monkeypatch.setattr(job, "compare", slow)
    shop.news()
    with pytest.raises(ResourceError, match="v3 was published meanwhile and stays"):
        shop.run()
    assert current_version(shop.places.bundles) == "v3"


def test_a_service_that_was_told_to_serve_another_version_is_left_alone(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.tell("v0")
    shop.news()
    assert shop.run() == (PUBLISHED, "v2", "v0")
    assert "the service was told to serve v0" in capsys.readouterr().err


def test_a_verdict_for_people() -> None:
    judged: dict[str, Any] = {
        "passed": False, "reason": "worse", "users": 9, "candidate": 0.1, "current": 0.2, "difference": -0.1,
        "difference_95": [-0.2, 0.0], "against": "v1", "since": "then",
    }  # fmt: skip
    assert line("v2", judged) == (
        "refused v2: worse; NDCG@10 of the next item 0.1000, and 0.2000 by v1 (-0.1000, 95% -0.2000 to +0.0000; "
        "9 visitors since then)"
    )
    assert line("v2", {**judged, "users": 0}) == "refused v2: worse; v1 stays"


def test_two_at_once(tmp_path: Path) -> None:
    program = (
        f"import time\nfrom rayrec.retrain.alone import alone\n"
        f"with alone({str(tmp_path)!r}):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        held = rf"another retrain is under way \(process {other.pid}\)"
        with pytest.raises(ResourceError, match=held), alone(str(tmp_path)):
            pass
        other.kill()
    with alone(str(tmp_path)):
        pass


def test_what_is_not_there_is_said_before_anything_is_done(tmp_path: Path) -> None:
    places = Places(str(tmp_path), str(tmp_path / "ds"), f"sqlite:///{tmp_path}/no.db", str(tmp_path / "raw"))
    with pytest.raises(UsageError, match="nothing is published there to start from"):
        retrain(places, [], STRICT)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- erased visitors


def events_of(dataset: Path) -> list[tuple[str, str]]:
    table = Dataset.open(str(dataset)).table("events")
    return sorted(zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True))


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_the_erased_leave_the_dataset_and_stay_out(tmp_path: Path) -> None:
    day, base, dataset, raw = 1_700_000_000, tmp_path / "base", tmp_path / "ds", tmp_path / "raw"
    base.mkdir()
    rows = [f"u{n % 4},i{n},{day + n},view" for n in range(16)]
    rows += ["u1,i1,never,view", "u2,i1,never,view"]  # rejected rows tell of people as well
    (base / "events.csv").write_text("\n".join(["user_id,item_id,timestamp,action", *rows]))
    prepare(str(base), str(dataset), with_settings(PrepareConfig(), ["shards=2"]))
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    later = (day + 100) * 1000
    state.append_events([Event("u1", "x", "view", later), Event("u5", "x", "view", later)])
    exports = Exports(str(raw), {})
    nothing = pa.table({name: pa.array([], pa.string()) for name in ("item_id", "title", "category", "brand", "price")})
    exports.export(state, nothing)
    add(str(raw), str(dataset))
    state.append_events([Event("u1", "back", "view", later + 2)])
    exports.export(state, nothing)
    add(str(raw), str(dataset))
    before = events_of(dataset)
    state.erase("u1")
    assert forget(str(dataset), {"stranger": later}, str(raw)) is None

    erased = exports.forget({"u1": later})
    report = forget(str(dataset), erased, str(raw))
    assert report is not None
    expected = [event for event in before if event[0] != "u1" or event[1] == "back"]
    assert len(expected) == len(before) - 5
    assert events_of(dataset) == expected
    assert report["events"]["rejected"] == {"bad_time": 1, "erased": 6}
    assert b"u1" not in b"".join(path.read_bytes() for path in (dataset / "rejects").rglob("*.parquet"))
    assert Intake.of(str(dataset)).erased_rows(erased) == {}

    state.append_events([Event("u6", "x", "view", later + 3)])
    exports.export(state, nothing)
    assert add(str(raw), str(dataset))["events"]["rejected"] == {"bad_time": 1, "erased": 6}
    assert events_of(dataset) == sorted([*expected, ("u6", "x")]), "nobody came back with the next day"
    assert json.loads((dataset / "report.json").read_text())["events"]["files"]["events.csv"]["rejected"]["erased"] == 5
