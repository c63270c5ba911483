"""Reasons: one or two true sentences on why an item is in the list, from what retrieval already knows.

In: an item, its sources, the visitor's newest items. Out: sentences. It must not know how the list was
ordered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayrec.catalogue import Catalogue
from rayrec.ranking.retrieval import Ints, Retriever


class Explainer:
    """Writes reasons for items of one catalogue."""

    def __init__(self, catalogue: Catalogue, retriever: Retriever) -> None:
        self._titles, self._ids = catalogue.table["title"], catalogue.ids
        self._retriever = retriever

    def reasons(self, item: int, sources: Sequence[str], recent: Ints, anchors: Ints) -> list[str]:
        """Reasons for showing `item` (an index): the strongest first, never empty if `sources` is not."""
        found: list[str] = []
        near = self._nearest(item, anchors if "related" in sources else recent)
        if follows := self._followed(item, anchors if "related" in sources else recent):
            found.append(f"Often follows {self._name(follows)}")
        if "related" in sources and near:
            found.append(f"Similar to {self._name(near)}")
        if "model" in sources and "related" not in sources:
            found.append(f"Fits your interest in {self._name(near)}" if near else "Fits what you looked at")
        if "new" in sources:
            found.append("New in the shop")
        if "popular" in sources:
            found.append("Popular with other visitors")
        return list(dict.fromkeys(found))[:2]

    def _followed(self, item: int, earlier: Ints) -> int:
        """The one of `earlier` that `item` follows most often; 0 for none."""
        if not len(earlier):
            return 0
        weights = self._retriever.cooccurrence[earlier, item].toarray().ravel()
        return int(earlier[np.argmax(weights)]) if weights.max() > 0 else 0

    def _nearest(self, item: int, earlier: Ints) -> int:
        """The one of `earlier` nearest to `item` by vector, other than itself; 0 for none."""
        others = earlier[earlier != item]
        if not len(others):
            return 0
        unit_ND = self._retriever.unit_ND
        return int(others[np.argmax(unit_ND[others] @ unit_ND[item])])

    def _name(self, item: int) -> str:
        return str(self._titles[item - 1].as_py() or self._ids[item])
