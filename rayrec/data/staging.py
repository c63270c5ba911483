"""A dataset folder that exists whole or not at all.

In: a target path. Out: a folder beside it to write to, which `commit` turns into the dataset. On an error, Ctrl-C
included, the half-written folder goes and an older dataset at the target stays. It must not know what is written.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayrec.data.dataset import FORMAT
from rayrec.errors import ResourceError, UsageError
from rayrec.files import filesystem

WORK = "work"
FOLDERS = (
    "sequences", "events", "items", "images", "vocab", "rejects/events", "rejects/items", "rejects/images",
    "intake/events", WORK,
)  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """A folder on a file system, as tasks write to it."""

    fs: pafs.FileSystem
    root: str

    def path(self, name: str) -> str:
        """Where the file `name` lies within the file system."""
        return f"{self.root}/{name}"

    def parquet(self, name: str, table: pa.Table, **options: Any) -> None:
        """Write a table as Parquet."""
        with self.fs.open_output_stream(self.path(name)) as stream:
            pq.write_table(table, stream, **options)

    def parquet_parts(self, name: str, schema: pa.Schema, tables: Iterable[pa.Table], **options: Any) -> None:
        """Write tables as row groups of a Parquet file, each as it comes; no file on an error or without any."""
        path, n_tables = self.path(name), 0
        try:
            with self.fs.open_output_stream(path) as stream, pq.ParquetWriter(stream, schema, **options) as writer:
                for table in tables:
                    writer.write_table(table)
                    n_tables += 1
        except BaseException:  # what was written closes as a whole file of a part
            with suppress(OSError):  # where nothing could be opened there is nothing, and the first error is to be told
                self.fs.delete_file(path)
            raise
        if not n_tables:
            self.fs.delete_file(path)

    def json(self, name: str, value: Any) -> None:
        """Write a value as JSON."""
        with self.fs.open_output_stream(self.path(name)) as stream:
            stream.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")

    def files(self) -> list[str]:
        """The names of all files, sorted."""
        entries = self.fs.get_file_info(pafs.FileSelector(self.root, recursive=True))
        paths = [entry.path for entry in entries if entry.type == pafs.FileType.File]
        return sorted(path.removeprefix(f"{self.root}/") for path in paths)

    def sha256(self, name: str) -> str:
        """SHA-256 of a file, in hex."""
        digest = hashlib.sha256()
        with self.fs.open_input_stream(self.path(name)) as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    def remove(self, name: str = "") -> None:
        """Delete a folder and all in it; a task that still writes there may need a second pass."""
        path = self.path(name) if name else self.root
        for _ in range(20):
            if self.fs.get_file_info(path).type == pafs.FileType.NotFound:
                return
            try:
                self.fs.delete_dir(path)
            except OSError:
                time.sleep(0.1)


class Staging:
    """The folder that becomes the dataset at `dataset`. Use as a context manager, and `commit` at the end.

    Raises UsageError if the target holds something else than a dataset, ResourceError if nothing can be written.
    """

    def __init__(self, dataset: str) -> None:
        self.dataset = dataset.rstrip("/")
        fs, root = filesystem(self.dataset)
        self.target = Folder(fs, root.rstrip("/"))
        self.folder = Folder(fs, f"{self.target.root}.part-{uuid.uuid4().hex[:8]}")
        self.local = isinstance(fs, pafs.LocalFileSystem)

    def __enter__(self) -> Folder:
        self._refuse_what_is_no_dataset()
        try:
            for name in FOLDERS:
                self.folder.fs.create_dir(self.folder.path(name), recursive=True)
            self.folder.json("manifest.json", None)
            self.folder.fs.delete_file(self.folder.path("manifest.json"))
        except BaseException as error:  # Ctrl-C too: __exit__ is not called for what happens here
            self.folder.remove()
            if isinstance(error, OSError):
                raise cannot_write(self.dataset, error) from None
            raise
        return self.folder

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.folder.remove()

    def commit(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Hash every file, write the manifest last, and put the folder in the target's place."""
        self.folder.remove(WORK)
        names = self.folder.files()
        with ThreadPoolExecutor() as pool:  # neither reading nor hashing holds Python's lock
            hashes = dict(zip(names, pool.map(self.folder.sha256, names), strict=True))
        manifest = {"format": FORMAT, **facts, "files": hashes}
        self.folder.json("manifest.json", manifest)
        if self.local:
            self._rename()
        else:
            self._move_files()
        return manifest

    def _refuse_what_is_no_dataset(self) -> None:
        info = self.target.fs.get_file_info(self.target.root)
        if info.type == pafs.FileType.File:
            raise UsageError(f"{self.dataset}: is a file; name a folder for the dataset")
        if info.type == pafs.FileType.NotFound or not self.target.fs.get_file_info(pafs.FileSelector(self.target.root)):
            return
        try:
            with self.target.fs.open_input_stream(self.target.path("manifest.json")) as stream:
                manifest = json.loads(stream.read())
        except (OSError, ValueError):
            manifest = None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UsageError(f"{self.dataset}: holds files and is no dataset; name another folder, or empty this one")

    def _rename(self) -> None:
        fs, target = self.target.fs, self.target
        old = Folder(fs, f"{target.root}.old-{uuid.uuid4().hex[:8]}")
        replaced = fs.get_file_info(target.root).type != pafs.FileType.NotFound
        if replaced:
            fs.move(target.root, old.root)
        try:
            fs.move(self.folder.root, target.root)
        except BaseException:
            if replaced:
                fs.move(old.root, target.root)
            raise
        old.remove()

    def _move_files(self) -> None:
        """Object stores rename nothing: without its manifest the old dataset is gone, with it the new one is there."""
        fs = self.target.fs
        if fs.get_file_info(self.target.path("manifest.json")).type == pafs.FileType.File:
            fs.delete_file(self.target.path("manifest.json"))
            self.target.remove()
        fs.create_dir(self.target.root, recursive=True)
        for name in sorted(self.folder.files(), key=lambda name: name == "manifest.json"):
            fs.create_dir(self.target.path(name).rpartition("/")[0], recursive=True)
            fs.move(self.folder.path(name), self.target.path(name))


def cannot_write(dataset: str, error: OSError) -> ResourceError:
    """The error for a folder that is full, read-only or out of reach."""
    return ResourceError(f"{dataset}: cannot write there ({error.strerror or error}); nothing was left behind")
