"""Names of columns and actions: the user's mapping, and the names that logs commonly use.

In: a mapping file, the columns found in a file. Out: which found column holds which canonical one, and what each
action's name means. It must not know how files are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from collections.abc import Mapping as Names
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from rayrec.errors import DataError, UsageError
from rayrec.schema import ACTIONS, SYNONYMS

EVENT_COLUMNS: Names[str, tuple[str, ...]] = MappingProxyType({
    "user_id": (
        "user", "uid", "customer_id", "customer", "visitor_id", "visitor", "member_id", "buyer_id", "client_id",
    ),
    "session_id": ("session", "visit_id", "visit", "invoice", "invoice_no", "basket_id", "order_id"),
    "item_id": ("item", "product_id", "product", "sku", "stock_code", "article_id", "asin", "goods_id", "content_id"),
    "timestamp": (
        "time", "ts", "datetime", "event_time", "event_timestamp", "timestamp_ms", "date_time", "unix_time", "date",
        "event_date", "invoice_date", "created_at", "t_dat",
    ),
    "action": ("event", "event_type", "event_name", "behavior", "behaviour", "behavior_type", "interaction", "type"),
    "event_id": ("eventid", "event_uuid"),
    "value": ("rating", "stars", "score"),
    "price": ("unit_price", "item_price"),
    "quantity": ("qty", "units"),
    "request_id": (), "position": ("rank",), "scene": (), "propensity": (), "model": (), "variant": (),
})  # fmt: skip
"""Canonical columns of events, and other names for each, the likeliest first."""

ITEM_COLUMNS: Names[str, tuple[str, ...]] = MappingProxyType({
    "item_id": EVENT_COLUMNS["item_id"],
    "category": ("category_id", "categories", "product_type", "genres", "department"),
    "brand": ("brand_name", "manufacturer", "vendor"),
    "price": ("unit_price", "item_price", "list_price"),
    "title": ("name", "product_name", "item_name", "description", "prod_name"),
    "image": ("image_url", "image_uri", "image_path", "picture"),
})  # fmt: skip
"""Canonical columns of the catalogue, and other names for each."""


class Mapping(BaseModel):
    """A user's own names. `columns`: canonical to theirs. `actions`: theirs to canonical.

    >>> Mapping(columns={"user_id": "kunde"}, actions={"kauf": "purchase"}).actions["kauf"]
    'purchase'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    columns: dict[str, str] = {}
    actions: dict[str, str] = {}

    @field_validator("columns")
    @classmethod
    def _columns_are_canonical(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in EVENT_COLUMNS and name not in ITEM_COLUMNS:
                known = ", ".join(dict.fromkeys([*EVENT_COLUMNS, *ITEM_COLUMNS]))
                raise ValueError(f"'{name}' is no canonical column; write canonical: theirs, with one of {known}")
        return columns

    @field_validator("actions")
    @classmethod
    def _actions_are_canonical(cls, actions: dict[str, str]) -> dict[str, str]:
        for theirs, ours in actions.items():
            if ours not in ACTIONS:
                raise ValueError(f"'{theirs}: {ours}': '{ours}' is no canonical action; one of {', '.join(ACTIONS)}")
        return actions

    def action(self, name: str) -> str | None:
        """The canonical action that a log calls `name`, or None if it is not known."""
        if name in self.actions:
            return self.actions[name]
        word = name.strip().lower()
        word = self.actions.get(word, SYNONYMS.get(word, word))
        return word if word in ACTIONS else None


def load_mapping(path: str | Path) -> Mapping:
    """Read a mapping file. Raises UsageError if it is missing, no YAML, or names what does not exist."""
    try:
        tree: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--map {path}: cannot read it ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--map {path}: not YAML ({error.__class__.__name__})") from None
    try:
        return Mapping.model_validate(tree if tree is not None else {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"--map {path}: {where or 'the file'}: {first['msg'].removeprefix('Value error, ')}") from None


def resolve(found: Iterable[str], known: Names[str, tuple[str, ...]], mapping: Mapping) -> dict[str, str]:
    """Which of the `found` columns holds each canonical one; canonical columns that are not there are left out.

    The mapping's name goes first, then the canonical name, then the synonyms in their order; case, spaces and
    punctuation of synonyms do not matter.

    >>> resolve(["CustomerID", "StockCode", "x"], EVENT_COLUMNS, Mapping())
    {'user_id': 'CustomerID', 'item_id': 'StockCode'}
    """
    found = list(found)
    by_plain_name = {_plain(name): name for name in reversed(found)}
    columns: dict[str, str] = {}
    for canonical, synonyms in known.items():
        mapped = mapping.columns.get(canonical)
        if mapped in found:
            columns[canonical] = mapped
            continue
        for name in (canonical, *synonyms):
            theirs = by_plain_name.get(_plain(name))
            if theirs is not None and theirs not in columns.values() and theirs not in mapping.columns.values():
                columns[canonical] = theirs
                break
    return columns


def require_event_columns(file: str, found: Iterable[str], columns: Names[str, str], mapping: Mapping) -> None:
    """Raise DataError that says which column is missing in `file`, what was found, and what to do."""
    found = list(found)
    for canonical, theirs in mapping.columns.items():
        if canonical in EVENT_COLUMNS and canonical not in ITEM_COLUMNS and theirs not in found:
            raise DataError(
                f"{file}: the mapping says {canonical}: {theirs}, and there is no such column; {_has(found)}"
            )
    needed = [("user_id", "session_id"), ("item_id",), ("timestamp",), ("action",)]
    missing = [" or ".join(group) for group in needed if not any(name in columns for name in group)]
    if missing:
        raise DataError(
            f"{file}: no column {', no column '.join(missing)}; {_has(found)}. Name yours in a mapping file "
            f"(columns: {{{missing[0].split()[0]}: THEIR_NAME}}) and pass it with --map"
        )


def _has(found: list[str]) -> str:
    return f"it has: {', '.join(found)}" if found else "it has no columns"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
