"""What stands before the application: who may call at all, and how much may be sent.

In: raw ASGI requests. Out: the same requests, or a problem. It must not know the routes.
"""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayrec.serving.problems import problem


class Guard:
    """ASGI middleware: body limit, and for a server without keys loopback names only.

    A page from elsewhere, or a name that was re-bound to this machine, cannot reach a server without keys: its
    `Origin` or `Host` gives it away.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, loopback_only: bool) -> None:
        self.app, self.max_body_bytes, self.loopback_only = app, max_body_bytes, loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer with a problem."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self.loopback_only:
            for name, url in (("Host", f"//{headers.get('host', '')}"), ("Origin", headers.get("origin"))):
                if url is not None and not is_loopback(_hostname(url)):
                    await problem(403, f"{name}: this server answers loopback names only")(scope, receive, send)
                    return
        size = headers.get("content-length", "")
        too_large = size.isdecimal() and int(size) > self.max_body_bytes
        if "transfer-encoding" in headers:
            body = await _read(receive, self.max_body_bytes)
            too_large, receive = body is None, _replay(body or b"", receive)
        if too_large:
            refusal = problem(413, f"a body may have {self.max_body_bytes} bytes", headers={"Connection": "close"})
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)


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
