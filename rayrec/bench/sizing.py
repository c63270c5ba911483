"""What a shop needs of machines: arithmetic from its size and from rates that were measured.

In: a shop, rates, the model's settings. Out: amounts, each with the sum that made it. It must not know a machine: the
rates do, and each says by which command it was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rayrec.config import Config
from rayrec.errors import UsageError
from rayrec.model.negatives import how_many

DAY_S = 86_400
FLOAT_BYTES = 4
ADAM_COPIES = 4
"""Of each weight in training: itself, its gradient, and two moments."""
BACKWARD = 3
"""A step is its forward pass and twice as much for gradients (Kaplan et al. 2020)."""


@dataclass(frozen=True)
class Shop:
    """A shop's size."""

    users: float = 10e6
    items: float = 10e6
    events_a_day: float = 1e9
    lists_a_user: float = 20.0  # a day
    pictures: float = 1.0  # share of the items that have one
    peak: float = 3.0  # the busiest hour against the mean
    days_kept: float = 30.0  # events that the state holds
    epochs: float = 1.0  # of training a day, on that day's events: each day starts from the last one's weights


@dataclass(frozen=True)
class Rates:
    """What was measured on two shared cores of an x86-64 virtual machine without a GPU."""

    prepare_events_s: float = 162e3  # a core; `rayrec bench prepare --events 10000000 --rounds 1`
    pictures_s: float = 4.3e3  # a core, decoded and resized to 128; the posters of MovieLens-1M, 7 kB each
    train_events_s: float = 12.3e3  # a core, first stage, softmax over 3,416 items; `rayrec train` on MovieLens-1M
    dataset_bytes: float = 27.0  # an event, on Taobao UserBehavior; 4 on MovieLens-1M
    state_bytes: float = 152.0  # an event in SQLite; `rayrec bench serve --only users`
    list_s: float = 2.2e-3  # CPU seconds of a list at 32 clients, events beside it; `rayrec bench serve`
    list_growth: float = 1.9  # times that at a million items; `rayrec bench serve --only items`
    replica_bytes: float = 5.8e3  # an item in a replica; the same
    busy: float = 0.6  # share of its cores that a service should use at its peak
    gpu_flops: float = 20e12  # a third of what an A10G says of itself in bf16; not measured
    gpu_bytes: float = 24e9


@dataclass(frozen=True)
class Need:
    """An amount, and how it came about."""

    what: str
    amount: float
    unit: str
    sum: str


def needs(shop: Shop, rates: Rates, config: Config) -> list[Need]:
    """What the shop needs for preparing, training and serving a model of `config`."""
    return [*_data(shop, rates, config), *_training(shop, rates, config), *_serving(shop, rates)]


def _data(shop: Shop, rates: Rates, config: Config) -> Iterator[Need]:
    events, pictures = shop.events_a_day, shop.items * shop.pictures
    size = config.model.image_size
    yield Need("prepare a day", events / rates.prepare_events_s / 3600, "core hours", "events / events a core and s")
    yield Need("dataset of a day", events * rates.dataset_bytes / 1e9, "GB", "events x bytes an event")
    yield Need("decode all pictures, once", pictures / rates.pictures_s / 3600, "core hours", "pictures / rate")
    yield Need("pictures, decoded", pictures * 3 * size**2 / 1e9, "GB", f"pictures x 3 x {size} x {size} bytes")


def _training(shop: Shop, rates: Rates, config: Config) -> Iterator[Need]:
    model, train = config.model, config.train
    width, hidden = model.width, model.hidden_width
    lstm = 2 * 4 * hidden * (width + hidden + (model.layers - 1) * 2 * hidden)
    softmax = 2 * width * how_many(round(shop.items), train)
    flops = BACKWARD * (lstm + softmax)
    events = shop.events_a_day * shop.epochs
    table = shop.items * width * FLOAT_BYTES * ADAM_COPIES
    rowwise = shop.items * (width + 1) * FLOAT_BYTES
    yield Need("arithmetic an event", flops / 1e6, "MFLOP", "3 x (LSTM + sampled softmax)")
    yield Need("train a day on CPUs", events / rates.train_events_s / 3600, "core hours", "events x epochs / rate")
    yield Need("train a day by arithmetic alone", events * flops / rates.gpu_flops / 60, "GPU minutes", "not measured")
    yield Need("fed to it meanwhile", rates.gpu_flops / flops * 17 / 1e6, "MB/s", "17 bytes an event, at that speed")
    yield Need("table of item ids in training", table / 1e9, "GB", f"items x {width} x 4 bytes x 4: it and Adam's")
    yield Need("the same by rows", rowwise / 1e9, "GB", "train.id_optimizer=rowwise_adagrad: it and one number a row")
    yield Need(
        "of a GPU's memory", table / rates.gpu_bytes, "times", "above 1 it does not fit: by rows, shared (below)"
    )


def _serving(shop: Shop, rates: Rates) -> Iterator[Need]:
    peak = shop.users * shop.lists_a_user / DAY_S * shop.peak
    cores = peak * rates.list_s * rates.list_growth / rates.busy
    replica = shop.items * rates.replica_bytes
    yield Need("lists at the peak", peak, "a second", "users x lists / 86,400 x peak")
    yield Need("cores for them", cores, "cores", "lists a second x CPU s x growth / share in use; a replica is one")
    yield Need("memory of a replica", replica / 1e9, "GB", "items x bytes")
    yield Need("memory of all", cores * replica / 1e12, "TB", "each replica holds every item: this binds")
    yield Need(
        "state", shop.events_a_day * shop.days_kept * rates.state_bytes / 1e12, "TB", "events a day x days x bytes"
    )
    yield Need("events at the peak", shop.events_a_day / DAY_S * shop.peak, "a second", "writes of the state")


def table(found: Sequence[Need]) -> str:
    """As Markdown.

    >>> print(table([Need("cores", 1234.5, "cores", "a x b")]))
    | what | amount | how |
    | --- | --- | --- |
    | cores | 1,230 cores | a x b |
    """
    rows = [f"| {need.what} | {_round(need.amount)} {need.unit} | {need.sum} |" for need in found]
    return "\n".join(["| what | amount | how |", "| --- | --- | --- |", *rows])


def _round(amount: float) -> str:
    """To three digits that mean something."""
    rounded = float(f"{amount:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"


def changed(given: Sequence[str]) -> tuple[Shop, Rates]:
    """Shop and rates with `name=number` put in. Raises UsageError."""
    kinds: dict[str, Any] = {one.name: kind for kind in (Shop, Rates) for one in fields(kind)}
    values: dict[Any, dict[str, float]] = {Shop: {}, Rates: {}}
    for text in given:
        name, _, number = text.partition("=")
        if name not in kinds:
            raise UsageError(f"--set {text}: there are {', '.join(kinds)}")
        try:
            values[kinds[name]][name] = float(number)
        except ValueError:
            raise UsageError(f"--set {text}: {number!r} is no number") from None
        if not 0 < values[kinds[name]][name] < float("inf"):
            raise UsageError(f"--set {text}: must be above 0")
    return Shop(**values[Shop]), Rates(**values[Rates])
