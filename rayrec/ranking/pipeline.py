"""The whole answer to a request, a batch of requests at a time: the page that tells the story.

In: requests, shared state, a scorer. Out: answers, and a log of what was shown. It must not know the web, Ray or how
the scorer was trained.

Axes: B requests, C candidates, M of them re-ranked, N + 1 catalogue rows, D width.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from rayrec.catalogue import Catalogue
from rayrec.config import SceneConfig, ServeConfig
from rayrec.errors import UsageError
from rayrec.history import HistoryBatch, encode_history
from rayrec.ranking.explain import Explainer
from rayrec.ranking.explore import explore
from rayrec.ranking.rerank import diversify
from rayrec.ranking.retrieval import RECENT, SOURCES, Asked, Candidates, Floats, Ints, Retriever
from rayrec.ranking.rules import Filters, Forbidden, Rules
from rayrec.schema import ACTION_CODE, ENGAGEMENTS
from rayrec.state.protocol import Act, History, Shown, State

log = logging.getLogger(__name__)

MAX_K = 200
POOL = 50  # at least so many candidates are re-ranked and explored
NO_FILTERS = Filters()
NO_HISTORY = History()
DAY_MS = 86_400_000
ENGAGED = frozenset(ENGAGEMENTS)
Doubles: TypeAlias = npt.NDArray[np.float64]


class Scorer(Protocol):
    """A trained model, as ranking sees it."""

    catalogue: Catalogue
    vectors_ND: Floats  # [N + 1, D], row 0 zeros
    cooccurrence: sp.csr_matrix  # [N + 1, N + 1], row i holds the weights of what follows i
    heads: tuple[str, ...]
    max_len: int
    clock: str
    actions: tuple[str, ...]  # what it reads of a history

    def user_vectors(self, history: HistoryBatch) -> Floats:
        """Vectors of B visitors. [B, D] float32."""

    def fuse(self, history: HistoryBatch, user_BD: Floats, candidates_BC: Ints, heads: Mapping[str, float]) -> Floats:
        """Scores of the candidates, 0..1. [B, C] float32; -inf where the candidate is 0 (padding).

        heads: the scene's weights; it answers by its first head for one that it has not.
        """


class UnknownSceneError(UsageError):
    """The request names a scene that is not configured."""


class UnknownItemError(UsageError):
    """The request's context names an item that is not in the catalogue."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. `visitor` is a `schema.visitor_id`, None for nobody in particular; `session` is that of the
    visitor's session, whose events count where the visitor has none.
    """

    visitor: str | None = None
    scene: str = "home"
    k: int = 10
    item_id: str | None = None  # the item at hand
    cart: tuple[str, ...] = ()
    events: tuple[Act, ...] = ()  # used for this answer and not stored
    store: bool = True
    filters: Filters = NO_FILTERS
    diversity: float | None = None  # None: as configured
    explore: float | None = None
    reasons: bool = False
    session: str | None = None


@dataclass(frozen=True, slots=True)
class Ranked:
    """One item of an answer."""

    item_id: str
    score: float
    propensity: float
    sources: list[str]
    reasons: list[str]


@dataclass(frozen=True, slots=True)
class Answer:
    """A list, and how it came to be. timing_ms: of each stage, for the batch the request was part of."""

    request_id: str
    model: str
    served_by: str  # "model", or the fallback that answered: "cooccurrence", "popular"
    items: list[Ranked]
    removed: dict[str, int]
    timing_ms: dict[str, float]


@dataclass
class Clock:
    """Measures stages."""

    ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of this block to the stage `name`."""
        started = time.perf_counter()
        yield
        self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - started) * 1000


