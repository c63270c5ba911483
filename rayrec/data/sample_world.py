"""The hidden truth of the sample shop: its items, its visitors and their tastes.

In: a SampleConfig and a random generator. Out: a World, to and from JSON. It must not know how visitors choose
(`sample_choice`), nor how anything is drawn or written.

Axes: U visitors, N items, C cells (a category in one colour), D days of the log, K kinds of one attribute.
Items are kept in the order (cell, launch), so that what is on sale in a cell on a day is a run of neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from rayrec.errors import UsageError
from rayrec.schema import visitor_id

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DAY_S: Final = 86_400
DAYPARTS: Final = 4
"""Night, morning, afternoon, evening: six hours each, UTC."""
END_S: Final = int(datetime(2026, 1, 1, tzinfo=timezone.utc).timestamp())
"""The log ends here, whatever the clock says: a sample is the same tomorrow."""
MIN_DAYS: Final = 56
EVENTS_PER_SESSION: Final = 5
ANONYMOUS_SHARE: Final = 0.03
ANONYMOUS_EVENTS: Final = 4
COLD_SHARE: Final = 0.05
LATE_SHARE: Final = 0.05
_NOVELTY: Final = 2.0  # log popularity that a late arrival gains


@dataclass(frozen=True)
class SampleConfig:
    """What to make. `events` counts the clean rows; `dirty` adds others, each counted in truth.json."""

    users: int = 2000
    items: int = 600
    events: int = 60_000
    seed: int = 0
    dirty: bool = False
    image_size: int = 128

    def __post_init__(self) -> None:
        least = {"users": 1, "items": 12, "seed": 0, "image_size": 16}
        for name, at_least in least.items():
            if getattr(self, name) < at_least:
                raise UsageError(f"sample: {name} is {getattr(self, name)}; it must be at least {at_least}")
        if self.events < self.users:
            raise UsageError(f"sample: {self.events} events for {self.users} users; each user makes at least one")
        if self.image_size > 512:
            raise UsageError(f"sample: image_size is {self.image_size}; it must be at most 512")


@dataclass(frozen=True)
class Category:
    """A kind of product. `complements` are bought with it; `refill_days` is set for what gets used up."""

    name: str
    noun: str
    price: float
    materials: tuple[str, ...]
    complements: tuple[str, ...]
    busy: int  # the daypart in which it is looked at most
    refill_days: int = 0


CATEGORIES: Final = (
    Category("shoes", "shoe", 80, ("canvas", "leather", "suede"), ("socks", "polish"), 2),
    Category("socks", "socks", 12, ("cotton", "wool", "bamboo"), ("shoes",), 0),
    Category("polish", "polish", 9, ("beeswax", "carnauba", "cream"), ("shoes", "socks"), 0, 9),
    Category("shirts", "shirt", 45, ("cotton", "linen", "flannel"), ("hats", "scarves"), 2),
    Category("hats", "hat", 30, ("felt", "straw", "wool"), ("scarves", "shirts"), 2),
    Category("scarves", "scarf", 35, ("silk", "wool", "cotton"), ("hats", "bags"), 3),
    Category("bags", "bag", 95, ("canvas", "leather", "nylon"), ("scarves", "shoes"), 2),
    Category("mugs", "mug", 15, ("ceramic", "enamel", "porcelain"), ("tea",), 1),
    Category("tea", "tea", 8, ("green", "black", "herbal"), ("mugs", "candles"), 1, 6),
    Category("lamps", "lamp", 70, ("ceramic", "brass", "paper"), ("candles", "mugs"), 3),
    Category("candles", "candle", 14, ("soy", "beeswax", "palm"), ("lamps", "soaps"), 3, 8),
    Category("soaps", "soap", 7, ("olive", "lavender", "citrus"), ("candles", "tea"), 1, 7),
)
COLOURS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
STYLES: Final = ("plain", "striped", "dotted", "checked", "zigzag", "floral")
BRANDS: Final = (
    "Marlow", "Nordhavn", "Solano", "Tessera", "Okori", "Rivage",
    "Pinecrest", "Lumen", "Bravura", "Kestrel", "Atelier Un", "Fennimore",
)  # fmt: skip
"""Brand b works in style b % 6 (mostly); the first four are cheap, the next four middling, the last four dear."""
TIERS: Final = ("budget", "middle", "premium")
_TIER_PRICE: Final = np.array([0.6, 1.0, 1.9])

N_CELLS: Final = len(CATEGORIES) * len(COLOURS)
CELL_CATEGORY: Final = np.repeat(np.arange(len(CATEGORIES)), len(COLOURS))
REFILL_CATEGORIES: Final = np.array([k for k, category in enumerate(CATEGORIES) if category.refill_days])


@dataclass(frozen=True)
class World:
    """Everything hidden. Integers index the tables above; item and visitor arrays run in step.

    launch_N counts days from the start of the log: 0 or less is before it, `days` or more never on sale in it.
    taste_* and thrift_U are in log-odds; habit_UD holds the share of a visitor's sessions in each daypart.
    """

    days: int
    item_id: list[str]
    category_N: Ints
    colour_N: Ints
    style_N: Ints
    brand_N: Ints
    tier_N: Ints
    material_N: Ints
    launch_N: Ints
    price_N: Floats
    popularity_N: Floats  # log
    visitor: list[str]  # schema.visitor_id
    taste_category_UK: Floats
    taste_colour_UK: Floats
    taste_style_UK: Floats
    thrift_U: Floats
    habit_UD: Floats
    cell_N: Ints = field(init=False, repr=False)
    cell_start_C: Ints = field(init=False, repr=False)
    cell_end_DC: Ints = field(init=False, repr=False)
    """On day d, cell c has the items cell_start_C[c] to cell_end_DC[d, c] - 1 on sale."""

    def __post_init__(self) -> None:
        cell_N = self.category_N * len(COLOURS) + self.colour_N
        start_C = np.searchsorted(cell_N, np.arange(N_CELLS))
        first_day_N = np.clip(self.launch_N, 0, self.days)
        launched_DC = np.zeros((self.days + 1, N_CELLS), np.int64)
        np.add.at(launched_DC, (first_day_N, cell_N), 1)
        object.__setattr__(self, "cell_N", cell_N)
        object.__setattr__(self, "cell_start_C", start_C)
        object.__setattr__(self, "cell_end_DC", start_C + np.cumsum(launched_DC, axis=0)[: self.days])

    @property
    def start_s(self) -> int:
        """The log's first midnight, epoch seconds."""
        return END_S - self.days * DAY_S

    def weights(self, visitor_B: Ints) -> Floats:
        """[B, N]: how much each visitor is drawn to each item, launched or not; only ratios matter."""
        log_BN = (
            self.taste_category_UK[visitor_B][:, self.category_N]
            + self.taste_colour_UK[visitor_B][:, self.colour_N]
            + self.taste_style_UK[visitor_B][:, self.style_N]
            - self.thrift_U[visitor_B][:, None] * (self.tier_N - 1)
            + self.popularity_N
        )
        return np.exp(log_BN)

    def title(self, item: int) -> str:
        """What the catalogue calls the item, for example "Red striped canvas shoe"."""
        category, style = CATEGORIES[self.category_N[item]], STYLES[self.style_N[item]]
        words = [COLOURS[self.colour_N[item]], "" if style == "plain" else style]
        words += [category.materials[self.material_N[item]], category.noun]
        return " ".join(word for word in words if word).capitalize()

    def to_json(self) -> dict[str, Any]:
        """As plain lists and numbers; `from_json` gives back an equal world."""
        made = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in made.items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> World:
        """The world that `to_json` wrote."""
        made: dict[str, Any] = {name: np.array(v) if _is_array(name) else v for name, v in content.items()}
        return cls(**made)


