"""The peer in `rayrec bench prepare`: the same cleaning as a plain, careful pandas script in one process.

In: a raw folder with events.csv. Out: events, sequences and rejects as Parquet, and counts. It must not use our stages.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

ACTIONS = {"pv": "view", "cart": "cart", "fav": "favorite", "buy": "purchase", "cancel": "cancel"}
HOUR_MS = 3_600_000


def prepare(raw: str, out: str) -> dict[str, int]:
    """Clean `raw/events.csv` into the folder `out`."""
    folder = Path(out)
    folder.mkdir()
    rows = pd.read_csv(Path(raw) / "events.csv", dtype=str)
    rows["row"] = np.arange(1, len(rows) + 1)
    events, rejects = _judged(rows)
    events = events.sort_values(["user_id", "time_ms", "row"], kind="stable", ignore_index=True)
    events, collapsed = _collapsed(events)
    events, robots = _without_robots(events)
    events, cancelled = _without_cancelled(events)
    pd.concat([rejects, robots, cancelled]).astype("string").to_parquet(folder / "rejects.parquet", index=False)
    _write_sequences(events, folder)
    events.drop(columns="row").to_parquet(folder / "events.parquet", index=False)
    return {"kept": len(events), "collapsed": collapsed}


def _judged(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    user = rows["user_id"].str.strip().str.replace(r"^(\d+)\.0+$", r"\1", regex=True)
    item = rows["item_id"].str.strip().str.replace(r"^(\d+)\.0+$", r"\1", regex=True)
    seconds = pd.to_numeric(rows["timestamp"], errors="coerce")
    action = rows["action"].str.lower().map(ACTIONS)
    price, quantity = (pd.to_numeric(rows[name], errors="coerce") for name in ("price", "quantity"))
    checks = {
        "no_user": user.isna() | (user == ""),
        "no_item": item.isna() | (item == ""),
        "bad_time": seconds.isna(),
        "time_out_of_window": (seconds < 788_918_400) | (seconds > time.time()),
        "unknown_action": action.isna(),
        "price_not_a_number": price.isna() & rows["price"].notna(),
        "impossible_price": price < 0,
        "impossible_quantity": quantity <= 0,
    }
    reason = np.select(list(checks.values()), list(checks), "")
    bad = reason != ""
    rejects = rows[bad].assign(reason=reason[bad])
    time_ms = seconds[~bad].mul(1000).astype("int64")
    columns = {"user_id": user, "item_id": item, "action": action, "price": price, "quantity": quantity}
    good = pd.DataFrame({name: column[~bad] for name, column in columns.items()})
    return good.assign(time_ms=time_ms, row=rows["row"][~bad]), rejects


def _collapsed(events: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    key = ["user_id", "time_ms", "item_id", "action", "price", "quantity"]
    copies = events.duplicated(key, keep=False)
    group = events[copies].groupby(key, dropna=False, sort=False)
    total = group["quantity"].transform("sum")
    booked = events["action"].isin(["purchase", "cancel"]) & copies
    repeat = events.duplicated(key)
    events.loc[booked, "quantity"] = total[booked[copies]]
    return events[~repeat].reset_index(drop=True), int(repeat.sum())


def _without_robots(events: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    counted = events[~events["action"].isin(["purchase", "cancel", "impression"])]
    gap = counted["time_ms"] - counted.groupby("user_id", sort=False)["time_ms"].shift(1000)
    robot = events["user_id"].isin(counted.loc[gap < HOUR_MS, "user_id"].unique())
    return events[~robot].reset_index(drop=True), events[robot].assign(reason="bot")


def _without_cancelled(events: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    booked = events[events["action"].isin(["purchase", "cancel"])]
    pairs = booked.loc[booked["action"] == "cancel", ["user_id", "item_id"]].drop_duplicates()
    touched = booked.reset_index().merge(pairs, on=["user_id", "item_id"]).sort_values("index")
    left = events["quantity"].to_numpy(copy=True)
    reason = np.full(len(events), "", object)
    stacks: dict[tuple[str, str], list[int]] = {}
    columns = (touched[name] for name in ("index", "user_id", "item_id", "action", "quantity"))
    for n, user, item, action, quantity in zip(*columns, strict=True):
        stack = stacks.setdefault((user, item), [])
        if action == "purchase":
            stack.append(n)
            continue
        match = next((m for m in reversed(stack) if left[m] >= quantity), None)
        reason[n] = "cancel_without_purchase" if match is None else "cancels_a_purchase"
        if match is not None:
            left[match] -= quantity
            if left[match] == 0:
                reason[match] = "cancelled"
                stack.remove(match)
    events = events.assign(quantity=left)
    gone = reason != ""
    return events[~gone].reset_index(drop=True), events[gone].assign(reason=reason[gone])


def _write_sequences(events: pd.DataFrame, folder: Path) -> None:
    """One row a visitor, with item numbers by frequency; the last two events are withheld."""
    codes, users = pd.factorize(events["user_id"])
    offsets = pa.array(np.r_[0, np.cumsum(np.bincount(codes))].astype(np.int32))
    frequency = events["item_id"].value_counts()
    index = events["item_id"].map(pd.Series(np.arange(1, len(frequency) + 1), frequency.index)).to_numpy(np.int32)
    action = pd.factorize(events["action"])[0].astype(np.int8)
    length = np.diff(offsets)
    n_train = np.where(length >= 3, length - 2, length)
    lists = {"item": index, "action": action, "time_ms": events["time_ms"].to_numpy()}
    columns = {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in lists.items()}
    pq.write_table(pa.table({"user_id": pa.array(users), **columns, "n_train": n_train}), folder / "sequences.parquet")
    items = pd.DataFrame({"item_id": frequency.index, "events": frequency.to_numpy()})
    items.to_parquet(folder / "items.parquet", index=False)
