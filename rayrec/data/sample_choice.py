"""How a visitor of the sample shop chooses: one closed-form rule, drawn from by the log and read by the oracle.

In: a World, and for each visitor the state left by the events so far. Out: the probability of every item, or one
drawn from it. It must not know files, nor how many events anyone makes, nor when.

The next item comes by one of six routes, whose shares `routes` gives:

    again       the item of the last event, on its way down the funnel view -> favorite -> cart -> purchase
    cart        in a new session: the item left in the cart
    refill      a consumable bought before and by now used up
    complement  an item that goes with the last one, by preference in its colour
    aisle       another item of the last one's category, by preference in its colour
    fresh       any item, by the season of the day

Within the last three an item has probability proportional to World.weights (taste, price, popularity) times a
multiplier of its cell. Axes as in `sample_world`; B visitors at once, R routes, F refill categories.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from rayrec.data.sample_world import (
    CATEGORIES,
    CELL_CATEGORY,
    COLOURS,
    DAY_S,
    DAYPARTS,
    REFILL_CATEGORIES,
    Floats,
    Ints,
    World,
)

Bools = npt.NDArray[np.bool_]

ACTION_NAMES: Final = ("view", "favorite", "cart", "purchase")
VIEW, FAVORITE, CART, PURCHASE = range(4)
NEW_SESSION_S: Final = 1800
"""A longer gap than this starts a new session."""
NOTHING: Final = -1


class Route(IntEnum):
    """Ways to the next item."""

    AGAIN = 0
    IN_CART = 1
    REFILL = 2
    COMPLEMENT = 3
    AISLE = 4
    FRESH = 5


# Shares by the last action, within a session; what is left is fresh.
_AGAIN = np.array([0.26, 0.30, 0.55, 0.0])
_COMPLEMENT = np.array([0.10, 0.10, 0.22, 0.60])
_AISLE = np.array([0.36, 0.36, 0.08, 0.05])
# Shares in a new session.
_NEW_COMPLEMENT, _NEW_AISLE, _NEW_CART = 0.08, 0.22, 0.30
_REFILL_NEW, _REFILL_SAME = 0.55, 0.06
# What is done to the same item again, by the last action; rows sum to 1.
_FUNNEL = np.array([[0.20, 0.20, 0.60, 0.0], [0.10, 0.0, 0.90, 0.0], [0.05, 0.0, 0.0, 0.95], [1.0, 0.0, 0.0, 0.0]])
_REFILL_BOUGHT = 0.8  # otherwise it is put into the cart
_SAME_COLOUR = 8.0
_BUSY, _QUIET = 2.5, 1.0

_REFILL_S = np.array([CATEGORIES[k].refill_days for k in REFILL_CATEGORIES]) * DAY_S
_REFILL_SLOT = np.full(len(CATEGORIES), NOTHING)
_REFILL_SLOT[REFILL_CATEGORIES] = np.arange(len(REFILL_CATEGORIES))


def _cell_multipliers() -> tuple[Floats, Floats, Floats]:
    """aisle [C, C], complement [C, C] by the last item's cell, season [dayparts, C]."""
    names = [category.name for category in CATEGORIES]
    goes_with_KK = np.array([[name in category.complements for name in names] for category in CATEGORIES])
    busy_K = np.array([category.busy for category in CATEGORIES])
    colour_KK = 1 + (_SAME_COLOUR - 1) * np.eye(len(COLOURS))
    season = np.where(np.arange(DAYPARTS)[:, None] == busy_K[CELL_CATEGORY], _BUSY, _QUIET)
    aisle_CC, complement_CC = np.kron(np.eye(len(CATEGORIES)), colour_KK), np.kron(goes_with_KK, colour_KK)
    return aisle_CC.astype(np.float64), complement_CC.astype(np.float64), season.astype(np.float64)


_AISLE_CC, _COMPLEMENT_CC, _SEASON_DC = _cell_multipliers()


