"""The bundle: the one artefact between training and serving. Written atomically, verified on open.

In: tensors, arrays, tables and settings. Out: a version folder whose manifest, written last, hashes every file.
It must not know what the tensors mean. A folder without a manifest does not exist for any reader.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save

from rayrec import __version__
from rayrec.catalogue import Catalogue
from rayrec.config import Config, saved_config
from rayrec.errors import BundleError, UsageError
from rayrec.files import download, filesystem, is_uri, read_text, upload, upload_file
from rayrec.followers import Followers
from rayrec.schema import BUNDLE_VERSION

FORMAT = "rayrec-bundle"
CURRENT = "CURRENT"
REPLACING = "replacing"
"""In a manifest while a derived file is being replaced: its new hash."""
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@dataclass(frozen=True)
class Bundle:
    """An opened and verified bundle; its files are read when asked for."""

    path: Path
    manifest: dict[str, Any]
    uri: str | None = None
    """Where it was read from, if `path` is a copy of it."""

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a version folder, or the current version of a BUNDLES folder, and check every hash; both may be URIs.

        Raises UsageError if there is nothing there, BundleError if it is incomplete, changed or of another version.
        """
        uri, folder = _local_copy(str(path)) if is_uri(path) else (None, resolve(Path(path)).absolute())
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except ValueError:
            raise BundleError(f"{folder}/manifest.json: not JSON; train again or restore the bundle") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise BundleError(f"{folder}: not a rayrec bundle")
        if manifest.get("bundle_version") != BUNDLE_VERSION:
            raise BundleError(
                f"{folder}: bundle of version {manifest.get('bundle_version')}, this rayrec reads {BUNDLE_VERSION}; "
                "train again"
            )
        if manifest.pop("seal", None) != _seal(manifest):
            raise BundleError(f"{folder}: manifest.json was changed after it was written; restore it or train again")
        replacing = manifest.pop(REPLACING, {})
        for name, digest in manifest["files"].items():
            file = folder / name
            if not file.is_file():
                raise BundleError(f"{folder}: {name} is missing; restore the bundle or train again")
            found = sha256(file)
            if found not in (digest, replacing.get(name)):
                raise BundleError(f"{folder}: {name} was changed after it was written; restore it or train again")
            manifest["files"][name] = found
        return cls(folder, manifest, uri)

    @property
    def location(self) -> str:
        """Where any node of a cluster finds it: its URI, or the path of a folder that all nodes share."""
        return self.uri or str(self.path)

    @property
    def version(self) -> str:
        """The name of this version, as in `BUNDLES/<version>/`."""
        return str(self.manifest["version"])

    @property
    def clock(self) -> str:
        """Clock of the data it was trained on: "time", "date" or "order"."""
        return str(self.manifest["clock"])

    @cached_property
    def config(self) -> Config:
        """The settings it was trained with."""
        return saved_config(self.json("config.json"))

    @cached_property
    def catalogue(self) -> Catalogue:
        """The items, as they were at training time."""
        return Catalogue.from_table(pq.read_table(self.path / "items" / "items.parquet", memory_map=True))

    @cached_property
    def vectors_ND(self) -> npt.NDArray[np.float32]:
        """Item vectors [N + 1, D] float32, memory-mapped; row 0 is zero."""
        return np.load(self.path / "vectors.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def followers(self) -> Followers:
        """What follows what, float32; the strongest of each row."""
        return Followers(self._matrix("cooccurrence/next"), self._matrix("cooccurrence/near"))

    def _matrix(self, name: str) -> sp.csr_array:
        folder = self.path / name
        arrays = [
            np.load(folder / f"{part}.npy", mmap_mode="r", allow_pickle=False) for part in ("data", "indices", "indptr")
        ]
        n = len(arrays[2]) - 1
        return sp.csr_array(tuple(arrays), shape=(n, n))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The model's weights."""
        return load_file(self.path / "model.safetensors")

    def json(self, name: str) -> Any:
        """A JSON file of the bundle."""
        return json.loads((self.path / name).read_text())


class BundleWriter:
    """Writes one bundle; it exists for readers once `commit` has written the manifest.

    Use as a context manager: on an error, Ctrl-C included, the half-written folder is removed.
    """

    def __init__(self, bundles: str | Path, version: str) -> None:
        if not _VERSION.fullmatch(version):
            raise UsageError(f"'{version}' cannot name a bundle: use letters, digits, dot, dash and underscore")
        self.version, self.uri = version, f"{str(bundles).rstrip('/')}/{version}" if is_uri(bundles) else None
        self.folder = (Path(tempfile.mkdtemp(prefix="rayrec-")) if self.uri else Path(bundles)) / version
        if (self.folder / "manifest.json").exists():
            raise UsageError(f"{self.folder}: this version exists already")

    def __enter__(self) -> BundleWriter:
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"{self.folder}: cannot write here ({error.strerror})") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, tb: object) -> None:
        if not (self.folder / "manifest.json").exists():
            shutil.rmtree(self.folder.parent if self.uri else self.folder, ignore_errors=True)

    def file(self, name: str) -> Path:
        """Where to write the file `name`; its folder exists."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def json(self, name: str, value: Any) -> None:
        """Write `value` as JSON."""
        self.file(name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write the model's weights."""
        data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        self.file("model.safetensors").write_bytes(data)  # save_file makes its own kind of error of a full disk

    def array(self, name: str, values: npt.NDArray[Any]) -> None:
        """Write a numpy array, without pickles."""
        np.save(self.file(name), values, allow_pickle=False)

    def matrix(self, name: str, matrix: sp.csr_array) -> None:
        """Write a sparse matrix as the folder `name`."""
        for part in ("data", "indices", "indptr"):
            self.array(f"{name}/{part}.npy", getattr(matrix, part))

    def commit(self, **facts: Any) -> Bundle:
        """Hash every file and write the manifest, which makes the bundle exist. `facts` go into the manifest."""
        files = {
            str(path.relative_to(self.folder)): sha256(path)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.name != "manifest.json"
        }
        manifest = {
            "format": FORMAT,
            "bundle_version": BUNDLE_VERSION,
            "rayrec": __version__,
            "version": self.version,
            "files": files,
            **facts,
        }
        _write_manifest(self.folder, manifest)
        if self.uri:
            upload(self.folder, self.uri, last="manifest.json")
        return Bundle(self.folder, manifest, self.uri)


