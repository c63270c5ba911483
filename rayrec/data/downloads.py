"""Downloaded files as they are published: found, unpacked, read. In: a file, a folder, an archive. Out: rows.

It must not know what the rows mean.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO

from rayrec.errors import DataError
from rayrec.progress import step

_CSV_FILES = ("*.csv", "*.csv.gz", "*.tar", "*.tar.gz", "*.tgz")


class OtherTableError(DataError):
    """A file that is readable and is another table than the one that is looked for."""


def find(src: Path, *names: str) -> Path:
    """The file `src` itself, or the first of `names` (globs) below the folder `src`. Raises DataError."""
    if src.is_file():
        return src
    for name in names:
        for path in sorted(src.rglob(name)):
            return path
    raise _missing(src, *names)


def only(src: Path, name: str, but: str = "") -> Path:
    """The file `src` itself, or the one that fits `name` (a glob) below the folder `src`.

    but: the end of names that do not count. Raises DataError if there is none, or more than one: which is meant must
    be said.
    """
    if src.is_dir():
        found = sorted(path for path in src.rglob(name) if not (but and path.name.endswith(but)))
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(src)) for path in found[:20])
            raise DataError(f"{src}: holds {names}; name one of these files")
        if not found:
            raise _missing(src, name)
        return found[0]
    return src


def _missing(src: Path, *names: str) -> DataError:
    there = ", ".join(sorted(path.name for path in src.iterdir())[:20])
    return DataError(f"{src}: no {' or '.join(names)}; there is: {there or 'nothing'}")


@contextmanager
def text(path: Path, encoding: str = "utf-8") -> Iterator[TextIO]:
    """A text file, gzipped or not; bytes that are not text become U+FFFD."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        yield io.TextIOWrapper(stream, encoding=encoding, errors="replace", newline="")


def csv_rows(path: Path, *columns: str) -> Iterator[tuple[str, ...]]:
    """The `columns` (two or more) of a CSV file, row by row. Raises DataError if it lacks one."""
    with text(path, "utf-8-sig") as stream:
        yield from _chosen(stream, path, *columns)


def _chosen(stream: TextIO, name: Path | str, *columns: str) -> Iterator[tuple[str, ...]]:
    reader = csv.reader(stream)
    header = next(reader, [])
    missing = [column for column in columns if column not in header]
    if missing:
        kind = OtherTableError if 2 * len(missing) > len(columns) else DataError
        raise kind(f"{name}: no column {', '.join(missing)}; it has: {', '.join(header)}")
    choose = itemgetter(*(header.index(column) for column in columns))
    for row in reader:
        yield choose(row if len(row) >= len(header) else [*row, *[""] * len(header)])


def typed_rows(path: Path) -> tuple[dict[str, str], Iterator[list[str]]]:
    """RecBole's tab-separated files: the type of each column by its name, in their order, and the rows.

    Raises DataError where a column of the header has no type (`name:type`), or two have one name.
    """
    rows = _tabbed(path)
    header = [column.partition(":") for column in next(rows, [])]
    if not header or not all(kind for _, _, kind in header):
        raise DataError(f"{path}: the first line must name columns and their types, as in user_id:token")
    kinds = {name: kind for name, _, kind in header}
    if len(kinds) < len(header):
        raise DataError(f"{path}: two columns of one name among {', '.join(name for name, _, _ in header)}")
    return kinds, rows


def _tabbed(path: Path) -> Iterator[list[str]]:
    with text(path, "utf-8-sig") as stream:
        for row in csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
            if row:
                yield [_unquoted(cell) for cell in row]


def _unquoted(cell: str) -> str:
    """Some of these files were written with quotes and some without; a lone quote is part of a title."""
    whole = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return cell[1:-1].replace('""', '"') if whole else cell


def csv_shards(src: Path, *columns: str) -> Iterator[tuple[str, Iterator[tuple[str, ...]]]]:
    """The CSV files in a folder, in its archives, or the one file: name without ending, and the `columns`.

    In a folder, files that lack most of these columns are passed over, and named. Raises DataError if all are, or if
    one lacks some: a day whose header has changed must not go missing.
    """
    if src.is_file():
        yield from _in_archive(src, *columns) if tarfile.is_tarfile(src) else [(_stem(src), csv_rows(src, *columns))]
        return
    passed_over: list[OtherTableError] = []
    taken = 0
    for path in sorted(path for ending in _CSV_FILES for path in src.rglob(ending)):
        for name, rows in csv_shards(path, *columns):
            try:
                first = next(rows, None)
            except OtherTableError as error:
                passed_over.append(error)
                step(f"passed over {error}")
                continue
            taken += 1
            yield name, chain([first] if first else [], rows)
    if passed_over and not taken:
        raise passed_over[0]


def _in_archive(path: Path, *columns: str) -> Iterator[tuple[str, Iterator[tuple[str, ...]]]]:
    with tarfile.open(path) as archive:
        for member in archive:  # in its own order: to seek back means to decompress from the start
            content = archive.extractfile(member) if member.name.endswith(".csv") else None
            if content is not None:
                stream = io.TextIOWrapper(content, "utf-8-sig", errors="replace", newline="")
                yield Path(member.name).stem, _chosen(stream, member.name, *columns)


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects, one a line. Raises DataError that names the line."""
    with text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                raise DataError(f"{path}: line {number} is not JSON; this is another file than expected") from None
            if isinstance(value, dict):
                yield value
