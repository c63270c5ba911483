"""The ranking that knows everything: the true probability of each next item of the sample shop.

In: the folder of a sample, and visitors' histories as anyone sees them. Out: scores for the judge that every model
faces. It must not know the metrics, and reads nothing of a history but items, actions and times.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from rayrec.data.sample_choice import ACTION_NAMES, NEW_SESSION_S, State, probabilities
from rayrec.data.sample_world import DAY_S, DAYPARTS, EVENTS_PER_SESSION, Floats, Ints, World
from rayrec.errors import DataError, UsageError

TRUTH_FORMAT: Final = "rayrec-sample-truth"
TRUTH_VERSION: Final = 1
_ACTION: Final = {name: code for code, name in enumerate(ACTION_NAMES)}


@dataclass(frozen=True)
class Query:
    """A visitor (schema.visitor_id) just before an event: the history, oldest first, and the event's time.

    Without `next_time_ms` the oracle weighs the times that are likely.
    """

    user_id: str
    item_ids: Sequence[str]
    actions: Sequence[str]
    times_ms: Sequence[int]
    next_time_ms: int | None = None


class Oracle:
    """Scores items for visitors of a sample shop."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._item = {item_id: index for index, item_id in enumerate(world.item_id)}
        self._visitor = {name: index for index, name in enumerate(world.visitor)}

    @classmethod
    def open(cls, folder: Path) -> Oracle:
        """The oracle of the sample in `folder`.

        Raises UsageError if there is no truth.json, DataError if it is another's.
        """
        path = Path(folder) / "truth.json"
        if not path.is_file():
            raise UsageError(f"{path}: not there; only a folder made by `rayrec sample` has its right answers")
        truth = json.loads(path.read_text())
        if (truth.get("format"), truth.get("version")) != (TRUTH_FORMAT, TRUTH_VERSION):
            raise DataError(f"{path}: not the truth of this version of rayrec; make the sample again")
        return cls(World.from_json(truth["world"]))

    def scores(
        self,
        user_id: str,
        history_item_ids: Sequence[str],
        history_actions: Sequence[str],
        history_times_ms: Sequence[int],
        item_ids: Sequence[str],
        next_time_ms: int | None = None,
    ) -> Floats:
        """[len(item_ids)]: the probability that each item is the next event's; 0 for items unknown or not on sale."""
        query = Query(user_id, history_item_ids, history_actions, history_times_ms, next_time_ms)
        return self.scores_batch([query], item_ids)[0]

    def scores_batch(self, queries: Sequence[Query], item_ids: Sequence[str]) -> Floats:
        """[Q, len(item_ids)]: `scores` of many queries at once. Raises DataError for an unknown visitor."""
        visitor_B = self._visitors([query.user_id for query in queries])
        state = self._replay(queries)
        p_BN = np.zeros((len(queries), len(self.world.item_id)))
        timed = np.array([query.next_time_ms is not None for query in queries], bool)
        for rows, timetable in ((np.flatnonzero(timed), False), (np.flatnonzero(~timed), True)):
            here, visitors = state.take(rows), visitor_B[rows]
            if timetable:
                for share_B, time_B in self._likely_times(visitors, here):
                    p_BN[rows] += share_B[:, None] * probabilities(self.world, visitors, here, time_B)
            else:
                time_B = np.array([(queries[row].next_time_ms or 0) // 1000 for row in rows.tolist()], np.int64)
                p_BN[rows] = probabilities(self.world, visitors, here, time_B)
        return self._columns(p_BN, item_ids)

    def affinity(self, user_ids: Sequence[str], item_ids: Sequence[str]) -> Floats:
        """[len(user_ids), len(item_ids)]: taste, price and popularity alone, whether on sale or not.

        This is the right order of items that nobody has seen yet. Raises DataError for an unknown visitor.
        """
        return self._columns(self.world.weights(self._visitors(user_ids)), item_ids)

    def _visitors(self, names: Sequence[str]) -> Ints:
        unknown = [name for name in names if name not in self._visitor]
        if unknown:
            raise DataError(f"visitor {unknown[0]!r} is not of this sample: was the dataset made from another folder?")
        return np.array([self._visitor[name] for name in names], np.int64)

    def _columns(self, value_BN: Floats, item_ids: Sequence[str]) -> Floats:
        index = np.array([self._item.get(item_id, len(self._item)) for item_id in item_ids], np.int64)
        return np.pad(value_BN, ((0, 0), (0, 1)))[:, index]

    def _replay(self, queries: Sequence[Query]) -> State:
        """The state after each history, all histories in step; what is no event of the shop is passed over."""
        histories = [
            [
                (self._item[item], _ACTION[action], time_ms // 1000)
                for item, action, time_ms in zip(query.item_ids, query.actions, query.times_ms, strict=True)
                if item in self._item and action in _ACTION
            ]
            for query in queries
        ]
        state = State.empty(len(queries))
        for place in range(max((len(history) for history in histories), default=0)):
            active = np.array([row for row, history in enumerate(histories) if len(history) > place])
            item_B, action_B, time_B = np.array([histories[row][place] for row in active]).T
            state.advance(self.world, active, item_B, action_B, time_B)
        return state

    def _likely_times(self, visitor_B: Ints, state: State) -> list[tuple[Floats, Ints]]:
        """Shares and times of the next event: soon, or in a new session in each daypart by the visitor's habit."""
        ended = 1 / EVENTS_PER_SESSION
        begun_B = state.item_B >= 0
        last_B = np.where(begun_B, state.time_B, self.world.start_s)
        habit_BD = self.world.habit_UD[visitor_B] / self.world.habit_UD[visitor_B].sum(1, keepdims=True)
        times = [(np.where(begun_B, 1 - ended, 0.0), last_B + 60)]
        for daypart in range(DAYPARTS):
            midnight_B = last_B // DAY_S * DAY_S
            time_B = midnight_B + daypart * DAY_S // DAYPARTS
            time_B = np.where(time_B - last_B > NEW_SESSION_S, time_B, time_B + DAY_S)
            times.append((np.where(begun_B, ended, 1.0) * habit_BD[:, daypart], time_B))
        return times
