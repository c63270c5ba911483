"""Cleaning events: the judgement of single rows, the clock, names, and what only other rows can show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrec.config import CleanConfig
from rayrec.data.clock import detect_clock, parse_moment, parse_times
from rayrec.data.events import Rules, canonical_events, with_origin
from rayrec.data.ledger import Ledger
from rayrec.data.mapping import EVENT_COLUMNS, Mapping, load_mapping, require_event_columns, resolve
from rayrec.data.visitors import Cleaned, clean_visitors
from rayrec.errors import DataError, UsageError
from rayrec.schema import ACTION_CODE, SYNONYMS

GOOD = {"user_id": "u", "item_id": "i", "timestamp": "1700000000", "action": "view"}


def table(*rows: dict[str, str | None]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names})


def reasons(*rows: dict[str, str | None], clean: CleanConfig | None = None, clock: str = "time") -> list[str]:
    rules = Rules.of(clean or CleanConfig(), clock, Mapping())  # type: ignore[arg-type]
    _, verdict, _ = canonical_events(table(*rows), rules)
    return [verdict.reasons[code] for code in verdict.code_R]


# ---------------------------------------------------------------- one row


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"user_id": None}, "no_user"),
        ({"user_id": "  "}, "no_user"),
        ({"item_id": None}, "no_item"),
        ({"timestamp": None}, "no_time"),
        ({"timestamp": "yesterday"}, "bad_time"),
        ({"timestamp": "2018-13-45"}, "bad_time"),
        ({"timestamp": "0"}, "time_out_of_window"),
        ({"timestamp": "1994-12-31T23:59:59"}, "time_out_of_window"),
        ({"timestamp": "2099-01-01"}, "time_out_of_window"),
        ({"action": None}, "no_action"),
        ({"action": "dance"}, "unknown_action"),
        ({"price": "-1"}, "impossible_price"),
        ({"price": "0"}, ""),
        ({"price": "cheap"}, "price_not_a_number"),
        ({"price": "1e999"}, "price_not_a_number"),
        ({"quantity": "-3"}, "impossible_quantity"),
        ({"quantity": "1000000"}, "impossible_quantity"),
        ({"quantity": "nan?"}, "quantity_not_a_number"),
        ({"action": "cancel", "quantity": "-3"}, ""),
        ({"propensity": "1.5"}, "impossible_propensity"),
        ({"position": "2.5"}, "impossible_position"),
        ({"position": "2.0"}, ""),
        ({"item_id": None, "action": "dance"}, "no_item"),
    ],
)
def test_the_first_reason_that_holds_is_given(changes: dict[str, str | None], reason: str) -> None:
    assert reasons({**GOOD, **changes}) == [reason]


def test_ids_are_strings_and_floats_are_read_back() -> None:
    rows = [{**GOOD, "user_id": user, "item_id": item} for user, item in [("17850.0", "007"), (" x ", "1.5")]]
    events, _, repairs = canonical_events(table(*rows), Rules.of(CleanConfig(), "time", Mapping()))
    assert events["user_id"].to_pylist() == ["17850", "x"]
    assert events["item_id"].to_pylist() == ["007", "1.5"]
    assert repairs == {"float_to_id:user_id": 1, "trimmed:user_id": 1}


def test_a_row_without_a_user_is_an_anonymous_session() -> None:
    rows = [{**GOOD, "user_id": user, "session_id": s} for user, s in [(None, "536365"), ("u", "1"), (None, None)]]
    events, verdict, _ = canonical_events(table(*rows), Rules.of(CleanConfig(), "time", Mapping()))
    assert events["user_id"].to_pylist()[:2] == ["session:536365", "u"]
    assert verdict.kept.tolist() == [True, True, False]


def test_rows_that_miss_too_many_fields() -> None:
    clean = CleanConfig(expected=("price", "quantity", "scene"), max_missing=0.5)
    assert reasons({**GOOD, "price": "1", "quantity": "2"}, {**GOOD, "price": "1"}, clean=clean) == [
        "",
        "too_many_missing",
    ]
    with pytest.raises(UsageError, match="colour: no such column"):
        reasons(GOOD, clean=CleanConfig(expected=("colour",)))


def test_the_window_can_be_set() -> None:
    clean = CleanConfig(after="2017-11-25T00:00:00+08:00", before="2017-12-04T00:00:00+08:00")
    times = ["1511539199", "1511539200", "1512316799", "1512316800"]
    rows = [{**GOOD, "timestamp": t} for t in times]
    assert reasons(*rows, clean=clean) == ["time_out_of_window", "", "", "time_out_of_window"]
    with pytest.raises(UsageError, match=r"clean\.after: 'soon' is no time"):
        Rules.of(CleanConfig(after="soon"), "time", Mapping())
    with pytest.raises(UsageError, match="order numbers"):
        Rules.of(clean, "order", Mapping())
    with pytest.raises(UsageError, match="must lie before"):
        Rules.of(CleanConfig(after="2018-01-01", before="2017-01-01"), "time", Mapping())


def test_a_block_without_rows() -> None:
    empty = table(GOOD).slice(0, 0)
    events, verdict, repairs = canonical_events(empty, Rules.of(CleanConfig(), "time", Mapping()))
    assert len(events) == len(verdict.kept) == len(repairs) == 0


# ---------------------------------------------------------------- clock


@pytest.mark.parametrize(
    ("sample", "clock"),
    [
        (["0", "1", "2"], "order"),
        (["1511544070"], "time"),
        (["1511544070123"], "time"),
        (["2018-09-20"], "date"),
        (["20180920", "20180921"], "date"),
        (["2018-09-20 00:00:00", "2018-09-21T00:00:00Z"], "date"),
        (["2018-09-20 00:00:00", "2018-09-21 10:00:00", "2018-09-21 11:00:00"], "time"),
        (["2010-12-01 08:26:00"], "time"),
        (["1", "2", "oops"], "order"),
        ([], "time"),
        (["rubbish"], "time"),
    ],
)
def test_the_clock_is_found(sample: list[str], clock: str) -> None:
    assert detect_clock(pa.array([*sample, None], pa.string())) == clock


@pytest.mark.parametrize(
    ("text", "time_ms"),
    [
        ("1511544070", 1511544070000),
        ("1511544070.5", 1511544070500),
        ("1511544070123", 1511544070123),
        ("2018-09-20", 1537401600000),
        ("2018-09-20T00:00", 1537401600000),
        ("2018-09-20 00:00:00.250", 1537401600250),
        ("2018-09-20T00:00:00.250999Z", 1537401600250),
        ("2018-09-20 02:00:00+02:00", 1537401600000),
        ("2018-09-20T02:00:00+0200", 1537401600000),
        ("2018-09-20 00:00:00 UTC", 1537401600000),
        ("1995-01-01T00:00:00.123456789Z", 788918400123),
    ],
)
def test_times_in_every_form_alone_and_among_others(text: str, time_ms: int) -> None:
    for column in ([text], [text, "2018-09-20 01:02:03", "1537401600", None, "x"]):
        times, read = parse_times(pa.array(column, pa.string()), "time")
        assert times[0] == time_ms
        assert read[:1].all()
        assert not read[3:].any()


def test_order_numbers_are_not_scaled_and_dates_lose_the_hour() -> None:
    assert parse_times(pa.array(["0", "17", "2.0", "2018-01-01"]), "order")[0].tolist() == [0, 17, 2, 0]
    times, read = parse_times(pa.array(["2018-09-20 13:00:00", "20180920", "20189999"]), "date")
    assert times[:2].tolist() == [1537401600000] * 2
    assert read.tolist()[:2] == [True, True]


@given(st.datetimes(min_value=__import__("datetime").datetime(1970, 1, 1)))
@settings(max_examples=100, deadline=None)
def test_any_moment_is_read_back(moment) -> None:  # type: ignore[no-untyped-def]
    expected = int(np.datetime64(moment, "ms").astype(np.int64))
    assert parse_moment(moment.isoformat(timespec="milliseconds"), "x") == expected


@given(st.lists(st.text(max_size=12) | st.from_regex(r"\d{4}-\d{2}-\d{2}( \d{2}:\d{2}:\d{2})?", fullmatch=True)))
@settings(max_examples=150, deadline=None)
def test_no_text_breaks_the_parser(texts: list[str]) -> None:
    for clock in ("time", "date", "order"):
        times, read = parse_times(pa.array(texts, pa.string()), clock)  # type: ignore[arg-type]
        assert len(times) == len(read) == len(texts)


# ---------------------------------------------------------------- names


def test_columns_are_known_by_many_names() -> None:
    assert resolve(["visitorid", "itemid", "Event", "timestamp", "colour"], EVENT_COLUMNS, Mapping()) == {
        "user_id": "visitorid", "item_id": "itemid", "timestamp": "timestamp", "action": "Event",
    }  # fmt: skip
    both = resolve(["CustomerID", "user_id"], EVENT_COLUMNS, Mapping())
    assert both == {"user_id": "user_id"}


def test_the_mapping_goes_first() -> None:
    mapping = Mapping(columns={"item_id": "user"})
    assert resolve(["user", "item_id"], EVENT_COLUMNS, mapping) == {"item_id": "user"}


def test_a_missing_column_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"e\.csv: no column user_id or session_id; it has: who, item_id.*--map"):
        require_event_columns(
            "e.csv", ["who", "item_id"], {"item_id": "item_id", "timestamp": "", "action": ""}, Mapping()
        )
    with pytest.raises(DataError, match="user_id: nobody"):
        require_event_columns("e.csv", ["who"], {}, Mapping(columns={"user_id": "nobody"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("columns: {colour: farbe}", "columns: 'colour' is no canonical column"),
        ("actions: {kauf: buyy}", "actions: 'kauf: buyy': 'buyy' is no canonical action"),
        ("acts: {}", "acts: Extra inputs"),
        ("- 1", "valid dictionary"),
        ("{", "not YAML"),
    ],
)
def test_a_bad_mapping_says_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(UsageError, match="--map") as error:
        load_mapping(tmp_path / "m.yaml")
    assert message in str(error.value)
    with pytest.raises(UsageError, match="cannot read it"):
        load_mapping(tmp_path / "none.yaml")


def test_actions_by_mapping_synonym_and_name() -> None:
    mapping = Mapping(actions={"1": "view", "PV": "click"})
    assert [mapping.action(name) for name in ("1", "PV", "pv", " Buy ", "purchase", "dance")] == [
        "view", "click", "view", "purchase", "purchase", None,
    ]  # fmt: skip
    assert all(Mapping().action(name) == action for name, action in SYNONYMS.items())


# ---------------------------------------------------------------- whole visitors


def events(*rows: tuple[str, str, int, str, float | None], **columns: list[object]) -> pa.Table:
    """Rows of (user, item, time in ms, action, quantity)."""
    user, item, time, action, quantity = zip(*rows, strict=True)
    code = pa.array([ACTION_CODE[name] for name in action], pa.int8())
    made = pa.table(
        {
            "user_id": list(user), "item_id": list(item), "time_ms": list(time), "action": code,
            "quantity": pa.array(quantity, pa.float64()), **columns,
        }
    )  # fmt: skip
    return with_origin(made, 0, np.arange(1, len(rows) + 1))


def kept_rows(cleaned: Cleaned) -> list[int]:
    return (cleaned.events["origin"].to_numpy() & 0xFFFF).tolist()


def gone(cleaned: Cleaned) -> dict[str, list[int]]:
    return {reason: (rows["origin"].to_numpy() & 0xFFFF).tolist() for reason, rows in cleaned.gone}


CLEAN = CleanConfig(bot_events_per_hour=10, bot_min_events=5)


def test_equal_rows_collapse_and_purchases_add_up() -> None:
    cleaned = clean_visitors(
        events(
            ("a", "i", 5, "view", None), ("a", "i", 5, "view", None), ("a", "i", 6, "view", None),
            ("a", "i", 9, "purchase", 2.0), ("a", "i", 9, "purchase", 2.0), ("b", "i", 9, "purchase", 2.0),
            ("c", "i", 9, "purchase", None), ("c", "i", 9, "purchase", None), ("c", "i", 9, "purchase", None),
        ), CLEAN, "time",
    )  # fmt: skip
    assert kept_rows(cleaned) == [1, 3, 4, 6, 7]
    assert (cleaned.collapsed["origin"].to_numpy() & 0xFFFF).tolist() == [2, 5, 8, 9]
    assert cleaned.events["quantity"].to_pylist() == [None, None, 4.0, 2.0, 3.0]


def test_rows_with_an_event_id_or_any_other_difference_do_not_collapse() -> None:
    rows = [("a", "i", 5, "view", None)] * 4
    cleaned = clean_visitors(events(*rows, event_id=["x", "y", None, None], scene=["", "", "h", "g"]), CLEAN, "time")
    assert kept_rows(cleaned) == [1, 2, 3, 4]


def test_robots_go_and_big_orders_stay() -> None:
    fast = [("bot", f"i{n}", n * 1000, "view", None) for n in range(12)]
    slow = [("slow", f"i{n}", n * 3_600_000, "view", None) for n in range(12)]
    order = [("shop", f"i{n}", 0, "purchase", 1.0) for n in range(50)]
    few = [("few", f"i{n}", n, "view", None) for n in range(4)]
    cleaned = clean_visitors(events(*fast, *slow, *order, *few), CLEAN, "time")
    assert gone(cleaned) == {"bot": list(range(1, 13))}
    off = clean_visitors(events(*fast), CleanConfig(bot_events_per_hour=0), "time")
    assert len(off.events) == 12
    assert len(clean_visitors(events(*fast), CLEAN, "date").events) == 12


def test_a_cancellation_annuls_the_latest_purchase_that_covers_it() -> None:
    cleaned = clean_visitors(
        events(
            ("a", "i", 1, "purchase", 5.0), ("a", "i", 2, "purchase", 5.0), ("a", "i", 3, "purchase", 1.0),
            ("a", "i", 4, "cancel", 5.0), ("a", "j", 5, "cancel", 1.0), ("b", "i", 6, "cancel", 5.0),
            ("a", "i", 7, "purchase", 9.0),
        ), CLEAN, "time",
    )  # fmt: skip
    assert kept_rows(cleaned) == [1, 3, 7]
    assert gone(cleaned) == {"cancelled": [2], "cancels_a_purchase": [4], "cancel_without_purchase": [5, 6]}


def test_a_partial_cancellation_reduces_and_a_full_sum_annuls() -> None:
    cleaned = clean_visitors(
        events(("a", "i", 1, "purchase", 5.0), ("a", "i", 2, "cancel", 2.0), ("b", "i", 1, "purchase", 5.0),
               ("b", "i", 2, "cancel", 2.0), ("b", "i", 3, "cancel", 3.0), ("b", "i", 4, "cancel", 1.0)), CLEAN, "time",
    )  # fmt: skip
    assert cleaned.events["quantity"].to_pylist() == [3.0]
    assert cleaned.repairs == {"purchase_reduced_by_cancel": 1}
    assert gone(cleaned) == {"cancelled": [3], "cancels_a_purchase": [2, 4, 5], "cancel_without_purchase": [6]}


def test_a_cancellation_without_a_quantity_takes_the_whole_purchase() -> None:
    cleaned = clean_visitors(events(("a", "i", 1, "purchase", 5.0), ("a", "i", 2, "cancel", None)), CLEAN, "time")
    assert len(cleaned.events) == 0
    without = events(("a", "i", 1, "purchase", None), ("a", "i", 2, "cancel", None)).drop_columns(["quantity"])
    assert len(clean_visitors(without, CLEAN, "time").events) == 0


def test_events_come_out_sorted_and_ties_keep_the_order_of_the_input() -> None:
    cleaned = clean_visitors(
        events(("b", "x", 2, "view", None), ("a", "y", 3, "view", None), ("a", "z", 3, "cart", None),
               ("é", "w", 0, "view", None), ("a", "y", 1, "view", None)), CLEAN, "time",
    )  # fmt: skip
    assert kept_rows(cleaned) == [5, 2, 3, 1, 4]


def test_no_visitors_at_all() -> None:
    cleaned = clean_visitors(events(("a", "i", 1, "cancel", None)).slice(0, 0), CLEAN, "time")
    assert len(cleaned.events) == len(cleaned.collapsed) == len(cleaned.gone) == 0


ROW = st.tuples(
    st.sampled_from("ab"), st.sampled_from("ij"), st.integers(0, 3), st.sampled_from(["view", "purchase", "cancel"]),
    st.sampled_from([None, 1.0, 2.0, 3.0]),
)  # fmt: skip


@given(st.lists(ROW, min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_no_row_is_lost_and_no_goods_appear(rows: list[tuple[str, str, int, str, float | None]]) -> None:
    cleaned = clean_visitors(events(*rows), CLEAN, "time")
    left = kept_rows(cleaned) + (cleaned.collapsed["origin"].to_numpy() & 0xFFFF).tolist()
    assert sorted(left + [row for rows in gone(cleaned).values() for row in rows]) == list(range(1, len(rows) + 1))
    assert "cancel" not in [
        name for name, code in ACTION_CODE.items() if code in set(cleaned.events["action"].to_pylist())
    ]
    bought = sum(q or 1.0 for _, _, _, action, q in rows if action == "purchase")
    assert sum(q or 0.0 for q in cleaned.events["quantity"].to_pylist()) <= bought + sum(q or 0 for *_, q in rows if q)


# ---------------------------------------------------------------- ledger


def test_the_ledger_proves_that_no_row_was_lost() -> None:
    ledger = Ledger()
    ledger.of(0).read = 3
    ledger.of(1).read = 2
    ledger.reject(np.array([0, 0]), "bad")
    ledger.collapse(np.array([1]))
    report = ledger.report(["a.csv", "b.csv", "header-alone.csv"], {0: 1, 1: 1})
    assert report["files"]["header-alone.csv"] == {"read": 0, "kept": 0, "collapsed": 0, "rejected": {}}
    assert report["files"]["b.csv"] == {"read": 2, "kept": 1, "collapsed": 1, "rejected": {}}
    assert (report["read"], report["kept"], report["rejected"]) == (5, 2, {"bad": 2})
    with pytest.raises(AssertionError, match=r"a\.csv"):
        ledger.report(["a.csv", "b.csv"], {0: 2, 1: 1})
