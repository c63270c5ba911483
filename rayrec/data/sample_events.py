"""The log of the sample shop: who does what to which item, and when.

In: a SampleConfig. Out: a World and its log as columns. It must not know files.

When events come is drawn first and without regard to items: how many a visitor makes, where sessions begin, and in
which slots (a daypart of a day) they lie. Then all visitors of a block choose in step: each first event, each
second, and so on, so that numpy draws thousands at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rayrec.data.sample_choice import PURCHASE, Chooser, State
from rayrec.data.sample_world import (
    ANONYMOUS_EVENTS,
    ANONYMOUS_SHARE,
    CATEGORIES,
    DAY_S,
    DAYPARTS,
    EVENTS_PER_SESSION,
    MIN_DAYS,
    Floats,
    Ints,
    SampleConfig,
    World,
    make_world,
)
from rayrec.progress import Task

_SLOT_S = DAY_S // DAYPARTS
_START_WITHIN_S = 4 * 3600  # a session starts in the first four hours of its slot
_LONGEST_SESSION = 30  # events; so it ends, at _LONGEST_GAP_S each, half an hour before the next slot
_LONGEST_GAP_S, _MEAN_GAP_S = 180, 45
_BLOCK_BYTES = 96 << 20


@dataclass(frozen=True)
class Log:
    """All events in order of time. E events; `session_E` counts a visitor's sessions from 0."""

    visitor_E: Ints
    session_E: Ints
    item_E: Ints
    action_E: Ints
    time_s_E: Ints
    quantity_E: Ints  # of a purchase, else 0


@dataclass(frozen=True)
class _Calendar:
    """Events visitor by visitor, oldest first: visitor u has offset_U1[u] to offset_U1[u + 1] - 1."""

    offset_U1: Ints
    session_E: Ints
    in_session_E: Ints

    @property
    def counts(self) -> Ints:
        """[U]: events of each visitor."""
        return np.diff(self.offset_U1)


def simulate(config: SampleConfig) -> tuple[World, Log]:
    """The shop and exactly `config.events` events, the same for the same config."""
    rng = np.random.default_rng(config.seed)
    n_U = _event_counts(config, rng)
    calendar = _sessions(n_U, config.users, rng)
    most_sessions = int(calendar.session_E.max()) + 1
    days = max(MIN_DAYS, math.ceil(2 * most_sessions / DAYPARTS))
    world = make_world(config, days, len(n_U) - config.users, rng)
    time_s_E = _times(world, calendar, rng)
    item_E, action_E = _choices(world, calendar, time_s_E, rng)
    visitor_E = np.repeat(np.arange(len(n_U)), n_U)
    refill_E = np.array([category.refill_days > 0 for category in CATEGORIES])[world.category_N[item_E]]
    quantity_E = (action_E == PURCHASE) * (1 + refill_E * rng.integers(0, 3, len(item_E)))
    order = np.lexsort((visitor_E, time_s_E))
    columns = (visitor_E, calendar.session_E, item_E, action_E, time_s_E, quantity_E)
    return world, Log(*(column[order] for column in columns))


def _event_counts(config: SampleConfig, rng: np.random.Generator) -> Ints:
    """[U]: events of each user (heavy-tailed, at least one), then of each anonymous visitor; exact in total."""
    spare = config.events - config.users
    n_anonymous = int(min(ANONYMOUS_SHARE * config.events, spare) / ANONYMOUS_EVENTS)
    more = rng.integers(max(n_anonymous, 1), size=(ANONYMOUS_EVENTS - 1) * n_anonymous)
    anonymous_U = 1 + np.bincount(more, minlength=n_anonymous)
    activity_U = rng.lognormal(0, 0.7, config.users)
    user_U = 1 + rng.multinomial(spare - anonymous_U.sum(), activity_U / activity_U.sum())
    return np.concatenate([user_U, anonymous_U])