class Ranker:
    """Answers requests with one model. Built once a model: it holds what is derived from the catalogue."""

    def __init__(
        self,
        scorer: Scorer,
        config: ServeConfig,
        *,
        model: str = "unnamed",
        rng: np.random.Generator | None = None,
    ) -> None:
        for name, scene in config.scenes.items():
            if unknown := set(scene.sources) - set(SOURCES):
                raise UsageError(
                    f"scene '{name}': unknown source '{min(unknown)}'; there are {', '.join(sorted(SOURCES))}"
                )
            if min(scene.heads.values(), default=0) < 0 or not sum(scene.heads.values()) > 0:
                raise UsageError(f"scene '{name}': the weights of its heads must be 0 or more, and not all 0")
        self.scorer, self.config, self.model = scorer, config, model
        self.catalogue = scorer.catalogue
        self.retriever = Retriever(scorer.catalogue, scorer.vectors_ND, scorer.cooccurrence)
        self._rules = Rules(scorer.catalogue)
        self._explainer = Explainer(scorer.catalogue, self.retriever)
        self._rng = rng or np.random.default_rng()
        self._fame_N = np.log1p(scorer.catalogue.n_train) / max(np.log1p(scorer.catalogue.n_train).max(), 1.0)

    def check(self, request: Request) -> None:
        """Raise UnknownSceneError or UnknownItemError, naming what there is, or UsageError for a bad k."""
        if request.scene not in self.config.scenes:
            known = ", ".join(sorted(self.config.scenes))
            raise UnknownSceneError(f"unknown scene '{request.scene}'; there are: {known}")
        for item_id in (*request.cart, *([request.item_id] if request.item_id is not None else [])):
            if item_id not in self.catalogue.index:
                raise UnknownItemError(f"there is no item '{item_id}'")
        if not 1 <= request.k <= MAX_K:
            raise UsageError(f"k must be 1 to {MAX_K}, got {request.k}")

    def recommend(self, requests: Sequence[Request], state: State) -> list[Answer]:
        """Answer each request, in order, and log what is shown. Raises as `check`, and StateError."""
        for request in requests:
            self.check(request)
        answers: dict[int, Answer] = {}
        for scene in dict.fromkeys(request.scene for request in requests):
            rows = [row for row, request in enumerate(requests) if request.scene == scene]
            together = self._recommend([requests[row] for row in rows], self.config.scenes[scene], state)
            answers.update(zip(rows, together, strict=True))
        ordered = [answers[row] for row in range(len(requests))]
        self._log_shown(requests, ordered, state)
        return ordered

    def _recommend(self, requests: list[Request], scene: SceneConfig, state: State) -> list[Answer]:
        clock = Clock()
        with clock.stage("history"):
            histories = self._histories(requests, state)
            history, asked = self._encode(requests, histories)
        with clock.stage("retrieve"):
            asked = self._with_user_vectors(history, asked)
            found = self.retriever.retrieve(asked, self._sources(scene, asked), self.config.per_source)
        with clock.stage("filter"):
            found, removed = self._filter(requests, histories, scene, asked, found)
        with clock.stage("score"):
            candidates_BC = _padded([candidates.item_C for candidates in found])
            score_BC, served_by = self._score(history, asked, candidates_BC, scene)
        with clock.stage("rerank"):
            shown = self._rerank(requests, candidates_BC, score_BC)
        with clock.stage("explain"):
            lists = [
                self._describe(request, asked, b, found[b], score_BC[b], shown[b]) for b, request in enumerate(requests)
            ]
        return [
            Answer(new_request_id(), self.model, served_by[b], lists[b], removed[b], clock.ms)
            for b in range(len(requests))
        ]

    # ------------------------------------------------------------ history

    def _histories(self, requests: Sequence[Request], state: State) -> list[History]:
        """What is stored of each visitor, and the request's own events, in order of time."""
        visitors = list({one for request in requests for one in (request.visitor, request.session) if one is not None})
        stored = dict(zip(visitors, state.histories(visitors, self.config.history), strict=True))
        histories = []
        for request in requests:
            history = stored.get(request.visitor or "", NO_HISTORY)
            if not history.acts:
                session = stored.get(request.session or "", NO_HISTORY)
                history = History(session.acts, history.bought | session.bought, history.hidden | session.hidden)
            histories.append(_with_events(history, request))
        return histories

    def _encode(self, requests: Sequence[Request], histories: list[History]) -> tuple[HistoryBatch, Asked]:
        """Histories as the model reads them; the items at hand count as looked at just now."""
        index = self.catalogue.index
        flat: list[tuple[int, int, int]] = []
        offsets, recent, anchors = [0], [], []
        for request, history in zip(requests, histories, strict=True):
            acts = [act for act in history.acts if act.item_id in index]
            at_hand = _at_hand(request)
            acts += _not_yet(at_hand, acts)
            flat += [(index[act.item_id], ACTION_CODE[act.action], act.time_ms) for act in acts]
            offsets.append(len(flat))
            recent.append(_newest([index[act.item_id] for act in acts]))
            anchors.append(_newest([index[act.item_id] for act in at_hand]))
        item, action, time_ms = np.array(flat, np.int64).reshape(-1, 3).T
        if self.scorer.clock == "date":
            time_ms = time_ms - time_ms % DAY_MS  # the model never saw an hour
        reader = self.scorer
        encoded = encode_history(
            *(item, action, time_ms, offsets), max_len=reader.max_len, clock=reader.clock, actions=reader.actions
        )
        return encoded, Asked(user_BD=None, known_B=encoded.length_B > 0, recent=recent, anchors=anchors)

    def _with_user_vectors(self, history: HistoryBatch, asked: Asked) -> Asked:
        try:
            user_BD = self.scorer.user_vectors(history)
        except Exception:  # whatever is wrong with the model, the shopper gets a list
            log.exception("the model failed on histories; answering without it")
            return asked
        return Asked(user_BD, asked.known_B, asked.recent, asked.anchors)

    # ------------------------------------------------------------ candidates

    def _sources(self, scene: SceneConfig, asked: Asked) -> list[str]:
        """The scene's sources; popular items too where some visitor has nothing to go by or the model failed."""
        lost = asked.user_BD is None or not asked.known_B.all()
        return list(dict.fromkeys([*scene.sources, *(["popular"] if lost else [])]))

    def _filter(
        self,
        requests: Sequence[Request],
        histories: Sequence[History],
        scene: SceneConfig,
        asked: Asked,
        found: Sequence[Candidates],
    ) -> tuple[list[Candidates], list[dict[str, int]]]:
        """Candidates that may be shown. Where too few are left, retrieve again among allowed items only."""
        kept, removed = [], []
        for b, request in enumerate(requests):
            forbidden = _forbidden(request, histories[b], scene)
            keep_C, reasons = self._rules.apply(found[b].item_C, request.filters, forbidden)
            left = Candidates(found[b].item_C[keep_C], found[b].source_C[keep_C], found[b].sources)
            if len(left.item_C) < request.k:
                allowed_N = self._rules.mask(request.filters, forbidden)
                sources = list(dict.fromkeys([*found[b].sources, "popular"]))
                n = max(self.config.per_source, request.k)
                (left,) = self.retriever.retrieve(asked.take([b]), sources, n, [allowed_N])
            kept.append(left)
            removed.append(reasons)
        return kept, removed

    # ------------------------------------------------------------ scores

    def _score(
        self, history: HistoryBatch, asked: Asked, candidates_BC: Ints, scene: SceneConfig
    ) -> tuple[Floats, list[str]]:
        """Scores 0..1, -inf for padding, and who gave them."""
        score_BC = self._model_scores(history, asked, candidates_BC, scene)
        served_by = ["model"] * len(asked)
        fallback = [b for b in range(len(asked)) if score_BC is None or not asked.known_B[b]]
        if score_BC is None:
            score_BC = np.empty(candidates_BC.shape, np.float32)
        if fallback:
            follow_BN = self.retriever.following([asked.recent[b] for b in fallback])
            for row, b in enumerate(fallback):
                follow_C = follow_BN[row].toarray().ravel()[candidates_BC[b]]
                strength_C = follow_C / (follow_C.max(initial=0) or 1.0)
                score_BC[b] = 0.9 * strength_C + 0.1 * self._fame_N[candidates_BC[b]]
                served_by[b] = "cooccurrence" if follow_C.any() else "popular"
        score_BC[candidates_BC == 0] = -np.inf
        return score_BC, served_by

    def _model_scores(
        self, history: HistoryBatch, asked: Asked, candidates_BC: Ints, scene: SceneConfig
    ) -> Floats | None:
        if asked.user_BD is None or not candidates_BC.size:
            return None
        try:
            return self.scorer.fuse(history, asked.user_BD, candidates_BC, scene.heads)
        except Exception:
            log.exception("the model failed on candidates; answering without it")
            return None

    # ------------------------------------------------------------ list

    def _rerank(self, requests: Sequence[Request], candidates_BC: Ints, score_BC: Floats) -> list[tuple[Ints, Doubles]]:
        """Places of the candidates to show, in order, and the propensity of each."""
        rank_BC = np.where(np.isnan(score_BC), -1.0, score_BC)  # NaN is no answer: after all numbers
        pool_B = np.array([max(POOL, 3 * request.k) for request in requests])
        order_BM = np.argsort(-rank_BC, axis=1, kind="stable")[:, : pool_B.max()]
        score_BM = np.take_along_axis(score_BC, order_BM, axis=1)
        score_BM[np.arange(order_BM.shape[1]) >= pool_B[:, None]] = -np.inf  # none sees another's pool
        size_B = np.count_nonzero(~np.isneginf(score_BM), axis=1)

        diversity = [_or(request.diversity, self.config.diversity) for request in requests]
        first_BK = np.broadcast_to(np.arange(order_BM.shape[1]), order_BM.shape)
        if any(diversity) and order_BM.size:
            unit_BMD = self.retriever.unit_ND[np.take_along_axis(candidates_BC, order_BM, axis=1)]
            k = max(request.k for request in requests)
            first_BK = diversify(score_BM, unit_BMD, np.array(diversity, np.float32), k)

        shown = []
        for b, request in enumerate(requests):
            places, rate = first_BK[b, : min(request.k, size_B[b])], _or(request.explore, self.config.explore)
            if rate > 0:
                places = np.concatenate([places, np.setdiff1d(np.arange(size_B[b]), places)])
            places, propensity = explore(places, request.k, rate, self._rng)
            shown.append((order_BM[b, places], propensity))
        return shown

    def _describe(
        self, request: Request, asked: Asked, b: int, found: Candidates, score_C: Floats, shown: tuple[Ints, Doubles]
    ) -> list[Ranked]:
        places, propensities = shown
        items = found.item_C[places]
        sources = [found.names(bits) for bits in found.source_C[places].tolist()]
        reasons: list[list[str]] = [[] for _ in places]
        if request.reasons:
            reasons = self._explainer.reasons(items, sources, asked.recent[b], asked.anchors[b])
        ids, scores = self.catalogue.ids[items].tolist(), np.nan_to_num(score_C[places]).tolist()
        return [Ranked(*facts) for facts in zip(ids, scores, propensities.tolist(), sources, reasons, strict=True)]

    def _log_shown(self, requests: Sequence[Request], answers: Sequence[Answer], state: State) -> None:
        """Keep what is shown, but for requests that want nothing kept."""
        now_ms = time.time_ns() // 1_000_000
        lists = [
            Shown(
                request_id=answer.request_id,
                visitor=request.visitor or "",
                time_ms=now_ms,
                scene=request.scene,
                model=answer.model,
                served_by=answer.served_by,
                item_ids=tuple(item.item_id for item in answer.items),
                propensities=tuple(item.propensity for item in answer.items),
            )
            for request, answer in zip(requests, answers, strict=True)
            if request.store
        ]
        if lists:
            state.log_shown(lists)


