"""Importers: public data sets in the form in which they are published, to raw folders like any shop's.

In: the downloaded files. Out: a raw folder (events/ in shards, items.csv, settings). Rows are renamed, never judged:
what is wrong with them is for `prepare` to find and to count. It must not know how they are cleaned.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import tarfile
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rayrec.data.downloads import csv_rows, csv_shards, find, json_lines, only, text, typed_rows
from rayrec.data.raw import SETTINGS_FILE
from rayrec.errors import DataError, ResourceError, UsageError
from rayrec.progress import Task, step

SHARD_ROWS = 1_000_000
ITEM_COLUMNS = ("item_id", "category", "brand", "price", "title", "image")

Row = list[str]


@dataclass(frozen=True)
class Source:
    """A public format. `read` yields nothing: it fills the shop from the files in the folder it is given."""

    description: str
    read: Callable[[Path, Shop], None]


class Shop:
    """A raw folder being written: events go out at once, items are gathered and written at the end."""

    def __init__(self, folder: Path, task: Task) -> None:
        self.folder, self.task = folder, task
        self.items: dict[str, dict[str, str]] = {}
        self.n_events = 0
        self.names: Counter[str] = Counter()

    def events(self, columns: Iterable[str], rows: Iterable[Iterable[str]], name: str = "part") -> None:
        """Write rows of events as shards `events/<name>-00000.csv` and so on; a name may come twice."""
        self.names[name] += 1
        name = name if self.names[name] == 1 else f"{name}-{self.names[name]}"
        shard, writer, stream = 0, None, None
        try:
            for n, row in enumerate(rows):
                if n % SHARD_ROWS == 0:
                    if stream:
                        stream.close()
                    stream = (self.folder / "events" / f"{name}-{shard:05d}.csv").open(
                        "w", newline="", encoding="utf-8"
                    )
                    writer = csv.writer(stream)
                    writer.writerow(columns)
                    shard += 1
                assert writer is not None
                writer.writerow(row)
                self.n_events += 1
                if n % 100_000 == 0:
                    self.task.update(self.n_events)
        finally:
            if stream:
                stream.close()

    def item(self, item_id: str, **fields: str) -> None:
        """Set what is known of an item; later calls add to earlier ones."""
        known = {name: value for name, value in fields.items() if value}
        self.items.setdefault(item_id, {}).update(known)

    def close(self) -> None:
        """Write items.csv."""
        with (self.folder / "items.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ITEM_COLUMNS, restval="")
            writer.writeheader()
            writer.writerows({"item_id": item_id, **fields} for item_id, fields in self.items.items())

    def settings(self, **settings: Any) -> None:
        """Leave settings for `prepare` (its dotted paths, with "__" for the dot); the user's own go first."""
        tree = {path.replace("__", "."): value for path, value in settings.items()}
        (self.folder / SETTINGS_FILE).write_text(yaml.safe_dump(tree), encoding="utf-8")