def _is_array(name: str) -> bool:
    return name.rsplit("_", 1)[-1].isupper()


def make_world(config: SampleConfig, days: int, n_anonymous: int, rng: np.random.Generator) -> World:
    """Draw the items and visitors of a shop whose log lasts `days`."""
    return World(days=days, **_make_items(config.items, days, rng), **_make_visitors(config.users, n_anonymous, rng))


def _make_items(n: int, days: int, rng: np.random.Generator) -> dict[str, Any]:
    category_N = rng.permutation(np.arange(n) % len(CATEGORIES))
    colour_N = rng.integers(len(COLOURS), size=n)
    brand_N = rng.integers(len(BRANDS), size=n)
    own_style_N = rng.random(n) < 0.85
    style_N = np.where(own_style_N, brand_N % len(STYLES), rng.integers(len(STYLES), size=n))
    tier_N = brand_N * len(TIERS) // len(BRANDS)
    launch_N, popularity_N = _launches(n, days, rng)
    base_N = np.array([CATEGORIES[k].price for k in category_N])
    price_N = np.ceil(base_N * _TIER_PRICE[tier_N] * np.exp(rng.normal(0, 0.15, n))) - 0.01
    number_N = np.sort(rng.choice(max(100_000, 4 * n), size=n, replace=False) + 1)
    order = np.lexsort((launch_N, colour_N, category_N))
    columns = {
        "category_N": category_N, "colour_N": colour_N, "style_N": style_N, "brand_N": brand_N, "tier_N": tier_N,
        "material_N": rng.integers(3, size=n), "launch_N": launch_N, "price_N": np.round(price_N, 2),
        "popularity_N": np.round(popularity_N, 3),
    }  # fmt: skip
    sorted_columns = {name: column[order] for name, column in columns.items()}
    return {"item_id": [f"{number_N[item]:06d}" for item in order], **sorted_columns}


def _launches(n: int, days: int, rng: np.random.Generator) -> tuple[Ints, Floats]:
    """Launch day and log popularity: Zipf, and a little more for what is new."""
    n_cold, n_late = math.ceil(COLD_SHARE * n), math.ceil(LATE_SHARE * n)
    launch_N = np.zeros(n, np.int64)
    chosen = rng.permutation(n)
    cold, late = chosen[:n_cold], chosen[n_cold : n_cold + n_late]
    launch_N[cold] = days + rng.integers(0, 7, n_cold)
    launch_N[late] = rng.integers(math.floor(0.9 * days), days - 1, n_late, endpoint=True)
    popularity_N = -0.7 * np.log(rng.permutation(n) + 3.0)
    popularity_N[late] += _NOVELTY
    return launch_N, popularity_N - popularity_N.mean()


def _make_visitors(users: int, anonymous: int, rng: np.random.Generator) -> dict[str, Any]:
    n = users + anonymous
    names = [f"u{number:06d}" for number in range(1, users + 1)]
    names += [visitor_id(None, anonymous_session(number)) for number in range(anonymous)]

    def tastes(kinds: Sequence[Any], spread: float) -> Floats:
        return np.round(rng.normal(0, spread, (n, len(kinds))), 3)

    return {
        "visitor": names,
        "taste_category_UK": tastes(CATEGORIES, 1.3),
        "taste_colour_UK": tastes(COLOURS, 1.3),
        "taste_style_UK": tastes(STYLES, 1.1),
        "thrift_U": np.round(rng.normal(0.2, 0.8, n), 3),
        "habit_UD": np.round(0.02 + 0.92 * rng.dirichlet((0.3, 0.8, 1.0, 1.2), n), 3),
    }


def anonymous_session(number: int) -> str:
    """The session id of an anonymous visitor."""
    return f"a{number:07d}"
