"""Shared state, chosen by URL. In: a URL. Out: a `protocol.State`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

from rayrec.errors import UsageError
from rayrec.state.protocol import State
from rayrec.state.sqlite import SqliteState

__all__ = ["State", "absolute_url", "open_state", "using"]


def open_state(url: str) -> State:
    """Open the state at `url`, making it if it does not exist.

    `sqlite:///relative/path` or `sqlite:////absolute/path`, optionally with `?synchronous=full`, which
    survives power loss too; the default `normal` survives the death of every process.
    `redis://host:port/0`, for replicas on several machines: see `redis.RedisState.open`; an extra.

    Raises UsageError for another scheme or a place that cannot be used.
    """
    scheme = url.partition("://")[0]
    if scheme == "sqlite":
        return SqliteState.open(url)
    if scheme in ("redis", "rediss"):
        if not find_spec("redis"):
            raise UsageError(f"state '{url}': install rayrec with its extra for it: pip install 'rayrec[redis]'")
        from rayrec.state.redis import RedisState

        return RedisState.open(url)
    raise UsageError(f"state '{url}': unknown kind '{scheme}'; use sqlite:///PATH or redis://HOST:PORT/0")


@contextmanager
def using(url: str) -> Iterator[State]:
    """The state at `url`, which must be there. Raises as `open_state`, and UsageError if it is not."""
    path = Path(unquote(url.partition("?")[0].removeprefix("sqlite:///")))
    if url.startswith("sqlite:///") and not path.is_file():
        raise UsageError(f"state '{url}': there is no such file")
    state = open_state(url)
    try:
        yield state
    finally:
        state.close()


def absolute_url(url: str) -> str:
    """The same state for a process that runs in another folder."""
    place, question, options = url.partition("?")
    path = place.removeprefix("sqlite:///")
    if path == place or path.startswith("/"):
        return url
    return f"sqlite:///{Path(path).absolute()}{question}{options}"
