"""How well the one who knows everything would do: the oracle of a sample shop before the same judge.

In: the oracle and the dataset made from its shop. Out: figures beside which a model's can be held.
"""

from __future__ import annotations

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.sample import Oracle, Query
from rayrec.evaluation.judge import cold_items
from rayrec.evaluation.metrics import Figures, rank_figures
from rayrec.evaluation.replay import Question, ReplaySettings, Split, Visitors, target_places
from rayrec.schema import ACTIONS

PROTOCOLS = ("metrics", "next", "cold")
BATCH = 512


def oracle_figures(
    oracle: Oracle, dataset: Dataset, split: Split = "test", *, is_told: bool = False
) -> dict[str, Figures]:
    """Figures of the oracle under PROTOCOLS; it ranks each whole history by true chance.

    is_told: it knows when the visitor asks, as a model does; without it weighs the times that are likely.
    """
    sequences, catalogue = dataset.sequences(), dataset.catalogue()
    settings = ReplaySettings(
        split, len(catalogue), dataset.clock, max_len=1, protocols=PROTOCOLS, cold=cold_items(catalogue)
    )
    visitors = Visitors.of(sequences)
    places = target_places(sequences, visitors, settings)
    row_Q = np.flatnonzero(places["next"] >= 0)
    ranks: dict[str, list[np.ndarray]] = {protocol: [] for protocol in PROTOCOLS}
    for start in range(0, len(row_Q), BATCH):
        row_B = row_Q[start : start + BATCH]
        place_B = places["next"][row_B]
        event_E, offsets = visitors.before(row_B, place_B)
        queries = [
            Query(
                visitors.user_U[row],
                catalogue.ids[visitors.item_A[events]].tolist(),
                [ACTIONS[code - 1] for code in visitors.action_A[events]],
                visitors.time_ms_A[events].tolist(),
                int(visitors.time_ms_A[visitors.offsets[row] + place]) if is_told else None,
            )
            for row, place, events in zip(row_B, place_B, np.split(event_E, offsets[1:-1]), strict=True)
        ]
        scores_BN = oracle.scores_batch(queries, catalogue.ids.tolist())
        question = Question.ask(visitors, row_B, place_B, settings)
        new_B = places["metrics"][row_B] >= 0
        ranks["next"].append(question.rank(scores_BN).rank_B)
        ranks["metrics"].append(question.rank_unseen(scores_BN).rank_B[new_B])
        cold_B = places["cold"][row_B] >= 0
        ranks["cold"].append(question.rank_cold(scores_BN, settings.cold).rank_B[cold_B])
    return {protocol: rank_figures(np.concatenate(parts)) for protocol, parts in ranks.items()}
