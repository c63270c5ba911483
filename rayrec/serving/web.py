"""The web application: plain FastAPI, the same under uvicorn, in a test, and in a Ray Serve replica.

In: HTTP. Out: JSON, pages, problems. It must not know Ray, nor how the model or the state do their work.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.convertors import StringConvertor, register_url_convertor

from rayrec import __version__
from rayrec.config import ImageConfig, ServeConfig
from rayrec.data.edits import LISTED
from rayrec.data.images import ImageRejected, as_jpeg
from rayrec.errors import BundleError, StateError, UsageError
from rayrec.ranking import requests
from rayrec.ranking.scoring import Scorer
from rayrec.schema import visitor_id
from rayrec.serving import problems, wire
from rayrec.serving.audit import Audit
from rayrec.serving.batching import Batcher, OverCapacityError
from rayrec.serving.guard import CALLER, Guard
from rayrec.serving.keys import LOCAL, TOKEN_S, Caller, Keys, new_session
from rayrec.serving.live import Cards, Edit, ImageOf, Live, Load, Loaded, Model
from rayrec.serving.metrics import MEDIA_TYPE, Metrics
from rayrec.serving.pictures import fetched
from rayrec.serving.problems import ProblemError
from rayrec.serving.request_log import NOTES, RequestLog
from rayrec.state.protocol import Event, Outcome, Shown, State

log = logging.getLogger(__name__)

BEAT_EVERY_S = 1.0
FOLLOW_EVERY_S = 0.25  # what a shop says of an item is to be live within a second
PICTURE_SIDE = 512  # pixels of a picture that is put, at most
ALIVE_MS = 3500  # a replica that was silent for longer is gone


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
        self.metrics = Metrics()
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
        replicas = await asyncio.to_thread(self.state.replicas, ALIVE_MS)
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


def create_app(
    scorer: Scorer,
    state: State,
    config: ServeConfig | None = None,
    *,
    model: str = "unnamed",
    image_of: ImageOf | None = None,
    replica_id: str | None = None,
    keys: Keys | None = None,
    load: Load | None = None,
    edit: Edit | None = None,
    answers_id: bool = True,
) -> FastAPI:
    """The application of one replica. It owns `state` and closes it at the end of its life.

    model: the version that answers name. image_of: bytes and media type of an item's image, by item index.
    keys: who may call; None: whoever is on this machine, by a loopback name. load: reads another version, to swap to.
    edit: how a shop's edits of its items reach the model; None if they cannot.
    answers_id: with a request's id, unless the server around does so.
    """
    config = config or ServeConfig()
    service = Service(
        scorer, state, config, model=model, image_of=image_of, replica_id=replica_id, load=load, edit=edit
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with suppress(StateError):  # a replica answers without it, and follows when it is back
            await service.live.follow_items()
            await service.live.follow_trends()
        tasks = [asyncio.create_task(service.beat()), asyncio.create_task(service.follow_items())]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await service.close()

    app = FastAPI(
        title="rayrec",
        version=__version__,
        summary="Events in, personal lists out.",
        lifespan=lifespan,
        responses=problems.responses(401, 403, 413, 422, 429, 503),
    )
    problems.install(app)
    app.add_middleware(
        Guard,
        max_body_bytes=config.max_body_bytes,
        keys=keys,
        visitor_rate=config.visitor_rate,
        key_rate=config.key_rate,
        newcomer_rate=config.newcomer_rate,
    )
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id"],
        )
    app.add_middleware(
        RequestLog,
        which=config.log_requests,
        visitors=config.log_visitors,
        replica=service.replica_id,
        model=lambda: service.live.model.version,
        answers_id=answers_id,
    )

    @app.exception_handler(OverCapacityError)
    async def _full(request: object, error: OverCapacityError) -> Response:
        return problems.problem(429, "over capacity; try again", headers={"Retry-After": "1"})

    register_url_convertor("id", _IdConvertor())
    _add_main_routes(app, service)
    _add_people_routes(app, service, keys)
    _add_service_routes(app, service)
    return app


def _add_main_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/events", response_model=wire.EventsAnswer)
    async def events(body: wire.EventsRequest, request: Request) -> Response:
        """Store 1 to 1,000 events; answered once they are durable."""
        answer = await service.store(body, request.scope[CALLER])
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.post("/v1/recommend", response_model=wire.RecommendAnswer, responses=problems.responses(404))
    async def recommend(body: wire.RecommendRequest, request: Request) -> Response:
        """A personal list. An unknown visitor gets one too."""
        answer = await service.recommend(body, request.scope[CALLER])
        request.scope[NOTES].update(_noted(body, answer, service.config.log_visitors))
        return Response(json.dumps(answer, ensure_ascii=False, allow_nan=False), media_type="application/json")

    picture = {200: {"content": {"image/*": {}}}, **problems.responses(404)}

    @app.get("/v1/items/{item_id:id}/image", response_class=Response, responses=picture)
    async def image(item_id: ItemPath) -> Response:
        """The picture of an item."""
        found = await service.picture(item_id)
        if found is None:
            raise ProblemError(404, "there is no picture of this item")
        return Response(found[0], media_type=found[1], headers={"Cache-Control": "max-age=3600"})

    @app.get("/v1/items/{item_id:id}", response_model=wire.ItemDetail, responses=problems.responses(404))
    async def item(item_id: ItemPath) -> Response:
        """What the catalogue says of an item."""
        model = service.live.model
        row = model.catalogue.index.get(item_id)
        if row is None or not model.catalogue.listed[row]:
            raise ProblemError(404, f"there is no item '{item_id}'")
        return JSONResponse(model.cards.of(item_id) | {"in_stock": bool(model.catalogue.in_stock[row])})

    @app.put("/v1/items/{item_id:id}/image", openapi_extra=PICTURE_BODY, responses=problems.responses(409))
    async def put_image(item_id: ItemPath, request: Request) -> wire.ItemAnswer:
        """Give an item a picture: its bytes are the body."""
        return await service.put_item(item_id, {}, await request.body())

    @app.put("/v1/items/{item_id:id}", responses=problems.responses(409))
    async def put_item(item_id: ItemPath, body: wire.ItemRequest) -> wire.ItemAnswer:
        """Say something of an item, new or known, that all replicas go by within a second: price, stock, picture."""
        data = await asyncio.to_thread(fetched, body.image, service.config.image_prefixes) if body.image else None
        return await service.put_item(item_id, body.facts(), data)

    @app.delete("/v1/items/{item_id:id}", responses=problems.responses(404, 409))
    async def delete_item(item_id: ItemPath) -> wire.ItemAnswer:
        """Never show an item again, until it is put again; what visitors did with it stays."""
        if not service.lists_item(item_id):
            raise ProblemError(404, f"there is no item '{item_id}'")
        return await service.put_item(item_id, {}, None, listed=False)


def _add_people_routes(app: FastAPI, service: Service, keys: Keys | None) -> None:
    audit = Audit(service.config.audit_file, keys.secret if keys else None)

    async def note(request: Request, deed: str, about: str) -> None:
        await asyncio.to_thread(audit, request.scope[CALLER], deed, about)

    @app.post("/v1/visitors")
    async def visitor(body: wire.VisitorRequest) -> wire.VisitorAnswer:
        """A session of its own, with a token, for a browser: it never holds a key."""
        session = keys.session_of(body.token, renewing=True) if keys and body.token else None
        session = session or new_session()
        return wire.VisitorAnswer(session_id=session, token=keys.token(session) if keys else None, expires_s=TOKEN_S)

    @app.get("/v1/users/{user_id:id}")
    async def user(user_id: UserPath, request: Request) -> wire.UserAnswer:
        """Everything held about a visitor (`session:ID` for an anonymous one)."""
        await note(request, "read", user_id)
        held = await asyncio.to_thread(service.state.user, user_id)
        return wire.UserAnswer(
            user_id=user_id,
            events=[_plain(event) for event in held.events],
            impressions=[_plain(shown) for shown in held.shown],
            sessions=held.sessions,
        )

    @app.delete("/v1/users/{user_id:id}")
    async def erase(user_id: UserPath, request: Request) -> wire.EraseAnswer:
        """Delete everything held about a visitor, for good."""
        await note(request, "erase", user_id)
        receipt = await asyncio.to_thread(service.state.erase, user_id)
        return wire.EraseAnswer(
            tombstone=receipt.tombstone,
            erased_ms=receipt.erased_ms,
            deleted={
                "events": receipt.events,
                "impressions": receipt.impressions,
                "sessions": receipt.sessions,
            },
        )

    @app.post("/v1/users/{user_id:id}:join")
    async def join(user_id: UserPath, body: wire.JoinRequest, request: Request) -> wire.JoinAnswer:
        """Give a session's past and future events to a user who has logged in."""
        await note(request, "join", user_id)
        moved = await asyncio.to_thread(service.state.join, user_id, body.session_id)
        return wire.JoinAnswer(user_id=user_id, session_id=body.session_id, moved=moved)


