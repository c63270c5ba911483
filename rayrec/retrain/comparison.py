"""Two bundles before the same questions, and whether one is worse than the other.

In: bundles, and a dataset that both may be asked about. Out: figures of both, paired by visitor, and a verdict. It must
not know how a bundle came about, nor what follows from the verdict.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrec.bundle import Bundle
from rayrec.catalogue import Catalogue
from rayrec.data.dataset import Dataset
from rayrec.data.edits import SHOWN, edited
from rayrec.data.items import AttributeEncoder
from rayrec.data.training_events import flat
from rayrec.evaluation.judge import Answers
from rayrec.evaluation.metrics import Scores, mean, ndcg
from rayrec.evaluation.paired import interval
from rayrec.evaluation.replay import ReplaySettings, users_at_once
from rayrec.evaluation.shards import replay_in_shards
from rayrec.history import HistoryBatch, Ints
from rayrec.model.scorer import Scorer
from rayrec.progress import timed
from rayrec.serving.scorer import load_scorer

CANDIDATE, CURRENT = "candidate", "current"
DECIDES = "next"
"""The protocol that the verdict is by: every visitor who is asked anything has a next item."""
PROTOCOLS = (DECIDES, "metrics", "cart", "purchase")
DAY_MS = 86_400_000
K = 10


@dataclass(frozen=True)
class Rule:
    """When a candidate passes, and what is asked.

    margin: the share of the current's figure that it may lack. days: how many of the newest are asked about. least:
    where fewer visitors have a question, the newest targets of so many are asked for, of whatever day.
    """

    margin: float = 0.02
    days: float = 1.0
    least: int = 200


def compare(candidate: Bundle, current: Bundle, dataset: Dataset, rule: Rule) -> dict[str, Any]:
    """Judge both over the Ray cluster; the verdict as it goes into the lineage.

    The candidate must have been trained on `dataset`; the current bundle may know other items, in another order.
    """
    since_ms = asked_since(target_times(dataset), rule)
    figures: dict[str, Any] = {"against": current.version, "dataset": dataset.path, "margin": rule.margin}
    if since_ms is None:
        return {**figures, **verdict(np.empty(0), np.empty(0), rule.margin)}
    when = _when(since_ms, dataset.clock)
    with timed(f"judge: {candidate.version} against {current.version}, what was done since {when}"):
        answers = pa.concat_tables(_answers({CANDIDATE: candidate, CURRENT: current}, dataset, since_ms))
    found = gains(answers)
    means = {name: {p: mean(by[name]) for p, by in found.items()} for name in (CANDIDATE, CURRENT)}
    decided = verdict(found[DECIDES][CANDIDATE], found[DECIDES][CURRENT], rule.margin)
    return {**figures, **decided, "since": when, "ndcg@10": means}


def _answers(bundles: Mapping[str, Bundle], dataset: Dataset, since_ms: int) -> Iterator[pa.Table]:
    """The answers of all bundles; those that read histories of one length are asked together."""
    n_items = len(dataset.catalogue())
    lengths = {name: bundle.config.model.max_len for name, bundle in bundles.items()}
    for max_len in sorted(set(lengths.values())):
        settings = ReplaySettings(
            split="test",
            n_items=n_items,
            clock=dataset.clock,
            max_len=max_len,
            batch=users_at_once(n_items),
            protocols=PROTOCOLS,
            since_ms=since_ms,
        )
        makers = {
            name: partial(scorer_for, _place(bundle), dataset.path)
            for name, bundle in bundles.items()
            if lengths[name] == max_len
        }
        yield replay_in_shards(dataset, dict(makers), settings)


def verdict(candidate_U: npt.NDArray[np.float64], current_U: npt.NDArray[np.float64], margin: float) -> dict[str, Any]:
    """Whether the candidate passes: its mean gain is at least (1 - margin) of the current's.

    [U] each, of the same visitors. Without a visitor nothing can be said for it, and it does not pass.
    """
    if not len(candidate_U):
        return {"passed": False, "users": 0, "reason": "nobody has a question to judge by"}
    candidate, current = float(candidate_U.mean()), float(current_U.mean())
    passed = candidate >= (1.0 - margin) * current
    return {
        "passed": passed,
        "users": len(candidate_U),
        "reason": "not worse by more than the margin" if passed else "worse by more than the margin",
        "candidate": candidate,
        "current": current,
        "difference": candidate - current,
        "difference_95": interval(candidate_U - current_U),
    }


def gains(answers: pa.Table) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
    """NDCG@10 of each visitor, by protocol and ranker; both rankers' in the same order. [U] each."""
    return {
        protocol: {name: ndcg(Answers.of(answers, name, protocol).rank_U, K) for name in (CANDIDATE, CURRENT)}
        for protocol in PROTOCOLS
    }


