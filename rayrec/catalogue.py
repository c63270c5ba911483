"""The catalogue as arrays: what stages and replicas know of every item.

In: a table of `schema.ITEM_SCHEMA`. Out: arrays indexed by item index, where row 0 is "unknown".
It must not know models, files or state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrec.schema import ITEM_SCHEMA


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths laid end to end: row n is values[offsets[n] : offsets[n + 1]]."""

    values: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]

    def __getitem__(self, n: int) -> npt.NDArray[np.int64]:
        return self.values[self.offsets[n] : self.offsets[n + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, rows: npt.NDArray[np.int64]) -> Ragged:
        """The lists of `rows` ([R] int64), in that order."""
        length_R = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(length_R)])
        start = np.repeat(self.offsets[:-1][rows] - offsets[:-1], length_R)
        return Ragged(self.values[start + np.arange(offsets[-1])], offsets)


@dataclass(frozen=True)
class Catalogue:
    """Items 1..N; every array has N + 1 rows, and row 0 stands for padding and unknown items.

    table          ITEM_SCHEMA, N rows: what is shown to people (title, brand, price, ...)
    ids            [N + 1] object   item id; "" at 0
    brand          [N + 1] int64    code; 0 unknown
    category       Ragged           codes of each item's categories
    title          Ragged           hashed words of the title
    price          [N + 1] float32  as in the catalogue, NaN unknown
    price_scaled   [N + 1] float32  filled and normalised
    price_bucket   [N + 1] int64    decile 1..10, 0 unknown
    n_train        [N + 1] int64    training events
    has_image      [N + 1] bool
    listed         [N + 1] bool     may be shown: in the catalogue, or all where logs came without one
    in_stock       [N + 1] bool
    """

    table: pa.Table
    ids: npt.NDArray[np.object_]
    brand: npt.NDArray[np.int64]
    category: Ragged
    title: Ragged
    price: npt.NDArray[np.float32]
    price_scaled: npt.NDArray[np.float32]
    price_bucket: npt.NDArray[np.int64]
    n_train: npt.NDArray[np.int64]
    has_image: npt.NDArray[np.bool_]
    listed: npt.NDArray[np.bool_]
    in_stock: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        """N, the number of real items."""
        return len(self.ids) - 1

    @classmethod
    def from_table(cls, table: pa.Table) -> Catalogue:
        """From rows of ITEM_SCHEMA whose `item_index` is 1..N in order. Raises ValueError if it is not."""
        table = table.select(ITEM_SCHEMA.names).cast(ITEM_SCHEMA).combine_chunks()
        index = table["item_index"].to_numpy()
        index_N = np.arange(len(table) + 1)
        if not np.array_equal(index, index_N[1:]):
            raise ValueError("items must be sorted by item_index, 1..N without gaps")

        def column(name: str, dtype: Any, fill: Any) -> npt.NDArray[Any]:
            values = table[name].to_numpy(zero_copy_only=False)
            return np.concatenate([np.array([fill], dtype), values.astype(dtype)])

        in_catalogue = column("in_catalogue", bool, False)
        return cls(
            table=table,
            ids=column("item_id", object, ""),
            brand=column("brand_code", np.int64, 0),
            category=_ragged(table["category_codes"]),
            title=_ragged(table["title_codes"]),
            price=column("price", np.float32, np.nan),
            price_scaled=column("price_scaled", np.float32, 0),
            price_bucket=column("price_bucket", np.int64, 0),
            n_train=column("n_train", np.int64, 0),
            has_image=column("has_image", bool, False),
            listed=in_catalogue if in_catalogue.any() else index_N > 0,
            in_stock=np.ones(len(index_N), bool),
        )

    @cached_property
    def index(self) -> dict[str, int]:
        """Item index of each item id."""
        return {item_id: n for n, item_id in enumerate(self.ids.tolist()) if n}


def _ragged(column: pa.ChunkedArray) -> Ragged:
    lists = column.combine_chunks()
    length = np.asarray(lists.value_lengths().fill_null(0), np.int64)
    offsets = np.concatenate([[0, 0], np.cumsum(length)])  # row 0 has no codes
    return Ragged(np.asarray(lists.flatten(), np.int64), offsets)