def _with_events(history: History, request: Request) -> History:
    """`history` with the request's own events put in their place."""
    if not request.events:
        return history
    engaged = [act for act in request.events if act.action in ENGAGED]
    bought = {act.item_id for act in request.events if act.action == "purchase"}
    hidden = {act.item_id for act in request.events if act.action in ("hide", "dislike")}
    acts = sorted([*history.acts, *engaged], key=lambda act: act.time_ms)
    return History(tuple(acts), history.bought | bought, history.hidden | hidden)


def _at_hand(request: Request) -> list[Act]:
    """The items of the request's context, as acts of this moment; the item on the page is the newest."""
    now_ms = time.time_ns() // 1_000_000
    page = [] if request.item_id is None else [Act(request.item_id, "view", now_ms)]
    return [*(Act(item_id, "cart", now_ms) for item_id in request.cart), *page]


def _not_yet(at_hand: Sequence[Act], acts: Sequence[Act]) -> list[Act]:
    """Of the items at hand, those that the history does not tell of: not its newest item, nor what it put in a cart."""
    newest = acts[-1].item_id if acts else None
    put = {act.item_id for act in acts if act.action == "cart"}
    return [act for act in at_hand if act.item_id != newest and not (act.action == "cart" and act.item_id in put)]


def _forbidden(request: Request, history: History, scene: SceneConfig) -> Forbidden:
    """What this visitor must not be shown now."""
    return Forbidden(
        context=frozenset(act.item_id for act in _at_hand(request)),
        excluded=frozenset(request.filters.exclude),
        hidden=history.hidden,
        bought=history.bought if scene.hide_purchased else frozenset(),
        seen=frozenset(act.item_id for act in history.acts) if scene.hide_seen else frozenset(),
    )


def _newest(items: Sequence[int]) -> Ints:
    """The newest distinct items, newest first."""
    return np.array(list(dict.fromkeys(reversed(items)))[:RECENT], np.int64)


def _padded(rows: Sequence[Ints]) -> Ints:
    """Rows of different lengths as one array, padded with 0 on the right. [B, C] int64."""
    padded = np.zeros((len(rows), max((len(row) for row in rows), default=0)), np.int64)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = row
    return padded


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def new_request_id() -> str:
    """A random id that begins with the time, so that rows of one time lie together in an index."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"
