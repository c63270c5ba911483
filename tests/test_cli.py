"""The command line: exit codes, one message on standard error, one JSON object as the last line of standard output."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from terminal import Ran, Terminal

from rayrec import cli
from rayrec.data.dataset import Dataset
from rayrec.errors import BundleError, DataError, ResourceError, StateError, UsageError
from rayrec.serving import wire
from rayrec.state import open_state
from rayrec.state.protocol import Event

Command = Callable[..., Ran]


@pytest.fixture
def rayrec(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command in this process."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = cli._run([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run


# ---------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "No such command"),
        ("sample", "Missing argument"),
        ("sample DIR --user 3", "No such option"),
        ("sample DIR --users 0", "--users"),
        ("sample DIR --users many", "--users"),
        ("import NAME", "give NAME, SRC"),
        ("import nothing SRC DIR", "unknown format 'nothing': choose one of online_retail"),
        ("import movielens_1m DIR/none DIR", "DIR/none: no such file"),
        ("prepare DIR/none DIR/out", "DIR/none: no such file"),
        ("prepare DIR DIR/out --map DIR/none.yaml", "DIR/none.yaml"),
        ("prepare DIR DIR/out --set images.sise=3", "did you mean 'size'?"),
        ("prepare DIR DIR/out --set images.size=huge", "images.size"),
        ("prepare DIR DIR/out --set images.size", "write it as path=value"),
        ("prepare nowhere://x DIR/out", "nowhere://x"),
        ("train DIR/none DIR/out", "DIR/none: no such dataset; make one with: rayrec prepare"),
        ("train DIR DIR/out --preset huge", "unknown preset 'huge': choose one of small, wide, base, paper"),
        ("train DIR DIR/out --set train.epoch=3", "did you mean 'epochs'?"),
        ("train DIR DIR/out --set model.dropout=2", "model.dropout"),
        ("train DIR DIR/out --epochs 0", "--epochs"),
        ("train DIR DIR/out --workers 0", "--workers"),
        ("evaluate DIR/none DIR", "DIR/none: no such bundle; make one with: rayrec train"),
        ("evaluate DIR DIR --split all", "--split"),
        ("retrain DIR/none DIR/ds", "DIR/none: no such bundle; make one with: rayrec train"),
        ("retrain DIR DIR/ds --state sqlite:///DIR/none.db", "DIR: nothing is published there to start from"),
        ("retrain DIR DIR/ds --margin 2", "--margin"),
        ("serve DIR/none", "DIR/none: no such bundle"),
        ("serve DIR --port 0", "--port"),
        ("serve DIR --tls-cert DIR/none.pem", "--tls-cert needs --tls-key"),
        ("serve DIR --tls-cert DIR/none.pem --tls-key DIR/none.key", "--tls-cert DIR/none.pem: no such file"),
        ("serve DIR --config DIR/none.yaml", "--config DIR/none.yaml: cannot be read"),
        ("load http://127.0.0.1:9 --seconds 1", "give --rate R or --clients C"),
        ("events export DIR/out", "--state"),
        ("events export DIR/out --state sqlite:///DIR/none.db", "there is no such file"),
        ("experiment report --state sqlite:///DIR/none.db", "there is no such file"),
        ("serve DIR --port 70000", "--port"),
        ("serve DIR --min-replicas 3 --max-replicas 2", "--min-replicas 3 is more than --max-replicas 2"),
        ("serve DIR --set explor=1", "did you mean 'explore'?"),
        ("serve DIR --set explore=2", "explore"),
        ("recommend DIR/none --user u", "DIR/none: no such bundle"),
        ("recommend DIR", "--user"),
        ("recommend DIR --user u -k 0", "-k"),
        ("bundles list DIR/none", "DIR/none: no such folder"),
        ("bench nothing", "No such command 'nothing'"),
    ],
)
def test_wrong_usage_exits_2_with_one_message(rayrec: Command, tmp_path: Path, line: str, words: str) -> None:
    folder = str(tmp_path)
    ran = rayrec(*(word.replace("DIR", folder) for word in line.split()))
    assert ran.code == 2, ran.err
    assert words.replace("DIR", folder) in ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        "prepare shop /tmp/dataset",
        "prepare /tmp/shop dataset",
        "train dataset /tmp/bundles",
        "train /tmp/dataset ./bundles",
        "train /tmp/dataset /tmp/bundles --from bundles",
        "evaluate bundles /tmp/dataset",
        "evaluate /tmp/bundles /tmp/dataset --report report.html",
        "serve bundles",
        "serve /tmp/bundles --state sqlite:///state.db",
        "retrain /tmp/bundles dataset",
        "retrain /tmp/bundles /tmp/dataset --raw exports",
    ],
)
def test_a_submitted_job_refuses_a_relative_path(rayrec: Command, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}}))
    ran = rayrec(*line.split())
    assert ran.code == 2, ran.err
    assert re.search(r"^rayrec: \S+: a relative path\. A submitted job", ran.err)


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError, 2), (DataError, 1), (BundleError, 1), (ResourceError, 1), (StateError, 1)],
)
def test_each_kind_of_error_has_its_code(
    rayrec: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[Exception], code: int
) -> None:
    def fail(*given: object) -> None:
        raise error("what, where, what to do")

    monkeypatch.setattr("rayrec.data.sample.write_shop", fail)
    ran = rayrec("sample", tmp_path / "shop", "--json")
    assert (ran.code, ran.out, ran.err) == (code, "", "rayrec: what, where, what to do\n")


def test_our_own_bug_keeps_its_traceback(rayrec: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rayrec.data.sample.write_shop", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rayrec("sample", tmp_path / "shop")


def test_an_interrupt_is_said_and_exits_130(rayrec: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rayrec.data.sample.write_shop", interrupt)
    ran = rayrec("sample", tmp_path / "shop")
    assert (ran.code, ran.out, ran.err.strip()) == (130, "", "rayrec: interrupted")


# ---------------------------------------------------------------- help


def test_help_names_the_commands(rayrec: Command) -> None:
    ran = rayrec("--help")
    assert ran.code == 0
    for name in (
        "demo",
        "sample",
        "import",
        "prepare",
        "train",
        "evaluate",
        "serve",
        "recommend",
        "bundles",
        "retrain",
    ):
        assert re.search(rf"^\W*{name}\b", ran.out, re.MULTILINE), name


def test_help_needs_neither_ray_nor_torch() -> None:
    with Terminal() as terminal:
        script = "import sys; from rayrec.cli import _run; _run(['--help']); print({'ray', 'torch'} & set(sys.modules))"
        assert terminal.run(sys.executable, "-c", script).out.splitlines()[-1] == "set()"


# ---------------------------------------------------------------- sample, import


def test_sample_reports_what_it_wrote(rayrec: Command, tmp_path: Path) -> None:
    ran = rayrec("sample", tmp_path / "shop", "--users", 20, "--items", 12, "--events", 200, "--json")
    assert ran.code == 0
    report = json.loads(ran.out.splitlines()[-1])
    assert (report["users"], report["items"], report["events"]) == (20, 12, 200)
    assert len((tmp_path / "shop" / "events.csv").read_text().splitlines()) == report["rows"] + 1
    again = rayrec("sample", tmp_path / "shop", "--users", 20)
    assert again.code == 2
    assert "not an empty folder" in again.err


def test_import_list_names_every_format(rayrec: Command) -> None:
    from rayrec.data.sources import SOURCES

    ran = rayrec("import", "--list")
    assert ran.code == 0
    assert [line.split()[0] for line in ran.out.splitlines()] == list(SOURCES)


def test_import_writes_a_raw_folder(rayrec: Command, tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n1::661::3::978302109\n")
    (tmp_path / "movies.dat").write_text("1193::One Flew (1975)::Drama\n661::James (1996)::Animation\n")
    ran = rayrec("import", "movielens_1m", tmp_path, tmp_path / "raw")
    assert ran.code == 0, ran.err
    assert (tmp_path / "raw" / "items.csv").is_file()
    assert len((tmp_path / "raw" / "events" / "part-00000.csv").read_text().splitlines()) == 3


# ---------------------------------------------------------------- prepare, train, evaluate


@pytest.mark.ray
def test_prepare_train_evaluate_answer_json_as_documented(
    rayrec: Command, monkeypatch: pytest.MonkeyPatch, tiny_dataset: Path, tiny_bundles: Path, tmp_path: Path
) -> None:
    report = json.loads((tiny_dataset / "report.json").read_text())
    for part in ("events", "items", "images"):
        counts = report[part]
        assert counts["read"] == counts["kept"] + counts["collapsed"] + sum(counts["rejected"].values())
    assert report["events"]["kept"] == 1500
    assert report["users"] == 60

    (version,) = [path.parent for path in tiny_bundles.glob("*/manifest.json")]
    assert (tiny_bundles / "CURRENT").read_text().strip() == version.name
    files = {"model.safetensors", "config.json", "vocab", "items", "vectors.npy", "cooccurrence", "metrics.json"}
    assert files | {"manifest.json", "MODEL_CARD.md"} <= {path.name for path in version.iterdir()}

    monkeypatch.setattr("rayrec.cluster.disconnect", lambda: None)  # from the cluster that all tests share
    report_to = ("--report", tmp_path / "report.html")
    kept = (version / "metrics.json").read_bytes()
    ran = rayrec("evaluate", tiny_bundles, tiny_dataset, "--users", 30, *report_to, "--json")
    assert ran.code == 0, ran.err
    result = ran.json
    assert {"split", "users", "items", "metrics", "next", "purchase", "pointwise", "floors", "slices"} <= set(result)
    assert (result["split"], result["items"], result["users"]) == ("test", 24, 30)
    assert "30 test users (a sample)" in ran.err
    assert (version / "metrics.json").read_bytes() == kept, "a sample does not stand for all"
    assert {"hr@10", "ndcg@10", "recall@20", "mrr@10", "coverage@10", "diversity@10"} <= set(result["metrics"])
    assert {"popular", "markov"} <= set(result["floors"])
    assert "<html" in (tmp_path / "report.html").read_text()
    state = f"sqlite:///{tmp_path}/state.db"
    assert rayrec("recommend", tiny_bundles, "--user", "u", "--state", state).code == 0, "the bundle still opens"


# ---------------------------------------------------------------- recommend, bundles


@pytest.fixture
def state(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/state.db"


@pytest.mark.ray
def test_recommend_answers_the_body_of_the_route(rayrec: Command, tiny_bundles: Path, state: str) -> None:
    ran = rayrec("recommend", tiny_bundles, "--user", "nobody-yet", "-k", 5, "--state", state, "--json")
    assert ran.code == 0, ran.err
    body = json.loads(ran.out)
    answer = wire.RecommendAnswer.model_validate(body, extra="forbid")
    assert set(body) == {"request_id", "model", "served_by", "items", "removed", "timing_ms"}
    assert len(answer.items) == 5
    assert answer.model == (tiny_bundles / "CURRENT").read_text().strip()
    assert answer.served_by == "popular", "nothing is known of this user"
    shown = {
        "item_id", "score", "propensity", "sources", "reasons", "title", "category", "brand", "price", "image",
    }  # fmt: skip
    assert all(set(item) == shown for item in body["items"])


@pytest.mark.ray
def test_recommend_by_the_past_in_a_dataset(
    rayrec: Command, tiny_bundles: Path, tiny_dataset: Path, state: str
) -> None:
    sequences = Dataset.open(str(tiny_dataset)).sequences(["user_id", "item"]).to_pylist()
    user = max(sequences, key=lambda row: len(row["item"]))["user_id"]
    asked = ("recommend", tiny_bundles, "--user", user, "--state", state, "--json")
    alone, known = (json.loads(rayrec(*asked, *more).out) for more in ((), ("--history", tiny_dataset)))
    assert (alone["served_by"], known["served_by"]) == ("popular", "model")
    again = json.loads(rayrec(*asked).out)
    assert again["served_by"] == "popular", "nothing of it was stored"
    ran = rayrec(*asked[:2], "--user", "stranger", "--state", state, "--history", tiny_dataset)
    assert ran.code == 2
    assert "no user 'stranger'" in ran.err


@pytest.mark.ray
def test_a_scene_of_ones_own_is_asked_for(rayrec: Command, tiny_bundles: Path, state: str, tmp_path: Path) -> None:
    (tmp_path / "shop.yaml").write_text("scenes: {gift: {sources: [popular], fill: false, max_per_category: 1}}")
    asked = ("recommend", tiny_bundles, "--user", "u", "--state", state, "--config", tmp_path / "shop.yaml", "--json")
    body = json.loads(rayrec(*asked, "--scene", "gift").out)
    categories = [item["category"] for item in body["items"] if item["category"]]
    assert len(categories) == len(set(categories)) > 0
    found = json.loads(rayrec(*asked, "--scene", "search", "--query", body["items"][0]["title"]).out)
    assert found["items"][0]["title"] == body["items"][0]["title"]
    assert rayrec(*asked, "--scene", "search").code == 2


def test_events_are_exported_and_experiments_reported(rayrec: Command, state: str, tmp_path: Path) -> None:
    opened = open_state(state)
    opened.append_events([Event("u", "a", "view", 1_700_000_000_000)])
    opened.close()
    body = json.loads(rayrec("events", "export", tmp_path / "raw", "--state", state, "--json").out)
    assert body == {"visitors": 1, "events": 1, "impressions": 0, "nobodys": 0, "files": 1}
    assert rayrec("events", "export", tmp_path / "raw", "--state", state).code == 2, "not into an old one"
    assert rayrec("experiment", "report", "--state", state).code == 2, "none is running"
    assert rayrec("experiment", "start", "bold", "v2", "--share", "0.2", "--state", state).code == 0
    report = json.loads(rayrec("experiment", "report", "--state", state, "--json").out)
    assert (report["name"], report["visitors"]) == ("bold", {"control": 0, "treatment": 0})
    assert rayrec("experiment", "stop", "--state", state).code == 0
    assert rayrec("experiment", "report", "--state", state).code == 2


@pytest.mark.ray
def test_recommend_for_people_prints_a_list(rayrec: Command, tiny_bundles: Path, state: str) -> None:
    ran = rayrec("recommend", tiny_bundles, "--user", "u", "-k", 3, "--state", state)
    assert [line.split()[0] for line in ran.out.splitlines()] == ["1", "2", "3"]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--user", "u", "--scene", "nowhere"], "unknown scene 'nowhere'; there are: cart, home, item"),
        (["--user", "u", "--scene", "item", "--item", "nothing"], "no item 'nothing'"),
        (["--user", ""], "user"),
        (["--user", "a\nb"], "user"),
        (["--user", "x" * 300], "user"),
        (["--user", "u", "--state", "mysql://here"], "unknown kind 'mysql'"),
    ],
)
def test_recommend_refuses_what_the_route_refuses(
    rayrec: Command, tiny_bundles: Path, state: str, options: list[str], words: str
) -> None:
    ran = rayrec("recommend", tiny_bundles, "--state", state, *options)
    assert ran.code == 2, ran.err
    assert ran.err.startswith("rayrec: ")
    assert words in ran.err
    assert len(ran.err.splitlines()) == 1


@pytest.mark.ray
def test_bundles_list_marks_the_live_version(rayrec: Command, tiny_bundles: Path) -> None:
    ran = rayrec("bundles", "list", tiny_bundles, "--json")
    assert ran.code == 0
    (row,) = json.loads(ran.out.splitlines()[-1])["bundles"]
    assert row["live"] is True
    assert row["items"] == 24
    assert row["parent"] is None
    assert ran.out.startswith(f"* {row['version']}")
    assert ran.out.splitlines()[0].endswith(f"dataset {row['dataset']['id']}")


def test_bundles_list_names_a_damaged_bundle(rayrec: Command, tmp_path: Path) -> None:
    for name in ("20260101-000000", "20260102-000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text('{"created": "today", "items": 3}' if name < "20260102" else "{")
        (tmp_path / name / "metrics.json").write_text("{}")
    ran = rayrec("bundles", "list", tmp_path, "--json")
    assert ran.code == 0
    whole, damaged = json.loads(ran.out.splitlines()[-1])["bundles"]
    assert (whole["items"], whole.get("trouble"), whole["dataset"]) == (3, None, None)
    assert "Expecting" in damaged["trouble"]
    assert "20260102-000000  damaged: " in ran.out


def test_bundles_list_of_a_folder_without_bundles(rayrec: Command, tmp_path: Path) -> None:
    ran = rayrec("bundles", "list", tmp_path, "--json")
    assert ran.code == 0
    assert json.loads(ran.out) == {"bundles": []}
    assert "no bundles" in ran.err


@pytest.mark.parametrize(
    ("module", "fault", "said"),
    [("ray.data.dataset", "self.missing", False), ("ray.data.dataset", "1 / 0", True), ("ours", "self.missing", True)],
)
def test_what_ctrl_c_left_half_built_is_torn_down_quietly(module: str, fault: str, said: bool) -> None:
    code = "import sys; from rayrec.cli import quiet_about_half_built; sys.unraisablehook = quiet_about_half_built\n"
    code += f"__name__ = {module!r}\nclass Half:\n    def __del__(self): {fault}\nHalf()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("Traceback" in done.stderr) is said
