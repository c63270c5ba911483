"""The pictures of a bundle, for the storefront. In: an opened bundle. Out: JPEG bytes by item index."""

from __future__ import annotations

import pyarrow.feather

from rayrec.bundle import Bundle

FILE = "images/thumbnails.arrow"


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
