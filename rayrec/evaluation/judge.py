"""The judge: puts the same questions to a ranker and to the floors, and adds up their answers.

In: a maker of a ranker, and a dataset. Out: the body of `rayrec evaluate --json`. It must not know models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.catalogue import Catalogue
from rayrec.data.dataset import Dataset
from rayrec.data.training_events import COLUMNS, TrainingEvents, flat
from rayrec.evaluation.floors import Markov, Popular, Ranker
from rayrec.evaluation.metrics import (
    SHOWN,
    Figures,
    list_figures,
    mean,
    ndcg_spread,
    pointwise_figures,
    popularity,
    rank_figures,
)
from rayrec.evaluation.replay import PROTOCOLS, ReplaySettings, Split, replay, user_hash
from rayrec.history import Ints
from rayrec.schema import SEQUENCE_SCHEMA

MODEL = "model"
COLD_ITEM_EVENTS = 5
"""An item with fewer training events is cold."""
COLD_USER_EVENTS = 5
"""A user with fewer events before the target is cold."""
HISTORY_EDGES = (0, 5, 10, 20, 50)
DECILES = 10


def evaluate(
    make_ranker: Callable[[], Ranker],
    dataset: Dataset,
    split: Split = "test",
    *,
    max_len: int,
    batch: int = 256,
    users: int | None = None,
    parallel: bool = True,
    floors: bool = True,
    protocols: Sequence[str] = PROTOCOLS,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge a ranker on a split, full ranking over all items, the floors beside it.

    make_ranker: called once in each process that asks; must be picklable if `parallel`.
    max_len: newest events of a history that a ranker reads (what was seen is masked by the whole of it).
    batch: users a call: it bounds memory to a few times batch * items * 4 bytes a process.
    users: ask only a seeded sample of so many tested users, which shards do not change; None asks all.
    parallel: spread users over the running Ray cluster; False stays in this process and needs no Ray.
    floors, protocols: what to leave out where speed matters, as in validation during training.

    Returns the JSON body of `rayrec evaluate --json`, see `summarise` and `cold_counts`; a figure that nothing was
    measured for is None.
    """
    columns = ["user_id", f"{split}_at", *COLUMNS] if parallel else SEQUENCE_SCHEMA.names
    sequences = dataset.sequences(columns)
    catalogue = dataset.catalogue()
    settings = ReplaySettings(
        split=split,
        n_items=len(catalogue),
        clock=dataset.clock,
        max_len=max_len,
        batch=batch,
        protocols=tuple(protocols),
        seed=seed,
        hash_limit=_hash_limit(sequences, split, users, seed),
        cold=cold_items(catalogue),
    )
    makers = {MODEL: make_ranker, **(floor_makers(sequences, catalogue) if floors else {})}
    if parallel:
        from rayrec.evaluation.shards import replay_in_shards  # Ray is a matter of this branch alone

        answers = replay_in_shards(dataset, makers, settings)
    else:
        answers = replay({name: make() for name, make in makers.items()}, sequences, settings)
    result = summarise(answers, catalogue, settings, tuple(makers))
    result["catalogue"] = cold_counts(sequences, catalogue)
    result["settings"]["sampled_users"] = users if settings.hash_limit < ReplaySettings.hash_limit else None
    return result


def cold_items(catalogue: Catalogue) -> tuple[int, ...]:
    """Items without a training event, ascending."""
    return tuple((np.flatnonzero(catalogue.n_train[1:] == 0) + 1).tolist())


def cold_counts(sequences: pa.Table, catalogue: Catalogue) -> dict[str, int]:
    """How many items have no training event, and how many of these have another, which is withheld or asked for.

    If all have, the catalogue was made of its log: what nobody had met is there for being somebody's next item, and to
    have no event gives away that an item is one. In a shop's catalogue there are those that nobody ever chose.
    """
    cold = np.asarray(cold_items(catalogue), np.int64)
    met_A, _ = flat(sequences, "item")
    return {"cold": len(cold), "cold_met_later": int(np.isin(cold, met_A).sum())}


def floor_makers(sequences: pa.Table, catalogue: Catalogue) -> dict[str, Callable[[], Ranker]]:
    """Makers of the floors, counted from the training events of a sequence table."""
    markov = Markov.count(TrainingEvents.of(sequences), catalogue.n_train)
    return {"popular": partial(Popular, catalogue.n_train), "markov": partial(_itself, markov)}


def _itself(ranker: Ranker) -> Ranker:
    return ranker


def _hash_limit(sequences: pa.Table, split: Split, users: int | None, seed: int) -> int:
    """The greatest `user_hash` of a sample of `users` tested users."""
    tested = sequences.filter(pc.greater_equal(sequences[f"{split}_at"], 0))["user_id"]
    if users is None or users >= len(tested):
        return ReplaySettings.hash_limit
    return sorted(user_hash(user, seed) for user in tested.to_pylist())[users - 1] if users > 0 else -1


# ---------------------------------------------------------------- adding up


