"""The web application: plain FastAPI, the same under uvicorn, in a test, and in a Ray Serve replica.

In: HTTP. Out: JSON, pages, problems. It must not know Ray, nor how the model or the state do their work.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.convertors import StringConvertor, register_url_convertor

from rayrec import __version__
from rayrec.config import ServeConfig
from rayrec.errors import BundleError, StateError, UsageError
from rayrec.ranking.scoring import Scorer
from rayrec.serving import problems, wire
from rayrec.serving.audit import Audit
from rayrec.serving.batching import OverCapacityError
from rayrec.serving.guard import CALLER, Guard
from rayrec.serving.keys import TOKEN_S, Keys, new_session
from rayrec.serving.live import Edit, ImageOf, Load
from rayrec.serving.metrics import MEDIA_TYPE
from rayrec.serving.pictures import fetched
from rayrec.serving.problems import ProblemError
from rayrec.serving.request_log import NOTES, RequestLog
from rayrec.serving.service import Service
from rayrec.state.protocol import Event, Shown, State


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
        chores = (service.beat(), service.follow_items(), service.tell_metrics())
        tasks = [asyncio.create_task(chore) for chore in chores]
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
        responses=problems.responses(401, 403, 408, 413, 422, 429, 503),
    )
    problems.install(app)
    _add_middleware(app, service, keys, answers_id)

    @app.exception_handler(OverCapacityError)
    async def _full(request: object, error: OverCapacityError) -> Response:
        return problems.problem(429, "over capacity; try again", headers={"Retry-After": "1"})

    register_url_convertor("id", _IdConvertor())
    audit = Audit(config.audit_file, keys.secret if keys else None)
    _add_list_routes(app, service)
    _add_item_routes(app, service, audit)
    _add_people_routes(app, service, audit, keys)
    _add_service_routes(app, service, audit)
    return app


def _add_middleware(app: FastAPI, service: Service, keys: Keys | None, answers_id: bool) -> None:
    """From the innermost to the outermost."""
    config = service.config
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
        count=service.metrics.requested,
        answers_id=answers_id,
    )


def _add_list_routes(app: FastAPI, service: Service) -> None:
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


def _add_item_routes(app: FastAPI, service: Service, audit: Audit) -> None:
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
        await asyncio.to_thread(audit.of_shop, request.scope[CALLER], "put picture", item_id)
        return await service.put_item(item_id, {}, await request.body())

    @app.put("/v1/items/{item_id:id}", responses=problems.responses(409))
    async def put_item(item_id: ItemPath, body: wire.ItemRequest, request: Request) -> wire.ItemAnswer:
        """Say something of an item, new or known, that all replicas go by within a second: price, stock, picture."""
        await asyncio.to_thread(audit.of_shop, request.scope[CALLER], "put item", item_id)
        data = await asyncio.to_thread(fetched, body.image, service.config.image_prefixes) if body.image else None
        return await service.put_item(item_id, body.facts(), data)

    @app.delete("/v1/items/{item_id:id}", responses=problems.responses(404, 409))
    async def delete_item(item_id: ItemPath, request: Request) -> wire.ItemAnswer:
        """Never show an item again, until it is put again; what visitors did with it stays."""
        if not service.lists_item(item_id):
            raise ProblemError(404, f"there is no item '{item_id}'")
        await asyncio.to_thread(audit.of_shop, request.scope[CALLER], "delete item", item_id)
        return await service.put_item(item_id, {}, None, listed=False)


def _add_people_routes(app: FastAPI, service: Service, audit: Audit, keys: Keys | None) -> None:
    async def note(request: Request, deed: str, about: str) -> None:
        await asyncio.to_thread(audit.of_visitor, request.scope[CALLER], deed, about)

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


def _add_service_routes(app: FastAPI, service: Service, audit: Audit) -> None:
    page = files("rayrec.serving").joinpath("pages", "storefront.html").read_text(encoding="utf-8")

    @app.get("/v1/status")
    async def status() -> wire.Status:
        """Model, replicas, catalogue, counters."""
        return await service.status()

    @app.post("/v1/models/{version}:activate", responses=problems.responses(404, 409))
    async def activate(version: wire.Version, request: Request) -> wire.ActivateAnswer:
        """Serve another version, in all replicas, without losing a request; a broken one is refused."""
        await asyncio.to_thread(audit.of_shop, request.scope[CALLER], "activate", version)
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
        """Counters and timings of all replicas, for Prometheus."""
        return Response(await service.counted(), media_type=MEDIA_TYPE)

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


def _plain(row: Event | Shown) -> dict[str, Any]:
    """A stored row as JSON values, without what is empty and without whose it is."""
    return {name: value for name, value in asdict(row).items() if value is not None and name != "visitor"}
