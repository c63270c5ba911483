"""Places: local paths and URIs that pyarrow.fs reads. In: a path. Out: a file system, copies. It knows no format."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from rayrec.errors import UsageError


def is_uri(path: str | Path) -> bool:
    """Whether `path` names its file system, as s3://bucket/folder does."""
    return "://" in str(path)


def absolute(path: str | Path) -> str:
    """A path that means the same in every process of this machine; a URI stays as it is."""
    return str(path).rstrip("/") if is_uri(path) else str(Path(path).absolute())


def filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path within it, of a local path or a URI.

    Raises UsageError for a scheme that pyarrow.fs does not know.
    """
    if not is_uri(path):
        return pafs.LocalFileSystem(), str(Path(path).absolute())
    try:
        fs, root = pafs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UsageError(f"{path}: cannot open this location ({error})") from None
    return fs, root


def upload(folder: Path, uri: str, last: str) -> None:
    """Copy a local folder to `uri`, the file `last` after all others: object stores have no atomic rename."""
    fs, root = filesystem(uri)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for name in [*(name for name in names if name != last), last]:
        upload_file(folder / name, fs, f"{root}/{name}")


def upload_file(path: Path, fs: pafs.FileSystem, target: str) -> None:
    """Copy one local file; its folder is made where folders exist."""
    fs.create_dir(target.rpartition("/")[0], recursive=True)
    with path.open("rb") as source, fs.open_output_stream(target) as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


def download(uri: str, key: str) -> Path:
    """A local copy of the folder at `uri`, kept for other processes of this user. `key` changes with its content."""
    cache = Path(tempfile.gettempdir()) / f"rayrec-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        raise UsageError(f"{cache}: belongs to somebody else; set TMPDIR to a folder of your own")
    copy = cache / hashlib.sha256(f"{uri}\n{key}".encode()).hexdigest()[:24] / uri.rstrip("/").rpartition("/")[2]
    if copy.is_dir():
        return copy
    part = copy.with_name(f".{uuid.uuid4().hex}")
    fs, root = filesystem(uri)
    try:
        part.mkdir(parents=True)
        pafs.copy_files(root, str(part), source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem())
        part.replace(copy)
    except OSError:
        if not copy.is_dir():  # another process was quicker
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return copy


def read_text(fs: pafs.FileSystem, path: str) -> str | None:
    """The text of a file; None if it is not there."""
    if fs.get_file_info(path).type != pafs.FileType.File:
        return None
    with fs.open_input_stream(path) as stream:
        return bytes(stream.read()).decode(errors="replace")
