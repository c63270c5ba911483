"""Reasons: one or two true sentences on why an item is in the list, from what retrieval already knows.

In: an item, its sources, the visitor's newest items. Out: sentences. It must not know how the list was
ordered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayrec.catalogue import Catalogue
from rayrec.ranking.retrieval import Floats, Ints, Retriever

POPULAR_FROM = 0.9  # the tenth of the items with the most training events may be called popular


class Explainer:
    """Writes reasons for items of one catalogue."""

    def __init__(self, catalogue: Catalogue, retriever: Retriever) -> None:
        self._titles, self._ids = catalogue.table["title"], catalogue.ids
        self._retriever = retriever
        enough = np.quantile(catalogue.n_train, POPULAR_FROM, method="lower")
        self._popular_N = catalogue.n_train >= max(1, enough)

    def reasons(self, items: Ints, sources: Sequence[Sequence[str]], recent: Ints, anchors: Ints) -> list[list[str]]:
        """Up to two reasons for each of one list's `items` (indices), the strongest first."""
        past, follows_PK, cosine_PK = self._against(items, recent)
        page, page_follows_PK, page_cosine_PK = self._against(items, anchors)
        found = []
        for k, (item, names) in enumerate(zip(items, sources, strict=True)):
            if {"related", "together"} & set(names):
                reasons = self._of(page, page_follows_PK[:, k], page_cosine_PK[:, k], "Similar to {}")
            elif {"model", "cooccurrence"} & set(names):
                reasons = self._of(past, follows_PK[:, k], cosine_PK[:, k], "Fits your interest in {}")
            else:
                reasons = []
            reasons += ["Chosen by the shop"] * ("pinned" in names)
            reasons += ["New in the shop"] * ("new" in names)
            reasons += ["Popular with other visitors"] * bool(self._popular_N[item])
            found.append(reasons[:2])
        return found

    def _against(self, items: Ints, earlier: Ints) -> tuple[Ints, Floats, Floats]:
        """How strongly each of K items follows each of P earlier ones, and how near they are; itself is not near."""
        follows_PK = self._retriever.strength(earlier, items)
        unit_ND = self._retriever.unit_ND
        cosine_PK = unit_ND[earlier] @ unit_ND[items].T
        return earlier, follows_PK, np.where(earlier[:, None] == items, -np.inf, cosine_PK)

    def _of(self, earlier: Ints, follows_P: Floats, cosine_P: Floats, near: str) -> list[str]:
        reasons = []
        if follows_P.max(initial=0) > 0:
            reasons.append(f"Often follows {self._name(earlier[np.argmax(follows_P)])}")
        if cosine_P.max(initial=-np.inf) > 0:
            reasons.append(near.format(self._name(earlier[np.argmax(cosine_P)])))
        return reasons

    def _name(self, item: int) -> str:
        return str(self._titles[item - 1].as_py() or self._ids[item])
