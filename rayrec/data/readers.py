"""Raw files to blocks of text columns: CSV, JSON lines and Parquet, streaming, in bounded memory.

In: a piece of a file. Out: blocks of rows whose columns are strings under canonical names, and the lines that could
not be parsed, with their reasons. It must not know what a column means: ids keep their leading zeros.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.json as pajson
import pyarrow.parquet as pq

from rayrec.data.ids import floats_as_text
from rayrec.data.records import BROKEN_QUOTE, is_mark, mark_broken_records, next_boundary
from rayrec.errors import DataError
from rayrec.history import Ints
from rayrec.interrupts import unbroken

# Arrow's own handler of Ctrl-C, which is in force while it parses, loses one that comes at the end of a block.
pa.enable_signal_handlers(False)

BLOCK_BYTES = 32 * 1024 * 1024
PARQUET_ROWS = 400_000
WINDOW_BYTES = 64 * 1024

NULLS = ("", "NULL", "null", "None", "none", "NaN", "nan", "NA", "N/A", "<NA>", "\\N")
"""Words that stand for a missing value."""

Choose = Callable[[list[str]], Mapping[str, str]]
"""From the columns found, the canonical ones to read: canonical name to theirs."""


@dataclass(frozen=True)
class RawFile:
    """One raw file. `path` is within its file system, `name` relative to the raw folder; `mtime_ns` None: not known."""

    path: str
    name: str
    format: str  # csv, jsonl, parquet
    gzipped: bool
    size_bytes: int
    mtime_ns: int | None = None


@dataclass(frozen=True)
class Piece:
    """A part of a raw file: bytes (after decompression) or, of Parquet, row groups; `end` None is the file's end."""

    file: int
    raw: RawFile
    start: int
    end: int | None
    names: tuple[str, ...] = ()  # columns of a CSV file


@dataclass(frozen=True)
class Broken:
    """A row that could not be parsed."""

    row: int
    reason: str
    text: str


@dataclass(frozen=True)
class Block:
    """Some rows of a piece.

    rows     canonical name: string, as the file has them; null where missing
    row_R    [R] int64  the row's number within the piece, from 1
    read     rows read, broken ones included
    ignored  the file's columns that nobody asked for
    """

    rows: pa.Table
    row_R: Ints
    broken: list[Broken]
    read: int
    ignored: tuple[str, ...]


def read_piece(fs: pafs.FileSystem, piece: Piece, choose: Choose) -> Iterator[Block]:
    """The rows of a piece, in blocks of bounded size. Raises DataError if the file cannot be read as its format."""
    try:
        if piece.raw.format == "parquet":
            blocks = _read_parquet(fs, piece, choose)
        elif piece.raw.format == "jsonl":
            blocks = (parse_jsonl(text, choose) for text in _texts(fs, piece))
        else:
            blocks = (parse_csv(text, piece.names, choose) for text in _texts(fs, piece))
        before = 0
        for block in blocks:
            yield _moved(block, before)
            before += block.read
    except (pa.ArrowInvalid, pa.ArrowTypeError, EOFError) as error:
        raise DataError(f"{piece.raw.name}: cannot be read as {piece.raw.format} ({error})") from None
    except OSError as error:
        raise DataError(f"{piece.raw.name}: cannot be read, damaged or cut off ({error})") from None


def _moved(block: Block, rows: int) -> Block:
    if not rows:
        return block
    broken = [Broken(b.row + rows, b.reason, b.text) for b in block.broken]
    return Block(block.rows, block.row_R + rows, broken, block.read, block.ignored)


# ---------------------------------------------------------------- text


def open_text(fs: pafs.FileSystem, raw: RawFile) -> Any:
    """A stream of the file's text, decompressed."""
    return fs.open_input_stream(raw.path, compression="gzip" if raw.gzipped else None)


def _texts(fs: pafs.FileSystem, piece: Piece) -> Iterator[bytes]:
    """The text of a piece in blocks that end where a record ends."""
    if piece.raw.gzipped:
        stream = open_text(fs, piece.raw)
        stream.read(piece.start)
    else:
        stream = fs.open_input_file(piece.raw.path)
        stream.seek(piece.start)
    left = piece.end - piece.start if piece.end is not None else None
    rest = b""
    with stream:
        while True:
            more = stream.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left))
            left = left - len(more) if left is not None else None
            text = rest + more
            if not more or left == 0:
                if text:
                    yield text
                return
            cut = _last_boundary(text, piece)
            rest = text[cut:]
            if cut:
                yield text[:cut]


def _last_boundary(text: bytes, piece: Piece) -> int:
    if piece.raw.format == "jsonl":
        return text.rfind(b"\n") + 1
    tail = max(0, len(text) - WINDOW_BYTES)
    boundary = next_boundary(text[tail:], len(piece.names))
    return tail + boundary if boundary > 0 else 0


