"""Progress in a job's log: plain lines, now and then, each saying something new."""

from __future__ import annotations

import pytest

from rayrec import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, to be moved by hand; not a terminal."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_console", progress.Console(stderr=True, force_terminal=False))
    return now


def test_a_quick_task_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Task("count", 2) as task:
        task.advance()
        clock[0] = 1.9
    assert capsys.readouterr().err == ""


def test_lines_come_every_few_seconds_and_never_twice(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Task("count", 3) as task:
        task.advance()
        clock[0] = 5.0
        task.advance(note="fast")
        clock[0] = 6.0
        task.advance()
        clock[0] = 11.0
        task.update(3)
        clock[0] = 17.0
        task.update(3)
    assert capsys.readouterr().err.splitlines() == ["count: 2/3 5s fast", "count: 3/3 11s fast"]


def test_long_lines_are_not_broken(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress.step("x" * 300 + " [bold]")
    assert capsys.readouterr().err == "x" * 300 + " [bold]\n"
