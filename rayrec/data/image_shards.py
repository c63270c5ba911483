"""Product images of a raw folder to Parquet shards of pixels, a batch at a time.

In: where each item's image lies, and what an earlier run has made of it. Out: shards of schema.IMAGE_SCHEMA and the
images that could not be used, with reasons. A picture that is as it was is not decoded again. It must not know how an
image is decoded, nor who runs the batches.
"""

from __future__ import annotations

import hashlib
import pickle
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayrec.config import ImageConfig
from rayrec.data.images import ImageRejected, decode
from rayrec.data.ledger import Ledger
from rayrec.data.raw import Raw
from rayrec.data.shuffle import read_partition, write_partitions
from rayrec.data.staging import WORK, Folder
from rayrec.errors import UsageError
from rayrec.files import filesystem
from rayrec.history import Ints
from rayrec.schema import IMAGE_SCHEMA, REJECT_SCHEMA

BATCH = 512
"""Pictures of a task and a shard: about a second, so that no core waits long for the last of them."""
ROW_GROUP = 16
"""New rows that are in memory at once, at the default size under a MB. A whole shard would be fresh pages of the system
each time, which cost a third of what its decoding does."""
PIXELS_BY = "lz4"
"""zstd makes posters a twentieth smaller than this, for three times the time and twice as long to read."""
LARGEST_BYTES = 64 * 1024 * 1024
FOLDER = "images/"


@dataclass(frozen=True)
class ImageRef:
    """One image as a raw folder names it. `source` is the images folder or the catalogue file that names it."""

    item_id: str
    where: str  # a path within the raw file system, or as the catalogue says
    source: str
    name: str  # for the report of rejects
    row: int
    folder: str  # the raw folder, as a path or URI

    @property
    def key(self) -> tuple[str, str, str]:
        """What an image is known by in later runs, wherever the raw folder is by then."""
        return self.item_id, self.source, self.name if self.source == FOLDER else self.where


@dataclass(frozen=True)
class Looked:
    """A picture as it was when it was decoded, or rejected for `reason`."""

    size_bytes: int
    mtime_ns: int | None
    sha256: str
    reason: str = ""


@dataclass(frozen=True)
class OldImages:
    """What an earlier run has made of pictures. item_ids: by old index. shards: files of schema.IMAGE_SCHEMA."""

    refs: list[ImageRef]
    looked: dict[tuple[str, str, str], Looked]
    item_ids: list[str]
    folder: Folder
    shards: list[str]


@dataclass
class ImageBatch:
    """What became of one batch: item indices with an image now, and the images without use, with reasons.

    looked: what is to be known of the pictures in later runs. decoded: how many were decoded.
    """

    index: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    rejected: list[tuple[ImageRef, str]] = field(default_factory=list)
    looked: dict[tuple[str, str, str], Looked] = field(default_factory=dict)
    decoded: int = 0


@dataclass(frozen=True)
class Gallery:
    """What became of all images.

    index    [K] int64, item indices with an image
    rejects  REJECT_SCHEMA
    known    KNOWN_SCHEMA, for later runs
    decoded  how many were decoded
    taken_over  how many are as an earlier run has decoded or rejected them
    """

    index: Ints
    rejects: pa.Table
    report: dict[str, Any]
    known: pa.Table
    decoded: int
    taken_over: int


KNOWN_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("item_id", "where", "source", "name")]
    + [("row", pa.int64()), ("folder", pa.string()), ("size_bytes", pa.int64()), ("mtime_ns", pa.int64())]
    + [("sha256", pa.string()), ("reason", pa.string())]
)
"""One row an image; the last four are null of one that nobody looked at."""


def image_refs(
    raw: Raw,
    catalogue: Iterable[tuple[str, str, str, int]],
    folder_of: Mapping[str, str] | None = None,
    old: OldImages | None = None,
) -> list[ImageRef]:
    """All images that the raw folders name; a file in images/ stands before what the catalogue says.

    catalogue: (item_id, image value, file, row) of the rows that name an image. folder_of: the raw folder of a
    catalogue's file, where that is another one. Pictures in the images folders of earlier runs stay, unless this raw
    folder is the same, and lacks them by now.
    """
    folder_of = folder_of or {}
    files = [
        ImageRef(item_id, path, FOLDER, FOLDER + path.rpartition("/")[2], 1, raw.uri)
        for item_id, path in raw.images.items()
    ]
    named = [
        ImageRef(item_id, value, file, file, row, folder_of.get(file, raw.uri))
        for item_id, value, file, row in catalogue
    ]
    here = {ref.key for ref in files}
    stay = [ref for ref in old.refs if ref.source == FOLDER] if old else []
    return [*files, *(ref for ref in stay if ref.folder != raw.uri and ref.key not in here), *named]


