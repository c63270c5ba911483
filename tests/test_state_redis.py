"""What is particular to Redis: servers that would lose or forget, its death and return, passwords."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import redis
from redisserver import RedisServer

from rayrec.errors import StateError, UsageError
from rayrec.state import open_state
from rayrec.state.protocol import Event


def test_what_was_answered_survives_the_death_of_the_server(redis_server: RedisServer) -> None:
    state = open_state(redis_server.url)
    for n in range(100):
        state.append_events([Event("u", f"i{n}", "view", n, f"e{n}")])
    redis_server.kill()
    with pytest.raises(StateError, match="cannot be written"):
        state.append_events([Event("u", "lost", "view", 200, "lost")])
    with pytest.raises(StateError, match="cannot be read"):
        state.setting("model")
    redis_server.start()
    assert [act.item_id for act in state.histories(["u"], 200)[0].acts] == [f"i{n}" for n in range(100)]
    assert state.append_events([Event("u", "i0", "view", 0, "e0")]) == ["duplicate"]
    state.close()


def test_erasures_in_a_row_each_have_the_log_rewritten(redis_server: RedisServer) -> None:
    """The second one comes while the log is rewritten for the first."""
    state = open_state(redis_server.url)
    for n in range(4):
        state.append_events([Event(f"visitor-{n}", f"thing-{m}", "view", m) for m in range(300)])
    for n in range(4):
        state.erase(f"visitor-{n}")
    client = redis.Redis(port=redis_server.port)
    while client.info("persistence")["aof_rewrite_in_progress"]:
        time.sleep(0.05)
    left = b"".join(file.read_bytes() for file in redis_server.folder.rglob("*") if file.is_file())
    assert b"visitor-3" not in left
    assert b"visitor-0" not in left
    client.close()
    state.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--appendonly", "no"), "keeps no log on disk"),
        (
            ("--appendonly", "yes", "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"),
            "evicts when its memory",
        ),
    ],
)
def test_a_server_that_would_lose_people_is_refused(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    server = RedisServer(tmp_path, options).start()
    try:
        with pytest.raises(StateError, match=words):
            open_state(server.url)
        if "no" in options:
            open_state(server.url + "?appendonly=no").close()
    finally:
        server.kill()


def test_the_password_is_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RedisServer(tmp_path).start()
    try:
        redis.Redis(port=server.port).config_set("requirepass", "tell-nobody")
        with pytest.raises(StateError, match="cannot be reached"):
            open_state(server.url)
        monkeypatch.setenv("RAYREC_REDIS_PASSWORD", "tell-nobody")
        open_state(server.url).close()
        with pytest.raises(UsageError, match="RAYREC_REDIS_PASSWORD, not in the URL") as told:
            open_state(f"redis://:tell-nobody@127.0.0.1:{server.port}/0")
        assert "tell-nobody" not in str(told.value)
    finally:
        server.kill()


def test_no_server_is_said_with_its_address() -> None:
    with pytest.raises(StateError, match=r"redis://127\.0\.0\.1:9/0: cannot be reached"):
        open_state("redis://127.0.0.1:9/0")


@pytest.mark.parametrize("url", ["redis://", "redis://host", "redis://host:6379/x", "redis://host/0?what=1"])
def test_wrong_urls(url: str) -> None:
    with pytest.raises(UsageError, match="write it as redis://HOST:PORT/0"):
        open_state(url)
