"""Errors as problem details (RFC 9457): what went wrong, in one shape, for every route.

In: exceptions. Out: `application/problem+json` responses. It must not know the routes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from rayrec.errors import StateError, UsageError
from rayrec.ranking.requests import UnknownItemError
from rayrec.serving.wire import Problem

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
TITLES = {
    400: "bad-request",
    401: "unauthorized",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    408: "too-slow",
    409: "conflict",
    413: "body-too-large",
    422: "invalid",
    429: "over-capacity",
    500: "internal-error",
    503: "state-unavailable",
}


class ProblemError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


def problem(
    status: int,
    detail: str,
    *,
    errors: Sequence[Mapping[str, Any]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The response for one problem. `errors` names single fields: {"pointer", "detail"}."""
    body = {
        "type": f"urn:rayrec:problem:{TITLES.get(status, 'error')}",
        "title": _title(status),
        "status": status,
        "detail": detail,
        "errors": list(errors),
    }
    return Response(json.dumps(body), status, headers, MEDIA_TYPE)


def _title(status: int) -> str:
    return TITLES.get(status, "error").replace("-", " ").capitalize()


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI document of an app with `install` says of these statuses."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _title(status), "content": content} for status in statuses}


def install(app: FastAPI) -> None:
    """Make every error that `app` knows of a problem, and have its OpenAPI document tell what that is."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        # A `model` of FastAPI's own would promise each problem as application/json as well.
        document["components"]["schemas"]["Problem"] = Problem.model_json_schema()
        return document

    app.openapi = openapi  # type: ignore[method-assign]

    @app.exception_handler(ProblemError)
    async def _ours(request: Request, error: ProblemError) -> Response:
        return problem(error.status, error.detail, headers=error.headers)

    @app.exception_handler(UsageError)
    async def _usage(request: Request, error: UsageError) -> Response:
        return problem(404 if isinstance(error, UnknownItemError) else 422, str(error))

    @app.exception_handler(StateError)
    async def _state(request: Request, error: StateError) -> Response:
        log.error("%s", error)
        return problem(503, "the shared state is not available", headers={"Retry-After": "1"})

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        errors = [
            {"pointer": "/" + "/".join(str(part) for part in one["loc"][1:]), "detail": one["msg"]}
            for one in error.errors()[:20]
        ]
        detail = "; ".join(f"{one['pointer']}: {one['detail']}" for one in errors[:3])
        return problem(422, detail, errors=errors)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        status = 422 if error.status_code == 400 else error.status_code  # 400: the body is not JSON
        headers = {"Allow": _allowed(app, request)} if status == 405 else error.headers
        return problem(status, str(error.detail), headers=headers)


def _allowed(app: FastAPI, request: Request) -> str:
    """The methods of a path. Starlette tells those of the first route that fits, and a path may have several."""
    fitting = [route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in fitting for method in getattr(route, "methods", None) or ()}))
