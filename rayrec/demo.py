"""`rayrec demo`: everything once, on the sample shop, told step by step.

In: a folder and a port. Out: a served shop and a table; or, with `leave`, a scripted shopper's lists before and after.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from rayrec import cluster
from rayrec.bundle import default_state
from rayrec.config import PrepareConfig, ServeConfig, preset
from rayrec.data.dataset import Dataset
from rayrec.data.pipelines import prepare
from rayrec.data.sample import Oracle, SampleConfig, write_shop
from rayrec.errors import ResourceError, UsageError
from rayrec.evaluation.oracle import oracle_figures
from rayrec.evaluation.table import table_lines
from rayrec.progress import step
from rayrec.serving.app import checked_address, run_server, served
from rayrec.serving.judging import judge
from rayrec.serving.keys import own_headers
from rayrec.training.trainer import train

COLOUR, KIND = "Red", "shoes"
CLICKS = 3
SHOWN = 10
MARK = ".rayrec-demo"


def run(work: Path, port: int, leave: bool) -> dict[str, Any]:
    """Sample shop -> prepare -> train -> evaluate -> serve in `work`, which is made anew.

    leave: run a scripted shopper against the endpoint and stop; else serve until Ctrl-C.
    Raises UsageError if `work` holds something else, ResourceError at once if the port is in use, and at the end if
    the shopper's clicks change nothing.
    """
    started = time.monotonic()
    checked_address("127.0.0.1", port)  # known before the work, not after it
    _clear(work)
    raw, dataset, bundles = work / "shop", work / "dataset", work / "bundles"
    with _chapter(1, "a sample shop whose right answers are known"):
        write_shop(raw, SampleConfig())
    try:
        cluster.connect()  # one Ray for all three, with all that training asks of it
        with _chapter(2, "prepare: clean logs, catalogue and pictures with Ray Data"):
            report = prepare(str(raw), str(dataset), PrepareConfig())
        with _chapter(3, "train: CNN + LSTM + fusion with Ray Train"):
            bundle = train(str(dataset), str(bundles), preset("small"))
        with _chapter(4, "evaluate: the model beside the floors and the oracle"):
            result = judge(str(bundle.path), str(dataset), "test", work / "report.html")
            known = Oracle.open(raw), Dataset.open(str(dataset))
            oracle, oracle_told = oracle_figures(*known), oracle_figures(*known, is_told=True)
    finally:
        cluster.disconnect()  # serving starts Ray with settings of its own
    lines = table_lines(result, {"oracle": oracle, "oracle, told": oracle_told})
    story: dict[str, Any] = {
        "bundle": str(bundle.path),
        "report": str(work / "report.html"),
        "events": report["events"]["kept"],
        "table": {
            "oracle": oracle,
            "oracle_told": oracle_told,
            "model": {name: result[name] for name in ("metrics", "next", "cart", "purchase")},
            **result["floors"],
        },
    }
    state, config = default_state(str(bundles)), ServeConfig()
    step("[5/5] serve: Ray Serve")
    if leave:
        with served(str(bundles), state_url=state, config=config, port=port) as url:
            story |= {"url": url, **shop_for(url, _wanted(bundle.catalogue.table.to_pylist()))}
        _print(lines)
        return {**story, "seconds": round(time.monotonic() - started, 1)}

    def ready(url: str) -> None:
        _print(lines)
        step(f"report      {work / 'report.html'}")
        step(f"storefront  {url}/      API {url}/docs      Ctrl-C stops")

    run_server(str(bundles), state_url=state, config=config, port=port, on_ready=ready)
    return {**story, "seconds": round(time.monotonic() - started, 1)}


@contextmanager
def _chapter(number: int, title: str) -> Iterator[None]:
    step(f"[{number}/5] {title}")
    started = time.monotonic()
    yield
    step(f"      done in {time.monotonic() - started:.1f} s")


def _print(lines: list[str]) -> None:
    step("")
    for line in lines:
        step(line)
    step("")


def _clear(work: Path) -> None:
    """Begin in an empty folder; only a folder of an earlier demo is emptied."""
    if work.exists() and (not work.is_dir() or (any(work.iterdir()) and not (work / MARK).exists())):
        raise UsageError(f"{work}: holds something that is not a demo's; name another folder with --work")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        (work / MARK).touch()
    except OSError as error:
        raise ResourceError(f"{work}: cannot write here ({error.strerror}); name another folder with --work") from None


# ---------------------------------------------------------------- the scripted shopper


def _wanted(items: list[dict[str, Any]]) -> list[str]:
    """Ids of red shoes, the most popular first."""
    red = [item for item in items if item["title"].startswith(f"{COLOUR} ") and item["category"] == KIND]
    return [item["item_id"] for item in sorted(red, key=lambda item: -item["n_train"])]


def shop_for(url: str, wanted: list[str]) -> dict[str, Any]:
    """A new visitor looks at the home shelf, clicks three of `wanted`, and looks again.

    -> "before" and "after": titles of the lists, and how many are of the wanted kind ("hits_before", "hits_after").
    Raises ResourceError if the list did not turn to what was clicked.
    """
    visitor = f"demo-{uuid.uuid4().hex[:8]}"
    with httpx.Client(base_url=url, timeout=10, headers=own_headers()) as client:
        before = _shelf(client, visitor)
        step(f"\na new visitor sees\n{_titles(before)}")
        for item_id in wanted[:CLICKS]:
            sent = {"session_id": visitor, "item_id": item_id, "action": "click"}
            client.post("/v1/events", json={"events": [sent]}).raise_for_status()
            step(f"  clicks {client.get(f'/v1/items/{item_id}').raise_for_status().json()['title']}")
        after = _shelf(client, visitor)
        step(f"and then sees\n{_titles(after)}")
    hits = [sum(_fits(item) for item in shelf) for shelf in (before, after)]
    kind = [sum(item["category"] == KIND for item in shelf) for shelf in (before, after)]
    step(
        f"{COLOUR.lower()} {KIND} in the list: {hits[0]} before, {hits[1]} after; "
        f"{KIND} of any colour: {kind[0]} before, {kind[1]} after"
    )
    if hits[1] <= hits[0]:
        raise ResourceError("the clicks did not change the list: this should not happen; please report it")
    return {
        "before": [item["title"] for item in before],
        "after": [item["title"] for item in after],
        "hits_before": hits[0],
        "hits_after": hits[1],
    }


def _shelf(client: httpx.Client, visitor: str) -> list[dict[str, Any]]:
    body = {"session_id": visitor, "scene": "home", "k": SHOWN}
    items: list[dict[str, Any]] = client.post("/v1/recommend", json=body).raise_for_status().json()["items"]
    return items


def _fits(item: dict[str, Any]) -> bool:
    return bool(item["category"] == KIND and item["title"].startswith(f"{COLOUR} "))


def _titles(items: list[dict[str, Any]]) -> str:
    return "\n".join(f"  {place:2d}  {item['title']}" for place, item in enumerate(items, 1))
