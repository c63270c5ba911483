"""One replica of the service: events and requests in, what is stored and lists out, as the wire has them.

In: a scorer, a state, what `wire` has checked. Out: the bodies of answers, or problems. It must not know HTTP's routes,
Ray, nor how the model or the state do their work.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any

from rayrec import __version__
from rayrec.config import ImageConfig, ServeConfig
from rayrec.data.edits import LISTED
from rayrec.data.images import ImageRejected, as_jpeg
from rayrec.errors import StateError
from rayrec.ranking import requests
from rayrec.ranking.scoring import Scorer
from rayrec.schema import visitor_id
from rayrec.serving import wire
from rayrec.serving.batching import Batcher
from rayrec.serving.keys import LOCAL, Caller
from rayrec.serving.live import Cards, Edit, ImageOf, Live, Load, Loaded, Model
from rayrec.serving.metrics import Metrics, together
from rayrec.serving.problems import ProblemError
from rayrec.state.protocol import REPLICA_ALIVE_MS, Event, Outcome, State

log = logging.getLogger(__name__)

BEAT_EVERY_S = 1.0
FOLLOW_EVERY_S = 0.25  # what a shop says of an item is to be live within a second
METRICS_EVERY_S = 5.0
METRICS_WITHIN_S = 1.0  # one who scrapes must not wait for a state that hangs
PICTURE_SIDE = 512  # pixels of a picture that is put, at most


class Service:
    """One replica: a model, the shared state, and the two batchers between them and the event loop."""

    def __init__(
        self,
        scorer: Scorer,
        state: State,
        config: ServeConfig,
        *,
        model: str,
        image_of: ImageOf | None,
        replica_id: str | None,
        load: Load | None = None,
        edit: Edit | None = None,
    ) -> None:
        self.state, self.config = state, config
        self.replica_id = replica_id or uuid.uuid4().hex[:8]
        self.live = Live(Model(model, Loaded(scorer, image_of, edit), config), config, state, load)
        self.metrics = Metrics(self.replica_id)
        self.started = time.monotonic()
        waiting = config.max_queued_requests
        self.lists: Batcher[requests.Request, tuple[requests.Answer, Cards]] = Batcher(
            "rank", self._rank, size=config.batch_size, max_waiting=waiting
        )
        self.events: Batcher[Sequence[Event], list[Outcome]] = Batcher(
            "events", self._append, size=config.batch_size, max_waiting=waiting
        )

    def _rank(self, batch: list[requests.Request]) -> list[tuple[requests.Answer, Cards]]:
        """Answers, each with the cards of the model that gave it."""
        models = [self.live.of(request.visitor) for request in batch]
        answers: dict[int, tuple[requests.Answer, Cards]] = {}
        for model in dict.fromkeys(models):
            rows = [row for row, one in enumerate(models) if one is model]
            together = model.ranker.recommend([batch[row] for row in rows], self.state)
            answers.update({row: (answer, model.cards) for row, answer in zip(rows, together, strict=True)})
        return [answers[row] for row in range(len(batch))]

    def _append(self, batch: list[Sequence[Event]]) -> list[list[Outcome]]:
        """Several clients' events in one transaction."""
        outcomes = iter(self.state.append_events([event for events in batch for event in events]))
        return [[next(outcomes) for _ in events] for events in batch]

    async def store(self, sent: wire.EventsRequest, caller: Caller = LOCAL) -> wire.EventsAnswer:
        """Store what can be stored; answer once it is durable. A visitor's events are their own session's."""
        now_ms, rejected = _now_ms(), []
        events: list[Event] = []
        place: list[int] = []
        for index, one in enumerate(sent.events):
            try:
                event = wire.event_of(one, now_ms, self.config.clock_skew_s)
                if caller.session is not None and event.visitor != visitor_id(None, caller.session):
                    raise ValueError("a visitor's token is for their own session")
                events.append(event)
                place.append(index)
            except ValueError as error:
                rejected.append(wire.Rejected(index=index, reason=str(error)))
        outcomes = await self.events.submit(events) if events else []
        rejected += [
            wire.Rejected(index=index, reason="this visitor was erased after the event happened")
            for index, outcome in zip(place, outcomes, strict=True)
            if outcome == "erased"
        ]
        known = self.live.model.catalogue.index
        answer = wire.EventsAnswer(
            accepted=outcomes.count("accepted"),
            duplicate=outcomes.count("duplicate"),
            unknown_item=sum(
                outcome == "accepted" and event.item_id not in known
                for event, outcome in zip(events, outcomes, strict=True)
            ),
            rejected=sorted(rejected, key=lambda one: one.index),
        )
        new = [event for event, outcome in zip(events, outcomes, strict=True) if outcome == "accepted"]
        self.metrics.stored(answer, [max(0, now_ms - event.time_ms) / 1000 for event in new])
        return answer

    async def recommend(self, sent: wire.RecommendRequest, caller: Caller = LOCAL) -> dict[str, Any]:
        """The body of an answer, as `wire.RecommendAnswer`."""
        if caller.session is not None and (sent.user_id is not None or sent.session_id not in (None, caller.session)):
            raise ProblemError(403, "a visitor's token is for their own session")
        try:
            request = wire.request_of(sent, _now_ms(), self.config.clock_skew_s)
        except ValueError as error:
            raise ProblemError(422, f"/events: {error}") from None
        self.live.of(request.visitor).ranker.check(request)
        answer, cards = await self._in_time(request)
        self.metrics.answered(answer, request.scene)
        return {
            "request_id": answer.request_id,
            "model": answer.model,
            "served_by": answer.served_by,
            "items": [_described(item, cards) for item in answer.items],
            "removed": answer.removed,
            "timing_ms": {stage: round(ms, 3) for stage, ms in answer.timing_ms.items()},
        }

    async def _in_time(self, request: requests.Request) -> tuple[requests.Answer, Cards]:
        """The answer, or what is popular where it is late; a late one that is under way is logged all the same."""
        ranking = asyncio.ensure_future(self.lists.submit(request))
        done, _ = await asyncio.wait([ranking], timeout=self.config.deadline_s)
        if done:
            return ranking.result()
        ranking.cancel()
        model = self.live.of(request.visitor)
        return model.ranker.popular(request), model.cards

    def lists_item(self, item_id: str) -> bool:
        """Whether there is such an item, and it may be shown."""
        catalogue = self.live.model.catalogue
        row = catalogue.index.get(item_id)
        return row is not None and bool(catalogue.listed[row])

    async def put_item(
        self, item_id: str, facts: dict[str, Any], picture: bytes | None, *, listed: bool = True
    ) -> wire.ItemAnswer:
        """Tell all replicas what a shop says of an item. Raises ProblemError for a picture that is none."""
        if not self.live.model.takes_edits:
            raise ProblemError(409, "this server was given a model alone, and its items cannot be changed")
        if picture is not None:
            try:
                picture = await asyncio.to_thread(as_jpeg, picture, PICTURE_SIDE, ImageConfig().max_pixels)
            except ImageRejected as rejected:
                raise ProblemError(422, f"the picture cannot be used: {rejected.reason}") from None
        known = self.lists_item(item_id)
        await asyncio.to_thread(self.state.put_item, item_id, {**facts, LISTED: listed}, picture)
        return wire.ItemAnswer(item_id=item_id, known=known, changed=facts, image=picture is not None)

    async def picture(self, item_id: str) -> tuple[bytes, str] | None:
        """Bytes and media type of an item's picture, None if there is none."""
        model = self.live.model
        if not self.lists_item(item_id):
            return None
        if item_id in model.picture_seq:
            data = await asyncio.to_thread(self.state.item_picture, item_id)
            return None if data is None else (data, "image/jpeg")
        return await asyncio.to_thread(model.image_of, model.catalogue.index[item_id]) if model.image_of else None

    async def status(self) -> wire.Status:
        """How the service is; replicas are those that reported themselves lately."""
        replicas = await asyncio.to_thread(self.state.replicas, REPLICA_ALIVE_MS)
        counts = await asyncio.to_thread(self.state.counts)
        return wire.Status(
            model=self.live.model.version,
            version=__version__,
            replica=self.replica_id,
            replicas=max(1, len(replicas)),
            catalogue=len(self.live.model.catalogue),
            scenes=sorted(self.config.scenes),
            uptime_s=round(time.monotonic() - self.started, 3),
            counters=counts,
        )

    async def beat(self) -> None:
        """Report this replica for as long as it lives, and follow what the others are told."""
        while True:
            try:
                await self.live.follow()
                await self.live.follow_trends()
                await asyncio.to_thread(self.state.beat, self.replica_id, self.live.model.version)
            except StateError as error:
                log.warning("cannot report this replica: %s", error)
            except Exception:  # a replica that stops following serves an old model for ever, and nobody sees it
                log.exception("cannot follow or report; trying again")
            await asyncio.sleep(BEAT_EVERY_S)

    async def tell_metrics(self) -> None:
        """Tell the others what this replica counts, for as long as it lives."""
        while True:
            try:
                await asyncio.to_thread(self._tell_metrics)
            except StateError as error:
                log.warning("cannot tell what this replica counted: %s", error)
            except Exception:  # as in `beat`
                log.exception("cannot tell what this replica counted; trying again")
            await asyncio.sleep(METRICS_EVERY_S)

    def _tell_metrics(self) -> str:
        self.metrics.serves(self.live.model.version)
        text = self.metrics.text()
        self.state.tell_metrics(self.replica_id, text)
        return text

    async def counted(self) -> str:
        """What all replicas have counted, in Prometheus' words: this one until now, the others a few seconds ago.

        While the state is away, or slow, it is this one alone.
        """
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._counted_by_all), METRICS_WITHIN_S)
        except (StateError, TimeoutError) as error:
            log.warning("cannot ask what the other replicas counted: %s", error or "the state is slow")
            return self.metrics.text()

    def _counted_by_all(self) -> str:
        # What this one says is told first: whichever replica answers, and when, no counter ever goes back.
        own = self._tell_metrics()
        return together(list({**self.state.told_metrics(), self.replica_id: own}.values()))

    async def follow_items(self) -> None:
        """Keep the catalogue up to date for as long as this replica lives."""
        while True:
            try:
                await self.live.follow_items()
            except StateError as error:
                log.warning("cannot follow the catalogue: %s", error)
            except Exception:  # as in `beat`
                log.exception("cannot follow the catalogue; trying again")
            await asyncio.sleep(FOLLOW_EVERY_S)

    async def close(self) -> None:
        """Finish what is at work and say goodbye."""
        self.lists.close()
        self.events.close()
        try:
            await asyncio.to_thread(self.state.leave, self.replica_id)
        except StateError as error:
            log.warning("cannot sign this replica off: %s", error)
        self.state.close()


def _described(item: requests.Ranked, cards: Cards) -> dict[str, Any]:
    """`wire.RankedOut`; by hand, since `asdict` copies whatever is in it."""
    return {
        **cards.of(item.item_id),
        "score": item.score,
        "propensity": item.propensity,
        "sources": item.sources,
        "reasons": item.reasons,
    }


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