def _add_service_routes(app: FastAPI, service: Service) -> None:
    page = files("rayrec.serving").joinpath("pages", "storefront.html").read_text(encoding="utf-8")

    @app.get("/v1/status")
    async def status() -> wire.Status:
        """Model, replicas, catalogue, counters."""
        return await service.status()

    @app.post("/v1/models/{version}:activate", responses=problems.responses(404, 409))
    async def activate(version: wire.Version) -> wire.ActivateAnswer:
        """Serve another version, in all replicas, without losing a request; a broken one is refused."""
        try:
            before = await service.live.activate(version)
        except UsageError as error:
            raise ProblemError(404, str(error)) from None
        except BundleError as error:
            raise ProblemError(409, f"{error}; {service.live.model.version} goes on") from None
        return wire.ActivateAnswer(model=version, before=before)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process is alive."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Whether lists can be served: the model is loaded and the state answers."""
        await asyncio.to_thread(service.state.setting, "active_model")
        return {"status": "ready", "model": service.live.model.version}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters and timings of the replica that answers, for Prometheus."""
        service.metrics.serves(service.live.model.version)
        return Response(service.metrics.text(), media_type=MEDIA_TYPE)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def storefront() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})


class _IdConvertor(StringConvertor):
    """`{item_id:id}`: anything, slashes too. `:path` ends at a line break, and would answer such an id with 404."""

    regex = r"[\s\S]*"


ItemPath = Annotated[wire.TextId, Path(description="id of an item")]
PICTURE_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}
}
UserPath = Annotated[wire.TextId, Path(description="id of a user")]
PAGE_POLICY = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' data:"


def _noted(sent: wire.RecommendRequest, answer: dict[str, Any], with_visitor: bool) -> dict[str, Any]:
    """What the log tells of a list."""
    told = {name: answer[name] for name in ("model", "served_by")}
    told |= {"scene": sent.scene, "list_id": answer["request_id"]}
    if with_visitor:
        asked = sent.context.model_dump(exclude_defaults=True)
        told |= {"user_id": sent.user_id, "session_id": sent.session_id, "context": asked}
    return told


def _described(item: requests.Ranked, cards: Cards) -> dict[str, Any]:
    """`wire.RankedOut`; by hand, since `asdict` copies whatever is in it."""
    return {
        **cards.of(item.item_id),
        "score": item.score,
        "propensity": item.propensity,
        "sources": item.sources,
        "reasons": item.reasons,
    }


def _plain(row: Event | Shown) -> dict[str, Any]:
    """A stored row as JSON values, without what is empty and without whose it is."""
    return {name: value for name, value in asdict(row).items() if value is not None and name != "visitor"}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
