"""The catalogue: raw rows to clean items, and clean items to the numbered and encoded table of schema.ITEM_SCHEMA.

In: tables of catalogue rows, the ids that occur in events, and training counts. Out: tables, vocabularies, counts of
what was repaired, and the encoder that treats a later item the same way. It must not know files or Ray.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.catalogue import Ragged
from rayrec.config import PrepareConfig, TextColumnConfig
from rayrec.data.columns import ColumnFit, apply, repair
from rayrec.data.ids import clean_ids
from rayrec.data.vocabulary import Vocabulary, build_vocabulary, title_codes
from rayrec.schema import ITEM_SCHEMA, REJECT_SCHEMA, TITLE_BUCKETS

Ints: TypeAlias = npt.NDArray[np.int64]

ATTRIBUTES = ("title", "category", "brand", "price", "image")
CATALOGUE_SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        *(pa.field(name, pa.float64() if name == "price" else pa.string()) for name in ATTRIBUTES),
    ]
)
"""A clean catalogue: one row an item."""

_MISSING = pa.array(["", "nan", "null", "none", "n/a", "\\n"])
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
LARGEST_PRICE = 1e30
"""Prices are handed on as float32, and their sums and squares must be finite as well."""
DECILES = tuple(np.arange(1, 10) / 10)


# ---------------------------------------------------------------- cleaning


@dataclass(frozen=True)
class CleanedItems:
    """A cleaned catalogue; rows read = rows of kept + collapsed_file + rejects.

    kept            CATALOGUE_SCHEMA, one row an item, in order of first appearance
    kept_file       [K] string, the file of the first row of each kept item
    collapsed_file  [C] string, the file of every further row of an item
    rejects         REJECT_SCHEMA
    repairs         {what: n}; no zeros
    """

    kept: pa.Table
    kept_file: pa.Array
    collapsed_file: pa.Array
    rejects: pa.Table
    repairs: dict[str, int]


def clean_items(rows: pa.Table) -> CleanedItems:
    """Clean catalogue rows: item_id, title, category, brand, price, image (any may be absent), file, row [, raw].

    A row without an item id is rejected (`no_item_id`). Several rows of one item become one: of each column the most
    frequent value that is not missing, the earliest of them on a tie. A price that is no number, or not above 0, is
    taken as unknown and counted; the item stays.
    """
    item_id = clean_ids(_column(rows, "item_id").cast(pa.string()))
    has_id = pc.is_valid(item_id)
    kept_rows = rows.filter(has_id)
    prices, repairs = parse_prices(_column(kept_rows, "price"))
    columns = {name: _text(kept_rows, name) for name in ATTRIBUTES if name != "price"} | {"price": prices}
    items = pa.table({"item_id": item_id.filter(has_id), **{name: columns[name] for name in ATTRIBUTES}})
    kept, first, conflicts = _collapse(items.cast(CATALOGUE_SCHEMA))
    repairs |= conflicts
    file = kept_rows["file"].combine_chunks()
    repeated = np.ones(len(items), bool)
    repeated[first] = False
    return CleanedItems(
        kept=kept,
        kept_file=file.take(pa.array(first)),
        collapsed_file=file.filter(pa.array(repeated)),
        rejects=_rejects(rows.filter(pc.invert(has_id)), "no_item_id"),
        repairs={what: n for what, n in repairs.items() if n},
    )


def parse_prices(column: pa.Array) -> tuple[pa.Array, dict[str, int]]:
    """Prices as float64 above 0, null where unknown, and how many were unparsable (or absurd) or not positive.

    Currency signs and codes are dropped; of "1,234.50" and "1.234,50" the last mark is the decimal one; a lone comma
    is decimal unless exactly three digits follow each.
    """
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        number = column.cast(pa.float64())
        given = number = pc.if_else(pc.is_nan(number), None, number)
    else:
        given = _blank_as_null(column.cast(pa.string()))
        plain = pc.match_substring_regex(given, _NUMBER)
        mended = pc.if_else(plain, given, _plain_number(given))
        number = pc.if_else(pc.match_substring_regex(mended, _NUMBER), mended, None).cast(pa.float64())
    finite = pc.if_else(pc.less(pc.abs(number), LARGEST_PRICE), number, None)
    prices = pc.if_else(pc.greater(finite, 0.0), finite, None)
    known, parsed = len(given) - given.null_count, len(finite) - finite.null_count
    return prices, {
        "price.unparsable": known - parsed,
        "price.not_positive": parsed - (len(prices) - prices.null_count),
    }


def _plain_number(text: pa.Array) -> pa.Array:
    """Prices as people write them ("€ 1.234,50", "USD 12") in the form of `_NUMBER`, as far as they can be."""
    bare = pc.replace_substring_regex(text, r"[\p{L}\p{Sc}\p{Z}\s'’]|\.$", "")
    commas_decimal = pc.match_substring_regex(bare, r"^[+-]?(\d{1,3}(\.\d{3})+|\d+)?,\d+$")
    commas_thousands = pc.match_substring_regex(bare, r"^[+-]?\d{1,3}(,\d{3})+(\.\d+)?$")
    european = pc.replace_substring(pc.replace_substring(bare, ".", ""), ",", ".")
    return pc.if_else(commas_thousands, pc.replace_substring(bare, ",", ""), pc.if_else(commas_decimal, european, bare))


def _collapse(items: pa.Table) -> tuple[pa.Table, Ints, dict[str, int]]:
    """One row an item, the place of each item's first row ([K] int64, ascending), and {"<column>.conflicting": n}."""
    place = np.arange(len(items))
    codes = items["item_id"].combine_chunks().dictionary_encode().indices.to_numpy()  # by first appearance
    first = np.unique(codes, return_index=True)[1]
    kept = items.take(pa.array(first))
    if len(first) == len(items):
        return kept, first, {}
    conflicts = {}
    for name in ATTRIBUTES:
        known = items[name].combine_chunks().dictionary_encode().indices
        value = known.fill_null(-1).to_numpy()
        chosen, conflicts[f"{name}.conflicting"] = _most_frequent(codes, value, place, len(first))
        column = items[name].take(pa.array(np.maximum(chosen, 0), mask=chosen < 0))
        kept = kept.set_column(kept.schema.get_field_index(name), name, column)
    return kept.cast(CATALOGUE_SCHEMA), first, conflicts