@dataclass(frozen=True)
class State:
    """What the events so far have left behind, of B visitors. Items are indices or NOTHING, times epoch s."""

    item_B: Ints
    action_B: Ints
    time_B: Ints
    cart_B: Ints
    refill_item_BF: Ints
    refill_time_BF: Ints

    @classmethod
    def empty(cls, n: int) -> State:
        """Of visitors who have done nothing yet."""
        one, several = np.full(n, NOTHING), np.full((n, len(REFILL_CATEGORIES)), NOTHING)
        return cls(one.copy(), one.copy(), one.copy(), one.copy(), several.copy(), several.copy())

    def take(self, rows: npt.NDArray[np.intp] | slice) -> State:
        """The state of some of the visitors; a slice gives views."""
        return State(*(getattr(self, f.name)[rows] for f in fields(self)))

    def advance(self, world: World, rows: npt.NDArray[np.intp], item_B: Ints, action_B: Ints, time_B: Ints) -> None:
        """Take in one event of each visitor in `rows`."""
        self.item_B[rows], self.action_B[rows], self.time_B[rows] = item_B, action_B, time_B
        bought_B = action_B == PURCHASE
        cleared_B = bought_B & (self.cart_B[rows] == item_B)
        self.cart_B[rows] = np.where(action_B == CART, item_B, np.where(cleared_B, NOTHING, self.cart_B[rows]))
        slot_B = _REFILL_SLOT[world.category_N[item_B]]
        used_up_B = bought_B & (slot_B != NOTHING)
        at = (rows[used_up_B], slot_B[used_up_B])
        self.refill_item_BF[at], self.refill_time_BF[at] = item_B[used_up_B], time_B[used_up_B]


def is_due(state: State, time_B: Ints) -> Bools:
    """[B, F]: whether the last purchase of each consumable is used up, and not forgotten."""
    since_BF = time_B[:, None] - state.refill_time_BF
    return (state.refill_item_BF != NOTHING) & (since_BF >= _REFILL_S) & (since_BF < 3 * _REFILL_S)


