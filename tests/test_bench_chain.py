"""`rayrec bench chain` measures all four commands, and says that they did their work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrec.bench import chain

EVENTS = 4000


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_all_of_it_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = chain.run(EVENTS, tmp_path, ["model.max_len=10"])
    for name in ("sample", "prepare", "train", "evaluate"):
        assert found[name]["cpu_s"] > 0
        assert found[name]["peak_mib"] > 50, name
    assert found["sample"]["said"] == EVENTS
    read = found["prepare"]["said"]
    assert read["read"] == EVENTS
    assert read["kept"] > 0.9 * EVENTS
    (epoch,) = found["train"]["said"]
    assert epoch["stage"] == "retrieval"
    assert epoch["samples"] > 100
    assert found["evaluate"]["said"]["users"] > 0

    def again(*given: Any, **options: Any) -> None:
        raise AssertionError("what was measured is not run again")

    monkeypatch.setattr(chain, "measured", again)
    assert chain.run(EVENTS, tmp_path, ["model.max_len=10"]) == found
