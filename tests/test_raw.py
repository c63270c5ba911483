"""Finding and reading raw files: every form, and what is broken in them."""

from __future__ import annotations

import gzip
import json
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrec.data import readers
from rayrec.data.raw import csv_names, find_raw, plan, raw_settings
from rayrec.data.readers import Block, parse_csv, parse_jsonl, read_piece
from rayrec.data.records import mark_broken_records, next_boundary
from rayrec.errors import DataError, UsageError

NAMES = ("a", "b", "c")
LOCAL = pafs.LocalFileSystem()


def everything(found: list[str]) -> dict[str, str]:
    return {name: name for name in found}


def rows_of(block: Block) -> list[tuple[object, ...]]:
    return list(zip(*(block.rows[name].to_pylist() for name in block.rows.column_names), strict=True))


def broken_of(block: Block) -> list[tuple[int, str]]:
    return [(b.row, b.reason) for b in block.broken]


# ---------------------------------------------------------------- CSV


def test_csv_keeps_leading_zeros_and_knows_missing_values() -> None:
    block = parse_csv(b"007,NULL,x\n08,, y \n", NAMES, everything)
    assert rows_of(block) == [("007", None, "x"), ("08", None, " y ")]
    assert block.row_R.tolist() == [1, 2]


def test_lines_of_the_wrong_length_are_broken_and_the_others_keep_their_numbers() -> None:
    block = parse_csv(b"1,2,3\n4,5\n6,7,8\n1,2,3,4\n9,9,9\n7", NAMES, everything)
    assert rows_of(block) == [("1", "2", "3"), ("6", "7", "8"), ("9", "9", "9")]
    assert block.row_R.tolist() == [1, 3, 5]
    assert broken_of(block) == [(2, "truncated_line"), (4, "too_many_fields"), (6, "truncated_line")]
    assert block.read == 6


def test_ctrl_c_in_the_middle_of_a_broken_line_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(text: str) -> bool:
        signal.raise_signal(signal.SIGINT)
        return False

    monkeypatch.setattr(readers, "is_mark", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            parse_csv(b"1,2,3\n4,5\n6,7,8\n", NAMES, everything)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_broken_quote_costs_its_own_record_only() -> None:
    text = b'1,"ok, really",3\n4,"never closed,6\n7,8,9\n"a\nb",5,6\n1,"x"y,3\n5" pipe,2,3\n'
    block = parse_csv(text, NAMES, everything)
    assert rows_of(block) == [("1", "ok, really", "3"), ("7", "8", "9"), ("a\nb", "5", "6"), ('5" pipe', "2", "3")]
    assert broken_of(block) == [(2, "broken_quote"), (5, "broken_quote")]
    assert block.row_R.tolist() == [1, 3, 4, 6]
    assert block.broken[0].text == '4,"never closed,6'


def test_two_broken_quotes_do_not_pair_up() -> None:
    block = parse_csv(b'1,2,"x\n4,5,6\n7,8,"y\n1,1,1\n', NAMES, everything)
    assert broken_of(block) == [(1, "broken_quote"), (3, "broken_quote")]
    assert rows_of(block) == [("4", "5", "6"), ("1", "1", "1")]


def test_an_even_number_of_quotes_can_be_broken_too() -> None:
    block = parse_csv(b'1,2,3\n4,5" pipe,"open\n6,7,8\n', NAMES, everything)
    assert broken_of(block) == [(2, "broken_quote")]
    assert rows_of(block) == [("1", "2", "3"), ("6", "7", "8")]


def test_windows_lines_other_encodings_and_one_column() -> None:
    block = parse_csv(b'1,2,3\r\n4,"5",caf\xe9\r\n', NAMES, everything)
    assert rows_of(block) == [("1", "2", "3"), ("4", "5", "caf\ufffd")]
    single = parse_csv(b'x\n"y\nz\n', ("a",), everything)
    assert rows_of(single) == [("x",), ("z",)]
    assert broken_of(single) == [(2, "broken_quote")]


def test_csv_names_are_unique_and_lose_the_byte_order_mark() -> None:
    names, length = csv_names(b'\xef\xbb\xbfa,"b, c",a\r\n1,2,3\n')
    assert names == ("a", "b, c", "a.2")
    assert length == len(b'\xef\xbb\xbfa,"b, c",a\r\n')


FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=8)


@given(st.lists(st.tuples(FIELD, FIELD, FIELD), min_size=1, max_size=20))
@settings(max_examples=150, deadline=None)
def test_whatever_csv_writers_write_is_read_back(rows: list[tuple[str, str, str]]) -> None:
    text = "".join(",".join('"' + field.replace('"', '""') + '"' for field in row) + "\n" for row in rows)
    block = parse_csv(text.encode(), NAMES, everything)
    missing = set(readers.NULLS)
    assert block.broken == []
    assert rows_of(block) == [tuple(None if field in missing else field for field in row) for row in rows]


