"""A catalogue with what a shop has said of its items since: other prices, stock, items that are new or gone.

In: a catalogue, facts by item, the encoder that training learned. Out: another catalogue, whose first rows are the same
items. It must not know where edits come from, pictures or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrec.catalogue import Catalogue
from rayrec.data.items import AttributeEncoder
from rayrec.schema import ITEM_SCHEMA

SHOWN = ("title", "category", "brand", "price")
LISTED, IN_STOCK = "listed", "in_stock"
"""Facts beside SHOWN: whether an item may be shown at all, and whether it can be bought now."""

Facts = Mapping[str, Any]
Ints = npt.NDArray[np.int64]


def edited(
    catalogue: Catalogue, facts: Mapping[str, Facts], pictured: Set[str], encoder: AttributeEncoder
) -> tuple[Catalogue, Ints]:
    """The catalogue after edits, and the rows of the items that they name, in their order ([R] int64).

    facts: by item id, what to change of it: SHOWN, LISTED, IN_STOCK; what is not there stays, None makes it unknown.
    An item that is not in the catalogue is added at the end, without training events. pictured: items of `facts` that
    have been given a picture.
    """
    known = [catalogue.index[item_id] for item_id in facts if item_id in catalogue.index]
    rows = dict(zip(known, catalogue.table.take(pa.array(known, pa.int64()) - 1).to_pylist(), strict=True))
    changed, next_row = [], len(catalogue) + 1
    for item_id, said in facts.items():
        row = rows.get(catalogue.index.get(item_id, 0))
        if row is None:
            row = dict.fromkeys(SHOWN) | {"item_index": next_row, "item_id": item_id, "n_train": 0}
            row |= {"has_image": False}
            next_row += 1
        row |= {name: said[name] for name in SHOWN if name in said}
        changed.append(row | {"in_catalogue": True, "has_image": row["has_image"] or item_id in pictured})
    codes = encoder.encode(pa.Table.from_pylist(changed, pa.schema([ITEM_SCHEMA.field(name) for name in SHOWN])))
    plain = [name for name in ITEM_SCHEMA.names if name not in codes]
    new = pa.table({**{name: [row[name] for row in changed] for name in plain}, **codes})
    new = new.select(ITEM_SCHEMA.names).cast(ITEM_SCHEMA)
    row_R = new["item_index"].to_numpy().astype(np.int64)

    place = np.arange(next_row - 1)  # in the old table with the new one behind it
    place[row_R - 1] = len(catalogue) + np.arange(len(row_R))
    table = pa.concat_tables([catalogue.table, new]).combine_chunks().take(pa.array(place))
    later = Catalogue.from_table(table)
    listed_N, in_stock_N = (_longer(flags, next_row) for flags in (catalogue.listed, catalogue.in_stock))
    for row, said in zip(row_R.tolist(), facts.values(), strict=True):
        listed_N[row] = said.get(LISTED, listed_N[row])
        in_stock_N[row] = said.get(IN_STOCK, in_stock_N[row])
    return replace(later, listed=listed_N, in_stock=in_stock_N), row_R


def _longer(flag_N: npt.NDArray[np.bool_], n_rows: int) -> npt.NDArray[np.bool_]:
    """A copy, True for rows that it does not have."""
    return np.concatenate([flag_N, np.ones(n_rows - len(flag_N), bool)])
