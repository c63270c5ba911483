"""The whole answer to a request, a batch of requests at a time: the page that tells the story.

In: requests, shared state, a scorer. Out: answers, and a log of what was shown. It must not know the web, Ray or how
the scorer was trained.

Axes: B requests, C candidates, M of them re-ranked, N + 1 catalogue rows, D width.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from rayrec.config import SceneConfig, ServeConfig
from rayrec.errors import StateError, UsageError
from rayrec.followers import weights_at
from rayrec.history import HistoryBatch
from rayrec.ranking.explain import Explainer
from rayrec.ranking.explore import explore
from rayrec.ranking.policy import Policy
from rayrec.ranking.reading import DAY_MS, Reading
from rayrec.ranking.requests import (
    MAX_K,
    Answer,
    Ranked,
    Request,
    UnknownItemError,
    UnknownSceneError,
    new_request_id,
)
from rayrec.ranking.rerank import capped, diversify, with_pinned
from rayrec.ranking.retrieval import INDEXED, SOURCES, Asked, Candidates, Floats, Ints, Retriever
from rayrec.ranking.rules import Bools, Forbidden, Rules
from rayrec.ranking.scoring import Remembering, Scorer, padded
from rayrec.ranking.text import TextIndex
from rayrec.state.protocol import History, Past, Shown

log = logging.getLogger(__name__)

POOL = 50  # at least so many candidates are re-ranked and explored
PINNED, QUERY = "pinned", "query"
MATCHES = 2000  # of a query, from which rules and filters take some away
Doubles: TypeAlias = npt.NDArray[np.float64]


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
        self.config, self.model, self._rng = config, model, rng or np.random.default_rng()
        searched = any(QUERY in scene.sources for scene in config.scenes.values())
        self._text = TextIndex(scorer.catalogue) if searched else None
        parts = (scorer.catalogue, scorer.vectors_ND, scorer.cooccurrence)
        self._rank_with(scorer, Retriever(*parts, config.exact_below, config.remembered))

    def over(self, scorer: Scorer, row_R: Ints) -> Ranker:
        """The same for a scorer whose catalogue has changed in these rows ([R] int64), some of them new."""
        later = copy.copy(self)
        if self._text is not None:
            self._text.update(scorer.catalogue, row_R)
        parts = (scorer.catalogue, scorer.vectors_ND, scorer.cooccurrence)
        later._rank_with(scorer, self.retriever.over(*parts, row_R))
        return later

    def _rank_with(self, scorer: Scorer, retriever: Retriever) -> None:
        self.scorer, self.retriever, self.catalogue = scorer, retriever, scorer.catalogue
        self._model = Remembering(scorer, self.config.remembered)
        rules = Rules(scorer.catalogue)
        self._rules = rules
        self._policies = {name: Policy(scene, rules) for name, scene in self.config.scenes.items()}
        self._reading = Reading(scorer, self.config.history)
        self._explainer = Explainer(scorer.catalogue, retriever)
        self._fame_N = np.log1p(scorer.catalogue.n_train) / max(np.log1p(scorer.catalogue.n_train).max(), 1.0)

    def check(self, request: Request) -> None:
        """Raise UnknownSceneError or UnknownItemError, naming what there is, or UsageError for a bad k."""
        if request.scene not in self.config.scenes:
            known = ", ".join(sorted(self.config.scenes))
            raise UnknownSceneError(f"unknown scene '{request.scene}'; there are: {known}")
        for item_id in (*request.cart, *([request.item_id] if request.item_id is not None else [])):
            if item_id not in self.catalogue.index:
                raise UnknownItemError(f"there is no item '{item_id}'")
        if self.config.scenes[request.scene].sources == (QUERY,) and not (request.query or "").strip():
            raise UsageError(f"scene '{request.scene}' searches: say what for, in context.query")
        if not 1 <= request.k <= MAX_K:
            raise UsageError(f"k must be 1 to {MAX_K}, got {request.k}")

    def recommend(self, requests: Sequence[Request], state: Past) -> list[Answer]:
        """Answer each request, in order, and log what is shown. Raises as `check`.

        Whatever fails behind it, there is an answer, which tells what it did without.
        """
        for request in requests:
            self.check(request)
        answers: dict[int, Answer] = {}
        for scene in dict.fromkeys(request.scene for request in requests):
            rows = [row for row, request in enumerate(requests) if request.scene == scene]
            together = self._recommend([requests[row] for row in rows], self._policies[scene], state)
            answers.update(zip(rows, together, strict=True))
        ordered = [answers[row] for row in range(len(requests))]
        try:
            self._log_shown(requests, ordered, state)
        except StateError as error:
            log.error("lists are shown and not logged: %s", error)
            return [replace(answer, without=(*answer.without, "log")) for answer in ordered]
        return ordered

    def popular(self, request: Request) -> Answer:
        """What is popular, at once: no history, no model, no log. Raises as `check`."""
        self.check(request)
        policy = self._policies[request.scene]
        forbidden = _forbidden(request, History(), policy.scene)
        keep_N, removed = self._rules.apply(self.retriever.popular, request.filters, forbidden, policy.barred)
        items = self.retriever.popular[keep_N][: request.k]
        facts = zip(self.catalogue.ids[items].tolist(), self._fame_N[items].tolist(), strict=True)
        ranked = [Ranked(item_id, fame, 1.0, ["popular"], []) for item_id, fame in facts]
        return Answer(new_request_id(), self.model, "popular", ranked, removed, {}, without=("time",))

    def _recommend(self, requests: list[Request], policy: Policy, state: Past) -> list[Answer]:
        clock = Clock()
        with clock.stage("history"):
            histories, without = self._histories(requests, state)
            history, asked = self._reading.encode(requests, histories)
        with clock.stage("retrieve"):
            asked = self._with_user_vectors(history, asked)
            asked, found, lost = self._retrieved(requests, policy.scene, asked)
            without += lost
        proposed = [candidates.counts() for candidates in found]
        with clock.stage("filter"):
            found, removed = self._filter(requests, histories, policy, asked, found)
        with clock.stage("score"):
            candidates_BC = padded([candidates.item_C for candidates in found])
            model_BC, remembered_B = self._model_scores(history, asked, candidates_BC, policy.scene)
            score_BC, served_by = self._score(asked, candidates_BC, model_BC, policy.scene)
        with clock.stage("rerank"):
            shown = self._rerank(requests, policy, candidates_BC, score_BC, removed)
        with clock.stage("explain"):
            lists = [
                self._describe(request, asked, b, found[b], score_BC[b], shown[b]) for b, request in enumerate(requests)
            ]
        if model_BC is None and candidates_BC.size:
            without = (*without, "model")
        if "state" in without:
            served_by = ["context" if by == "model" else by for by in served_by]
        return [
            Answer(
                new_request_id(), self.model, served_by[b], lists[b], removed[b], clock.ms, without,
                candidates=proposed[b], together=len(requests), basket=self._basket(request),
                remembered=bool(remembered_B[b]),
            )
            for b, request in enumerate(requests)
        ]  # fmt: skip

    def _basket(self, request: Request) -> float | None:
        if not request.cart:
            return None
        return float(np.nansum([self.catalogue.price[self.catalogue.index[item_id]] for item_id in request.cart]))

    def _histories(self, requests: Sequence[Request], state: Past) -> tuple[list[History], tuple[str, ...]]:
        """The visitors' past; what they sent along alone, where the state is away."""
        try:
            return self._reading.histories(requests, state), ()
        except StateError as error:
            log.error("answering without histories: %s", error)
            return self._reading.put_together(requests, {}), ("state",)

    # ------------------------------------------------------------ candidates

    def _with_user_vectors(self, history: HistoryBatch, asked: Asked) -> Asked:
        try:
            user_BD = self._model.user_vectors(history)
        except Exception:  # whatever is wrong with the model, the shopper gets a list
            log.exception("the model failed on histories; answering without it")
            return asked
        return replace(asked, user_BD=user_BD)

    def _retrieved(
        self, requests: Sequence[Request], scene: SceneConfig, asked: Asked
    ) -> tuple[Asked, list[Candidates], tuple[str, ...]]:
        """Candidates, and what they had to do without: where an index fails, those of sources that need none."""
        try:
            asked = self._searched(requests, scene, asked)
            return asked, self.retriever.retrieve(asked, self._sources(scene, asked), self.config.per_source), ()
        except Exception:  # whatever is wrong with an index, the shopper gets a list
            log.exception("an index failed; answering without it")
        sources = [name for name in self._sources(scene, asked) if name not in INDEXED]
        sources = list(dict.fromkeys([*sources, "popular"]))
        return asked, self.retriever.retrieve(asked, sources, self.config.per_source), ("index",)

    def _searched(self, requests: Sequence[Request], scene: SceneConfig, asked: Asked) -> Asked:
        """With what the queries mean, in a scene that asks for it."""
        if QUERY not in scene.sources or self._text is None:
            return asked
        return replace(asked, matches=[self._matches(self._text, request.query or "") for request in requests])

    def _matches(self, index: TextIndex, query: str) -> tuple[Ints, Floats]:
        items, fit = index.search(query, MATCHES)
        known = items <= len(self.catalogue)  # the index may be ahead of this catalogue
        return items[known], fit[known]

    def _sources(self, scene: SceneConfig, asked: Asked) -> list[str]:
        """The scene's sources; popular items too where some visitor has nothing to go by or the model failed."""
        lost = scene.fill and (asked.user_BD is None or not asked.known_B.all())
        return list(dict.fromkeys([*scene.sources, *(["popular"] if lost else [])]))

    def _filter(
        self,
        requests: Sequence[Request],
        histories: Sequence[History],
        policy: Policy,
        asked: Asked,
        found: Sequence[Candidates],
    ) -> tuple[list[Candidates], list[dict[str, int]]]:
        """Candidates that may be shown, pinned ones among them. Where too few are left, retrieve again among allowed
        items only; substitutes of what is in the cart are better than no list.
        """
        kept, removed = [], []
        for b, request in enumerate(requests):
            forbidden, barred = _forbidden(request, histories[b], policy.scene), policy.barred
            substitute_N = policy.substitutes(request.cart)
            strict = barred if substitute_N is None else {**barred, "substitute": substitute_N}
            keep_C, reasons = self._rules.apply(found[b].item_C, request.filters, forbidden, strict)
            left = Candidates(found[b].item_C[keep_C], found[b].source_C[keep_C], found[b].sources)
            for masks in [strict] if strict is barred else [strict, barred]:
                if len(left.item_C) < request.k and policy.scene.fill:
                    allowed_N = self._rules.mask(request.filters, forbidden, masks)
                    left = self._again(asked.take([b]), found[b].sources, request.k, allowed_N)
            pinned = np.array([item for _, item in policy.pinned if self.catalogue.listed[item]], np.int64)
            if len(pinned):
                keep_P, _ = self._rules.apply(pinned, request.filters, forbidden, barred)
                left = left.adding(pinned[keep_P], PINNED)
            kept.append(left)
            removed.append(reasons)
        return kept, removed

    def _again(self, asked: Asked, sources: Sequence[str], k: int, allowed_N: Bools) -> Candidates:
        """Candidates of one request among the allowed items alone."""
        n = max(self.config.per_source, k)
        return self.retriever.retrieve(asked, list(dict.fromkeys([*sources, "popular"])), n, [allowed_N])[0]

    # ------------------------------------------------------------ scores

    def _score(
        self, asked: Asked, candidates_BC: Ints, score_BC: Floats | None, scene: SceneConfig
    ) -> tuple[Floats, list[str]]:
        """Scores 0..1, -inf for padding, and who gave them. score_BC: the model's, None if it failed."""
        served_by = ["model"] * len(asked)
        fallback = [b for b in range(len(asked)) if score_BC is None or not asked.known_B[b]]
        if score_BC is None:
            score_BC = np.empty(candidates_BC.shape, np.float32)
        if fallback:
            ways = self.retriever.following([asked.recent[b] for b in fallback])
            follow_BC = weights_at(ways, candidates_BC[fallback], len(self.catalogue) + 1).sum(axis=0)
            for b, follow_C in zip(fallback, follow_BC, strict=True):
                strength_C = follow_C / (follow_C.max(initial=0) or 1.0)
                score_BC[b] = 0.9 * strength_C + 0.1 * self._fame_N[candidates_BC[b]]
                served_by[b] = "cooccurrence" if follow_C.any() else "popular"
        if asked.matches is not None:
            score_BC = _blended(score_BC, candidates_BC, asked.matches, scene.text_weight)
            served_by = ["model" if by == "model" else QUERY for by in served_by]
        score_BC[candidates_BC == 0] = -np.inf
        return score_BC, served_by

    def _model_scores(
        self, history: HistoryBatch, asked: Asked, candidates_BC: Ints, scene: SceneConfig
    ) -> tuple[Floats | None, Bools]:
        """The model's scores, None if it failed, and which requests needed no work of it. [B, C], [B]."""
        nothing_B = np.zeros(len(asked), bool)
        if asked.user_BD is None or not candidates_BC.size:
            return None, nothing_B
        try:
            return self._model.fuse(history, asked.user_BD, candidates_BC, scene.heads)
        except Exception:
            log.exception("the model failed on candidates; answering without it")
            return None, nothing_B

    # ------------------------------------------------------------ list

    def _rerank(
        self,
        requests: Sequence[Request],
        policy: Policy,
        candidates_BC: Ints,
        score_BC: Floats,
        removed: list[dict[str, int]],
    ) -> list[tuple[Ints, Doubles]]:
        """Places of the candidates to show, in order, and the propensity of each. `removed` learns of limits."""
        if policy.factor_N is not None:
            score_BC = score_BC * policy.factor_N[candidates_BC]
        rank_BC = np.where(np.isnan(score_BC), -1.0, score_BC)  # NaN is no answer: after all numbers
        # A limit may leave out any number of candidates: all of them stand in line.
        pool_B = np.array([score_BC.shape[1] if policy.caps else max(POOL, 3 * request.k) for request in requests])
        order_BM = np.argsort(-rank_BC, axis=1, kind="stable")[:, : pool_B.max()]
        score_BM = np.take_along_axis(score_BC, order_BM, axis=1)
        score_BM[np.arange(order_BM.shape[1]) >= pool_B[:, None]] = -np.inf  # none sees another's pool
        size_B = np.count_nonzero(~np.isneginf(score_BM), axis=1)

        scene, config = policy.scene, self.config
        diversity = [_first(request.diversity, scene.diversity, config.diversity) for request in requests]
        first_BK = np.broadcast_to(np.arange(order_BM.shape[1]), order_BM.shape)
        if any(diversity) and order_BM.size:
            unit_BMD = self.retriever.unit_ND[np.take_along_axis(candidates_BC, order_BM, axis=1)]
            k = order_BM.shape[1] if policy.caps else max(request.k for request in requests)
            first_BK = diversify(score_BM, unit_BMD, np.array(diversity, np.float32), k)

        shown = []
        for b, request in enumerate(requests):
            rate = _first(request.explore, scene.explore, config.explore)
            n = size_B[b] if policy.caps else min(request.k + len(policy.pinned), size_B[b])
            places = first_BK[b, :n]
            if rate > 0:
                places = np.concatenate([places, np.setdiff1d(np.arange(size_B[b]), places)])
            places = order_BM[b, places]
            if policy.caps:
                kept, left_out = capped(candidates_BC[b, places], policy.caps)
                places = places[kept]
                removed[b].update(left_out)
            shown.append(self._choose(request, policy, candidates_BC[b], places, rate))
        return shown

    def _choose(
        self, request: Request, policy: Policy, item_C: Ints, places: Ints, rate: float
    ) -> tuple[Ints, Doubles]:
        """The first of the ordered places, some of them explored, and the pinned ones where they belong."""
        pinned = [(at, int(np.argmax(item_C == item))) for at, item in policy.pinned if at < request.k]
        pinned = [(at, place) for (at, place) in pinned if (at, item_C[place]) in policy.pinned]
        free = places[~np.isin(places, [place for _, place in pinned])]
        chosen, propensities = explore(free, request.k, rate, self._rng)
        of_place = dict(zip(chosen.tolist(), propensities.tolist(), strict=True))
        chosen = with_pinned(chosen, pinned, request.k)
        return chosen, np.array([of_place.get(place, 1.0) for place in chosen.tolist()])

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

    def _log_shown(self, requests: Sequence[Request], answers: Sequence[Answer], state: Past) -> None:
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


