"""The raw folder: which files hold events, items and images, and how to share them out.

In: a folder, file, glob or URI. Out: the files found, and pieces of about equal size for tasks to read.
It must not know what the rows mean.
"""

from __future__ import annotations

import csv
import fnmatch
import itertools
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow.fs as pafs
import pyarrow.parquet as pq
import yaml

from rayrec.data.readers import BLOCK_BYTES, WINDOW_BYTES, Piece, RawFile, open_text
from rayrec.data.records import next_boundary
from rayrec.errors import DataError, UsageError
from rayrec.files import absolute, filesystem

FORMATS = {
    ".csv": "csv", ".csv.gz": "csv", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".ndjson": "jsonl",
    ".ndjson.gz": "jsonl", ".parquet": "parquet",
}  # fmt: skip
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

SETTINGS_FILE = "prepare.yaml"
"""Settings that belong to the raw data (`clean.after: ...`): an importer leaves them, the user's own go first."""

SAMPLE_BYTES = 256 * 1024
SMALLEST_PIECE_BYTES = 4 * 1024 * 1024
OPENING_BYTES = 64 * 1024
"""To open a file costs about as much as to read so much of one: thousands of tiny ones are shared out by number."""
UNPACKED = {"parquet": 5, "gzip": 7}
"""How much larger the text of a compressed file is, about."""


@dataclass(frozen=True)
class Raw:
    """What a raw folder holds. `images` maps an item's id to its file within `fs`; `uri` is the folder to all nodes."""

    fs: pafs.FileSystem
    root: str
    uri: str
    events: tuple[RawFile, ...]
    items: tuple[RawFile, ...]
    images: dict[str, str]


def find_raw(raw: str, *, events: bool = True) -> Raw:
    """Look through a raw folder (or a file or glob of events).

    Raises UsageError if there is nothing at `raw`, DataError if there are no events in it, unless `events` is False.
    """
    try:
        return _find(raw, events)
    except OSError as error:
        raise UsageError(f"{raw}: cannot be read ({error})") from None


def _find(raw: str, events_needed: bool) -> Raw:
    base, pattern = _split_glob(raw)
    fs, root = filesystem(base)
    info = fs.get_file_info(root)
    if info.type == pafs.FileType.NotFound:
        raise UsageError(f"{base}: no such file or folder")
    if info.type == pafs.FileType.File:
        folder = absolute(base).rpartition("/")[0]
        return Raw(fs, str(PurePosixPath(root).parent), folder, (_raw_file(info, info.base_name),), (), {})
    top = fs.get_file_info(pafs.FileSelector(root))
    events = _matching(fs, root, pattern) if pattern else _named(fs, root, top, "events")
    items = _named(fs, root, top, "items")
    if not events and not pattern:
        events = [file for file in _data_files(top, root) if file not in items]
    if not events and (pattern or events_needed or not items):
        what = f"no file matches {pattern}" if pattern else "no events.csv, .csv.gz, .jsonl or .parquet, and no events/"
        names = ", ".join(sorted(entry.base_name for entry in top)[:20])
        raise DataError(f"{raw}: {what}; there is: {names or 'nothing'}")
    full = _not_empty(events, raw) if events else []
    return Raw(fs, root, absolute(base), tuple(full), tuple(items), _images(fs, top))


def raw_settings(raw: Raw) -> dict[str, Any]:
    """The settings that the raw folder brings along, by dotted path. Raises DataError if the file holds none."""
    path = f"{raw.root}/{SETTINGS_FILE}"
    if raw.fs.get_file_info(path).type != pafs.FileType.File:
        return {}
    with raw.fs.open_input_stream(path) as stream:
        try:
            tree = yaml.safe_load(stream.read())
        except yaml.YAMLError as error:
            raise DataError(f"{path}: not YAML ({error.__class__.__name__})") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: must hold settings, as in clean.after: 2017-11-25")
    return tree