class Packed:
    """Parts of which a task needs one: it unpickles that, and the rest stays where Ray keeps it, uncopied."""

    def __init__(self, parts: Iterable[Any]) -> None:
        packed = [pickle.dumps(part) for part in parts]
        self._bound = np.cumsum([0, *map(len, packed)])
        self._bytes = np.frombuffer(b"".join(packed), np.uint8)

    def __len__(self) -> int:
        return len(self._bound) - 1

    def __getitem__(self, number: int) -> Any:
        return pickle.loads(self._bytes[self._bound[number] : self._bound[number + 1]].tobytes())


class ImageDecoder:
    """Decodes the first image of each known item, in batches by ascending item index, one shard a batch."""

    def __init__(
        self,
        here: str,
        out: Folder,
        config: ImageConfig,
        refs: Iterable[ImageRef],
        index: Mapping[str, int],
        old: OldImages | None = None,
    ) -> None:
        self.here, self.out, self.config, self.old = here, out, config, old
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
        known = [(place, ref, self._known(ref)) for place, ref in self.refs]
        self.batches = Packed(known[start : start + BATCH] for start in range(0, len(known), BATCH))
        self.n_batches = len(self.batches)
        self.n_old = len(old.shards) if old and self.n_batches else 0
        if old and self.n_old:
            self._index = np.array([place for place, _ in self.refs])
            row_of = {ref.item_id: row for row, (_, ref, looked) in enumerate(known) if looked}
            self._row_of_old = np.array([row_of.get(item_id, -1) for item_id in old.item_ids], np.int64)
            self._old_folder, self._old_shards = old.folder, old.shards

    def __getstate__(self) -> dict[str, Any]:
        """What tasks need: each of them would unpickle the lists of all pictures as well."""
        return {name: value for name, value in vars(self).items() if name not in ("refs", "spare", "strangers", "old")}

    def deal_old(self, shard: int) -> None:
        """Deal the pixels of an old shard out to the batches of this run, under their new indices."""
        table = _parquet(self._old_folder, self._old_shards[shard])
        place_R = self._row_of_old[table["item_index"].to_numpy()]
        index = self._index[place_R].astype(np.int32)
        mine = pa.table({"item_index": index, "pixels": table["pixels"]}, schema=IMAGE_SCHEMA)
        mine = mine.filter(pa.array(place_R >= 0))
        path = self.out.path(f"{WORK}/pixels-{shard:05d}.arrow")
        write_partitions(self.out.fs, path, mine, place_R[place_R >= 0] // BATCH, self.n_batches)

    def decode(self, number: int) -> ImageBatch:
        """Decode what is new or changed of one batch, and write its readable images."""
        batch = ImageBatch()
        name = f"images/part-{number:05d}.parquet"
        tables = self._readable(number, batch)
        self.out.parquet_parts(name, IMAGE_SCHEMA, tables, compression=PIXELS_BY, use_dictionary=False)
        return batch

    def _readable(self, number: int, batch: ImageBatch) -> Iterator[pa.Table]:
        """The readable images of one batch, a row group at a time; `batch` is told of each."""
        old = self._old_pixels(number)
        pixels: list[bytes] = []
        for index, ref, known in self.batches[number]:
            try:
                pixels.append(self._pixels(ref, known, old.get(index), batch))
            except ImageRejected as rejected:
                batch.rejected.append((ref, rejected.reason))
                continue
            batch.index.append(index)
            batch.sources.append(ref.source)
            if len(pixels) == ROW_GROUP:
                yield _shard(batch.index[-len(pixels) :], pixels)
                pixels = []
        if pixels:
            yield _shard(batch.index[-len(pixels) :], pixels)

    def _known(self, ref: ImageRef) -> Looked | None:
        return self.old.looked.get(ref.key) if self.old else None

    def _old_pixels(self, number: int) -> dict[int, bytes]:
        if not self.n_old:
            return {}
        paths = [self.out.path(f"{WORK}/pixels-{shard:05d}.arrow") for shard in range(self.n_old)]
        table = read_partition(self.out.fs, paths, number)
        return dict(zip(table["item_index"].to_pylist(), table["pixels"].to_pylist(), strict=True))

    def _pixels(self, ref: ImageRef, known: Looked | None, old: bytes | None, batch: ImageBatch) -> bytes:
        """The pixels of one picture; what was decoded, or rejected, before is taken from there if nothing changed."""
        if known is not None and not known.reason and old is None:
            known = None
        # What lies in folders of earlier days is as it was then: they may be gone.
        if known is not None and (ref.folder != self.here or _untouched(known, _stat(ref))):
            return _as_before(ref, known, old, batch)
        fs, path, info = _found(ref)
        data = _read(fs, path)
        digest = hashlib.sha256(data).hexdigest()
        if known is not None and known.sha256 == digest:
            return _as_before(ref, replace(known, size_bytes=info.size, mtime_ns=info.mtime_ns), old, batch)
        batch.decoded += 1
        try:
            pixels = decode(data, self.config).tobytes()
        except ImageRejected as rejected:
            batch.looked[ref.key] = Looked(info.size, info.mtime_ns, digest, rejected.reason)
            raise
        batch.looked[ref.key] = Looked(info.size, info.mtime_ns, digest)
        return pixels

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
        looked = {key: one for batch in batches for key, one in batch.looked.items()}
        seen = [looked.get(ref.key) for ref in everything]
        known = {one.name: [getattr(ref, one.name) for ref in everything] for one in fields(ImageRef)}
        known |= {one.name: [getattr(look, one.name, None) for look in seen] for one in fields(Looked)}
        return Gallery(
            index,
            pa.Table.from_pylist(rows, REJECT_SCHEMA),
            ledger.report(names, kept),
            pa.table(known, KNOWN_SCHEMA),
            decoded := sum(batch.decoded for batch in batches),
            len(looked) - decoded,
        )


def old_images(known: pa.Table, item_ids: list[str], folder: Folder, shards: list[str]) -> OldImages:
    """What an earlier run has made of pictures. known: KNOWN_SCHEMA. item_ids: by index, from 0."""
    refs, looked = [], {}
    for row in known.to_pylist():
        ref = ImageRef(**{name: row[name] for name in ("item_id", "where", "source", "name", "row", "folder")})
        refs.append(ref)
        if row["sha256"] is not None:
            looked[ref.key] = Looked(**{name: row[name] for name in ("size_bytes", "mtime_ns", "sha256", "reason")})
    return OldImages(refs, looked, item_ids, folder, shards)


def untouched(raw: Raw, old: OldImages) -> bool:
    """Whether the images folder of `raw` holds just what an earlier run found in it, by sizes and times."""
    refs = image_refs(raw, [])
    before = [ref for ref in old.refs if ref.source == FOLDER and ref.folder == raw.uri]
    if {ref.key for ref in refs} != {ref.key for ref in before}:
        return False
    infos = raw.fs.get_file_info([ref.where for ref in refs]) if refs else []
    looked = [old.looked.get(ref.key) for ref in refs]
    return all(one is None or _untouched(one, info) for one, info in zip(looked, infos, strict=True))


def _shard(index: list[int], pixels: list[bytes]) -> pa.Table:
    return pa.table({"item_index": index, "pixels": pixels}, schema=IMAGE_SCHEMA)


def _parquet(folder: Folder, name: str) -> pa.Table:
    with folder.fs.open_input_file(folder.path(name)) as stream:
        return pq.read_table(stream)


def _untouched(known: Looked, info: pafs.FileInfo) -> bool:
    return bool(info.mtime_ns is not None and (info.size, info.mtime_ns) == (known.size_bytes, known.mtime_ns))


def _as_before(ref: ImageRef, known: Looked, pixels: bytes | None, batch: ImageBatch) -> bytes:
    batch.looked[ref.key] = known
    if known.reason:
        raise ImageRejected(known.reason)
    assert pixels is not None
    return pixels


def _stat(ref: ImageRef) -> pafs.FileInfo:
    fs, path = _locate(ref)
    return fs.get_file_info(path)


def _found(ref: ImageRef) -> tuple[pafs.FileSystem, str, pafs.FileInfo]:
    """The file of an image. Raises ImageRejected if there is none, or one too large."""
    fs, path = _locate(ref)
    info = fs.get_file_info(path)
    if info.type != pafs.FileType.File:
        raise ImageRejected("missing_file")
    if info.size is not None and info.size > LARGEST_BYTES:
        raise ImageRejected("too_many_bytes")
    return fs, path, info


def _read(fs: pafs.FileSystem, path: str) -> bytes:
    try:
        with fs.open_input_file(path) as stream:
            data: bytes = stream.read()
            return data
    except OSError:
        raise ImageRejected("unreadable_file") from None


def _locate(ref: ImageRef) -> tuple[pafs.FileSystem, str]:
    """The file system and path of an image. A relative value never leads out of the raw folder."""
    fs, root = _filesystem(ref.folder)
    if ref.source == FOLDER:
        return fs, ref.where
    if "://" in ref.where or ref.where.startswith("/"):
        try:
            return filesystem(ref.where)
        except UsageError:
            raise ImageRejected("unsupported_location") from None
    path = posixpath.normpath(posixpath.join(root, ref.where))
    if isinstance(fs, pafs.LocalFileSystem):
        path = str(Path(path).resolve())
        root = str(Path(root).resolve())
    if not path.startswith(root.rstrip("/") + "/"):
        raise ImageRejected("outside_the_raw_folder")
    return fs, path


_filesystem = lru_cache(maxsize=16)(filesystem)
