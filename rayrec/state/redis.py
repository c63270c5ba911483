"""Shared state in Redis or Valkey: for replicas on several machines.

In: values of `protocol`. Out: the same. It must not know who reads or writes. A write is one script, which the server
runs as a whole or not at all; times of erasures and of replicas are the server's own, so that clocks of machines need
not agree. One server (with replicas of its own, if any), no Redis Cluster: a script touches keys of many visitors.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from operator import attrgetter
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import redis

from rayrec.errors import StateError, UsageError
from rayrec.schema import ENGAGEMENTS, SESSION_PREFIX
from rayrec.state.protocol import (
    FORGET_REPLICA_MS,
    KEEP_CHANGES,
    KEEP_HAPPENINGS,
    MARKS,
    Act,
    Change,
    Event,
    Happening,
    History,
    ItemEdit,
    Outcome,
    Receipt,
    Replica,
    Shown,
    UserRecord,
)

PREFIX = "rayrec:"
METRICS = PREFIX + "metrics:"
PASSWORD = "RAYREC_REDIS_PASSWORD"
CONNECT_S, ANSWER_S = 2.0, 10.0
REWRITE_S = 10.0  # so long an erasure waits for a rewriting of the log that began before it
SEQ_DIGITS = 16
"""A member of a sorted set begins with its number of arrival: of equal times the set keeps the order of members."""

_BODY = attrgetter(*[field.name for field in fields(Event)][1:])
_SHOWN_BODY = attrgetter(*[field.name for field in fields(Shown) if field.name != "visitor"])

# ---------------------------------------------------------------- scripts

_COMMON = f"""
local P = '{PREFIX}'
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function number() return string.format('%0{SEQ_DIGITS}d', redis.call('INCR', P .. 'seq')) end
local function owner(visitor, digest)
  local joined = redis.call('HGET', P .. 'joins', visitor)
  if not joined then return visitor, digest end
  return string.sub(joined, 65), string.sub(joined, 1, 64)
end
local function announce(kind, key)
  local seq = redis.call('INCR', P .. 'change')
  redis.call('ZADD', P .. 'changes', seq, cjson.encode({{seq, kind, key, now_ms()}}))
  redis.call('ZREMRANGEBYRANK', P .. 'changes', 0, -{KEEP_CHANGES} - 1)
  return seq
