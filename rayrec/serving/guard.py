"""What stands before the application: who may call at all, and how much may be sent.

In: raw ASGI requests. Out: the same requests, or a problem. It must not know the routes.
"""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayrec.serving.keys import ANYONE, LOCAL, Caller, Keys, needed
from rayrec.serving.limits import Limiter
from rayrec.serving.problems import problem

CALLER = "rayrec.caller"
"""Where a request's scope tells who calls: a `keys.Caller`."""
NO_LIMIT = Limiter(0)

BUFFERED_BYTES = 15_000
"""A body of so many bytes is whole before a request gets here: HAProxy waits for what its buffer of 16 kB holds."""
BODY_WITHIN_S = 30.0
"""A larger one may take so long. HAProxy bounds the time between two bytes alone."""


class Guard:
    """ASGI middleware: who may call what, how often and with how much; without keys loopback names only.

    A page from elsewhere, or a name that was re-bound to this machine, cannot reach a server without keys: its
    `Origin` or `Host` gives it away.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        body_within_s: float = BODY_WITHIN_S,
        keys: Keys | None = None,
        visitor_rate: float = 0,
        key_rate: float = 0,
        newcomer_rate: float = 0,
    ) -> None:
        self.app, self.max_body_bytes, self.body_within_s, self.keys = app, max_body_bytes, body_within_s, keys
        self._visitors, self._keys, self._newcomers = Limiter(visitor_rate), Limiter(key_rate), Limiter(newcomer_rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer with a problem."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        size = headers.get("content-length", "")
        too_large = size.isdecimal() and int(size) > self.max_body_bytes
        if "transfer-encoding" in headers:
            try:
                body = await _read(_in_time(receive, self.body_within_s), self.max_body_bytes)
            except HTTPException as error:
                await problem(error.status_code, error.detail, headers={"Connection": "close"})(scope, receive, send)
                return
            too_large, receive = body is None, _replay(body or b"", receive)
        elif size.isdecimal() and int(size) > BUFFERED_BYTES:
            receive = _in_time(receive, self.body_within_s)
        if too_large:
            refusal = problem(413, f"a body may have {self.max_body_bytes} bytes", headers={"Connection": "close"})
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """Why the caller may not call this; None if they may, and then the scope tells who they are."""
        if self.keys is None:
            for name, url in (("Host", f"//{headers.get('host', '')}"), ("Origin", headers.get("origin"))):
                if url is not None and not is_loopback(_hostname(url)):
                    return problem(403, f"{name}: this server answers loopback names only")
            scope[CALLER] = LOCAL
            return None
        caller = self.keys.caller(headers.get("authorization"))
        scope_needed = needed(scope["method"], scope["path"])
        if caller is None or (caller is ANYONE and scope_needed != "public"):
            said = "send a key or a visitor's token: Authorization: Bearer ..." if caller else "no such key or token"
            return problem(401, said, headers={"WWW-Authenticate": "Bearer"})
        if not caller.may(scope_needed):
            return problem(403, f"this is for the scope '{scope_needed}', and yours is '{caller.scope}'")
        own = f"/v1/users/session:{caller.session}"
        if caller.session is not None and scope["path"].startswith("/v1/users/") and scope["path"] != own:
            return problem(403, "a visitor's token is for their own session")
        if not self._limiter(scope, caller).admits(caller.session or caller.name):
            return problem(429, "too many requests; slow down", headers={"Retry-After": "1"})
        scope[CALLER] = caller
        return None

    def _limiter(self, scope: Scope, caller: Caller) -> Limiter:
        if scope["path"] == "/v1/visitors":
            return self._newcomers
        return self._keys if caller.may("shop") else self._visitors if caller.session else NO_LIMIT


def is_loopback(host: str | None) -> bool:
    """Whether a host name or address means this machine itself."""
    if host is None:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _in_time(receive: Receive, within_s: float) -> Receive:
    """Raises HTTPException (408) where the body is not whole within that time of the first call."""
    ends: float | None = None
    whole = False

    async def timed() -> Message:
        nonlocal ends, whole
        if whole:
            return await receive()
        now = asyncio.get_running_loop().time()
        ends = ends or now + within_s
        try:
            message = await asyncio.wait_for(receive(), ends - now)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the body was not whole within {within_s:g} s; send it again, at once") from None
        whole = not message.get("more_body")
        return message

    return timed


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The whole body, None if it has more than `limit` bytes."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if message["type"] != "http.request" or not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: list[Message | dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
