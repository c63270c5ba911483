"""The catalogue's raw files to clean items, with an account of every row.

In: the items files of a raw folder. Out: a clean catalogue, the images it names, rejects and counts. The catalogue
is read as a whole: it must fit into memory. It must not know events.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data.ids import clean_ids
from rayrec.data.items import clean_items
from rayrec.data.ledger import Ledger
from rayrec.data.mapping import ITEM_COLUMNS, Mapping, resolve
from rayrec.data.raw import Raw, plan
from rayrec.data.readers import Piece, read_piece
from rayrec.errors import DataError
from rayrec.schema import REJECT_SCHEMA

CATALOGUE_TEXT = pa.schema([(name, pa.string()) for name in (*ITEM_COLUMNS, "file")] + [("row", pa.int64())])


@dataclass(frozen=True)
class RawCatalogue:
    """A clean catalogue.

    items    items.CATALOGUE_SCHEMA, one row an item
    files    [K] string, the file of each item
    images   (item_id, image value, file, row) of the rows that name an image
    rejects  REJECT_SCHEMA
    repairs  {what: n}
    report   the section of report.json
    """

    items: pa.Table
    files: pa.Array
    images: list[tuple[str, str, str, int]]
    rejects: pa.Table
    repairs: dict[str, int]
    report: dict[str, Any]


def read_catalogue(raw: Raw, mapping: Mapping) -> RawCatalogue:
    """Read and clean all items files; none is an empty catalogue. Raises DataError if one has no item_id column."""
    names = [file.name for file in raw.items]
    ledger, rows_of_file = Ledger(), Counter[int]()
    tables, broken = [CATALOGUE_TEXT.empty_table()], []
    for piece in (piece for task in plan(raw.fs, raw.items) for piece in task):
        before = rows_of_file[piece.file]
        for block in read_piece(raw.fs, piece, partial(_columns, piece, mapping)):
            name = pa.array([piece.raw.name] * len(block.rows), pa.string())
            row = pa.array(block.row_R + before)
            tables.append(block.rows.append_column("file", name).append_column("row", row))
            broken += [
                {"file": piece.raw.name, "row": b.row + before, "reason": b.reason, "raw": b.text} for b in block.broken
            ]
            rows_of_file[piece.file] += block.read
    rows = pa.concat_tables(tables, promote_options="default")
    cleaned = clean_items(rows)
    rejects = pa.concat_tables([pa.Table.from_pylist(broken, REJECT_SCHEMA), cleaned.rejects])
    for file, n in rows_of_file.items():
        ledger.of(file).read = n
    for name, reason in zip(rejects["file"].to_pylist(), rejects["reason"].to_pylist(), strict=True):
        ledger.of(names.index(name)).rejected[reason] += 1
    for name, n in Counter(cleaned.collapsed_file.to_pylist()).items():
        ledger.of(names.index(name)).collapsed += n
    kept = {names.index(name): n for name, n in Counter(cleaned.kept_file.to_pylist()).items()}
    report = ledger.report(names, kept)
    return RawCatalogue(cleaned.kept, cleaned.kept_file, _images(rows), rejects, cleaned.repairs, report)


def overlaid(old: RawCatalogue, new: RawCatalogue, gone: Set[str]) -> RawCatalogue:
    """The catalogue of `old` with `new` on top: an item that `new` lists is as it says there, the others stay.

    gone: files of `old` that `new` stands in for, and whose items go. The files of the two bear different names
    otherwise. An item of `old` that `new` lists again counts as collapsed. Repairs are those of both.
    """
    replaced = pc.is_in(old.files, pa.array(sorted(gone), pa.string()))
    again = pc.and_not(pc.is_in(old.items["item_id"].combine_chunks(), new.items["item_id"].combine_chunks()), replaced)
    stays = pc.invert(pc.or_(replaced, again))
    accounts = {file: dict(account) for file, account in old.report["files"].items() if file not in gone}
    for file, n in Counter(old.files.filter(again).to_pylist()).items():
        accounts[file]["kept"] -= n
        accounts[file]["collapsed"] += n
    accounts |= new.report["files"]
    total: dict[str, Any] = {
        name: sum(one[name] for one in accounts.values()) for name in ("read", "kept", "collapsed")
    }
    rejected = sum((Counter(one["rejected"]) for one in accounts.values()), Counter[str]())
    theirs = old.rejects.filter(pc.invert(pc.is_in(old.rejects["file"], pa.array(sorted(gone), pa.string()))))
    return RawCatalogue(
        items=pa.concat_tables([old.items.filter(stays), new.items]).combine_chunks(),
        files=pa.concat_arrays([old.files.filter(stays), new.files]),
        images=[*new.images, *(image for image in old.images if image[2] not in gone)],
        rejects=pa.concat_tables([theirs, new.rejects]),
        repairs=dict(Counter(old.repairs) + Counter(new.repairs)),
        report={**total, "rejected": dict(sorted(rejected.items())), "files": accounts},
    )


def _columns(piece: Piece, mapping: Mapping, found: list[str]) -> dict[str, str]:
    columns = resolve(found, ITEM_COLUMNS, mapping)
    if found and "item_id" not in columns:
        raise DataError(
            f"{piece.raw.name}: no column item_id; it has: {', '.join(found)}. Name yours in a mapping file "
            "(columns: {item_id: THEIR_NAME}) and pass it with --map"
        )
    return columns


def _images(rows: pa.Table) -> list[tuple[str, str, str, int]]:
    named = rows.filter(pc.and_(rows["image"].is_valid(), rows["item_id"].is_valid()))
    ids = clean_ids(named["item_id"].combine_chunks()).to_pylist()
    columns = (ids, named["image"].to_pylist(), named["file"].to_pylist(), named["row"].to_pylist())
    return list(zip(*columns, strict=True))
