"""A list without a server: the same service, asked once in this process.

In: a bundle, a state URL, a user. Out: the body of /v1/recommend. It must not know Ray.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pyarrow.compute as pc
from pydantic import ValidationError

from rayrec.bundle import Bundle
from rayrec.config import ServeConfig
from rayrec.data.dataset import Dataset
from rayrec.errors import UsageError
from rayrec.schema import ACTIONS, SESSION_PREFIX
from rayrec.serving import wire
from rayrec.serving.editing import editor
from rayrec.serving.scorer import load_scorer
from rayrec.serving.service import Service
from rayrec.state import open_state


def recommend(
    bundle_path: str, state_url: str, user_id: str, scene: str, k: int, item_id: str | None, history: str | None,
    query: str | None = None, config: ServeConfig | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The list of one user. Nothing of it is stored.

    item_id, query: what is at hand, and what is searched for. history: a dataset to take the user's past from, beside
    what the state holds; UsageError if it has no such user.
    """
    bundle = Bundle.open(bundle_path)
    session_id = user_id.removeprefix(SESSION_PREFIX) if user_id.startswith(SESSION_PREFIX) else None
    try:
        request = wire.RecommendRequest(
            user_id=None if session_id else user_id,
            session_id=session_id,
            scene=scene,
            k=k,
            context=wire.Context(item_id=item_id or None, query=query),
            events=past(Dataset.open(history), user_id) if history else (),
            store=False,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}") from None
    service = Service(
        load_scorer(bundle),
        open_state(state_url),
        config or ServeConfig(),
        model=bundle.version,
        image_of=None,
        replica_id="offline",
        edit=editor(bundle),
    )

    async def ask() -> dict[str, Any]:
        try:
            await service.live.follow_items()
            await service.live.follow_trends()
            return await service.recommend(request)
        finally:
            await service.close()

    return asyncio.run(ask())


def past(dataset: Dataset, user_id: str) -> tuple[wire.ItemEvent, ...]:
    """The user's newest events in a dataset, as many as a request may carry."""
    sequences = dataset.sequences(["user_id", "item", "action", "time_ms"])
    rows = sequences.filter(pc.equal(sequences["user_id"], user_id)).to_pylist()
    if not rows:
        raise UsageError(f"{dataset.path}: no user '{user_id}'")
    ids = dataset.catalogue().ids
    steps = list(zip(rows[0]["item"], rows[0]["action"], rows[0]["time_ms"], strict=True))[-wire.MAX_EVENTS :]
    # On clock "order" a time is a place in the order, no date: events without a time keep the order of sending.
    timed = dataset.clock != "order"
    return tuple(
        wire.ItemEvent(item_id=ids[item], action=ACTIONS[action - 1], timestamp=time_ms / 1000 if timed else None)
        for item, action, time_ms in steps
    )