def _sessions(n_U: Ints, users: int, rng: np.random.Generator) -> _Calendar:
    """Cut each visitor's events into sessions; an anonymous visitor has one."""
    offset_U1 = np.concatenate([[0], np.cumsum(n_U)])
    place_E = np.arange(offset_U1[-1])
    begins_E = rng.random(len(place_E)) < 1 / EVENTS_PER_SESSION
    begins_E[offset_U1[users] :] = False
    begins_E[offset_U1[:-1]] = True
    since_E = place_E - np.maximum.accumulate(np.where(begins_E, place_E, 0))
    begins_E |= since_E % _LONGEST_SESSION == 0
    in_session_E = since_E % _LONGEST_SESSION
    begun_E = np.cumsum(begins_E)
    return _Calendar(offset_U1, begun_E - np.repeat(begun_E[offset_U1[:-1]], n_U), in_session_E)


def _times(world: World, calendar: _Calendar, rng: np.random.Generator) -> Ints:
    """[E]: epoch s, rising within a visitor. Sessions lie in different slots, chosen by the visitor's habit."""
    n_U, n_slots = calendar.counts, world.days * DAYPARTS
    sessions_U = calendar.session_E[calendar.offset_U1[1:] - 1] + 1
    first_U1 = np.concatenate([[0], np.cumsum(sessions_U)])
    slot_S = np.empty(first_U1[-1], np.int64)
    step = max(1, _BLOCK_BYTES // (32 * n_slots))
    for begin in range(0, len(n_U), step):
        block = slice(begin, begin + step)
        slot_S[first_U1[begin] : first_U1[min(begin + step, len(n_U))]] = _slots(
            world.habit_UD[block], sessions_U[block], n_slots, rng
        )
    start_S = world.start_s + slot_S * _SLOT_S + rng.integers(0, _START_WITHIN_S, len(slot_S))
    gap_E = 5 + np.minimum(rng.exponential(_MEAN_GAP_S, len(calendar.session_E)), _LONGEST_GAP_S - 5).astype(np.int64)
    gap_E[calendar.in_session_E == 0] = 0
    elapsed_E = np.cumsum(gap_E)
    session_E = np.repeat(first_U1[:-1], n_U) + calendar.session_E
    return start_S[session_E] + elapsed_E - elapsed_E[calendar.in_session_E == 0][session_E]


def _slots(habit_BD: Floats, sessions_B: Ints, n_slots: int, rng: np.random.Generator) -> Ints:
    """The slots of each visitor's sessions, ascending, all visitors' one after the other.

    Drawn without replacement in proportion to habit, by the Gumbel-top-k trick.
    """
    key_BS = np.log(habit_BD)[:, np.arange(n_slots) % DAYPARTS] + rng.gumbel(size=(len(habit_BD), n_slots))
    ranked_BS = np.argsort(-key_BS, axis=1)[:, : sessions_B.max()]
    chosen_BS = np.arange(ranked_BS.shape[1]) < sessions_B[:, None]
    slots_BS = np.sort(np.where(chosen_BS, ranked_BS, n_slots), axis=1)
    return slots_BS[slots_BS < n_slots]


def _choices(world: World, calendar: _Calendar, time_s_E: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Item and action of every event."""
    item_E, action_E = np.empty_like(time_s_E), np.empty_like(time_s_E)
    n_U = calendar.counts
    busiest_first = np.argsort(-n_U, kind="stable")
    step = max(1, _BLOCK_BYTES // (16 * len(world.item_id)))
    with Task("sample: events", total=len(time_s_E)) as task:
        for begin in range(0, len(n_U), step):
            visitor_B = busiest_first[begin : begin + step]
            n_B, offset_B = n_U[visitor_B], calendar.offset_U1[visitor_B]
            chooser, state = Chooser(world, visitor_B, rng), State.empty(len(visitor_B))
            for place in range(n_B[0]):
                active = np.arange(np.searchsorted(-n_B, -place))  # those with more than `place` events
                event_B = offset_B[active] + place
                item_B, action_B = chooser.draw(state.take(slice(len(active))), time_s_E[event_B])
                state.advance(world, active, item_B, action_B, time_s_E[event_B])
                item_E[event_B], action_E[event_B] = item_B, action_B
                task.advance(len(active))
    return item_E, action_E