def _utf8(text: bytes) -> bytes:
    """`text` with bytes that are not UTF-8 replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.decode()
    except UnicodeDecodeError:
        return text.decode("utf-8", "replace").encode()
    return text


# ---------------------------------------------------------------- CSV


def parse_csv(text: bytes, names: tuple[str, ...], choose: Choose) -> Block:
    """Rows of CSV text without its header. Lines of the wrong length or with broken quotes become `broken`."""
    chosen = choose(list(names))
    text, marked = mark_broken_records(_utf8(text), len(names))
    quotes = iter(marked)
    broken: list[Broken] = []

    def unparsable(row: pacsv.InvalidRow) -> str:
        if is_mark(row.text):
            broken.append(Broken(row.number, BROKEN_QUOTE, next(quotes).decode("utf-8", "replace")))
        else:
            short = row.actual_columns < row.expected_columns
            broken.append(Broken(row.number, "truncated_line" if short else "too_many_fields", row.text))
        return "skip"

    if not text.strip():
        return Block(_no_rows(chosen), np.empty(0, np.int64), [], 0, _ignored(names, chosen))
    with unbroken():  # Arrow drops an exception of its callback, and calls what it was given there a broken file
        table = pacsv.read_csv(
            io.BytesIO(text),
            read_options=pacsv.ReadOptions(column_names=list(names), use_threads=False, block_size=len(text) + 1),
            parse_options=pacsv.ParseOptions(newlines_in_values=b'"' in text, invalid_row_handler=unparsable),
            convert_options=pacsv.ConvertOptions(
                column_types={name: pa.string() for name in names},
                include_columns=list(chosen.values()),
                null_values=list(NULLS),
                strings_can_be_null=True,
            ),
        )
    read = len(table) + len(broken)
    good_R = np.delete(np.arange(1, read + 1), [b.row - 1 for b in broken])
    rows = table.rename_columns(list(chosen)).combine_chunks()
    return Block(rows, good_R, broken, read, _ignored(names, chosen))


# ---------------------------------------------------------------- JSON lines


def parse_jsonl(text: bytes, choose: Choose) -> Block:
    """Rows of JSON objects, one a line. Lines that hold none become `broken`."""
    text = _utf8(text)
    table = _jsonl_at_once(text)
    broken: list[Broken] = []
    if table is None:
        table, broken = _jsonl_by_line(text)
    read = len(table) + len(broken)
    good_R = np.delete(np.arange(1, read + 1), [b.row - 1 for b in broken])
    chosen = choose(table.column_names)
    return Block(_as_text(table, chosen), good_R, broken, read, _ignored(table.column_names, chosen))


def _jsonl_at_once(text: bytes) -> pa.Table | None:
    """All lines by Arrow's parser; None where it could not read every line just as it stands."""
    try:
        first = [json.loads(line) for line in text[:WINDOW_BYTES].split(b"\n")[:-1][:50] if line.strip()]
        strings = {k for row in first for k, v in row.items() if isinstance(v, str)}
        table = pajson.read_json(
            io.BytesIO(text),
            read_options=pajson.ReadOptions(use_threads=False, block_size=len(text) + 1),
            parse_options=pajson.ParseOptions(explicit_schema=pa.schema([(k, pa.string()) for k in sorted(strings)])),
        )
    except (pa.ArrowInvalid, ValueError, AttributeError):
        return None
    guessed = any(pa.types.is_timestamp(column.type) for column in table.columns)
    lines = sum(1 for line in text.split(b"\n") if line.strip())
    return table if len(table) == lines and not guessed else None


def _jsonl_by_line(text: bytes) -> tuple[pa.Table, list[Broken]]:
    rows: list[dict[str, str | None]] = []
    broken: list[Broken] = []
    lines = [line for line in text.split(b"\n") if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            rows.append({key: _json_text(field) for key, field in value.items()})
        else:
            broken.append(Broken(number, "broken_json", line.decode("utf-8", "replace")))
    names = sorted({name for row in rows for name in row})
    return pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names}), broken


def _json_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- Parquet


def _read_parquet(fs: pafs.FileSystem, piece: Piece, choose: Choose) -> Iterator[Block]:
    with fs.open_input_file(piece.raw.path) as stream:
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        chosen = choose(names)
        groups = list(range(piece.start, file.num_row_groups if piece.end is None else piece.end))
        batches = file.iter_batches(PARQUET_ROWS, groups, list(chosen.values()), use_threads=False)
        before = 0
        for batch in batches:
            rows = _as_text(pa.table(batch), chosen)
            yield Block(rows, np.arange(1, len(rows) + 1), [], len(rows), _ignored(names, chosen))
            before += len(rows)


def _as_text(table: pa.Table, chosen: Mapping[str, str]) -> pa.Table:
    columns = {}
    for canonical, theirs in chosen.items():
        column = table[theirs].combine_chunks()
        try:
            text = floats_as_text(column) if pa.types.is_floating(column.type) else pc.cast(column, pa.string())
        except pa.ArrowNotImplementedError:
            raise DataError(f"column {theirs} holds {column.type}: write plain numbers or strings") from None
        columns[canonical] = pc.if_else(pc.is_in(text, pa.array(NULLS)), pa.scalar(None, pa.string()), text)
    return pa.table(columns)


def _no_rows(chosen: Mapping[str, str]) -> pa.Table:
    return pa.table({name: pa.array([], pa.string()) for name in chosen})


def _ignored(names: list[str] | tuple[str, ...], chosen: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in chosen.values())