end
"""

# ARGV: for each event visitor, its digest, time, event id, mark ('' if none), item, act ('' if none), body.
_APPEND = f"""
local out = {{}}
for i = 1, #ARGV, 8 do
  local visitor, digest, time_ms, event_id, mark, item, act, body = unpack(ARGV, i, i + 7)
  local whose, digest_of = owner(visitor, digest)
  local erased = redis.call('HGET', P .. 'tombstones', digest_of)
  if erased and tonumber(time_ms) <= tonumber(erased) then
    out[#out + 1] = 'erased'
  elseif redis.call('SADD', P .. 'event-ids', event_id) == 0 then
    out[#out + 1] = 'duplicate'
  else
    local seq = number()
    redis.call('ZADD', P .. 'events:' .. whose, time_ms, seq .. body)
    if act ~= '' then
      local acts = P .. 'acts:' .. whose
      local before = redis.call('ZREVRANGEBYSCORE', acts, time_ms, '-inf', 'LIMIT', 0, 1)[1]
      redis.call('ZADD', acts, time_ms, seq .. act)
      before = before and string.sub(before, {SEQ_DIGITS} + 1) or ''
      redis.call('ZADD', P .. 'happenings', tonumber(seq), cjson.encode({{tonumber(seq), act, time_ms, before}}))
    end
    if mark == 'purchase' then
      redis.call('HINCRBY', P .. 'bought:' .. whose, item, 1)
      redis.call('ZADD', P .. 'bought-at:' .. whose, 'GT', time_ms, item)
    elseif mark == 'cancel' then redis.call('HINCRBY', P .. 'bought:' .. whose, item, -1)
    elseif mark ~= '' then redis.call('SADD', P .. 'hidden:' .. whose, item) end
    redis.call('HINCRBY', P .. 'counts', 'events', 1)
    out[#out + 1] = 'accepted'
  end
end
redis.call('ZREMRANGEBYRANK', P .. 'happenings', 0, -{KEEP_HAPPENINGS} - 1)
return out
"""

# ARGV: the limit, then visitors.
_HISTORIES = """
local out = {}
for i = 2, #ARGV do
  local whose = owner(ARGV[i], '')
  out[#out + 1] = {
    redis.call('ZRANGE', P .. 'acts:' .. whose, -ARGV[1], -1, 'WITHSCORES'),
    redis.call('HGETALL', P .. 'bought:' .. whose),
    redis.call('ZRANGE', P .. 'bought-at:' .. whose, 0, -1, 'WITHSCORES'),
    redis.call('SMEMBERS', P .. 'hidden:' .. whose)}
end
return out
"""

# ARGV: for each list visitor, time, body.
_LOG_SHOWN = """
for i = 1, #ARGV, 3 do
  redis.call('ZADD', P .. 'shown:' .. owner(ARGV[i], ''), ARGV[i + 1], number() .. ARGV[i + 2])
  redis.call('HINCRBY', P .. 'counts', 'shown', 1)
end
"""

# ARGV: session, user, the user's digest.
_JOIN = """
local session, user, digest = unpack(ARGV)
local before = redis.call('HGET', P .. 'joins', session)
if before then redis.call('SREM', P .. 'sessions:' .. string.sub(before, 65), session) end
redis.call('HSET', P .. 'joins', session, digest .. user)
redis.call('SADD', P .. 'sessions:' .. user, session)
local moved = redis.call('ZCARD', P .. 'events:' .. session)
for _, kind in ipairs({'events:', 'acts:', 'shown:', 'bought-at:'}) do
  redis.call('ZUNIONSTORE', P .. kind .. user, 2, P .. kind .. user, P .. kind .. session, 'AGGREGATE', 'MAX')
  redis.call('DEL', P .. kind .. session)
end
local bought = redis.call('HGETALL', P .. 'bought:' .. session)
for i = 1, #bought, 2 do redis.call('HINCRBY', P .. 'bought:' .. user, bought[i], bought[i + 1]) end
redis.call('SUNIONSTORE', P .. 'hidden:' .. user, P .. 'hidden:' .. user, P .. 'hidden:' .. session)
redis.call('DEL', P .. 'bought:' .. session, P .. 'hidden:' .. session)
announce('joined', digest)
return moved
"""

# ARGV: visitor, its digest.
_ERASE = f"""
local visitor, digest = unpack(ARGV)
local events = redis.call('ZRANGE', P .. 'events:' .. visitor, 0, -1)
for _, member in ipairs(events) do
  redis.call('SREM', P .. 'event-ids', cjson.decode(string.sub(member, {SEQ_DIGITS} + 1))[4])
  local seq = tonumber(string.sub(member, 1, {SEQ_DIGITS}))
  redis.call('ZREMRANGEBYSCORE', P .. 'happenings', seq, seq)
end
local shown = redis.call('ZCARD', P .. 'shown:' .. visitor)
local sessions = redis.call('SMEMBERS', P .. 'sessions:' .. visitor)
for _, session in ipairs(sessions) do redis.call('HDEL', P .. 'joins', session) end
local joined = redis.call('HGET', P .. 'joins', visitor)
if joined then
  redis.call('SREM', P .. 'sessions:' .. string.sub(joined, 65), visitor)
  redis.call('HDEL', P .. 'joins', visitor)
end
for _, kind in ipairs({{'events:', 'acts:', 'bought:', 'bought-at:', 'hidden:', 'shown:', 'sessions:'}}) do
  redis.call('DEL', P .. kind .. visitor)
end
redis.call('HINCRBY', P .. 'counts', 'events', 0 - #events)
redis.call('HINCRBY', P .. 'counts', 'shown', 0 - shown)
local erased = now_ms()
redis.call('HSET', P .. 'tombstones', digest, string.format('%.0f', erased))
announce('erased', digest)
return {{erased, #events, shown, #sessions}}
"""

# ARGV: name, value.
_PUT_SETTING = """
redis.call('HSET', P .. 'settings', ARGV[1], ARGV[2])
announce('setting', ARGV[1])
"""

# ARGV: item, its picture ('' leaves it), then name and value of each fact.
_PUT_ITEM = """
local item, picture = ARGV[1], ARGV[2]
local seq = announce('item', item)
redis.call('ZADD', P .. 'items', seq, item)
if picture ~= '' then
  redis.call('SET', P .. 'picture:' .. item, picture)
  redis.call('HSET', P .. 'pictured', item, seq)
end
for i = 3, #ARGV, 2 do redis.call('HSET', P .. 'item:' .. item, ARGV[i], ARGV[i + 1]) end
return seq
"""

# ARGV: since, limit.
_ITEM_EDITS = """
local out = {}
local found = redis.call('ZRANGEBYSCORE', P .. 'items', '(' .. ARGV[1], '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[2])
for i = 1, #found, 2 do
  local item = found[i]
  local at = redis.call('HGET', P .. 'pictured', item)
  out[#out + 1] = {tonumber(found[i + 1]), item, redis.call('HGETALL', P .. 'item:' .. item), tonumber(at or 0)}
end
return out
"""

# ARGV: replica, model.
_BEAT = f"""
redis.call('HSET', P .. 'replicas', ARGV[1], cjson.encode({{now_ms(), ARGV[2]}}))
local all = redis.call('HGETALL', P .. 'replicas')
for i = 1, #all, 2 do
  if cjson.decode(all[i + 1])[1] < now_ms() - {FORGET_REPLICA_MS} then redis.call('HDEL', P .. 'replicas', all[i]) end
end
"""

# ARGV: the greatest age in ms.
_REPLICAS = """
local out, all = {}, redis.call('HGETALL', P .. 'replicas')
for i = 1, #all, 2 do
  local beat = cjson.decode(all[i + 1])
  if beat[1] >= now_ms() - ARGV[1] then out[#out + 1] = {all[i], beat[2], beat[1]} end
end
return out
"""

_SCRIPTS = {
    "append": _APPEND, "histories": _HISTORIES, "log_shown": _LOG_SHOWN, "join": _JOIN, "erase": _ERASE,
    "put_setting": _PUT_SETTING, "put_item": _PUT_ITEM, "item_edits": _ITEM_EDITS, "beat": _BEAT, "replicas": _REPLICAS,
}  # fmt: skip


# ---------------------------------------------------------------- the state


class RedisState:
    """`protocol.State` in the Redis that `client` speaks to. logged: it keeps a log on disk."""

    def __init__(self, client: redis.Redis, logged: bool = True) -> None:
        self._client, self._logged = client, logged
        self._calls, self._closed = 0, False
        self._changed = threading.Condition()
        self._script = {name: client.register_script(_COMMON + body) for name, body in _SCRIPTS.items()}
        self._ask(lambda: client.setnx(PREFIX + "secret", secrets.token_hex(32)))
        self._key = bytes.fromhex(str(self._ask(lambda: client.get(PREFIX + "secret"))))

    @classmethod
    def open(cls, url: str) -> RedisState:
        """From `redis://[user@]host[:port]/db[?appendonly=no]`, or `rediss://` with TLS.

        The password comes from the environment (RAYREC_REDIS_PASSWORD). A server that would lose events when it ends,
        or evict them when memory runs out, is refused: `?appendonly=no` accepts the former.
        Raises UsageError for another form of URL, StateError for a server that cannot be used.
        """
        parts = urlsplit(url)
        options = parse_qs(parts.query)
        volatile = options.pop("appendonly", ["yes"])[0] == "no"
        if parts.password:
            raise UsageError(f"state {parts.scheme}://{parts.hostname}: set the password in {PASSWORD}, not in the URL")
        if not parts.hostname or not parts.path.removeprefix("/").isdecimal() or options:
            raise UsageError(f"state '{url}': write it as redis://HOST:PORT/0")
        client = redis.Redis.from_url(
            urlunsplit((parts.scheme, parts.netloc, parts.path, "", "")),
            password=os.environ.get(PASSWORD), decode_responses=True,
            socket_connect_timeout=CONNECT_S, socket_timeout=ANSWER_S, health_check_interval=30,
        )  # fmt: skip
        try:
            info: dict[str, Any] = client.info()  # type: ignore[assignment]
            if not int(info.get("aof_enabled", 0)) and not volatile:
                raise StateError(
                    "it keeps no log on disk (appendonly no), and would lose events; start it with --appendonly yes, "
                    "or accept that with ?appendonly=no"
                )
            if int(info.get("maxmemory", 0)) and info.get("maxmemory_policy") != "noeviction":
                raise StateError(
                    f"it evicts when its memory is full ({info['maxmemory_policy']}), and would forget people's "
                    "histories; set maxmemory-policy noeviction"
                )
            return cls(client, bool(int(info.get("aof_enabled", 0))))
        except redis.RedisError as error:
            raise StateError(f"state {url}: cannot be reached ({error})") from None
        except StateError as error:
            raise StateError(f"state {url}: {error}") from None

    # ------------------------------------------------------------ events

    def append_events(self, events: Sequence[Event]) -> list[Outcome]:
        """See `protocol.State`."""
        words: list[Any] = []
        for event in events:
            if None in (event.visitor, event.item_id, event.action, event.time_ms):
                raise StateError("the state cannot be written (an event without visitor, item, action or time)")
            event_id = event.event_id or uuid.uuid4().hex
            body = _packed((*_BODY(event)[:3], event_id, *_BODY(event)[4:]))
            act = _packed((event.item_id, event.action)) if event.action in ENGAGEMENTS else ""
            mark = event.action if event.action in MARKS else ""
            words += [event.visitor, self._digest(event.visitor), event.time_ms, event_id]
            words += [mark, event.item_id, act, body]
        found: list[Outcome] = self._run("append", words) if words else []
        # Sent twice after a lost connection, an event whose id is ours is its own duplicate.
        return [
            "accepted" if outcome == "duplicate" and event.event_id is None else outcome
            for event, outcome in zip(events, found, strict=True)
        ]

    def histories(self, visitors: Sequence[str], limit: int) -> list[History]:
        """See `protocol.State`."""
        if not visitors:
            return []
        return [_history(*found) for found in self._run("histories", [limit, *visitors])]

    def happenings(self, since: int | None, limit: int = KEEP_HAPPENINGS) -> list[Happening]:
        """See `protocol.State`."""
        key = PREFIX + "happenings"
        if since is None:
            members = self._ask(lambda: self._client.zrange(key, -limit, -1))
        else:
            members = self._ask(lambda: self._client.zrangebyscore(key, f"({since}", "+inf", start=0, num=limit))
        found = []
        for member in members:
            seq, act, time_ms, before = json.loads(member)
            item_id, action = json.loads(act)
            found.append(Happening(seq, item_id, action, int(time_ms), json.loads(before)[0] if before else None))
        return found

    def log_shown(self, lists: Sequence[Shown]) -> None:
        """See `protocol.State`."""
        words: list[Any] = []
        for shown in lists:
            words += [shown.visitor, shown.time_ms, _packed(_SHOWN_BODY(shown))]
        self._run("log_shown", words)

    # ------------------------------------------------------------ people

    def user(self, visitor: str) -> UserRecord:
        """See `protocol.State`."""
        events, shown = (self._bodies(f"{PREFIX}{kind}:{visitor}") for kind in ("events", "shown"))
        sessions: set[str] = self._ask(lambda: self._client.smembers(f"{PREFIX}sessions:{visitor}"))
        return UserRecord(
            events=[Event(visitor, *body) for body in events],
            shown=[Shown(body[0], visitor, *body[1:-2], *map(tuple, body[-2:])) for body in shown],
            sessions=sorted(session.removeprefix(SESSION_PREFIX) for session in sessions),
        )

    def visitors(self) -> Iterator[str]:
        """See `protocol.State`."""
        yield from self._held("events")
        for visitor in self._held("shown"):
            if not self._ask(partial(self._client.exists, f"{PREFIX}events:{visitor}")):
                yield visitor

    def erase(self, visitor: str) -> Receipt:
        """See `protocol.State`. The server's log is rewritten too, in the background: until then it holds a copy."""
        digest = self._digest(visitor)
        erased_ms, events, shown, sessions = self._run("erase", [visitor, digest])
        if self._logged:
            self._rewrite_log()
        return Receipt(digest, erased_ms, events, shown, sessions)

    def erased_ms(self, visitor: str) -> int | None:
        """See `protocol.State`."""
        found = self._ask(lambda: self._client.hget(PREFIX + "tombstones", self._digest(visitor)))
        return None if found is None else int(found)

    def join(self, user_id: str, session_id: str) -> int:
        """See `protocol.State`."""
        return int(self._run("join", [SESSION_PREFIX + session_id, user_id, self._digest(user_id)]))

    # ------------------------------------------------------------ what replicas share

    def put_setting(self, name: str, value: str) -> None:
        """See `protocol.State`."""
        self._run("put_setting", [name, value])

    def setting(self, name: str) -> str | None:
        """See `protocol.State`."""
        found: str | None = self._ask(lambda: self._client.hget(PREFIX + "settings", name))
        return found

    def put_item(self, item_id: str, facts: Mapping[str, Any], picture: bytes | None = None) -> int:
        """See `protocol.State`."""
        # As text: what this client reads is decoded.
        words = [item_id, "" if picture is None else base64.b64encode(picture).decode()]
        for name, value in facts.items():
            words += [name, _packed(value)]
        return int(self._run("put_item", words))

    def item_edits(self, since: int, limit: int = 1000) -> list[ItemEdit]:
        """See `protocol.State`."""
        return [
            ItemEdit(seq, item_id, dict(zip(said[::2], map(json.loads, said[1::2]), strict=True)), picture_seq)
            for seq, item_id, said, picture_seq in self._run("item_edits", [since, limit])
        ]

    def item_picture(self, item_id: str) -> bytes | None:
        """See `protocol.State`."""
        found = self._ask(lambda: self._client.get(f"{PREFIX}picture:{item_id}"))
        return None if found is None else base64.b64decode(found)

    def changes(self, since: int, limit: int = 1000) -> list[Change]:
        """See `protocol.State`."""
        found = self._ask(
            lambda: self._client.zrangebyscore(PREFIX + "changes", f"({since}", "+inf", start=0, num=limit)
        )
        return [Change(*json.loads(member)) for member in found]

    def beat(self, replica_id: str, model: str) -> None:
        """See `protocol.State`."""
        self._run("beat", [replica_id, model])

    def leave(self, replica_id: str) -> None:
        """See `protocol.State`."""
        self._ask(lambda: self._client.hdel(PREFIX + "replicas", replica_id))
        self._ask(lambda: self._client.delete(METRICS + replica_id))

    def tell_metrics(self, replica_id: str, metrics: str) -> None:
        """See `protocol.State`."""
        # A key of its own, which forgets itself: beats read all replicas, and need not read this.
        self._ask(lambda: self._client.set(METRICS + replica_id, metrics, px=FORGET_REPLICA_MS), "written")

    def told_metrics(self) -> dict[str, str]:
        """See `protocol.State`."""
        replicas = sorted(replica.replica_id for replica in self.replicas(FORGET_REPLICA_MS))
        if not replicas:
            return {}
        told = self._ask(lambda: self._client.mget([METRICS + replica_id for replica_id in replicas]))
        return {replica_id: text for replica_id, text in zip(replicas, told, strict=True) if text is not None}

    def replicas(self, within_ms: int) -> list[Replica]:
        """See `protocol.State`."""
        return sorted(Replica(*found) for found in self._run("replicas", [within_ms]))

    def counts(self) -> dict[str, int]:
        """See `protocol.State`."""
        counts = self._ask(lambda: self._client.hgetall(PREFIX + "counts"))
        erased = self._ask(lambda: self._client.hlen(PREFIX + "tombstones"))
        return {**{name: int(counts.get(name, 0)) for name in ("events", "shown")}, "erased": int(erased)}

    def close(self) -> None:
        """See `protocol.State`."""
        with self._changed:
            self._closed = True
            # A connection that is closed while it is read fails in ways of its own.
            self._changed.wait_for(lambda: self._calls == 0, timeout=ANSWER_S)
        self._client.close()

    # ------------------------------------------------------------ inside

    def _rewrite_log(self) -> None:
        """Begin to write the log anew, without what is gone. One that began before would still hold it."""
        deadline = time.monotonic() + REWRITE_S
        while True:
            try:
                self._client.execute_command("BGREWRITEAOF")  # type: ignore[no-untyped-call]
                return
            except redis.ResponseError as error:
                if "in progress" not in str(error) or time.monotonic() > deadline:
                    raise StateError(
                        f"the visitor was erased, but the server's log still holds a copy ({error}); erase once more"
                    ) from None
                time.sleep(0.1)
            except redis.RedisError as error:
                raise StateError(f"the state cannot be written ({error})") from None

    def _held(self, kind: str) -> Iterator[str]:
        prefix, cursor = f"{PREFIX}{kind}:", 0
        while True:
            cursor, keys = self._ask(partial(self._client.scan, cursor, match=prefix + "*", count=1000))
            yield from (key.removeprefix(prefix) for key in keys)
            if not cursor:
                return

    def _bodies(self, key: str) -> list[Any]:
        members: list[str] = self._ask(lambda: self._client.zrange(key, 0, -1))
        return [json.loads(member[SEQ_DIGITS:]) for member in members]

    def _digest(self, visitor: str) -> str:
        return hmac.new(self._key, visitor.encode(), hashlib.sha256).hexdigest()

    def _run(self, name: str, words: Iterable[Any]) -> Any:
        return self._ask(lambda: self._script[name](args=list(words)), "written")

    def _ask(self, question: Callable[[], Any], what: str = "read") -> Any:
        with self._changed:
            if self._closed:
                raise StateError("the state was closed")
            self._calls += 1
        try:
            return question()
        except redis.RedisError as error:
            raise StateError(f"the state cannot be {what} ({error})") from error
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()


def _packed(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def _history(acts: list[str], bought: list[str], bought_at: list[str], hidden: list[str]) -> History:
    members, times = acts[::2], acts[1::2]
    held = dict(zip(bought[::2], map(int, bought[1::2]), strict=True))
    last = zip(bought_at[::2], bought_at[1::2], strict=True)
    return History(
        acts=tuple(
            Act._make((*json.loads(member[SEQ_DIGITS:]), int(float(time))))
            for member, time in zip(members, times, strict=True)
        ),
        bought={item_id: int(float(time)) for item_id, time in last if held[item_id] > 0},
        hidden=frozenset(hidden),
    )
