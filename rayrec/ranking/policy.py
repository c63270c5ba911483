"""A scene's policy: what the shop wants shown there, in which measure, and where.

In: a scene's settings, a catalogue. Out: masks, factors, limits and pinned places, by item. It must not know who asks,
nor how scores come about.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayrec.config import ItemsConfig, SceneConfig
from rayrec.ranking.retrieval import NEW_BELOW, Floats, Ints
from rayrec.ranking.rules import Bools, Rules

CAPS = {"max_per_category": "category", "max_per_brand": "brand"}


class Policy:
    """One scene's wishes over one catalogue.

    barred: items that are never shown, by the reason for which they are removed ([N + 1] bool each).
    factor_N: what scores are multiplied by ([N + 1] float32), None where nothing is boosted.
    caps: how many items of one code a list may hold, by reason: codes ([N + 1] int64, 0: of no group) and the limit.
    pinned: place in the list (from 0) and item, in order of place.
    """

    def __init__(self, scene: SceneConfig, rules: Rules) -> None:
        catalogue = rules.catalogue
        self.scene, self._rules = scene, rules
        self.barred: dict[str, Bools] = {} if catalogue.in_stock.all() else {"stock": ~catalogue.in_stock}
        if scene.only.given:
            self.barred["only"] = ~self.meant(scene.only)
        if scene.never:
            self.barred["never"] = np.any([self.meant(items) for items in scene.never], axis=0)
        self.factor_N: Floats | None = None
        if scene.boost:
            self.factor_N = np.ones(len(catalogue) + 1, np.float32)
            for boost in scene.boost:
                self.factor_N[self.meant(boost)] *= boost.factor
        self.caps: dict[str, tuple[Ints, int]] = {
            name: (_codes(catalogue.table[column].to_pylist()), getattr(scene, name))
            for name, column in CAPS.items()
            if getattr(scene, name)
        }
        index = catalogue.index
        self.pinned = [(place - 1, index[item]) for place, item in sorted(scene.pinned.items()) if item in index]

    def meant(self, items: ItemsConfig) -> Bools:
        """The items that a part of the settings means. [N + 1] bool."""
        catalogue = self._rules.catalogue
        meant_N = np.arange(len(catalogue) + 1) > 0
        for column, names in (("category", items.category), ("brand", items.brand)):
            if names:
                meant_N &= self._rules.named(column, names)
        if items.item:
            meant_N &= np.isin(catalogue.ids, np.array(items.item, object))
        if items.price_min is not None:
            meant_N &= catalogue.price >= items.price_min
        if items.price_max is not None:
            meant_N &= catalogue.price <= items.price_max
        if items.new is not None:
            meant_N &= (catalogue.n_train < NEW_BELOW) == items.new
        return meant_N

    def substitutes(self, cart: Sequence[str]) -> Bools | None:
        """Items of the categories of what is in the cart ([N + 1] bool), where the scene wants complements."""
        if not self.scene.complements or not cart:
            return None
        categories = {name for item in cart if (name := self._rules.category_of(item))}
        return self._rules.named("category", sorted(categories)) if categories else None


def _codes(names: list[str | None]) -> Ints:
    """A number for each distinct name, 0 for none; row 0 is of none."""
    code_of: dict[str, int] = {}
    codes = [0 if not name else code_of.setdefault(name, len(code_of) + 1) for name in names]
    return np.array([0, *codes], np.int64)
