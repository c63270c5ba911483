"""What is logged of requests: one JSON object a line, and whatever else is logged meanwhile bears the request's id.

In: raw ASGI requests, records of rayrec's loggers. Out: the same requests, lines. It must not know what routes do. No
line tells of whom or of what a request was, unless it is asked to: ids and words of visitors stay out of logs.
"""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any, Final, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayrec.config import LoggedRequests
from rayrec.serving.guard import CALLER
from rayrec.serving.problems import problem

log = logging.getLogger(__name__)

AT_WORK: Final[ContextVar[tuple[str, ...]]] = ContextVar("rayrec.requests", default=())
"""The ids of the requests for which code runs: of one, or of all that are in a batch. A thread has none of itself."""

NOTES: Final = "rayrec.notes"
"""Where a request's scope takes what a route adds to the line: a dictionary."""

SANE: Final = re.compile(rb"[A-Za-z0-9_-]{1,128}")


class RequestLog:
    """ASGI middleware, outside all others: gives a request its id and logs the answer; what was not caught is a 500.

    which: of answers, to log. visitors: with paths as they were sent. model: what is served now. count: told the
    route, the status and the seconds of every answer. answers_id: in `X-Request-Id`, unless the server around does so.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        which: LoggedRequests,
        visitors: bool,
        replica: str,
        model: Callable[[], str],
        count: Callable[[str | None, int, float], None],
        answers_id: bool = True,
    ) -> None:
        self.app, self.replica, self.model, self.count = app, replica, model, count
        self._least = {"all": 0, "errors": 400, "none": 1000}[which]
        self._visitors, self._answers_id = visitors, answers_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; see how it is answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started, status = _id_of(scope["headers"]), time.perf_counter(), 0
        scope[NOTES] = {}
        before = AT_WORK.set((request_id,))

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._answers_id:
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            try:
                await self.app(scope, receive, answer)
            except Exception:
                log.exception("an error of the server")
                if status:  # an answer has begun, which only the server can break off
                    raise
                await problem(500, "an error of the server; it was logged")(scope, receive, answer)
            took_s, route = time.perf_counter() - started, _route(scope)
            self.count(route, status, took_s)
            if status >= self._least:
                self._log(scope, route, status, took_s * 1000)
        finally:
            AT_WORK.reset(before)

    def _log(self, scope: Scope, route: str | None, status: int, ms: float) -> None:
        caller = scope.get(CALLER)
        line = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(ms, 3),
            "caller": caller.name if caller else None,
            "replica": self.replica,
            "model": self.model(),
            **scope[NOTES],
        }
        if self._visitors:
            line["path"] = scope["path"]
        level = logging.INFO if status < 400 else logging.WARNING if status < 500 else logging.ERROR
        log.log(level, "%(method)s %(route)s: %(status)s after %(ms)s ms", line)


class Lines(logging.Formatter):
    """A record as one JSON object: time, level, the ids of `AT_WORK`, and what a request or the record has to say.

    visitors: with the words of exceptions, which may name them; else their kind and place alone.
    """

    def __init__(self, *, visitors: bool) -> None:
        super().__init__()
        self._visitors = visitors

    def format(self, record: logging.LogRecord) -> str:
        """Called by `logging`, in the context and thread of who logs."""
        time_s = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {"time": time_s.isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
        ids = AT_WORK.get()
        if ids:
            line |= {"request_id": ids[0]} if len(ids) == 1 else {"request_ids": ids}
        if record.name == log.name and isinstance(record.args, dict):
            line |= record.args
        else:
            line |= {"logger": record.name, "message": record.getMessage()}
        if record.exc_info and record.exc_info[1]:
            error = record.exc_info[1]
            line |= {"error": type(error).__name__, "traceback": "".join(traceback.format_tb(error.__traceback__))}
            if self._visitors:
                line["error"] += f": {error}"
        return json.dumps(line)  # in ASCII: some readers take U+2028 for the end of a line


def log_lines(stream: TextIO, *, visitors: bool) -> None:
    """Have all that rayrec logs in this process written to `stream`, as `Lines`, and nowhere else."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines(visitors=visitors))
    ours = logging.getLogger("rayrec")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)


def _id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The id that was sent, if it can do no harm in a log; else a new one."""
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    return given.decode() if SANE.fullmatch(given) else uuid.uuid4().hex


def _route(scope: Scope) -> str | None:
    """The template of the route, as /v1/users/{user_id}; of a request that was refused before, the one it asked for."""
    route = scope.get("route")
    if route is None:
        matches = [(one.matches(scope)[0].value, -place, one) for place, one in enumerate(scope["app"].routes)]
        found, _, route = max(matches)
        if not found:
            return None
    return getattr(route, "path_format", None)
