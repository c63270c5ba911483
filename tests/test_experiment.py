"""Experiments on visitors whose behaviour is known: no difference where there is none, however often one looks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from test_live import Live, live_of

from rayrec.errors import BundleError, ResourceError, StateError, UsageError
from rayrec.evaluation.experiment import (
    Experiment,
    Seen,
    anytime_reach,
    compared,
    hits,
    replied,
    reply,
    report,
    running,
    sample_ratio_p,
    start,
    stop,
    summary,
    table,
    taken_up,
)
from rayrec.state import State, open_state
from rayrec.state.protocol import Event, Shown

A = Experiment("a", "v2", 0.3, 0)


@pytest.fixture
def state(tmp_path: Path) -> State:
    return open_state(f"sqlite:///{tmp_path}/state.db")


def test_the_hash_draws_the_share_and_draws_anew_for_another_name() -> None:
    visitors = [f"u{n}" for n in range(20_000)]
    arms = np.array([A.arm(visitor) == "treatment" for visitor in visitors])
    assert arms.mean() == pytest.approx(0.3, abs=0.01)
    assert [A.arm(visitor) for visitor in visitors[:50]] == [A.arm(visitor) for visitor in visitors[:50]]
    other = np.array([Experiment("b", "v2", 0.3, 0).arm(visitor) == "treatment" for visitor in visitors])
    assert np.corrcoef(arms, other)[0, 1] == pytest.approx(0, abs=0.03)


def test_start_and_stop(state: State) -> None:
    assert running(state) is None
    begun = start(state, "a", "v2", 0.1)
    assert running(state) == begun
    with pytest.raises(UsageError, match="'a' is running"):
        start(state, "b", "v2", 0.1)
    stop(state)
    assert running(state) is None
    for name, share in (("", 0.1), ("c", 0.0), ("c", 1.0)):
        with pytest.raises(UsageError, match="a name, and a share"):
            start(state, name, "v2", share)


def shown(request_id: str, time_ms: int, *items: str, model: str = "v1", visitor: str = "u") -> Shown:
    return Shown(request_id, visitor, time_ms, "home", model, "model", items, (1.0,) * len(items))


def test_an_act_counts_for_the_list_that_led_to_it() -> None:
    day_ms = 86_400_000
    lists = [shown("r1", 10, "a", "b"), shown("r2", 20, "a"), shown("r3", 30, "c")]

    def acts(*events: Event) -> int:
        return hits(lists, events, ("click", "view"))

    assert acts(Event("u", "a", "click", 25, request_id="r1"), Event("u", "b", "click", 26, request_id="r1")) == 1
    assert acts(Event("u", "a", "click", 25), Event("u", "c", "view", 40)) == 2, "the latest that showed it"
    assert acts(Event("u", "a", "click", 5)) == 0, "before any list"
    assert acts(Event("u", "c", "click", 31 + day_ms)) == 0, "too late"
    assert acts(Event("u", "z", "click", 25)) == 0, "never shown"
    assert acts(Event("u", "a", "purchase", 25)) == 0
    assert acts(Event("u", "a", "click", 25, request_id="of-another-time")) == 0


def test_a_report_reads_the_state(state: State) -> None:
    experiment = Experiment("a", "v2", 0.5, 1000)
    for n in range(200):
        visitor = f"u{n}"
        treated = experiment.arm(visitor) == "treatment"
        lists = [
            shown(f"{visitor}-{m}", 2000 + m, "x", model="v2" if treated else "v1", visitor=visitor) for m in (0, 1)
        ]
        state.log_shown([*lists, shown(f"{visitor}-old", 1, "x", visitor=visitor)])
        if treated:
            state.append_events([Event(visitor, "x", "click", 2005, request_id=f"{visitor}-0")])
    state.log_shown([shown("nobody", 2000, "x", visitor="")])
    found = report(state, experiment)
    assert sum(found["visitors"].values()) == 200
    assert found["lists"] == {arm: 2 * n for arm, n in found["visitors"].items()}
    click = found["outcomes"]["click"]
    assert (click["control"], click["treatment"], click["difference"]) == (0.0, 0.5, 0.5)
    assert click["interval"][0] > 0
    assert found["outcomes"]["cart"]["difference"] == 0
    assert found["crossed"] == 0
    assert not found["sample_ratio"]["suspicious"]
    assert "(sure)" in table(found)


def simulated(rng: np.random.Generator, n: int, lift: float = 0.0, share: float = 0.5) -> list[Seen]:
    """Visitors of very different tastes and habits; treatment adds `lift` to the chance that a list is clicked."""
    treated = rng.random(n) < share
    lists = 1 + rng.poisson(rng.gamma(0.5, 8, n))
    chance = np.clip(rng.beta(0.6, 3, n) + lift * treated, 0, 1)
    clicks = rng.binomial(lists, chance)
    return [
        Seen("treatment" if one else "control", int(m), (int(c), 0, 0))
        for one, m, c in zip(treated, lists, clicks, strict=True)
    ]


def test_an_a_a_run_is_hardly_ever_sure_however_often_one_looks() -> None:
    """At 5% to be wrong at any of 20 looks; an interval for one look is wrong in about a fifth of such runs."""
    rng = np.random.default_rng(0)
    looks, runs, wrong, naively_wrong = range(200, 4001, 200), 200, 0, 0
    for _ in range(runs):
        seen = simulated(rng, looks[-1])
        treated = np.array([one.arm == "treatment" for one in seen])
        hit, lists = (
            np.array([value(one) for one in seen], float) for value in (lambda o: o.hits[0], lambda o: o.lists)
        )
        sure = naive = False
        for n in looks:
            row = compared(hit[:n], lists[:n], treated[:n])
            low, high = row["interval"]
            sure |= not low <= 0 <= high
            once = 1.96 * (high - low) / 2 / anytime_reach(1.0, n) / np.sqrt(n)
            naive |= abs(row["difference"]) > once
        wrong, naively_wrong = wrong + sure, naively_wrong + naive
    assert wrong / runs <= 0.07
    assert naively_wrong / runs > 0.12, "or the test would prove nothing"


def test_a_real_difference_is_found() -> None:
    found = summary(simulated(np.random.default_rng(1), 6000, lift=0.05), 0.5)
    low, high = found["outcomes"]["click"]["interval"]
    assert 0 < low < 0.05 < high


def test_uneven_arms_are_told() -> None:
    assert sample_ratio_p(500, 1000, 0.5) == 1.0
    assert sample_ratio_p(0, 0, 0.5) == 1.0
    found = summary(simulated(np.random.default_rng(2), 3000, share=0.45), 0.5)
    assert found["sample_ratio"]["suspicious"]
    assert "TOO UNEVEN" in table({"name": "a", "version": "v2", "share": 0.5, **found})
    even = [summary(simulated(np.random.default_rng(seed), 500), 0.5)["sample_ratio"] for seed in range(50)]
    assert not any(one["suspicious"] for one in even)


def test_an_arm_without_visitors_has_no_figures() -> None:
    found = summary([Seen("control", 3, (1, 0, 0))], 0.5)
    click = found["outcomes"]["click"]
    assert (click["control"], click["treatment"], click["interval"]) == (pytest.approx(1 / 3), None, None)
    assert "–" in table({"name": "a", "version": "v2", "share": 0.5, **found})
    assert summary([], 0.5)["visitors"] == {"control": 0, "treatment": 0}


# ---------------------------------------------------------------- in a replica


def test_a_replica_serves_each_arm_by_its_version(state: State) -> None:
    live: Live = live_of(state)
    asyncio.run(live.follow())
    assert live.of("u1").version == "v1"
    experiment = start(state, "a", "v2", 0.5)
    asyncio.run(live.follow())
    served = {visitor: live.of(visitor).version for visitor in (f"u{n}" for n in range(50))}
    assert served == {visitor: "v2" if experiment.arm(visitor) == "treatment" else "v1" for visitor in served}
    assert set(served.values()) == {"v1", "v2"}
    assert live.of(None).version == "v1"
    stop(state)
    asyncio.run(live.follow())
    assert {live.of(visitor).version for visitor in served} == {"v1"}


def test_a_broken_treatment_is_refused_and_everybody_is_served(state: State) -> None:
    live = live_of(state)
    start(state, "a", "damaged", 0.5)
    for _ in range(2):
        asyncio.run(live.follow())
    assert {live.of(f"u{n}").version for n in range(50)} == {"v1"}


def test_who_starts_one_hears_whether_it_runs(state: State) -> None:
    live = live_of(state)
    experiment = start(state, "a", "v2", 0.5)
    assert not taken_up(state, experiment, within_s=5), "no replica is up"
    state.beat("r1", "v1")
    with pytest.raises(ResourceError, match="no replica has taken up"):
        taken_up(state, experiment, within_s=0)
    asyncio.run(live.follow())
    assert taken_up(state, experiment, within_s=0)


def test_one_that_is_refused_is_stopped_with_the_reason_even_under_a_name_used_before(state: State) -> None:
    live = live_of(state)
    state.beat("r1", "v1")
    for _ in range(2):
        experiment = start(state, "a", "damaged", 0.5)
        asyncio.run(live.follow())
        with pytest.raises(BundleError, match="damaged"):
            taken_up(state, experiment, within_s=0)
        assert running(state) is None
    experiment = start(state, "a", "v2", 0.5)
    asyncio.run(live.follow())
    assert taken_up(state, experiment, within_s=0)


def test_a_refusal_stands_whatever_other_replicas_say(state: State) -> None:
    experiment = start(state, "a", "v2", 0.5)
    reply(state, experiment, "no memory")
    reply(state, experiment)
    assert replied(state, experiment) == "no memory"


def test_a_state_that_is_away_for_a_moment_is_no_refusal(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    live = live_of(state)
    experiment = start(state, "a", "v2", 0.5)
    put, away = state.put_setting, [True]

    def put_later(name: str, value: str) -> None:
        if away:
            away.clear()
            raise StateError("away")
        put(name, value)

    monkeypatch.setattr(state, "put_setting", put_later)
    with pytest.raises(StateError):
        asyncio.run(live.follow())
    assert replied(state, experiment) is None
    asyncio.run(live.follow())
    assert replied(state, experiment) == ""
    assert {live.of(f"u{n}").version for n in range(50)} == {"v1", "v2"}