def _forbidden(request: Request, history: History, scene: SceneConfig) -> Forbidden:
    """What this visitor must not be shown now."""
    bought = history.bought if scene.hide_purchased else {}
    if scene.hide_purchased_days is not None:
        since_ms = time.time_ns() // 1_000_000 - scene.hide_purchased_days * DAY_MS
        bought = {item_id: last_ms for item_id, last_ms in bought.items() if last_ms >= since_ms}
    return Forbidden(
        context=frozenset(one for one in (*request.cart, request.item_id) if one is not None),
        excluded=frozenset(request.filters.exclude),
        hidden=history.hidden,
        bought=frozenset(bought),
        seen=frozenset(act.item_id for act in history.acts) if scene.hide_seen else frozenset(),
    )


def _blended(score_BC: Floats, candidates_BC: Ints, matches: Sequence[tuple[Ints, Floats]], weight: float) -> Floats:
    """How well each candidate fits the query, and taste, both as a share of the list's best."""
    blended_BC = np.zeros(score_BC.shape, np.float32)
    for b, (items, fit) in enumerate(matches):
        order = np.argsort(items)
        place_C = np.searchsorted(items[order], candidates_BC[b]).clip(max=max(0, len(items) - 1))
        fit_C = np.where(items[order][place_C] == candidates_BC[b], fit[order][place_C], 0) if len(items) else 0
        taste_C = np.nan_to_num(score_BC[b], nan=0.0, neginf=0.0)
        blended_BC[b] = weight * fit_C + (1 - weight) * taste_C / (taste_C.max(initial=0) or 1.0)
    return blended_BC


def _first(*values: float | None) -> float:
    """The first that is given."""
    return next(value for value in values if value is not None)