def _most_frequent(owner: Ints, value: Ints, place: Ints, n: int) -> tuple[Ints, int]:
    """Of each owner 0..n - 1 the place of its most frequent value (-1: none known), and how many owners disagree.

    value: code of each row's value, -1 where missing. The earliest place stands for a value.
    """
    known = value >= 0
    pair = pa.table({"owner": owner[known], "value": value[known], "place": place[known]})
    counts = pair.group_by(["owner", "value"]).aggregate([("place", "count"), ("place", "min")])
    counts = counts.sort_by([("owner", "ascending"), ("place_count", "descending"), ("place_min", "ascending")])
    owners, start, distinct = np.unique(counts["owner"].to_numpy(), return_index=True, return_counts=True)
    chosen = np.full(n, -1, np.int64)
    chosen[owners] = counts["place_min"].to_numpy()[start]
    return chosen, int(np.sum(distinct > 1))


def _rejects(rows: pa.Table, reason: str) -> pa.Table:
    if "raw" in rows.column_names:
        raw = rows["raw"]
    else:
        content = rows.drop_columns([name for name in ("file", "row") if name in rows.column_names])
        raw = [json.dumps(row, ensure_ascii=False, default=str) for row in content.to_pylist()]
    table = {"file": rows["file"], "row": rows["row"], "reason": [reason] * len(rows), "raw": raw}
    return pa.table(table).cast(REJECT_SCHEMA)


def _column(rows: pa.Table, name: str) -> pa.Array:
    if name not in rows.column_names:
        return pa.nulls(len(rows), pa.string())
    column = rows[name].combine_chunks()
    return pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column


def _text(rows: pa.Table, name: str) -> pa.Array:
    """A text column, trimmed; null for blanks, and for "nan", "null", "none", "n/a"."""
    return _blank_as_null(_column(rows, name).cast(pa.string()))


def _blank_as_null(text: pa.Array) -> pa.Array:
    trimmed = pc.utf8_trim_whitespace(text)
    return pc.if_else(pc.is_in(pc.utf8_lower(trimmed), _MISSING), pa.scalar(None, pa.string()), trimmed)


# ---------------------------------------------------------------- encoding