@given(st.lists(st.sampled_from([b"1,2,3", b'1,"2",3', b'"1', b'x"y,2', b"1,2", b'"a\nb",2,3', b""]), max_size=12))
@settings(max_examples=200, deadline=None)
def test_every_record_is_read_or_broken_whatever_stands_beside_it(lines: list[bytes]) -> None:
    block = parse_csv(b"".join(line + b"\n" for line in lines), NAMES, everything)
    assert len(block.rows) == sum(line in (b"1,2,3", b'1,"2",3', b'"a\nb",2,3') for line in lines)
    assert block.read == sum(bool(line) for line in lines)


def test_a_boundary_is_not_inside_a_quoted_text() -> None:
    text = b'rest"\n1,"a\nb\nc\nd",3\n4,5,6\n7,8,9\n1,2,3\n4,5,6\n'
    place = next_boundary(text, 3)
    assert text[place:].startswith(b"7,8,9")
    assert next_boundary(b"no newline", 3) == -1


def test_sound_text_is_left_alone() -> None:
    text = b'1,"a ""b"" c",3\n"","",""\n'
    assert mark_broken_records(text, 3) == (text, [])


# ---------------------------------------------------------------- JSON lines and Parquet


def test_jsonl_numbers_and_strings_become_text() -> None:
    lines = [{"a": "007", "b": 17850.0, "c": None}, {"a": "x", "b": 2}]
    block = parse_jsonl("\n".join(map(json.dumps, lines)).encode(), everything)
    assert sorted(block.rows.column_names) == ["a", "b", "c"]
    assert block.rows["a"].to_pylist() == ["007", "x"]
    assert [float(text) for text in block.rows["b"].to_pylist()] == [17850.0, 2.0]


def test_a_line_that_is_no_json_object_is_broken() -> None:
    block = parse_jsonl(b'{"a": 1}\n{"a": \n[1]\n\n{"a": "2018-01-01", "b": {"x": 1}}\n', everything)
    assert broken_of(block) == [(2, "broken_json"), (3, "broken_json")]
    assert block.rows["a"].to_pylist() == ["1", "2018-01-01"]
    assert block.row_R.tolist() == [1, 4]


def test_jsonl_ids_that_look_like_dates_stay_as_they_are() -> None:
    block = parse_jsonl(b'{"a": "2018-01-01"}\n{"a": "2018-01-02"}\n', everything)
    assert block.rows["a"].to_pylist() == ["2018-01-01", "2018-01-02"]


def test_parquet_types_become_text(tmp_path: Path) -> None:
    table = pa.table({"i": [1, None], "f": [17850.0, 0.1], "s": ["007", "nan"], "d": pa.array([0, 1], pa.date32())})
    pq.write_table(table, tmp_path / "events.parquet")
    raw = find_raw(str(tmp_path))
    (block,) = [b for task in plan(raw.fs, raw.events) for p in task for b in read_piece(raw.fs, p, everything)]
    assert rows_of(block) == [("1", "17850", "007", "1970-01-01"), (None, "0.1", None, "1970-01-02")]


def test_files_that_are_not_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "events.parquet").write_text("not parquet")
    raw = find_raw(str(tmp_path))
    with pytest.raises(DataError, match=r"events\.parquet"):
        plan(raw.fs, raw.events)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "events.csv.gz").write_bytes(gzip.compress(b"a,b,c\n" + b"1,2,3\n" * 100_000)[:-500])
    raw = find_raw(str(cut))
    with pytest.raises(DataError, match=r"events\.csv\.gz: cannot be read, damaged or cut off"):
        [b for task in plan(raw.fs, raw.events) for p in task for b in read_piece(raw.fs, p, everything)]


# ---------------------------------------------------------------- pieces


@pytest.mark.parametrize("gzipped", [False, True])
def test_pieces_and_blocks_join_up_to_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gzipped: bool
) -> None:
    monkeypatch.setattr("rayrec.data.raw.SMALLEST_PIECE_BYTES", 2000)
    monkeypatch.setattr("rayrec.data.readers.BLOCK_BYTES", 700)
    monkeypatch.setattr("rayrec.data.readers.WINDOW_BYTES", 300)
    rows = [f'{n},"title, of\n{n}",x' if n % 7 == 0 else f"{n},{n * n},y" for n in range(1000)]
    text = ("a,b,c\n" + "\n".join(rows)).encode()
    name = "events.csv.gz" if gzipped else "events.csv"
    (tmp_path / name).write_bytes(gzip.compress(text) if gzipped else text)
    raw = find_raw(str(tmp_path))
    pieces = [piece for task in plan(raw.fs, raw.events) for piece in task]
    assert len(pieces) == 1 if gzipped else len(pieces) > 3
    blocks = [list(read_piece(raw.fs, piece, everything)) for piece in pieces]
    assert [a for piece in blocks for block in piece for a in block.rows["a"].to_pylist()] == [
        str(n) for n in range(1000)
    ]
    for piece_blocks in blocks:
        numbers = [row for block in piece_blocks for row in block.row_R.tolist()]
        assert numbers == list(range(1, len(numbers) + 1))


