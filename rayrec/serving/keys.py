"""Who calls: keys with scopes, tokens of visitors, and what each may do.

In: the secrets of the environment, a request's method, path and bearer. Out: a caller, or a refusal. It must not know
what routes do. Keys are compared in constant time; a token is signed, so that nothing of it need be stored.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from rayrec.errors import UsageError

KEYS: Final = "RAYREC_API_KEYS"
"""Environment variable: shop=KEY,admin=KEY; a scope may have several keys, so that they can be changed one by one."""

Scope: TypeAlias = Literal["public", "visitor", "shop", "admin"]
RANK: Final[dict[Scope, int]] = {"public": 0, "visitor": 1, "shop": 2, "admin": 3}
LEAST_KEY: Final = 16
TOKEN_S: Final = 3600
RENEW_S: Final = 30 * 86_400
"""For so long a token can be exchanged for a new one of the same session."""

TOKEN: Final = "visitor."
"""How a token begins, to be told from a key."""

# The least that a caller must be, by method and path; the first that fits. What is not named is for admins.
RULES: Final[tuple[tuple[str, re.Pattern[str], Scope], ...]] = tuple(
    (methods, re.compile(path), scope)  # type: ignore[misc]
    for methods, path, scope in (
        ("GET HEAD", r"/|/healthz|/readyz|/docs|/openapi\.json", "public"),
        ("GET HEAD", r"/v1/items/.+", "public"),
        ("POST", r"/v1/visitors", "public"),
        ("POST", r"/v1/(events|recommend)", "visitor"),
        ("GET DELETE", r"/v1/users/session:.+", "visitor"),
    )
)


@dataclass(frozen=True)
class Caller:
    """Who calls. name: tells keys apart in logs and gives none away. session: of a visitor, who is bound to it."""

    scope: Scope
    name: str
    session: str | None = None

    def may(self, scope: Scope) -> bool:
        """Whether the caller is at least this."""
        return RANK[self.scope] >= RANK[scope]


def own_headers() -> dict[str, str]:
    """What this process sends to call a server with its own keys as an admin; nothing if there are none."""
    found = [part.strip().partition("=") for part in os.environ.get(KEYS, "").split(",")]
    admin = next((key for scope, _, key in found if scope == "admin"), None)
    return {"Authorization": f"Bearer {admin}"} if admin else {}


ANYONE: Final = Caller("public", "anyone")
LOCAL: Final = Caller("admin", "local")
"""Every caller of a server without keys, which answers this machine alone."""


class Keys:
    """The keys of a server, and a secret of their own, for signatures."""

    def __init__(self, keys: Mapping[str, Scope]) -> None:
        self._callers = [(_digest(key), Caller(scope, f"{scope}-{_digest(key)[:6]}")) for key, scope in keys.items()]
        # Derived of all keys, so that every replica signs alike; tokens end when keys are changed.
        self.secret = hmac.new(b"rayrec visitor tokens", "\n".join(sorted(keys)).encode(), hashlib.sha256).digest()

    @classmethod
    def parse(cls, text: str) -> Keys:
        """From `shop=KEY,admin=KEY`. Raises UsageError, which never shows a key."""
        found: dict[str, Scope] = {}
        for number, part in enumerate(filter(None, (part.strip() for part in text.split(","))), 1):
            scope, equals, key = part.partition("=")
            if not equals or scope not in ("shop", "admin"):
                raise UsageError(f"{KEYS}: part {number} must be shop=KEY or admin=KEY")
            if len(key) < LEAST_KEY:
                raise UsageError(f"{KEYS}: the {scope} key of part {number} is short; use at least {LEAST_KEY} letters")
            found[key] = scope  # type: ignore[assignment]
        if not found:
            raise UsageError(f"{KEYS}: is empty; write shop=KEY,admin=KEY, or unset it to serve on loopback")
        return cls(found)

    def caller(self, authorization: str | None) -> Caller | None:
        """Whose `Authorization` header this is: nobody's in particular without one, None if it is no one's."""
        if authorization is None:
            return ANYONE
        kind, _, bearer = authorization.partition(" ")
        if kind.lower() != "bearer":
            return None
        if bearer.startswith(TOKEN):
            session = self.session_of(bearer)
            return None if session is None else Caller("visitor", "visitor", session)
        given, found = _digest(bearer), None
        for digest, caller in self._callers:  # all of them, whichever it is
            if hmac.compare_digest(given, digest):
                found = caller
        return found

    def token(self, session: str, now_s: float | None = None) -> str:
        """A token for a visitor's own session, good for an hour."""
        content = json.dumps([session, int(now_s if now_s is not None else time.time()) + TOKEN_S]).encode()
        body = _text(content)
        return f"{TOKEN}{body}.{_text(self._signature(body))}"

    def session_of(self, token: str, *, renewing: bool = False, now_s: float | None = None) -> str | None:
        """The session of a token that is genuine and not too old; to renew it, it may be."""
        body, _, signature = token.removeprefix(TOKEN).rpartition(".")
        if not hmac.compare_digest(_text(self._signature(body)).encode(), signature.encode()):
            return None
        session, until_s = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        late_s = (now_s if now_s is not None else time.time()) - until_s
        return str(session) if late_s < (RENEW_S if renewing else 0) else None

    def _signature(self, body: str) -> bytes:
        return hmac.new(self.secret, body.encode(), hashlib.sha256).digest()


def needed(method: str, path: str) -> Scope:
    """The least scope that may call a path."""
    for methods, pattern, scope in RULES:
        if method in methods.split() and pattern.fullmatch(path):
            return scope
    return "admin"


def new_session() -> str:
    """A session that nobody can guess."""
    return "web-" + secrets.token_hex(12)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _text(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
