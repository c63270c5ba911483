"""Rules: which candidates may be shown, and why the others may not.

In: items, a request's filters, what the visitor bought or hid. Out: a mask and counts of what was removed by
reason. It must not know scores. An item that several rules forbid is counted once, under the first of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrec.catalogue import Catalogue

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
NOTHING: Mapping[str, Bools] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Filters:
    """What the caller wants to see. Empty means anything; several values of one filter mean any of them."""

    category: tuple[str, ...] = ()
    brand: tuple[str, ...] = ()
    item_type: tuple[str, ...] = ()
    price_min: float | None = None
    price_max: float | None = None
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Forbidden:
    """Item ids that this visitor must not be shown now, by reason, in order of precedence."""

    context: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()
    bought: frozenset[str] = frozenset()
    seen: frozenset[str] = frozenset()


class Rules:
    """Rules over one catalogue."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue

    def apply(
        self, item_C: Ints, filters: Filters, forbidden: Forbidden, barred: Mapping[str, Bools] = NOTHING
    ) -> tuple[Bools, dict[str, int]]:
        """Which items may be shown ([C] bool), and how many each reason removed.

        barred: items of the whole catalogue that may not be shown, by reason ([N + 1] bool each). An item without a
        price passes no price filter, one without a category no category filter, and so on.
        """
        keep_C = np.ones(len(item_C), bool)
        removed: dict[str, int] = {}

        def forbid(reason: str, bad_C: Bools) -> None:
            n = int(np.count_nonzero(bad_C & keep_C))
            if n:
                removed[reason] = removed.get(reason, 0) + n
                keep_C[bad_C] = False

        for reason in ("context", "excluded", "hidden", "bought", "seen"):
            rows = self._rows(getattr(forbidden, reason))
            if len(rows):
                forbid(reason, np.isin(item_C, rows))
        for reason, rows_of, names in (
            ("category", self._in_category, filters.category),
            ("brand", self._of_brand, filters.brand),
            ("item_type", {}, filters.item_type),  # catalogues hold no item type yet, so no item is of one
        ):
            if names:
                wanted = np.concatenate([rows_of.get(name, _NONE) for name in names])
                forbid(reason, ~np.isin(item_C, wanted))
        for reason, barred_N in barred.items():
            forbid(reason, barred_N[item_C])
        price_C = self.catalogue.price[item_C]
        if filters.price_min is not None:
            forbid("price", ~(price_C >= filters.price_min))
        if filters.price_max is not None:
            forbid("price", ~(price_C <= filters.price_max))
        return keep_C, removed

    def mask(self, filters: Filters, forbidden: Forbidden, barred: Mapping[str, Bools] = NOTHING) -> Bools:
        """The whole catalogue under the same rules. [N + 1] bool."""
        return self.apply(np.arange(len(self.catalogue) + 1), filters, forbidden, barred)[0]

    def named(self, column: str, names: Sequence[str]) -> Bools:
        """Items of any of the categories, or brands, of these names. [N + 1] bool."""
        rows_of = self._in_category if column == "category" else self._of_brand
        named_N = np.zeros(len(self.catalogue) + 1, bool)
        for name in names:
            named_N[rows_of.get(name, _NONE)] = True
        return named_N

    def category_of(self, item_id: str) -> str | None:
        """All of an item's categories, as the catalogue writes them."""
        row = self.catalogue.index.get(item_id)
        return None if row is None else self.catalogue.table["category"][row - 1].as_py()

    def _rows(self, item_ids: Iterable[str]) -> Ints:
        index = self.catalogue.index
        return np.array([index[item_id] for item_id in item_ids if item_id in index], np.int64)

    @cached_property
    def _in_category(self) -> dict[str, Ints]:
        return _rows_by_name(self.catalogue.table["category"], split=True)

    @cached_property
    def _of_brand(self) -> dict[str, Ints]:
        return _rows_by_name(self.catalogue.table["brand"], split=False)


_NONE = np.empty(0, np.int64)


def _rows_by_name(column: pa.ChunkedArray, *, split: bool) -> dict[str, Ints]:
    """Catalogue rows of each name; with `split`, "a|b" counts for "a", for "b" and for "a|b"."""
    distinct = column.combine_chunks().dictionary_encode()
    code_N = distinct.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    by_code = np.argsort(code_N, kind="stable")
    bounds = np.searchsorted(code_N[by_code], np.arange(len(distinct.dictionary) + 1))
    rows: defaultdict[str, list[Ints]] = defaultdict(list)
    for code, name in enumerate(distinct.dictionary.to_pylist()):
        if name:
            for part in {name, *name.split("|")} if split else {name}:
                rows[part].append(by_code[bounds[code] : bounds[code + 1]] + 1)
    return {name: np.sort(np.concatenate(found)) for name, found in rows.items()}