def add_file(bundle: Bundle, name: str, write: Callable[[Path], object]) -> Bundle:
    """Add or replace one derived file (metrics, a report) of a finished bundle, and its hash in the manifest."""
    part = bundle.path / f".{name}.{uuid.uuid4().hex}"

    def put(changed: str) -> None:
        if bundle.uri:
            fs, root = filesystem(bundle.uri)
            upload_file(bundle.path / changed, fs, f"{root}/{changed}")

    try:
        write(part)
        digest = sha256(part)
        # Between the file and the manifest the bundle must still open, whatever ends us: both hashes are good then.
        _write_manifest(bundle.path, {**bundle.manifest, REPLACING: {name: digest}})
        put("manifest.json")
        part.replace(bundle.path / name)
        put(name)
    finally:
        part.unlink(missing_ok=True)
    manifest = {**bundle.manifest, "files": {**bundle.manifest["files"], name: digest}}
    _write_manifest(bundle.path, manifest)
    put("manifest.json")
    return Bundle(bundle.path, manifest, bundle.uri)


def publish(bundle: Bundle) -> None:
    """Make `bundle` the live version of its BUNDLES folder."""
    content = bundle.version.encode() + b"\n"
    if bundle.uri:
        fs, root = filesystem(bundle.uri.rpartition("/")[0])
        with fs.open_output_stream(f"{root}/{CURRENT}") as stream:
            stream.write(content)
    else:
        write_atomically(bundle.path.parent / CURRENT, content)


def current_version(path: str | Path) -> str | None:
    """The live version of a BUNDLES folder or URI; None if `path` is none, or nothing is published there."""
    fs, root = filesystem(str(path))
    version = (read_text(fs, f"{root}/{CURRENT}") or "").strip()
    return version if _VERSION.fullmatch(version) else None


def versions(bundles: str | Path) -> list[str]:
    """Finished versions in a BUNDLES folder or URI, by name."""
    fs, root = filesystem(str(bundles))
    folders = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    manifests = fs.get_file_info([f"{folder.path}/manifest.json" for folder in folders])
    return sorted(info.path.split("/")[-2] for info in manifests if info.type == pafs.FileType.File)


def _local_copy(uri: str) -> tuple[str, Path]:
    """The URI of the version that `uri` means, and a local copy of it. Raises as `resolve`."""
    uri = uri.rstrip("/")
    fs, root = filesystem(uri)
    manifest = read_text(fs, f"{root}/manifest.json")
    if manifest is not None:
        return uri, download(uri, manifest)
    version = (read_text(fs, f"{root}/{CURRENT}") or "").strip()
    if not version:
        raise UsageError(f"{uri}: no bundle there; make one with: rayrec train DATASET {uri}")
    manifest = read_text(fs, f"{root}/{version}/manifest.json") if _VERSION.fullmatch(version) else None
    if manifest is None:
        raise BundleError(
            f"{uri}/{CURRENT} names '{version}', which is not there; versions: {', '.join(versions(uri))}"
        )
    return f"{uri}/{version}", download(f"{uri}/{version}", manifest)


def resolve(path: Path) -> Path:
    """The version folder meant by `path`: itself, or the current version of a BUNDLES folder.

    Raises UsageError if there is none.
    """
    if (path / "manifest.json").is_file():
        return path
    current = path / CURRENT
    if current.is_file():
        version = current.read_text(errors="replace").strip()
        if _VERSION.fullmatch(version) and (path / version / "manifest.json").is_file():
            return path / version
        raise BundleError(f"{current} names '{version}', which is not there; versions: {', '.join(versions(path))}")
    if not path.exists():
        raise UsageError(f"{path}: no such bundle; make one with: rayrec train DATASET {path}")
    if versions(path):
        raise UsageError(f"{path}: no version is published; name one: {', '.join(versions(path))}")
    raise UsageError(f"{path}: no bundle here (no manifest.json): was training interrupted?")


def default_state(path: str | Path) -> str:
    """URL of the state of a bundle: a file beside it, in the BUNDLES folder, where every version finds it.

    Raises UsageError for a bundle at a URI, which has no such place.
    """
    if is_uri(path):
        raise UsageError(
            f"{path}: this bundle is not on this machine, so say where state is kept: --state sqlite:///PATH"
        )
    return f"sqlite:///{resolve(Path(path)).absolute().parent / 'state.db'}"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    as_read = json.loads(json.dumps(manifest))  # keys that are numbers become text, which changes their order
    sealed = {**manifest, "seal": _seal(as_read)}
    write_atomically(folder / "manifest.json", json.dumps(sealed, indent=1).encode())


def _seal(manifest: dict[str, Any]) -> str:
    """SHA-256 of all that the manifest says."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
