"""Pictures of items: those of a bundle, and those that a shop brings later.

In: an opened bundle; the place of a picture. Out: bytes. It must not know what is drawn on them.
"""

from __future__ import annotations

import base64
import binascii
import posixpath
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import pyarrow as pa
import pyarrow.feather

from rayrec.bundle import Bundle
from rayrec.files import filesystem
from rayrec.serving.problems import ProblemError

FILE = "images/thumbnails.arrow"
LARGEST = 16 << 20
WAIT_S = 5.0


class Pictures:
    """JPEG pictures, memory-mapped: replicas of one machine share them. A bundle may have none."""

    def __init__(self, bundle: Bundle) -> None:
        self._row: dict[int, int] = {}
        if FILE in bundle.manifest["files"]:
            table = pyarrow.feather.read_table(bundle.path / FILE, memory_map=True)
            self._jpeg = table["jpeg"]
            self._row = {item: row for row, item in enumerate(table["item_index"].to_pylist())}

    def __call__(self, item_index: int) -> tuple[bytes, str] | None:
        """Bytes and media type of an item's picture; None if it has none."""
        row = self._row.get(item_index)
        return None if row is None else (self._jpeg[row].as_py(), "image/jpeg")


def fetched(place: str, prefixes: Sequence[str]) -> bytes:
    """The bytes at a `data:` URI, or at a URL or path below one of `prefixes`.

    Raises ProblemError (422) for any other place, and for one that cannot be read or holds more than LARGEST.
    """
    if place.startswith("data:"):
        return _of_data(place)
    if not any(_below(place, prefix) for prefix in prefixes):
        allowed = f", or a place below {', '.join(prefixes)}" if prefixes else ""
        raise ProblemError(422, f"/image: send it as a data: URI{allowed}; the server's image_prefixes allow no other")
    try:
        data = _of_web(place) if place.startswith(("http://", "https://")) else _of_files(place)
    except (httpx.HTTPError, OSError, pa.ArrowException) as error:
        raise ProblemError(422, f"/image: cannot be read ({type(error).__name__})") from None
    if len(data) > LARGEST:
        raise ProblemError(422, f"/image: larger than {LARGEST >> 20} MiB")
    return data


def _below(place: str, prefix: str) -> bool:
    """Whether a place is below a prefix however it is written: by "..", or by a link, it would lead elsewhere."""
    path = unquote(urlsplit(place).path)
    if not place.startswith(prefix) or posixpath.normpath(path) != path.rstrip("/") or "\\" in path:
        return False
    return "://" in place or Path(place).resolve().is_relative_to(Path(prefix).resolve())


def _of_data(place: str) -> bytes:
    head, comma, body = place.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ProblemError(422, "/image: write it as data:image/jpeg;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error:
        raise ProblemError(422, "/image: what follows base64, is not base64") from None


def _of_web(url: str) -> bytes:
    """The body of a page, as far as LARGEST and one more. A redirect leads nowhere: it could leave the prefix."""
    data = bytearray()
    with httpx.stream("GET", url, timeout=WAIT_S) as answer:
        if answer.status_code != 200:
            raise httpx.HTTPError(f"status {answer.status_code}")
        for part in answer.iter_bytes():
            data += part
            if len(data) > LARGEST:
                break
    return bytes(data)


def _of_files(place: str) -> bytes:
    fs, path = filesystem(place)
    with fs.open_input_stream(path) as stream:
        return bytes(stream.read(LARGEST + 1))