@dataclass(frozen=True)
class AttributeEncoder:
    """How the attributes of an item become codes: what training learnt, applied to items that come later."""

    categories: Vocabulary
    brands: Vocabulary
    price: ColumnFit
    price_deciles: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """All but the vocabularies, ready for JSON."""
        return {"price": asdict(self.price), "price_deciles": list(self.price_deciles)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], vocab: Mapping[str, list[str]]) -> AttributeEncoder:
        """The encoder that `to_dict` and `BuiltItems.vocab` saved."""
        return cls(
            categories=Vocabulary(vocab["categories"]),
            brands=Vocabulary(vocab["brands"]),
            price=ColumnFit(**saved["price"]),
            price_deciles=tuple(saved["price_deciles"]),
        )

    def encode(self, items: pa.Table) -> dict[str, pa.Array]:
        """The encoded columns of ITEM_SCHEMA for `items` (title, category, brand, price), which may be new ones."""
        prices = items["price"].to_numpy().astype(np.float64)
        words = title_codes(items["title"].to_pylist(), TITLE_BUCKETS)
        return {
            "category_codes": _as_lists(encode_categories(_column(items, "category"), self.categories)),
            "brand_code": pa.array(self.brands.encode(_column(items, "brand")).astype(np.int32)),
            "title_codes": _as_lists(words),
            "price_scaled": pa.array(np.nan_to_num(apply(self.price, prices)).astype(np.float32)),
            "price_bucket": pa.array(price_buckets(prices, self.price_deciles)),
        }


@dataclass(frozen=True)
class BuiltItems:
    """The finished items.

    table    ITEM_SCHEMA, sorted by item_index
    vocab    {"categories": [...], "brands": [...]}: the word of each code (Vocabulary.words)
    encoder  for items that come later
    repairs  {what: n}; no zeros
    """

    table: pa.Table
    vocab: dict[str, list[str]]
    encoder: AttributeEncoder
    repairs: dict[str, int]


def build_items(
    catalogue: pa.Table,
    event_item_ids: Sequence[str] | pa.Array,
    n_train: Mapping[str, int] | Sequence[int] | Ints,
    image_ids: Set[str],
    config: PrepareConfig,
) -> BuiltItems:
    """Number and encode every item of the catalogue or the events.

    catalogue: CATALOGUE_SCHEMA. event_item_ids: [E], different ids. n_train: training events of an item by id, or [E].
    image_ids: items with a readable picture. Items are numbered from 1 by descending `n_train`, then by id.

    A missing price is scaled as configured but stays null in `price`; where it is left unfilled it scales to 0.
    """
    items = _numbered(catalogue, event_item_ids, n_train)
    repairs: dict[str, int] = {}
    for name, text_config in (("category", config.category), ("brand", config.brand)):
        items, counts = _repair_text(items, name, text_config)
        repairs |= {f"{name}.{what}": n for what, n in counts.items()}
    encoder, price_scaled, counts = _learn(items, config)
    repairs |= {f"price.{what}": n for what, n in counts.items()}
    columns = {
        "item_index": pa.array(np.arange(1, len(items) + 1, dtype=np.int32)),
        **{name: items[name] for name in items.column_names},
        "has_image": pc.is_in(items["item_id"], pa.array(sorted(image_ids), pa.string())),
        **encoder.encode(items),
        "price_scaled": pa.array(price_scaled),
    }
    return BuiltItems(
        table=pa.table({name: columns[name] for name in ITEM_SCHEMA.names}).cast(ITEM_SCHEMA),
        vocab={"categories": encoder.categories.words, "brands": encoder.brands.words},
        encoder=encoder,
        repairs=repairs,
    )


def encode_categories(categories: pa.Array, vocabulary: Vocabulary) -> Ragged:
    """Known category codes of each item: of "a/b|c" those of "a", "a/b" and "c", each once, in order."""
    levels, owner = category_levels(categories)
    code = vocabulary.encode(levels)
    known = code > 0
    pair = owner[known] * len(vocabulary) + code[known]
    once = np.sort(np.unique(pair, return_index=True)[1])
    length = np.bincount(owner[known][once], minlength=len(categories))
    return Ragged(code[known][once], np.concatenate([[0], np.cumsum(length)]))


def category_levels(categories: pa.Array) -> tuple[pa.Array, Ints]:
    """Every level of every category, and the row it belongs to ([M] string, [M] int64).

    "|" joins several categories; "/" and ">" divide the levels of one, and each level counts, so that an item in a
    rare category still shares something with others.

    >>> category_levels(pa.array(["Tops/Vest", None, "a|b"]))[0].to_pylist()
    ['Tops', 'Tops/Vest', 'a', 'b']
    """
    lists = pc.split_pattern(categories, "|")
    parts, owner = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy().astype(np.int64)
    distinct = parts.dictionary_encode()
    levels_of = [_levels(part) for part in distinct.dictionary.to_pylist()]
    offsets = np.concatenate([[0], np.cumsum([len(levels) for levels in levels_of], dtype=np.int64)])
    place = distinct.indices.to_numpy().astype(np.int64)
    flat = pa.array([level for levels in levels_of for level in levels], pa.string())
    taken = Ragged(np.arange(len(flat)), offsets).take(place)
    return flat.take(pa.array(taken.values)), np.repeat(owner, np.diff(taken.offsets))