def day_of(world: World, time_B: Ints) -> Ints:
    """[B]: the day of the log, its last day for later times."""
    return np.clip((time_B - world.start_s) // DAY_S, 0, world.days - 1)


def routes(world: World, visitor_B: Ints, state: State, time_B: Ints) -> Floats:
    """[B, R]: the share of each route at the time of the next event; rows sum to 1."""
    begun_B = state.item_B != NOTHING
    new_B = time_B - state.time_B > NEW_SESSION_S
    action_B, item_B = np.maximum(state.action_B, 0), np.maximum(state.item_B, 0)
    willing_B = np.clip(1 - 0.3 * world.thrift_U[visitor_B] * (world.tier_N[item_B] - 1), 0.4, 1.5)
    on_sale_BC = world.cell_end_DC[day_of(world, time_B)] - world.cell_start_C
    has_aisle_B = ((_AISLE_CC[world.cell_N[item_B]] > 0) * on_sale_BC).sum(1) > 1
    has_complement_B = ((_COMPLEMENT_CC[world.cell_N[item_B]] > 0) * on_sale_BC).sum(1) > 0

    share_BR = np.zeros((len(visitor_B), len(Route)))
    share_BR[:, Route.AGAIN] = np.where(new_B, 0, _AGAIN[action_B] * willing_B)
    share_BR[:, Route.IN_CART] = np.where(new_B & (state.cart_B != NOTHING), _NEW_CART, 0)
    share_BR[:, Route.COMPLEMENT] = np.where(new_B, _NEW_COMPLEMENT, _COMPLEMENT[action_B]) * has_complement_B
    share_BR[:, Route.AISLE] = np.where(new_B, _NEW_AISLE, _AISLE[action_B]) * has_aisle_B
    share_BR *= begun_B[:, None]
    # Over 1 only for a willing visitor's cart; then nothing is fresh.
    share_BR /= np.maximum(share_BR.sum(1, keepdims=True), 1)
    share_BR[:, Route.FRESH] = np.maximum(1 - share_BR.sum(1), 0)
    refill_B = np.where(is_due(state, time_B).any(1), np.where(new_B, _REFILL_NEW, _REFILL_SAME), 0)
    share_BR *= 1 - refill_B[:, None]
    share_BR[:, Route.REFILL] = refill_B
    return share_BR


def multiplier(world: World, route: Route, state: State, time_B: Ints) -> Floats:
    """[B, C]: of each cell, on one of the routes complement, aisle, fresh."""
    if route == Route.FRESH:
        return _SEASON_DC[time_B % DAY_S * DAYPARTS // DAY_S]
    table_CC = _AISLE_CC if route == Route.AISLE else _COMPLEMENT_CC
    return table_CC[world.cell_N[np.maximum(state.item_B, 0)]]


def probabilities(world: World, visitor_B: Ints, state: State, time_B: Ints) -> Floats:
    """[B, N]: the probability that each item is that of the next event, given that it comes at `time_B`."""
    share_BR = routes(world, visitor_B, state, time_B)
    rows = np.arange(len(visitor_B))
    on_sale_BN = world.launch_N <= day_of(world, time_B)[:, None]
    weight_BN = world.weights(visitor_B) * on_sale_BN
    p_BN = np.zeros_like(weight_BN)
    for route in (Route.COMPLEMENT, Route.AISLE, Route.FRESH):
        route_BN = weight_BN * multiplier(world, route, state, time_B)[:, world.cell_N]
        if route == Route.AISLE:
            route_BN[rows, state.item_B] *= state.item_B == NOTHING
        total_B = route_BN.sum(1)
        p_BN += route_BN * (share_BR[:, route] / np.where(total_B > 0, total_B, 1))[:, None]
    np.add.at(p_BN, (rows, state.item_B), share_BR[:, Route.AGAIN])
    np.add.at(p_BN, (rows, state.cart_B), share_BR[:, Route.IN_CART])
    due_BF = is_due(state, time_B)
    each_BF = share_BR[:, Route.REFILL, None] * due_BF / np.maximum(due_BF.sum(1, keepdims=True), 1)
    np.add.at(p_BN, (rows[:, None], state.refill_item_BF), each_BF)
    return p_BN


class Chooser:
    """Draws from `probabilities` for a block of visitors, without touching all items at each draw."""

    def __init__(self, world: World, visitor_B: Ints, rng: np.random.Generator) -> None:
        self.world, self.visitor_B, self.rng = world, visitor_B, rng
        self.weight_BN = world.weights(visitor_B)
        self.cumulative_BM = np.zeros((len(visitor_B), len(world.item_id) + 1))  # M = N + 1
        np.cumsum(self.weight_BN, axis=1, out=self.cumulative_BM[:, 1:])

    def draw(self, state: State, time_B: Ints) -> tuple[Ints, Ints]:
        """Item and action of the next event of the first len(time_B) visitors of the block."""
        n = len(time_B)
        route_B = self._pick(routes(self.world, self.visitor_B[:n], state, time_B))
        chance_B = self.rng.random(n)
        item_B = np.where(route_B == Route.IN_CART, state.cart_B, state.item_B)
        action_B = np.full(n, VIEW)

        again = np.flatnonzero(route_B == Route.AGAIN)
        action_B[again] = (np.cumsum(_FUNNEL, 1)[state.action_B[again], :3] <= chance_B[again, None]).sum(1)
        action_B[route_B == Route.IN_CART] = PURCHASE
        refill = np.flatnonzero(route_B == Route.REFILL)
        slot = self._pick(is_due(state.take(refill), time_B[refill]).astype(float))
        item_B[refill] = state.refill_item_BF[refill, slot]
        action_B[refill] = np.where(chance_B[refill] < _REFILL_BOUGHT, PURCHASE, CART)
        for route in (Route.COMPLEMENT, Route.AISLE, Route.FRESH):
            rows = np.flatnonzero(route_B == route)
            item_B[rows] = self._browse(route, rows, state.take(rows), time_B[rows])
        return item_B, action_B

    def _browse(self, route: Route, rows: npt.NDArray[np.intp], state: State, time_B: Ints) -> Ints:
        """An item by taste and the route's multiplier: first its cell, then the item within it."""
        world, every = self.world, np.arange(len(rows))
        end_BC = world.cell_end_DC[day_of(world, time_B)]
        mass_BC = self.cumulative_BM[rows[:, None], end_BC] - self.cumulative_BM[rows[:, None], world.cell_start_C]
        left_out_B = np.zeros(len(rows))
        if route == Route.AISLE:  # never the last item itself
            left_out_B = self.weight_BN[rows, state.item_B]
            last_cell_B = world.cell_N[state.item_B]
            one_left_B = end_BC[every, last_cell_B] - world.cell_start_C[last_cell_B] == 1
            mass_BC[every, last_cell_B] = np.where(one_left_B, 0, mass_BC[every, last_cell_B] - left_out_B)
        cell_B = self._pick(mass_BC * multiplier(world, route, state, time_B))
        low_B, high_B = world.cell_start_C[cell_B], end_BC[every, cell_B]
        at_B = self.cumulative_BM[rows, low_B] + self.rng.random(len(rows)) * mass_BC[every, cell_B]
        if route == Route.AISLE:
            beyond_B = (cell_B == last_cell_B) & (at_B >= self.cumulative_BM[rows, state.item_B])
            at_B = np.where(beyond_B, at_B + left_out_B, at_B)
        while (high_B - low_B > 1).any():
            middle_B = (low_B + high_B) // 2
            right_B = (self.cumulative_BM[rows, middle_B] <= at_B) & (high_B - low_B > 1)
            low_B, high_B = (
                np.where(right_B, middle_B, low_B),
                np.where(right_B, high_B, np.maximum(middle_B, low_B + 1)),
            )
        return low_B

    def _pick(self, weight_BK: Floats) -> Ints:
        """[B]: a column drawn in proportion to each row's weights."""
        cumulative_BK = np.cumsum(weight_BK, axis=1)
        at_B = self.rng.random(len(weight_BK)) * cumulative_BK[:, -1]
        return (cumulative_BK[:, :-1] <= at_B[:, None]).sum(1)
