"""The replay: asks rankers what a visitor did next, under each protocol, and keeps the ranks of the right items.

In: rankers and visitors' sequences. Out: a table of answers (ANSWER_SCHEMA), one row a ranker, protocol and user.
It must not know where sequences come from, nor average anything. An answer depends on its user alone: it is the
same in any shard and any batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrec.data.training_events import flat
from rayrec.evaluation.floors import Ranker
from rayrec.evaluation.metrics import SHOWN, Scores, nan_is_worst, ranks, ranks_unseen, top
from rayrec.history import HistoryBatch, Ints, encode_history
from rayrec.schema import ACTIONS, TARGET_ACTIONS

Split: TypeAlias = Literal["test", "valid"]

PROTOCOLS = ("metrics", "next", *TARGET_ACTIONS, "cold", "pointwise")
"""metrics: the next item, if it is new to the user, among new ones. next: the next item, among all. cart, purchase:
the next event of that action, given all before it, among all. cold: as metrics, of users whose next item has no
training event, among such items (as Volkovs et al. 2017 and Zhu et al. 2020 judge cold start). pointwise: the next
item against NEGATIVES sampled ones."""

NEGATIVES = 100

SCORES_AT_ONCE = 20_000_000
"""Scores that a worker holds at a time; with what is derived from them about a gigabyte."""

ANSWER_SCHEMA = pa.schema(
    [
        pa.field("ranker", pa.string(), nullable=False),
        pa.field("protocol", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("target", pa.int64(), nullable=False),  # item index
        pa.field("history", pa.int64(), nullable=False),  # events before the target, all of them
        pa.field("rank", pa.int64(), nullable=False),  # 0 under pointwise
        pa.field("shown", pa.list_(pa.int64()), nullable=False),  # SHOWN items, 0 is nothing; empty under pointwise
        pa.field("score", pa.list_(pa.float64()), nullable=False),  # the target's, then the others'; else empty
    ]
)


@dataclass(frozen=True)
class ReplaySettings:
    """What is asked and how.

    max_len: newest events of history that a ranker reads. batch: users a call. hash_limit: ask only users whose
    `user_hash` is at most this (a sample that does not depend on shards). cold: the items without a training event,
    ascending. since_ms: ask only for events from then on, as the dataset's clock counts; None asks for all.
    """

    split: Split
    n_items: int
    clock: str
    max_len: int
    batch: int = 256
    protocols: tuple[str, ...] = PROTOCOLS
    seed: int = 0
    hash_limit: int = 2**64
    cold: tuple[int, ...] = ()
    since_ms: int | None = None


def users_at_once(n_items: int) -> int:
    """A `batch` of at most 256 users, and of at most SCORES_AT_ONCE scores."""
    return max(1, min(256, SCORES_AT_ONCE // (n_items + 1)))


def replay(rankers: Mapping[str, Ranker], sequences: pa.Table, settings: ReplaySettings) -> pa.Table:
    """Ask every ranker about every tested user of `sequences` (SEQUENCE_SCHEMA). Rows of ANSWER_SCHEMA.

    A target item outside 1..n_items raises ValueError: the ranker and the dataset do not belong together.
    """
    visitors = Visitors.of(sequences)
    places = target_places(sequences, visitors, settings)
    candidates = _sampled_candidates(visitors, places.get("pointwise"), settings)
    parts = [
        answer
        for name, ranker in rankers.items()
        for answer in _replay_one(name, ranker, visitors, places, candidates, settings)
    ]
    return pa.concat_tables(parts) if parts else ANSWER_SCHEMA.empty_table()


# ---------------------------------------------------------------- who is asked what


@dataclass(frozen=True)
class Visitors:
    """Sequences laid end to end: row u's events are offsets[u] : offsets[u + 1]."""

    user_U: npt.NDArray[np.object_]
    item_A: Ints
    action_A: Ints
    time_ms_A: Ints
    offsets: Ints

    @classmethod
    def of(cls, sequences: pa.Table) -> Visitors:
        """From a table of SEQUENCE_SCHEMA."""
        item_A, offsets = flat(sequences, "item")
        return cls(
            user_U=sequences["user_id"].to_numpy(zero_copy_only=False),
            item_A=item_A,
            action_A=flat(sequences, "action")[0],
            time_ms_A=flat(sequences, "time_ms")[0],
            offsets=offsets,
        )

    def before(self, row_B: Ints, place_B: Ints) -> tuple[Ints, Ints]:
        """The events before each place: their index into the flat arrays [E], and offsets [B + 1]."""
        offsets_B = np.concatenate([[0], np.cumsum(place_B)])
        start_E = np.repeat(self.offsets[row_B] - offsets_B[:-1], place_B)
        return start_E + np.arange(offsets_B[-1]), offsets_B

    def at(self, row_B: Ints, place_B: Ints) -> Ints:
        """The item at each place. [B]"""
        return self.item_A[self.offsets[row_B] + place_B]