# ---------------------------------------------------------------- what is asked


def target_times(dataset: Dataset) -> Ints:
    """When the events happened that the test split asks for. [T] epoch ms, or what the dataset's clock counts."""
    sequences = dataset.sequences(["time_ms", "test_at"])
    time_A, offsets = flat(sequences, "time_ms")
    place_U = np.asarray(sequences["test_at"], np.int64)
    asked = np.flatnonzero(place_U >= 0)
    return time_A[offsets[asked] + place_U[asked]]


def asked_since(time_T: Ints, rule: Rule) -> int | None:
    """From when on targets are asked for: the newest `days`, or further back until there are `least`; None without any.

    >>> asked_since(np.array([0, 5, DAY_MS + 6, DAY_MS + 7]), Rule(days=1.0, least=3))
    5
    """
    if not len(time_T):
        return None
    newest = int(time_T.max()) - int(rule.days * DAY_MS)
    enough = int(np.sort(time_T)[::-1][min(rule.least, len(time_T)) - 1])
    return min(newest, enough)


def _when(time_ms: int, clock: str) -> str:
    if clock == "order":
        return str(time_ms)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_ms / 1000))


# ---------------------------------------------------------------- a bundle before another dataset's items


class Renumbered:
    """A scorer before items that are numbered otherwise. theirs_N: [N + 1] the scorer's number of each, 0 at 0."""

    def __init__(self, scorer: Scorer, theirs_N: Ints) -> None:
        self.scorer, self.theirs_N = scorer, theirs_N
        self.heads, self.actions = scorer.heads, scorer.actions

    def rank_all(self, history: HistoryBatch, head: str) -> Scores:
        """See `floors.Ranker`."""
        return self.scorer.rank_all(self._theirs(history), head)[:, self.theirs_N]

    def score(self, history: HistoryBatch, candidates_BC: Ints, head: str) -> Scores:
        """See `floors.Ranker`."""
        return self.scorer.score(self._theirs(history), self.theirs_N[candidates_BC], head)

    def _theirs(self, history: HistoryBatch) -> HistoryBatch:
        return replace(history, item_BL=self.theirs_N[history.item_BL])


def scorer_for(bundle_path: str, dataset_path: str) -> Renumbered:
    """The scorer of a bundle before the items of a dataset.

    Those that it does not know are told to it as a shop tells the service: by their attributes and pictures.
    """
    bundle, dataset = Bundle.open(bundle_path), Dataset.open(dataset_path)
    items = dataset.catalogue()
    scorer = load_scorer(bundle)
    strangers = [item_id for item_id in items.ids[1:].tolist() if item_id not in scorer.catalogue.index]
    if strangers:
        scorer = _knowing(scorer, bundle, dataset, items, strangers)
    theirs = scorer.catalogue.index
    return Renumbered(scorer, np.array([0, *(theirs[item_id] for item_id in items.ids[1:].tolist())], np.int64))


def _knowing(scorer: Scorer, bundle: Bundle, dataset: Dataset, items: Catalogue, strangers: list[str]) -> Scorer:
    vocab = {name: bundle.json(f"vocab/{name}.json") for name in ("categories", "brands")}
    encoder = AttributeEncoder.from_dict(bundle.json("vocab/encoder.json"), vocab)
    row_of = items.index
    shown = items.table.select(SHOWN).take(pa.array([row_of[item_id] - 1 for item_id in strangers])).to_pylist()
    facts: Mapping[str, dict[str, Any]] = dict(zip(strangers, shown, strict=True))
    pixels = _pixels(bundle, dataset, {row_of[item_id]: item_id for item_id in strangers})
    catalogue, row_R = edited(scorer.catalogue, facts, set(pixels), encoder)
    return scorer.over(catalogue, row_R, {catalogue.index[item_id]: image for item_id, image in pixels.items()})


def _pixels(bundle: Bundle, dataset: Dataset, wanted: Mapping[int, str]) -> dict[str, npt.NDArray[np.uint8]]:
    """The pictures of some of the dataset's items, by id; none where the bundle reads pictures of another size."""
    if bundle.json("vocab/images.json") != dataset.manifest["config"]["images"]:
        return {}
    images = dataset.images()
    return {
        wanted[item]: image
        for item, image in zip(images.item_M.tolist(), images.pixels_MHWC, strict=True)
        if item in wanted
    }


def _place(bundle: Bundle) -> str:
    """Where any node finds it."""
    return bundle.location