@dataclass(frozen=True)
class Answers:
    """What one ranker answered under one protocol, in the order of the users' ids; see replay.ANSWER_SCHEMA."""

    target_U: Ints
    history_U: Ints
    rank_U: Ints
    shown_UK: Ints
    score_UC: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.target_U)

    @classmethod
    def of(cls, answers: pa.Table, ranker: str, protocol: str) -> Answers:
        """Those of `ranker` under `protocol`."""
        wanted = pc.and_(pc.equal(answers["ranker"], ranker), pc.equal(answers["protocol"], protocol))
        rows = answers.filter(wanted).sort_by("user_id")

        def matrix(name: str) -> npt.NDArray[Any]:
            flat = rows[name].combine_chunks().flatten().to_numpy()
            return flat.reshape(len(rows), -1 if len(rows) else SHOWN)

        return cls(
            target_U=rows["target"].to_numpy(),
            history_U=rows["history"].to_numpy(),
            rank_U=rows["rank"].to_numpy(),
            shown_UK=matrix("shown"),
            score_UC=matrix("score"),
        )


def summarise(
    answers: pa.Table, catalogue: Catalogue, settings: ReplaySettings, rankers: Sequence[str] = (MODEL,)
) -> dict[str, Any]:
    """The JSON body of the answers of these rankers: "model", and floors."""
    by = {(r, p): Answers.of(answers, r, p) for r in rankers for p in settings.protocols}
    bodies = {r: {p: _body(p, by[r, p], catalogue) for p in settings.protocols} for r in rankers}
    ranked = {r: by[r, "metrics"] for r in rankers if "metrics" in settings.protocols}
    users = len(pc.unique(answers["user_id"]))
    return {
        "split": settings.split,
        "users": users,
        "not_new": users - len(ranked[MODEL]) if ranked else None,
        "items": len(catalogue),
        **bodies[MODEL],
        "floors": {r: _floor_body(bodies[r]) for r in rankers if r != MODEL},
        "slices": slices(ranked, catalogue) if ranked else {},
        "detail": detail(ranked, catalogue) if ranked else {},
        "settings": {"max_len": settings.max_len, "seed": settings.seed, "clock": settings.clock},
    }


def _body(protocol: str, answers: Answers, catalogue: Catalogue) -> Figures:
    if protocol == "pointwise":
        return {"users": len(answers), **pointwise_figures(answers.score_UC)}
    return {
        "users": len(answers),
        **rank_figures(answers.rank_U),
        **ndcg_spread(answers.rank_U),
        **list_figures(answers.shown_UK, catalogue),
    }


def _floor_body(bodies: dict[str, Figures]) -> Figures:
    """A floor's `metrics` at the top, its other protocols by name."""
    return {**bodies.get("metrics", {}), **{name: body for name, body in bodies.items() if name != "metrics"}}


def slices(ranked: dict[str, Answers], catalogue: Catalogue) -> dict[str, Figures]:
    """Figures of parts of the users under `metrics`: by how well known the target is, and how long the history."""
    target_U, history_U = ranked[MODEL].target_U, ranked[MODEL].history_U
    known_U = catalogue.n_train[target_U]
    parts = {
        "new_items": known_U == 0,
        "cold_items": known_U < COLD_ITEM_EVENTS,
        "warm_items": known_U >= COLD_ITEM_EVENTS,
        "cold_users": history_U < COLD_USER_EVENTS,
    }
    for low, high in zip(HISTORY_EDGES, (*HISTORY_EDGES[1:], None), strict=True):
        name = f"history_{low}+" if high is None else f"history_{low}-{high - 1}"
        parts[name] = (history_U >= low) & (history_U < (np.inf if high is None else high))
    return {
        name: {
            **_slice_body(ranked[MODEL].rank_U[part_U]),
            "floors": {r: _slice_body(answers.rank_U[part_U]) for r, answers in ranked.items() if r != MODEL},
        }
        for name, part_U in parts.items()
    }


def _slice_body(rank_U: Ints) -> Figures:
    figures = rank_figures(rank_U, cutoffs=(10,))
    return {"n": len(rank_U), **{name: figures[name] for name in ("hr@10", "ndcg@10", "mrr@10")}}


def detail(ranked: dict[str, Answers], catalogue: Catalogue) -> Figures:
    """What the report draws, under `metrics`.

    hr_at: hr@1 .. hr@SHOWN of each ranker. ranks: share of targets at rank 1, 2, 3-4, 5-8, ... (doubling).
    exposure: share of what each ranker shows in its first 10 that falls on each tenth of the catalogue by
    popularity, the least popular first; "chosen" is what users really took.
    """
    tenth_N = np.minimum((popularity(catalogue.n_train) * DECILES).astype(np.int64), DECILES - 1)
    bins = int(np.ceil(np.log2(max(len(catalogue), 1)))) + 1

    def shares(places: Ints, length: int) -> list[float]:
        return (np.bincount(places, minlength=length) / max(len(places), 1)).tolist()

    shown = {r: a.shown_UK[:, :10] for r, a in ranked.items()}
    exposure = {r: shares(tenth_N[items[items > 0]], DECILES) for r, items in shown.items()}
    exposure["chosen"] = shares(tenth_N[ranked[MODEL].target_U], DECILES)
    return {
        "hr_at": {r: [mean(a.rank_U <= k) for k in range(1, SHOWN + 1)] for r, a in ranked.items()},
        "ranks": {r: shares(np.ceil(np.log2(a.rank_U)).astype(np.int64), bins) for r, a in ranked.items()},
        "exposure": exposure,
    }
