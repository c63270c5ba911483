"""How many of a visitor's nearest items a search by vector finds. In: a bundle. Out: one line of JSON."""

from __future__ import annotations

import json

import numpy as np

from rayrec.bundle import Bundle
from rayrec.config import ServeConfig
from rayrec.history import encode_history
from rayrec.ranking.pipeline import Ranker
from rayrec.ranking.retrieval import Asked
from rayrec.serving.scorer import load_scorer

VISITORS, EVENTS = 20, 20


def main(bundle_path: str) -> None:
    """Print the mean over some visitors, of as many items as are asked of a source."""
    scorer = load_scorer(Bundle.open(bundle_path))
    n, items = ServeConfig().per_source, len(scorer.catalogue)
    rng = np.random.default_rng(0)
    item_E = rng.integers(1, items + 1, VISITORS * EVENTS)
    history = encode_history(
        item_E, np.ones_like(item_E), np.arange(len(item_E)) * 1000, np.arange(VISITORS + 1) * EVENTS,
        max_len=scorer.max_len, clock=scorer.clock, actions=scorer.actions,
    )  # fmt: skip
    user_BD = scorer.user_vectors(history)
    nobody = [np.empty(0, np.int64)] * VISITORS
    asked = Asked(user_BD, np.ones(VISITORS, bool), nobody, nobody)
    retriever = Ranker(scorer, ServeConfig()).retriever
    shares = []
    for user_D, candidates in zip(user_BD, retriever.retrieve(asked, ["model"], n), strict=True):
        score_N = scorer.vectors_ND @ user_D
        score_N[0] = -np.inf
        least = np.sort(score_N)[-min(n, items)] - 1e-5  # what ties with the last is as good
        shares.append(np.count_nonzero(score_N[candidates.item_C] >= least) / min(n, items))
    print(json.dumps({"at": n, "recall": float(np.mean(shares))}))