def plan(fs: pafs.FileSystem, files: Iterable[RawFile], tasks_at_least: int = 8) -> list[list[Piece]]:
    """Cut `files` into pieces at record boundaries, and pack them into tasks of about equal size, in file order."""
    files = list(files)
    total = sum(_text_bytes(file) for file in files)
    piece_bytes = min(BLOCK_BYTES, max(SMALLEST_PIECE_BYTES, total // tasks_at_least))
    with ThreadPoolExecutor(16) as pool:
        cut = list(pool.map(lambda pair: _pieces(fs, pair[0], pair[1], piece_bytes), enumerate(files)))
    tasks: list[list[Piece]] = []
    room = 0
    for piece, size in (pair for pieces in cut for pair in pieces):
        if not tasks or size > room:
            tasks.append([])
            room = piece_bytes
        tasks[-1].append(piece)
        room -= max(size, OPENING_BYTES)
    return tasks


def sample_pieces(fs: pafs.FileSystem, files: Iterable[RawFile]) -> list[Piece]:
    """A small first piece of each file, to look at; its last record may be cut off."""
    pieces = []
    for number, file in enumerate(files):
        if file.format == "parquet":
            pieces.append(Piece(number, file, 0, 1))
        else:
            names, start = csv_names(_head(fs, file)) if file.format == "csv" else ((), 0)
            pieces.append(Piece(number, file, start, start + SAMPLE_BYTES, names))
    return pieces


def text_bytes(files: Iterable[RawFile]) -> int:
    """About how many bytes of text the files hold, once decompressed."""
    return sum(_text_bytes(file) for file in files)


def csv_names(head: bytes) -> tuple[tuple[str, ...], int]:
    """The column names in the first line of a CSV file, each made unique, and that line's length in bytes."""
    line, newline, _ = head.partition(b"\n")
    text = line.decode("utf-8-sig", "replace").rstrip("\r")
    names: list[str] = []
    for name in next(csv.reader([text]), []):
        name = name.strip()
        names.append(name if name not in names else f"{name}.{len(names)}")
    return tuple(names), len(line) + len(newline)


# ---------------------------------------------------------------- finding


def _split_glob(raw: str) -> tuple[str, str | None]:
    """The folder before the first wildcard, and the pattern below it."""
    parts = raw.rstrip("/").split("/")
    for n, part in enumerate(parts):
        if re.search(r"[*?\[]", part):
            return "/".join(parts[:n]) or ("/" if raw.startswith("/") else "."), "/".join(parts[n:])
    return raw.rstrip("/") or "/", None


def _matching(fs: pafs.FileSystem, root: str, pattern: str) -> list[RawFile]:
    entries = fs.get_file_info(pafs.FileSelector(root, recursive=True))
    files = _data_files(entries, root)
    return [file for file in files if fnmatch.fnmatchcase(file.name, pattern)]


def _named(fs: pafs.FileSystem, root: str, top: list[pafs.FileInfo], stem: str) -> list[RawFile]:
    """The files `stem.csv`, `stem-001.csv` and so on, or those under the folder `stem/`.

    Raises DataError where two forms of the same data stand side by side: reading both would count all twice.
    """
    shard = re.compile(rf"{stem}([-_.].*)?", re.IGNORECASE)
    files = [file for file in _data_files(top, root) if shard.fullmatch(file.name)]
    whole = [file.name for file in files if file.name.lower().removesuffix(_suffix(file.name) or "") == stem]
    folders = [entry for entry in top if entry.type == pafs.FileType.Directory and entry.base_name == stem]
    if len(whole) + len(folders) > 1 or (folders and files):
        names = [file.name for file in files] + [f"{folder.base_name}/" for folder in folders]
        raise DataError(f"{root}: {' and '.join(names)} hold {stem} side by side; keep one of them")
    if folders:
        return _data_files(fs.get_file_info(pafs.FileSelector(folders[0].path, recursive=True)), root)
    return files


def _data_files(entries: Iterable[pafs.FileInfo], root: str) -> list[RawFile]:
    prefix = root.rstrip("/") + "/"
    files = [
        _raw_file(entry, entry.path.removeprefix(prefix))
        for entry in entries
        if entry.type == pafs.FileType.File and _suffix(entry.base_name) and entry.base_name[0] not in "._"
    ]
    return sorted(files, key=lambda file: file.name)


def _raw_file(entry: pafs.FileInfo, name: str) -> RawFile:
    suffix = _suffix(entry.base_name)
    if suffix is None:
        raise UsageError(f"{entry.path}: cannot read this kind of file; known are {', '.join(FORMATS)}")
    return RawFile(entry.path, name, FORMATS[suffix], suffix.endswith(".gz"), entry.size, entry.mtime_ns)


def _suffix(name: str) -> str | None:
    """The known ending of a file's name, longest first; None if it has none."""
    return next((s for s in sorted(FORMATS, key=len, reverse=True) if name.lower().endswith(s)), None)


def _not_empty(files: list[RawFile], raw: str) -> list[RawFile]:
    """The files that hold anything: writers of shards leave empty ones behind, but not all may be so."""
    full = [file for file in files if file.size_bytes]
    if not full:
        raise DataError(f"{raw}: {', '.join(file.name for file in files[:5])}: empty, there is nothing to prepare")
    return full


def _images(fs: pafs.FileSystem, top: list[pafs.FileInfo]) -> dict[str, str]:
    folder = next((e for e in top if e.type == pafs.FileType.Directory and e.base_name == "images"), None)
    if folder is None:
        return {}
    entries = sorted(fs.get_file_info(pafs.FileSelector(folder.path)), key=lambda entry: str(entry.path))
    return {
        entry.base_name.rpartition(".")[0]: entry.path
        for entry in entries
        if entry.type == pafs.FileType.File and entry.base_name.lower().endswith(IMAGE_SUFFIXES)
    }


# ---------------------------------------------------------------- planning


def _text_bytes(file: RawFile) -> int:
    return file.size_bytes * UNPACKED.get("gzip" if file.gzipped else file.format, 1)


def _pieces(fs: pafs.FileSystem, number: int, file: RawFile, piece_bytes: int) -> list[tuple[Piece, int]]:
    """The pieces of one file, each with its size in bytes of text."""
    if file.format == "parquet":
        return _row_group_pieces(fs, number, file, piece_bytes)
    names: tuple[str, ...] = ()
    start = 0
    if file.format == "csv":
        names, start = csv_names(_head(fs, file))
    if file.gzipped:
        return [(Piece(number, file, start, None, names), _text_bytes(file))]
    cuts = [start, *_cuts(fs, file, start, piece_bytes, names), file.size_bytes]
    return [(Piece(number, file, a, b, names), b - a) for a, b in itertools.pairwise(cuts) if b > a]


def _head(fs: pafs.FileSystem, file: RawFile) -> bytes:
    try:
        with open_text(fs, file) as stream:
            head: bytes = stream.read(WINDOW_BYTES)
            return head
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read, damaged or cut off ({error})") from None


def _cuts(fs: pafs.FileSystem, file: RawFile, start: int, piece_bytes: int, names: tuple[str, ...]) -> Iterable[int]:
    with fs.open_input_file(file.path) as stream:
        for target in range(start + piece_bytes, file.size_bytes - piece_bytes // 2, piece_bytes):
            window = stream.read_at(WINDOW_BYTES, target)
            place = next_boundary(window, len(names)) if names else window.find(b"\n") + 1
            if place > 0:
                yield target + place


def _row_group_pieces(fs: pafs.FileSystem, number: int, file: RawFile, piece_bytes: int) -> list[tuple[Piece, int]]:
    try:
        with fs.open_input_file(file.path) as stream:
            meta = pq.read_metadata(stream)
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read, damaged or cut off ({error})") from None
    except Exception as error:  # Arrow raises errors of several kinds on what is no Parquet
        raise DataError(f"{file.name}: not a Parquet file ({error})") from None
    group_bytes = max(1, _text_bytes(file) // max(1, meta.num_row_groups))
    step = max(1, piece_bytes // group_bytes)
    starts = range(0, meta.num_row_groups, step)
    return [(Piece(number, file, a, min(a + step, meta.num_row_groups)), step * group_bytes) for a in starts]