def target_places(sequences: pa.Table, visitors: Visitors, settings: ReplaySettings) -> dict[str, Ints]:
    """The place of each row's target under each protocol of the settings, -1 for none. [U] each."""
    column_of = {"next": f"{settings.split}_at", **{a: f"{a}_{settings.split}_at" for a in TARGET_ACTIONS}}
    place_of = {protocol: np.asarray(sequences[column], np.int64) for protocol, column in column_of.items()}
    if settings.hash_limit < 2**64:
        asked_U = np.array([user_hash(user, settings.seed) <= settings.hash_limit for user in visitors.user_U], bool)
        place_of = {protocol: np.where(asked_U, place_U, -1) for protocol, place_U in place_of.items()}
    if settings.since_ms is not None:
        place_of = {protocol: _since(visitors, place_U, settings.since_ms) for protocol, place_U in place_of.items()}
    for place_U in place_of.values():
        row = np.flatnonzero(place_U >= 0)
        target = visitors.at(row, place_U[row])
        if len(target) and not 1 <= target.min() <= target.max() <= settings.n_items:
            raise ValueError(f"targets go from {target.min()} to {target.max()}, items from 1 to {settings.n_items}")
    next_U = place_of["next"]
    new_U = np.where(_is_new(visitors, next_U), next_U, -1)
    cold_U = np.full(len(new_U), -1)
    row = np.flatnonzero(new_U >= 0)
    cold = row[np.isin(visitors.at(row, new_U[row]), settings.cold)]
    cold_U[cold] = new_U[cold]
    place_of |= {"metrics": new_U, "cold": cold_U, "pointwise": next_U}
    return {protocol: place_of[protocol] for protocol in settings.protocols}


def _since(visitors: Visitors, place_U: Ints, since_ms: int) -> Ints:
    """The places [U], without those of events before `since_ms`."""
    row = np.flatnonzero(place_U >= 0)
    early = visitors.time_ms_A[visitors.offsets[row] + place_U[row]] < since_ms
    later_U = place_U.copy()
    later_U[row[early]] = -1
    return later_U


def user_hash(user_id: str, seed: int) -> int:
    """A number in [0, 2**64) that seeds what is random about a user, the same on every machine."""
    digest = hashlib.blake2b(user_id.encode(), digest_size=8, key=seed.to_bytes(8, "little", signed=True))
    return int.from_bytes(digest.digest(), "little")


def _is_new(visitors: Visitors, place_U: Ints) -> npt.NDArray[np.bool_]:
    """Whether the item at each row's place does not occur before it. [U]; False where place is -1."""
    row = np.flatnonzero(place_U >= 0)
    event, offsets = visitors.before(row, place_U[row])
    asker = np.repeat(np.arange(len(row)), np.diff(offsets))
    again = visitors.item_A[event] == visitors.at(row, place_U[row])[asker]
    new_U = np.zeros(len(place_U), bool)
    new_U[row] = np.bincount(asker[again], minlength=len(row)) == 0
    return new_U