def price_buckets(prices: npt.NDArray[np.float64], deciles: Sequence[float]) -> npt.NDArray[np.int8]:
    """Decile 1..10 of each price ([N], NaN unknown); 0 where unknown or without deciles."""
    known = ~np.isnan(prices) if len(deciles) else np.zeros(len(prices), bool)
    return np.where(known, 1 + np.searchsorted(deciles, prices, side="left"), 0).astype(np.int8)


def _numbered(
    catalogue: pa.Table, event_item_ids: Sequence[str] | pa.Array, n_train: Mapping[str, int] | Sequence[int] | Ints
) -> pa.Table:
    """All items in order of their index, with `in_catalogue` and `n_train`."""
    catalogue = catalogue.select(CATALOGUE_SCHEMA.names)
    event_ids = event_item_ids if isinstance(event_item_ids, pa.Array) else pa.array(event_item_ids, pa.string())
    if isinstance(n_train, Mapping):
        counted = pa.array(n_train.keys(), pa.string()), pa.array(n_train.values(), pa.int64())
    else:
        counted = event_ids, pa.array(n_train, pa.int64())
    extra = event_ids.filter(pc.invert(pc.is_in(event_ids, catalogue["item_id"].combine_chunks())))
    others = pa.table({"item_id": pc.unique(extra)})
    items = pa.concat_tables([catalogue, others], promote_options="default").combine_chunks()
    in_catalogue = np.arange(len(items)) < len(catalogue)

    count = np.zeros(len(items), np.int64)
    place = pc.index_in(items["item_id"].combine_chunks(), counted[0])
    has_count = place.is_valid().to_numpy(zero_copy_only=False)
    count[has_count] = counted[1].take(place.drop_null()).to_numpy()
    items = items.append_column("in_catalogue", pa.array(in_catalogue))
    items = items.append_column("n_train", pa.array(count))
    return items.sort_by([("n_train", "descending"), ("item_id", "ascending")]).combine_chunks()


def _repair_text(items: pa.Table, name: str, config: TextColumnConfig) -> tuple[pa.Table, dict[str, int]]:
    """`items` with the text column `name` dropped if too sparse, else filled as configured."""
    column = _column(items, name)
    if column.null_count > config.drop_above * len(column):
        return _with(items, name, pa.nulls(len(items), pa.string())), {"dropped": 1}
    known = column.drop_null()
    if config.fill == "none" or (config.fill == "mode" and not len(known)):
        return items, {}
    stand_in = config.constant if config.fill == "constant" else build_vocabulary(known, len(known), 2).words[1]
    counts = {"filled": column.null_count} if column.null_count else {}
    return _with(items, name, pc.fill_null(column, stand_in)), counts


def _learn(items: pa.Table, config: PrepareConfig) -> tuple[AttributeEncoder, npt.NDArray[np.float32], dict[str, int]]:
    """The encoder, the scaled price of each item, and what was repaired in prices."""
    categories, brands = category_levels(_column(items, "category"))[0], _column(items, "brand").drop_null()
    prices = items["price"].to_numpy().astype(np.float64)
    repaired = repair(prices, config.price)
    known = prices[~np.isnan(prices)]
    has_deciles = repaired.fit.kept and len(known) > 0
    encoder = AttributeEncoder(
        categories=build_vocabulary(categories, config.category.hash_above, config.category.hash_buckets),
        brands=build_vocabulary(brands, config.brand.hash_above, config.brand.hash_buckets),
        price=repaired.fit,
        price_deciles=tuple(np.quantile(known, DECILES).tolist()) if has_deciles else (),
    )
    return encoder, np.nan_to_num(repaired.values).astype(np.float32), repaired.repairs


def _levels(category: str) -> list[str]:
    steps = [step.strip() for step in category.replace(">", "/").split("/")]
    steps = [step for step in steps if step]
    return ["/".join(steps[: n + 1]) for n in range(len(steps))]


def _with(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)


def _as_lists(ragged: Ragged) -> pa.Array:
    return pa.ListArray.from_arrays(ragged.offsets.astype(np.int32), ragged.values.astype(np.int32))