def import_source(name: str, src: str | Path, dst: str | Path) -> dict[str, int]:
    """Turn the files of a public data set in `src` (a folder, file or archive) into the raw folder `dst`.

    Answers how many events and items were written. Raises UsageError for an unknown name, a missing `src` or a `dst`
    that is not empty; DataError if the files are not those of the format; ResourceError where nothing can be written.
    Nothing half-done stays.
    """
    if name not in SOURCES:
        raise UsageError(f"unknown format '{name}': choose one of {', '.join(SOURCES)}")
    src, dst = Path(src), Path(dst)
    if not src.exists():
        raise UsageError(f"{src}: no such file or folder")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UsageError(f"{dst}: exists and is not an empty folder; name another, or remove it first")
    part = dst.with_name(f"{dst.name}.part-{uuid.uuid4().hex[:8]}")
    try:
        (part / "events").mkdir(parents=True)
        with Task(f"Importing {name}") as task:
            shop = Shop(part, task)
            SOURCES[name].read(src, shop)
            if not shop.n_events:
                raise DataError(f"{src}: found no events; {name} is {SOURCES[name].description}")
            shop.close()
            task.update(shop.n_events)
        part.replace(dst)
    except csv.Error as error:
        raise DataError(f"{src}: cannot be read as a table ({error})") from None
    except (EOFError, tarfile.TarError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{src}: a damaged archive ({error}); fetch it again") from None
    except OSError as error:
        raise ResourceError(f"{dst}: cannot write there ({error.strerror or error}); nothing was left behind") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return {"events": shop.n_events, "items": len(shop.items)}


# ---------------------------------------------------------------- the formats


def _online_retail(src: Path, shop: Shop) -> None:
    """Invoices that start with C cancel; those that start with A adjust the books and stay as they are."""
    columns = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID")
    titles: Counter[tuple[str, str]] = Counter()
    prices: Counter[tuple[str, str]] = Counter()

    def events(rows: Iterable[tuple[str, ...]]) -> Iterator[Row]:
        for invoice, item, title, quantity, date, price, customer in rows:
            titles[item, title.strip()] += 1
            prices[item, price] += 1
            action = {"C": "cancel", "A": "adjust"}.get(invoice[:1], "purchase")
            yield [customer, invoice, item, _iso(date), action, price, quantity]

    header = ("user_id", "session_id", "item_id", "timestamp", "action", "price", "quantity")
    for name, rows in csv_shards(src, *columns):
        shop.events(header, events(rows), name)
    for counts, field in ((titles, "title"), (prices, "price")):
        for (item, value), _ in reversed(counts.most_common()):  # the most frequent comes last, and stays
            if value and not value.startswith(("-", "0.0")) and value != "0":
                shop.item(item, **{field: value})


def _iso(date: str) -> str:
    """12/1/2010 8:26 (as in the spreadsheet, month first) as 2010-12-01 08:26:00; anything else as it is."""
    day, _, hour = date.partition(" ")
    parts = day.split("/")
    if len(parts) != 3 or ":" not in hour or not all(part.isdigit() for part in parts):
        return date
    month, day_of_month, year = (int(part) for part in parts)
    year += 2000 if year < 100 else 0
    return f"{year:04d}-{month:02d}-{day_of_month:02d} {hour.zfill(5)}:00"


def _taobao(src: Path, shop: Shop) -> None:
    """Nine days of Beijing time, 2017-11-25 to 2017-12-03: times outside are known to be broken."""

    def events() -> Iterator[Row]:
        with text(find(src, "UserBehavior.csv", "UserBehavior*.csv", "UserBehavior*.csv.gz")) as stream:
            for row in csv.reader(stream):
                if len(row) == 5 and row[1] and row[2]:
                    shop.items.setdefault(row[1], {"category": row[2]})
                yield [row[0], row[1], row[4], row[3]] if len(row) == 5 else row[:3]

    shop.events(("user_id", "item_id", "timestamp", "action"), events())
    shop.settings(clean__after="2017-11-25T00:00:00+08:00", clean__before="2017-12-04T00:00:00+08:00")


def _movielens_1m(src: Path, shop: Shop) -> None:
    def events() -> Iterator[Row]:
        with text(find(src, "ratings.dat")) as stream:
            for line in stream:
                user, item, rating, timestamp = (*line.rstrip("\r\n").split("::"), "", "", "", "")[:4]
                yield [user, item, timestamp, "rate", rating]

    shop.events(("user_id", "item_id", "timestamp", "action", "value"), events())
    movies = find(src.parent if src.is_file() else src, "movies.dat")
    with text(movies, "latin-1") as stream:
        for line in stream:
            item, title, genres = (*line.rstrip("\r\n").split("::"), "", "")[:3]
            shop.item(item, title=title, category=genres)


def _hm(src: Path, shop: Shop) -> None:
    rows = csv_rows(find(src, "transactions_train.csv"), "customer_id", "article_id", "t_dat", "price")
    shop.events(
        ("user_id", "item_id", "timestamp", "action", "price"),
        ([user, item, day, "purchase", price] for user, item, day, price in rows),
    )
    folder = src.parent if src.is_file() else src
    columns = ("article_id", "prod_name", "product_group_name", "product_type_name", "index_group_name")
    for item, title, group, kind, brand in csv_rows(find(folder, "articles.csv"), *columns):
        image = folder / "images" / item[:3] / f"{item}.jpg"
        path = str(image.absolute()) if image.exists() else ""
        shop.item(item, title=title, category=f"{group}/{kind}", brand=brand, image=path)


def _retailrocket(src: Path, shop: Shop) -> None:
    """Item properties are hashed, all but `categoryid`; an item's latest category counts."""
    rows = csv_rows(find(src, "events.csv"), "visitorid", "itemid", "timestamp", "event")
    shop.events(("user_id", "item_id", "timestamp", "action"), rows)
    latest: dict[str, int] = {}
    for path in sorted((src.parent if src.is_file() else src).rglob("item_properties*.csv")):
        for time, item, name, value in csv_rows(path, "timestamp", "itemid", "property", "value"):
            if name == "categoryid" and int(time or 0) >= latest.get(item, 0):
                latest[item] = int(time or 0)
                shop.item(item, category=value)


def _amazon_reviews(src: Path, shop: Shop) -> None:
    """Reviews as JSON lines, of 2014 and 2018 (reviewerID, asin, ...) or 2023 (user_id, parent_asin, ...)."""
    files = [src] if src.is_file() else sorted(path for path in src.rglob("*.json*") if path.is_file())
    metas = [path for path in files if path.name.lower().startswith("meta")]

    def events(path: Path) -> Iterator[Row]:
        for row in json_lines(path):
            user = row.get("reviewerID") or row.get("user_id") or ""
            item = row.get("parent_asin") or row.get("asin") or ""
            rating = row.get("overall", row.get("rating", ""))
            yield [user, item, str(row.get("unixReviewTime", row.get("timestamp", ""))), "rate", str(rating)]

    for path in files:
        if path not in metas:
            name = path.name.split(".")[0]
            shop.events(("user_id", "item_id", "timestamp", "action", "value"), events(path), name)
    for path in metas:
        for row in json_lines(path):
            categories = row.get("categories") or row.get("category") or []
            flat = [word for part in categories for word in (part if isinstance(part, list) else [part])]
            shop.item(
                str(row.get("parent_asin") or row.get("asin") or ""),
                title=str(row.get("title") or ""),
                brand=str(row.get("brand") or row.get("store") or ""),
                price=str(row.get("price") or "").strip("$ "),
                category="|".join(dict.fromkeys(map(str, flat))) if isinstance(categories, list) else str(categories),
            )


def _recbole(src: Path, shop: Shop) -> None:
    """Atomic files: what was done in NAME.inter, what is known of items in NAME.item, if there is one.

    A row is a rating where there is a column of that name, else a view; columns of other names are passed over.
    """
    path = only(src, "*.inter")
    kinds, rows = typed_rows(path)
    needed = ("user_id", "item_id", "timestamp")
    if missing := [name for name in needed if name not in kinds]:
        raise DataError(f"{path}: no column {', '.join(missing)}; it has: {', '.join(kinds)}")
    if others := [name for name in kinds if name not in (*needed, "rating")]:
        step(f"{path.name}: passed over the columns {', '.join(others)}")
    place = {name: at for at, name in enumerate(kinds)}

    def events() -> Iterator[Row]:
        for row in rows:
            cells = [*row, *[""] * len(kinds)]
            done = ["rate", cells[place["rating"]]] if "rating" in place else ["view", ""]
            yield [*(cells[place[name]] for name in needed), *done]

    shop.events(("user_id", "item_id", "timestamp", "action", "value"), events())
    items = path.with_suffix(".item")
    if items.exists():
        _recbole_items(items, shop)


RECBOLE_NAMES = {
    "title": ("title", "movie_title", "movie_name", "item_name", "name"),
    "category": ("categories", "category", "class", "genres", "genre"),
    "brand": ("brand",),
    "price": ("price",),
}
"""Our columns, and what they are called in RecBole's collection of data sets; the first that is there is taken."""


def _recbole_items(path: Path, shop: Shop) -> None:
    kinds, rows = typed_rows(path)
    if "item_id" not in kinds:
        raise DataError(f"{path}: no column item_id; it has: {', '.join(kinds)}")
    column = {ours: next((name for name in theirs if name in kinds), None) for ours, theirs in RECBOLE_NAMES.items()}
    for row in rows:
        cells = dict(zip(kinds, row, strict=False))
        fields = {ours: cells.get(name, "") for ours, name in column.items() if name}
        if kinds.get(column["category"] or "") == "token_seq":
            fields["category"] = "|".join(_parts(fields["category"]))
        shop.item(cells.get("item_id", ""), **fields)


def _parts(cell: str) -> list[str]:
    """The parts of a token_seq: by commas where there are any or parts are quoted, as in some sets; else by spaces."""
    has_commas = ", " in cell or cell.startswith(("'", '"'))
    return [part.strip("'\"") for part in cell.split(", ")] if has_commas else cell.split()


def _s3rec(src: Path, shop: Shop) -> None:
    """What was done is not told: all are views. Attributes are numbers without names."""
    path = only(src, "*.txt", but="_sample.txt")

    def events() -> Iterator[Row]:
        n_of_user: Counter[str] = Counter()
        with text(path, "utf-8-sig") as stream:
            for line in stream:
                user, *items = line.split() or [""]
                for item in items:
                    yield [user, item, str(n_of_user[user]), "view"]
                    n_of_user[user] += 1

    shop.events(("user_id", "item_id", "timestamp", "action"), events())
    attributes = path.with_name(f"{path.stem}_item2attributes.json")
    if attributes.exists():
        for item, codes in _lists(attributes).items():
            shop.item(item, category="|".join(map(str, codes)))


def _lists(path: Path) -> dict[str, list[Any]]:
    """A JSON object of lists. Raises DataError."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(one, list) for one in value.values()):
        raise DataError(f"{path}: not a JSON object of items and lists of their attributes")
    return value


SOURCES: dict[str, Source] = {
    "online_retail": Source(
        "UCI Online Retail: CSV with InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID; "
        "a file, a folder or a tar of files",
        _online_retail,
    ),
    "taobao_userbehavior": Source("Taobao UserBehavior.csv: user,item,category,behavior,time, no header", _taobao),
    "movielens_1m": Source("MovieLens-1M: ratings.dat and movies.dat", _movielens_1m),
    "hm": Source("H&M fashion (Kaggle): transactions_train.csv, articles.csv and images/", _hm),
    "retailrocket": Source("Retailrocket (Kaggle): events.csv and item_properties_part*.csv", _retailrocket),
    "amazon_reviews": Source(
        "Amazon reviews of 2014, 2018 or 2023: JSON lines, with or without meta files", _amazon_reviews
    ),
    "recbole": Source("RecBole's atomic files: NAME.inter with a timestamp, with or without NAME.item", _recbole),
    "s3rec": Source("S3-Rec's sequences: NAME.txt, a line a user, with or without NAME_item2attributes.json", _s3rec),
}
"""The known formats by name."""