def _sampled_candidates(visitors: Visitors, place_U: Ints | None, settings: ReplaySettings) -> Ints:
    """The target and up to NEGATIVES other items, drawn evenly without replacement. [U, C], 0 where not asked.

    Items the user has seen may be drawn: the target may be one of them too.
    """
    others = max(min(NEGATIVES, settings.n_items - 1), 0)
    candidate_UC = np.zeros((len(visitors.user_U), others + 1), np.int64)
    if place_U is None:
        return candidate_UC
    for row in np.flatnonzero(place_U >= 0):
        target = visitors.item_A[visitors.offsets[row] + place_U[row]]
        rng = np.random.default_rng(user_hash(visitors.user_U[row], settings.seed))
        drawn = rng.choice(settings.n_items - 1, others, replace=False) + 1
        candidate_UC[row, 0] = target
        candidate_UC[row, 1:] = drawn + (drawn >= target)
    return candidate_UC


# ---------------------------------------------------------------- asking


def _replay_one(
    name: str,
    ranker: Ranker,
    visitors: Visitors,
    places: Mapping[str, Ints],
    candidates: Ints,
    settings: ReplaySettings,
) -> Iterator[pa.Table]:
    """All answers of one ranker. Protocols that share head, user and place share one call."""
    heads = {protocol: _head(ranker, protocol) for protocol in places}
    for head in sorted(set(heads.values())):
        asked = [protocol for protocol in places if heads[protocol] == head]
        row_Q, place_Q = _distinct_questions([places[protocol] for protocol in asked])
        for start in range(0, len(row_Q), settings.batch):
            row_B, place_B = row_Q[start : start + settings.batch], place_Q[start : start + settings.batch]
            question = Question.ask(visitors, row_B, place_B, settings, ranker.actions)
            chosen_of = {protocol: places[protocol][row_B] == place_B for protocol in asked}
            yield from _answer_batch(name, ranker, head, question, chosen_of, candidates[row_B], settings)


def _answer_batch(
    name: str,
    ranker: Ranker,
    head: str,
    question: Question,
    chosen_of: Mapping[str, npt.NDArray[np.bool_]],
    candidates_BC: Ints,
    settings: ReplaySettings,
) -> Iterator[pa.Table]:
    """The answers of one batch, of each protocol about the users chosen for it. Every item is scored once."""
    ranked: dict[bool, Ranked] = {}
    scores_BN: Scores | None = None
    for protocol, chosen_B in chosen_of.items():
        if not chosen_B.any():
            continue
        if protocol == "pointwise":
            score_BC = ranker.score(question.history, candidates_BC, head)
            yield question.answers(name, protocol, chosen_B, score_BC=score_BC)
            continue
        if scores_BN is None:
            scores_BN = _all_scores(ranker, question.history, head, settings)
        if protocol == "cold":
            yield question.answers(name, protocol, chosen_B, ranked=question.rank_cold(scores_BN, settings.cold))
            continue
        masked = protocol == "metrics"
        if masked not in ranked:
            ranked[masked] = question.rank_unseen(scores_BN) if masked else question.rank(scores_BN)
        yield question.answers(name, protocol, chosen_B, ranked=ranked[masked])


def _head(ranker: Ranker, protocol: str) -> str:
    wanted = protocol if protocol in TARGET_ACTIONS else "next"
    return wanted if wanted in ranker.heads else ranker.heads[0]


def _all_scores(ranker: Ranker, history: HistoryBatch, head: str, settings: ReplaySettings) -> Scores:
    scores_BN = ranker.rank_all(history, head)
    if scores_BN.shape != (len(history), settings.n_items + 1):
        raise ValueError(
            f"the ranker gave scores of shape {scores_BN.shape} for {len(history)} users and {settings.n_items} items"
        )
    return nan_is_worst(scores_BN)


def _distinct_questions(places: list[Ints]) -> tuple[Ints, Ints]:
    """The different (row, place) of some protocols, in order."""
    pairs = np.concatenate([np.stack([np.arange(len(place_U)), place_U], axis=1) for place_U in places])
    pairs = np.unique(pairs[pairs[:, 1] >= 0], axis=0)
    return pairs[:, 0], pairs[:, 1]