def test_many_small_files_share_a_task(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    folder.mkdir()
    for n in range(50):
        (folder / f"{n:03d}.csv").write_text("a,b,c\n1,2,3\n")
    raw = find_raw(str(tmp_path))
    (task,) = plan(raw.fs, raw.events)
    assert [piece.file for piece in task] == list(range(50))
    assert raw.events[7].name == "events/007.csv"


def test_thousands_of_tiny_files_are_shared_out_by_their_number(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("a,b,c\n1,2,3\n")
    (one,) = find_raw(str(tmp_path)).events
    tasks = plan(pafs.LocalFileSystem(), [one] * 5000)
    assert 8 <= len(tasks) <= 80
    assert max(map(len, tasks)) <= 5000 // 8


# ---------------------------------------------------------------- finding


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x\n1\n")
    return folder


@pytest.mark.parametrize(
    ("names", "asked", "events", "items"),
    [
        (["events.csv", "items.csv", "readme.txt"], "", ["events.csv"], ["items.csv"]),
        (
            ["events-001.csv", "events-002.jsonl", "items.jsonl"],
            "",
            ["events-001.csv", "events-002.jsonl"],
            ["items.jsonl"],
        ),
        (["events/a/1.csv", "events/2.csv.gz", "events/_SUCCESS"], "", ["events/2.csv.gz", "events/a/1.csv"], []),
        (["2024-01.csv", "2024-02.csv", "items.csv"], "", ["2024-01.csv", "2024-02.csv"], ["items.csv"]),
        (["log/2024-01.csv", "log/2023-01.csv", "items.csv"], "log/2024-*.csv", ["2024-01.csv"], []),
        (["a/1.csv", "b/2.csv", "items.csv"], "*/?.csv", ["a/1.csv", "b/2.csv"], ["items.csv"]),
        (["one.jsonl", "items.csv"], "one.jsonl", ["one.jsonl"], []),
    ],
)
def test_every_form_of_a_raw_folder(
    tmp_path: Path, names: list[str], asked: str, events: list[str], items: list[str]
) -> None:
    raw = find_raw(f"{write(tmp_path, *names)}/{asked}")
    assert [file.name for file in raw.events] == events
    assert [file.name for file in raw.items] == items


def test_images_are_found_by_item_id(tmp_path: Path) -> None:
    write(tmp_path, "events.csv", "images/0012.jpg", "images/a.b.png", "images/notes.txt", "images/sub/x.jpg")
    assert sorted(find_raw(str(tmp_path)).images) == ["0012", "a.b"]


def test_a_uri_is_as_good_as_a_path(tmp_path: Path) -> None:
    write(tmp_path, "events.csv")
    assert [file.name for file in find_raw(f"file://{tmp_path}").events] == ["events.csv"]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no such file or folder"):
        find_raw(str(tmp_path / "nowhere"))
    write(tmp_path, "notes.txt", "items.csv")
    with pytest.raises(DataError, match=r"no events.*there is: items\.csv, notes\.txt"):
        find_raw(str(tmp_path))
    with pytest.raises(DataError, match=r"no file matches \*\.parquet"):
        find_raw(f"{tmp_path}/*.parquet")
    with pytest.raises(UsageError, match="cannot open this location"):
        find_raw("gopher://x/y")


def test_two_forms_of_the_same_data_are_not_both_read(tmp_path: Path) -> None:
    write(tmp_path, "events.csv", "events.parquet")
    with pytest.raises(DataError, match="side by side"):
        find_raw(str(tmp_path))


def test_empty_files(tmp_path: Path) -> None:
    write(tmp_path, "events/1.csv")
    (tmp_path / "events" / "2.csv").write_bytes(b"")
    assert [file.name for file in find_raw(str(tmp_path)).events] == ["events/1.csv"]
    (tmp_path / "events" / "1.csv").write_bytes(b"")
    with pytest.raises(DataError, match="empty, there is nothing to prepare"):
        find_raw(str(tmp_path))


def test_settings_of_the_raw_folder(tmp_path: Path) -> None:
    raw = find_raw(str(write(tmp_path, "events.csv")))
    assert raw_settings(raw) == {}
    (tmp_path / "prepare.yaml").write_text("clean.after: '2017-11-25'\n")
    assert raw_settings(raw) == {"clean.after": "2017-11-25"}
    (tmp_path / "prepare.yaml").write_text("- 1\n")
    with pytest.raises(DataError, match="must hold settings"):
        raw_settings(raw)
