"""Product images of a raw folder to Parquet shards of pixels, a batch at a time.

In: where each item's image lies. Out: shards of schema.IMAGE_SCHEMA and the images that could not be used, with
reasons. It must not know how an image is decoded, nor who runs the batches.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from rayrec.config import ImageConfig
from rayrec.data.images import ImageRejected, decode
from rayrec.data.ledger import Ledger
from rayrec.data.raw import Raw
from rayrec.data.staging import Folder
from rayrec.errors import UsageError
from rayrec.files import filesystem
from rayrec.history import Ints
from rayrec.schema import IMAGE_SCHEMA, REJECT_SCHEMA

BATCH = 256
LARGEST_BYTES = 64 * 1024 * 1024
FOLDER = "images/"


@dataclass(frozen=True)
class ImageRef:
    """One image as the raw folder names it. `source` is the images folder or the catalogue file that names it."""

    item_id: str
    where: str  # a path within the raw file system, or as the catalogue says
    source: str
    name: str  # for the report of rejects
    row: int = 1


@dataclass(frozen=True)
class ImageBatch:
    """What became of one batch: item indices with an image now, and the images without use, with reasons."""

    index: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    rejected: list[tuple[ImageRef, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Gallery:
    """What became of all images. `index`: [K] int64, item indices with an image; `rejects`: REJECT_SCHEMA."""

    index: Ints
    rejects: pa.Table
    report: dict[str, Any]


def image_refs(raw: Raw, catalogue: Iterable[tuple[str, str, str, int]]) -> list[ImageRef]:
    """All images that the raw folder names; a file in images/ stands before what the catalogue says.

    catalogue: (item_id, image value, file, row) of the rows that name an image.
    """
    files = [ImageRef(item_id, path, FOLDER, FOLDER + path.rpartition("/")[2]) for item_id, path in raw.images.items()]
    return files + [ImageRef(item_id, value, file, file, row) for item_id, value, file, row in catalogue]


class ImageDecoder:
    """Decodes the first image of each known item, in batches by ascending item index, one shard a batch."""

    def __init__(
        self, raw: Raw, out: Folder, config: ImageConfig, refs: Iterable[ImageRef], index: Mapping[str, int]
    ) -> None:
        self.raw, self.out, self.config = raw, out, config
        first: dict[str, ImageRef] = {}
        self.spare: list[ImageRef] = []
        self.strangers: list[ImageRef] = []
        for ref in refs:
            if ref.item_id not in index:
                self.strangers.append(ref)
            elif ref.item_id in first:
                self.spare.append(ref)
            else:
                first[ref.item_id] = ref
        self.refs = sorted(((index[item_id], ref) for item_id, ref in first.items()), key=lambda pair: pair[0])
        self.n_batches = -(-len(self.refs) // BATCH)

    def decode(self, number: int) -> ImageBatch:
        """Decode one batch and write its readable images."""
        batch = ImageBatch()
        pixels: list[bytes] = []
        for index, ref in self.refs[number * BATCH : (number + 1) * BATCH]:
            try:
                pixels.append(decode(_read(self.raw, ref), self.config).tobytes())
            except ImageRejected as rejected:
                batch.rejected.append((ref, rejected.reason))
            else:
                batch.index.append(index)
                batch.sources.append(ref.source)
        if pixels:
            shard = pa.table({"item_index": batch.index, "pixels": pixels}, schema=IMAGE_SCHEMA)
            self.out.parquet(f"images/part-{number:05d}.parquet", shard, compression="zstd", use_dictionary=False)
        return batch

    def gathered(self, batches: Iterable[ImageBatch]) -> Gallery:
        """All batches together. An image of an item that nobody knows, or a second one, is counted, not decoded."""
        batches = list(batches)
        rejected = [(ref, "unknown_item") for ref in self.strangers]
        rejected += [pair for batch in batches for pair in batch.rejected]
        ledger, kept = Ledger(), Counter[int]()
        everything = [*self.strangers, *self.spare, *(ref for _, ref in self.refs)]
        names = list(dict.fromkeys(ref.source for ref in everything))
        for ref in everything:
            ledger.of(names.index(ref.source)).read += 1
        for ref, reason in rejected:
            ledger.of(names.index(ref.source)).rejected[reason] += 1
        for ref in self.spare:
            ledger.of(names.index(ref.source)).collapsed += 1
        kept.update(names.index(source) for batch in batches for source in batch.sources)
        rows = [{"file": ref.name, "row": ref.row, "reason": reason, "raw": ref.where} for ref, reason in rejected]
        index = np.array([n for batch in batches for n in batch.index], np.int64)
        return Gallery(index, pa.Table.from_pylist(rows, REJECT_SCHEMA), ledger.report(names, kept))


def _read(raw: Raw, ref: ImageRef) -> bytes:
    fs, path = _locate(raw, ref)
    info = fs.get_file_info(path)
    if info.type != pafs.FileType.File:
        raise ImageRejected("missing_file")
    if info.size is not None and info.size > LARGEST_BYTES:
        raise ImageRejected("too_many_bytes")
    try:
        with fs.open_input_stream(path, compression=None) as stream:
            data: bytes = stream.read()
            return data
    except OSError:
        raise ImageRejected("unreadable_file") from None


def _locate(raw: Raw, ref: ImageRef) -> tuple[pafs.FileSystem, str]:
    """The file system and path of an image. A relative value never leads out of the raw folder."""
    if ref.source == FOLDER:
        return raw.fs, ref.where
    if "://" in ref.where or ref.where.startswith("/"):
        try:
            return filesystem(ref.where)
        except UsageError:
            raise ImageRejected("unsupported_location") from None
    path = posixpath.normpath(posixpath.join(raw.root, ref.where))
    if isinstance(raw.fs, pafs.LocalFileSystem):
        path = str(Path(path).resolve())
        root = str(Path(raw.root).resolve())
    else:
        root = raw.root
    if not path.startswith(root.rstrip("/") + "/"):
        raise ImageRejected("outside_the_raw_folder")
    return raw.fs, path