@dataclass(frozen=True)
class Ranked:
    """Ranks of the targets [B], and the first SHOWN items of each list [B, SHOWN]."""

    rank_B: Ints
    shown_BK: Ints


@dataclass(frozen=True)
class Question:
    """A batch of users, each before one event: the history to rank by, and the right answer."""

    history: HistoryBatch
    user_B: npt.NDArray[np.object_]
    target_B: Ints
    length_B: Ints
    row_S: Ints
    item_S: Ints

    @classmethod
    def ask(
        cls,
        visitors: Visitors,
        row_B: Ints,
        place_B: Ints,
        settings: ReplaySettings,
        actions: tuple[str, ...] = ACTIONS,
    ) -> Question:
        """The question of rows `row_B`, each when its event at `place_B` came, to one who reads `actions`."""
        event, offsets = visitors.before(row_B, place_B)
        item_E = visitors.item_A[event]
        history = encode_history(
            item_E,
            visitors.action_A[event],
            visitors.time_ms_A[event],
            offsets,
            max_len=settings.max_len,
            clock=settings.clock,
            actions=actions,
            asked_ms=visitors.time_ms_A[visitors.offsets[row_B] + place_B],
        )
        asker_E = np.repeat(np.arange(len(row_B)), place_B)
        seen = np.unique(np.stack([asker_E, item_E], axis=1), axis=0)  # all of the history, not the newest alone
        return cls(history, visitors.user_U[row_B], visitors.at(row_B, place_B), place_B, seen[:, 0], seen[:, 1])

    def rank(self, scores_BN: Scores) -> Ranked:
        """Among all items."""
        return Ranked(ranks(scores_BN, self.target_B), top(scores_BN, SHOWN))

    def rank_unseen(self, scores_BN: Scores) -> Ranked:
        """Among the items that are not in the history."""
        masked_BN = scores_BN.copy()
        masked_BN[self.row_S, self.item_S] = -np.inf
        return Ranked(ranks_unseen(scores_BN, self.target_B, self.row_S, self.item_S), top(masked_BN, SHOWN))

    def rank_cold(self, scores_BN: Scores, cold: Sequence[int]) -> Ranked:
        """Among the items of `cold` that are not in the history; a target that is not one of them has no rank (0)."""
        item_N = np.array([0, *cold], np.int64)
        masked_BN = scores_BN.copy()
        masked_BN[self.row_S, self.item_S] = -np.inf
        score_BN = masked_BN[:, item_N]
        is_cold_B = np.isin(self.target_B, item_N)
        place_B = np.where(is_cold_B, np.searchsorted(item_N, self.target_B), 0)
        return Ranked(ranks(score_BN, place_B) * is_cold_B, item_N[top(score_BN, SHOWN)])

    def answers(
        self,
        name: str,
        protocol: str,
        chosen_B: npt.NDArray[np.bool_],
        *,
        ranked: Ranked | None = None,
        score_BC: Scores | None = None,
    ) -> pa.Table:
        """Rows of ANSWER_SCHEMA about the chosen users: ranks and lists, or scores of the sampled candidates."""
        users = int(chosen_B.sum())
        if ranked is None:
            ranked = Ranked(np.zeros(len(chosen_B), np.int64), np.empty((len(chosen_B), 0), np.int64))
        if score_BC is None:
            score_BC = np.empty((len(chosen_B), 0))
        columns = [
            pa.array([name] * users),
            pa.array([protocol] * users),
            pa.array(self.user_B[chosen_B], pa.string()),
            pa.array(self.target_B[chosen_B]),
            pa.array(self.length_B[chosen_B]),
            pa.array(ranked.rank_B[chosen_B]),
            _list_array(ranked.shown_BK[chosen_B]),
            _list_array(np.asarray(score_BC, np.float64)[chosen_B]),
        ]
        return pa.table(columns, schema=ANSWER_SCHEMA)


def _list_array(values: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> pa.ListArray:
    rows, width = values.shape
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * width, values.ravel())
