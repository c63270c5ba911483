"""The bench of serving: who is compared, that what was run is kept, and that the table says what was found."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayrec.bench import serving
from rayrec.bench.layers import shares
from rayrec.bench.load import Record
from rayrec.bench.ramp import Until, joined
from rayrec.bench.recall import main as print_recall
from rayrec.bench.server_runs import KINDS, TRIVIAL, _alone, free_port, started
from rayrec.bench.serving import EVENTS, LISTS, Made, Shop, Sizes, plans, requests, run, visitors
from rayrec.bench.serving_table import TARGETS, Target, ramp_row, ramp_table, summary, table, target_row
from rayrec.config import ServeConfig
from rayrec.errors import UsageError

SMALL = partial(Shop, items=300, users=30, events=10)
SIZES = Sizes(items=(400,), history=(), users=())


def test_runs_are_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "Shop", SMALL)
    only = ["uvicorn", "items", "layers"]
    given: dict[str, Any] = {"rounds": 1, "seconds": 0.4, "clients": [1, 3], "sizes": SIZES, "only": only}
    result = run(tmp_path, **given)
    assert result["trouble"] == {}
    assert [row["name"] for row in result["servers"]] == ["uvicorn"]
    for row in result["servers"] + result["growth"]:
        for point in row["points"]:
            assert (point["failed"], point["rate"] > 0, point["p50"] <= point["p99"]) == (0, True, True)
        assert row["mib"] > 5
    (grown,) = result["growth"]
    assert (grown["name"], grown["recall"]) == ("400", {"at": ServeConfig().per_source, "recall": 1.0})
    stages = [row["layer"] for row in result["layers"]]
    assert {"rank: retrieve", "rank: score", "JSON in, validated", "HTTP: uvicorn, sockets, client"} <= set(stages)
    assert "Ray Serve and HAProxy" not in stages, "it was not measured"
    assert result["candidates"] > 100
    assert "pipeline.recommend" in result["shares"]
    assert json.loads((tmp_path / "serve.json").read_text()) == json.loads(json.dumps(result))
    text = (tmp_path / "table.md").read_text()
    assert "| items | 400 |" in text
    assert "| req/s at 32 | at least 2000 |  |  | not measured |" in text
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")

    for name in ("ask", "started", "running", "make_bundle", "fill_state"):
        monkeypatch.setattr(serving, name, lambda *_, **__: pytest.fail("measured again"))
    assert run(tmp_path, **given) == result


def test_who_cannot_run_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "Shop", SMALL)

    def no_environment(folder: Path, requirements: tuple[str, ...]) -> Path:
        raise RuntimeError("cannot install litserve: no route | to host")

    monkeypatch.setattr("rayrec.bench.server_runs.environment", no_environment)
    result = run(tmp_path, rounds=1, seconds=0.2, clients=[1], sizes=Sizes(), only=["LitServe", TRIVIAL])
    assert result["trouble"] == {"LitServe": "cannot install litserve: no route / to host"}
    assert [row["name"] for row in result["servers"]] == [TRIVIAL]
    assert "no route / to host |" in (tmp_path / "table.md").read_text()


def test_each_part_can_be_chosen() -> None:
    sizes = Sizes(items=(10,), history=(5, 6), users=(7,))
    everything = plans([1, 8], sizes)
    assert [plan.name for plan in everything if plan.part == "servers"] == [TRIVIAL, *KINDS]
    assert [plan.name for plan in plans([1], sizes, ["history"])] == ["5", "6"]
    assert [plan.name for plan in plans([1], sizes, ["uvicorn", "layers"])] == ["uvicorn", "layers"]
    assert {plan.mixes for plan in everything if plan.name == "rayrec serve"} == {(LISTS, EVENTS)}
    with pytest.raises(UsageError, match="unknown part torchserve: choose among nothing but an answer, rayrec serve"):
        plans([1], sizes, ["torchserve"])


def test_few_visitors_come_often_or_all_alike() -> None:
    rng = serving.np.random.default_rng(0)
    often = Counter(visitors(Shop(users=1000), 5000, rng))
    alike = Counter(visitors(Shop(users=1000, even=True), 5000, rng))
    assert often["u0000000"] > 500 > 30 > max(alike.values())


def test_what_is_sent() -> None:
    def sent(kind: str, mix: str) -> list[tuple[str, Any]]:
        heads = [one.partition(b"\r\n\r\n") for one in requests(kind, Shop(users=50), mix, 0)]
        return [(head.split()[1].decode(), json.loads(body)) for head, _, body in heads]

    lists = sent("uvicorn", LISTS)
    assert {path for path, _ in lists} == {"/v1/recommend"}
    assert lists[0][1].keys() == {"user_id", "scene", "k"}
    assert [body["requests"] for _, body in sent("BentoML", LISTS)] == [[body] for _, body in lists]
    paths = Counter(path for path, _ in sent("rayrec serve", EVENTS))
    assert paths["/v1/events"] / paths.total() == pytest.approx(4 / 15, abs=0.02)


def test_a_copy_of_the_state_is_served(tmp_path: Path) -> None:
    made = Made(tmp_path)
    with made.state(SMALL()) as first:
        first.with_name("served.db-wal").write_text("what was shown")
    with made.state(SMALL()) as second:
        assert {file.name for file in tmp_path.iterdir()} == {"state-30-10-300.db", "served.db"}
        assert second.stat().st_size > 10_000
    assert len(list(tmp_path.iterdir())) == 1


def test_recall_of_an_exact_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_recall(Made(tmp_path).bundle(400))
    assert json.loads(capsys.readouterr().out) == {"at": ServeConfig().per_source, "recall": 1.0}


def test_shares_are_of_our_functions_alone() -> None:
    def work() -> None:
        for n in range(300):
            Target("rate", n, 1.0).met(0.5)
            str(TARGETS[0])

    assert shares(work) == {}, "the bench's own are none"


# ---------------------------------------------------------------- servers


def test_a_server_that_fails_says_why(tmp_path: Path) -> None:
    code = "raise SystemExit('there is no such bundle')"
    with (
        pytest.raises(RuntimeError, match="did not come up: there is no such bundle"),
        started([sys.executable, "-c", code], free_port(), b"\r\n\r\n{}", {}, tmp_path / "log"),
    ):
        pytest.fail("it is not up")


def test_a_server_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """Even where its children do not want to."""
    answers = (
        "import http.server\n"
        "class Ok(http.server.BaseHTTPRequestHandler):\n"
        "    def do_POST(self):\n"
        "        self.send_response(200); self.send_header('Content-Length', '0'); self.end_headers()\n"
        f"http.server.HTTPServer(('127.0.0.1', {(port := free_port())}), Ok).serve_forever()\n"
    )
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn!r}])\n"
    (tmp_path / "server.py").write_text(parent + answers)
    with started([sys.executable, str(tmp_path / "server.py")], port, b"\r\n\r\n{}", {}, tmp_path / "log") as server:
        family = server.cpu_s()
        assert len(family) == 2
        assert server.pss_mib() > 5
        time.sleep(0.3)
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.process.returncode == -signal.SIGTERM


def test_other_environments_see_rayrec_alone(tmp_path: Path) -> None:
    for _ in range(2):
        folder = _alone(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["rayrec"]
    assert (folder / "rayrec" / "config.py").is_file()


# ---------------------------------------------------------------- the table


def server_run(name: str, round_: int, rates: dict[int, float], p50: float = 2.0) -> dict[str, Any]:
    points = [
        {
            "mix": LISTS, "clients": clients, "answers": 100, "failed": {}, "rate": rate,
            "ms": {"p50": p50, "p99": 2 * p50}, "cpu_s": 0.2, "generator_cpu_s": 0.01,
        }
        for clients, rate in rates.items()
    ]  # fmt: skip
    shop = {"items": 10, "users": 10, "events": 10, "even": False}
    return {
        "part": "servers",
        "name": name,
        "round": round_,
        "shop": shop,
        "ready_s": 1.0,
        "mib": [100, 101],
        "points": points,
    }


def test_ratios_are_taken_within_a_round() -> None:
    """The machine was three times as slow in the second round: the ratio does not see it."""
    runs = [
        server_run("rayrec serve", 0, {8: 900}), server_run("rayrec serve", 1, {8: 300}),
        server_run("LitServe", 0, {8: 600}), server_run("LitServe", 1, {8: 200}),
    ]  # fmt: skip
    row = target_row(Target("rate", 8, 1.5, "LitServe"), runs)
    assert (row["found"], row["range"], row["met"]) == (1.5, [1.5, 1.5], True)
    assert target_row(Target("rate", 8, 1.6, "LitServe"), runs)["met"] is False
    assert target_row(Target("p50", 8, 2.0), runs)["met"] is False, "below, not at"
    assert target_row(Target("p50", 8, 2.1), runs)["met"] is True
    assert target_row(Target("rate", 8, 1.5, "BentoML"), runs)["met"] is None


def test_the_table_of_servers() -> None:
    runs = [server_run("rayrec serve", round_, {1: 400 + round_, 8: 1000}) for round_ in range(3)]
    found = summary(runs, {})
    (row,) = found["servers"]
    assert row["points"][0]["rate"] == 401
    assert row["points"][0]["cpu_s_per_1000"] == pytest.approx(2.0)
    result = {
        "date": "2026-01-01", "cpus": 2, "python": "3.11", "seconds": 1, "rounds": 3, "shop": asdict(SMALL()),
        "trouble": {"BentoML": "no wheel"}, **found,
    }  # fmt: skip
    text = table(result)
    assert "| rayrec serve | 401 / 1,000 | 2.00 / 2.00 | 4.00 / 4.00 | 0 | 2.00 / 2.00 | 101 | 5.00 | 1.0 |" in text
    assert "| BentoML |  |  |  |  |  |  |  | no wheel |" in text
    assert "## Growth" not in text
    assert "## A crowd" not in text


# ---------------------------------------------------------------- a ramp


def test_a_crowd_comes_and_goes_on_one_clock() -> None:
    quiet, crowd = Record(replicas=[(0, 1), (1, 1)]), Record(replicas=[(0, 1), (1, 4)])
    quiet.add(0.5, 0.5, 0.6, "200")
    crowd.add(1.0, 1.25, 1.5, "503")
    whole = joined([quiet, crowd], [2.5, 2.0])
    assert (whole.due_s, whole.took_s, whole.status) == ([0.5, 3.5], [pytest.approx(0.1), 0.5], ["200", "503"])
    assert whole.replicas == [(0, 1), (1, 1), (2, 1), (3, 4)]


def test_a_load_ends_when_replicas_are_as_many_as_it_waits_for() -> None:
    load = Until("http://127.0.0.1:9", 300, False, {}, wanted=4)
    load._started = time.perf_counter() - 5
    for second, replicas in enumerate((1, 2, 4, 4)):
        load.counted(second, replicas)
        assert (load.first_s is None, load.reached_s is None) == (replicas == 1, replicas < 4)
    assert load.seconds == load.reached_s == pytest.approx(5, abs=1)
    assert [n for _, n in load.record.replicas] == [1, 2, 4, 4]


def ramp_run(all_s: float, failed: int) -> dict[str, Any]:
    part = {"rate": 5.0, "ms": {"p50": 9.0, "p99": 20.0}, "cpu_s_per_1000": 10.0, "generator_cpu_s_per_1000": 1.0,
            "failed": failed, "replicas": 1, "mib": 900.0}  # fmt: skip
    return {
        "part": "ramp", "name": "ramp", "replicas": 4, "clients": 32, "requests": 500, "failed": 2 * failed,
        "up_s": {"first": 9.0, "all": all_s}, "down_s": {"first": 40.0, "all": 50.0},
        "parts": [{"part": "one replica", **part}, {"part": "all replicas", **part, "mib": 910.0, "replicas": 4}],
    }  # fmt: skip


def test_the_table_of_a_ramp() -> None:
    row = ramp_row([ramp_run(11.0, 0), ramp_run(15.0, 1)])
    assert row is not None
    assert (row["up_s"], row["failed"], row["mib_per_1000"]) == ({"first": 9.0, "all": 13.0}, 2, 20.0)
    text = ramp_table(row)
    assert "| all replicas | 4 | 5 | 9.0 | 20.0 | 1 | 10.00 | 910 |" in text
    assert "32 clients come: 9.0 s to the first extra replica, 13.0 s to all 4. They go: 40.0 s" in text
    assert "1,000 requests, 2 failed; 20.00 MiB more per 1,000" in text
    assert ramp_row([]) is None
