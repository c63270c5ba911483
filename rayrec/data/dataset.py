"""The dataset folder: what `prepare` wrote, opened for reading.

In: a folder or URI. Out: its manifest, catalogue, images and sequences. It must not know how they were made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from rayrec.catalogue import Catalogue
from rayrec.errors import DataError, UsageError
from rayrec.files import absolute, filesystem
from rayrec.schema import DATASET_VERSION, IMAGE_SCHEMA, SEQUENCE_SCHEMA

FORMAT = "rayrec-dataset"
FOLDERS = ("sequences", "items", "images")


@dataclass(frozen=True)
class Images:
    """Decoded images of the items that have one.

    item_M       [M] int64               item index, ascending
    pixels_MHWC  [M, size, size, 3] uint8  RGB
    """

    item_M: npt.NDArray[np.int64]
    pixels_MHWC: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, parts: Sequence[Images]) -> Images:
        """At least one part, together."""
        item_M = np.concatenate([part.item_M for part in parts])
        order = np.argsort(item_M, kind="stable")
        pixels_MHWC = np.concatenate([part.pixels_MHWC for part in parts])
        in_order = bool((order[1:] > order[:-1]).all())  # as prepare writes them: no second copy of all then
        return cls(item_M, pixels_MHWC) if in_order else cls(item_M[order], pixels_MHWC[order])


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset. `path` is an absolute local folder or a URI, without a trailing slash."""

    path: str
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str) -> Dataset:
        """Open a dataset folder.

        Raises UsageError if there is nothing at `path`, DataError if it is no dataset or of another version.
        """
        path = absolute(path)
        fs, root = filesystem(path)
        if fs.get_file_info(root).type == pafs.FileType.NotFound:
            raise UsageError(f"{path}: no such dataset; make one with: rayrec prepare RAW {path}")
        if fs.get_file_info(f"{root}/manifest.json").type != pafs.FileType.File:
            raise DataError(f"{path}: not a dataset (no manifest.json): was prepare interrupted? Run it again")
        try:
            with fs.open_input_stream(f"{root}/manifest.json") as stream:
                manifest = json.loads(stream.read())
        except ValueError:
            raise DataError(f"{path}/manifest.json: not JSON; run prepare again") from None
        if manifest.get("format") != FORMAT:
            raise DataError(f"{path}: not a rayrec dataset (format is {manifest.get('format')!r})")
        if manifest.get("version") != DATASET_VERSION:
            raise DataError(
                f"{path}: dataset of version {manifest.get('version')}, this rayrec reads version {DATASET_VERSION}; "
                "run prepare again on the raw folder"
            )
        return cls(path, manifest)

    @property
    def clock(self) -> str:
        """ "time", "date" or "order"."""
        return str(self.manifest["clock"])

    def fingerprint(self) -> str:
        """A hash of what the manifest says and of the names and sizes of all shards. Equal where datasets are."""
        fs, root = filesystem(self.path)
        infos = fs.get_file_info(pafs.FileSelector(root, recursive=True))
        places = {info.path.removeprefix(root).lstrip("/"): info.size for info in infos if info.is_file}
        shards = {place: size for place, size in places.items() if place.partition("/")[0] in FOLDERS}
        said = json.dumps([self.manifest, shards], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    def catalogue(self) -> Catalogue:
        """Every item, in the order of its index."""
        table = self.table("items")
        return Catalogue.from_table(table.sort_by("item_index"))

    def sequences(self, columns: list[str] | None = None, shards: Sequence[str] = ()) -> pa.Table:
        """All visitors' sequences (schema.SEQUENCE_SCHEMA), in memory. shards: paths of those to read, if not all."""
        return self.table("sequences", shards).select(columns or SEQUENCE_SCHEMA.names)

    def images(self) -> Images:
        """All decoded images, in memory: M * size * size * 3 bytes."""
        parts = list(self.image_shards())
        if not parts:
            size = int(self.manifest["config"]["images"]["size"])
            return Images(np.empty(0, np.int64), np.empty((0, size, size, 3), np.uint8))
        return Images.of(parts)

    def image_shards(self, part: int = 0, parts: int = 1) -> Iterator[Images]:
        """Decoded images, a shard at a time; of every `parts` shards that at place `part` alone."""
        if not self.has("images"):
            return
        size = int(self.manifest["config"]["images"]["size"])
        fs, root = filesystem(self.path)
        infos = fs.get_file_info(pafs.FileSelector(f"{root}/images"))
        for path in sorted(info.path for info in infos if info.is_file)[part::parts]:
            table = self.table("images", [path]).select(IMAGE_SCHEMA.names)
            values = (value for chunk in table["pixels"].chunks for value in chunk)
            pixels_MHWC = np.empty((len(table), size, size, 3), np.uint8)
            for row, value in enumerate(values):
                pixels_MHWC[row] = np.frombuffer(value.as_buffer(), np.uint8).reshape(size, size, 3)
            yield Images(table["item_index"].to_numpy().astype(np.int64), pixels_MHWC)

    def vocab(self, name: str) -> Any:
        """`vocab/<name>.json`. "categories" and "brands": the word of each code, code 0 is the unknown. "encoder":
        the settings with which prepare encoded items, to encode new ones alike (`items.AttributeEncoder`)."""
        fs, root = filesystem(self.path)
        with fs.open_input_stream(f"{root}/vocab/{name}.json") as stream:
            return json.loads(stream.read())

    def has(self, folder: str) -> bool:
        """Whether any file was written under `folder`."""
        fs, root = filesystem(self.path)
        return bool(fs.get_file_info(pafs.FileSelector(f"{root}/{folder}", allow_not_found=True)))

    def table(self, folder: str, shards: Sequence[str] = ()) -> pa.Table:
        """All shards of one folder as a table, or those at the paths `shards` within the file system."""
        fs, root = filesystem(self.path)
        return pads.dataset(list(shards) or f"{root}/{folder}", filesystem=fs, format="parquet").to_table()
