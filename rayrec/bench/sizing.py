"""What a shop needs of machines: arithmetic from its size and from rates that were measured.

In: a shop, rates, the model's settings. Out: amounts, each with the sum that made it. It must not know a machine: the
rates do, and each says by which command it was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rayrec.config import Config, PrepareConfig
from rayrec.errors import UsageError
from rayrec.model.negatives import how_many

DAY_S = 86_400
FLOAT_BYTES = 4
ADAM_COPIES = 4
"""Of each weight in training: itself, its gradient, and two moments."""
STORED = PrepareConfig().images.size
MONTH_DAYS = 30
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


def _from(value: float, unit: str, source: str) -> Any:
    return field(default=value, metadata={"unit": unit, "source": source})


ASSUMED = "assumed"


@dataclass(frozen=True)
class Rates:
    """What was measured on two shared cores of an x86-64 virtual machine without a GPU, and what is assumed."""

    prepare_events_s: float = _from(162e3, "events/s a core", "`rayrec bench prepare --events 10000000 --rounds 1`")
    pictures_s: float = _from(4.3e3, "pictures/s a core", "`rayrec prepare`, posters of 7 kB, MovieLens-1M")
    picture_packed: float = _from(0.9, "of 128 x 128 x 3 bytes stored", "`rayrec prepare`, lz4, the same; noise: 1.0")
    train_events_s: float = _from(12.3e3, "events/s a core", "`rayrec train`, first stage, ids, MovieLens-1M")
    dataset_bytes: float = _from(27.0, "bytes an event", "`rayrec prepare`, Taobao UserBehavior; 4 on MovieLens-1M")
    state_bytes: float = _from(152.0, "bytes an event", "`rayrec bench serve --only users`, SQLite")
    list_s: float = _from(2.2e-3, "CPU s a list", "`rayrec bench serve`, 32 clients, events beside it")
    list_growth: float = _from(1.9, "times that at 1M items", "`rayrec bench serve --only items`")
    replica_bytes: float = _from(5.8e3, "bytes an item", "`rayrec bench serve --only items`")
    busy: float = _from(0.6, "of its cores in use at the peak", ASSUMED)
    gpu_flops: float = _from(20e12, "FLOP/s a GPU", f"{ASSUMED}: a third of what an A10G says of itself in bf16")
    gpu_bytes: float = _from(24e9, "bytes a GPU", f"{ASSUMED}: an A10G")


@dataclass(frozen=True)
class Prices:
    """What machines cost, in any currency. Nobody's list: put in yours."""

    core_hour: float = _from(0.05, "a core and hour", ASSUMED)
    gpu_hour: float = _from(1.0, "a GPU and hour", ASSUMED)
    gb_month: float = _from(0.05, "a GB stored and month", ASSUMED)
    core_gb: float = _from(8.0, "GB of memory that come with a core", ASSUMED)


@dataclass(frozen=True)
class Need:
    """An amount, and how it came about."""

    what: str
    amount: float
    unit: str
    sum: str


@dataclass(frozen=True)
class Cost:
    """What something costs a day, and how it came about."""

    what: str
    a_day: float
    sum: str


LEFT_OUT = """\
Left out: the fusion and validation, which read the last events of some users; the CNN in hours of CPUs, whose rate is
that of ids; pretrained networks; pictures and gradients on their way between nodes; traffic to visitors; copies of what
is stored; decoding pictures the first time, in the costs; people."""


def needs(shop: Shop, rates: Rates, config: Config) -> list[Need]:
    """What the shop needs for preparing, training and serving a model of `config`."""
    return [*_data(shop, rates, config), *_training(shop, rates, config), *_serving(shop, rates)]


def _data(shop: Shop, rates: Rates, config: Config) -> Iterator[Need]:
    events, pictures = shop.events_a_day, shop.items * shop.pictures
    size = config.model.image_size
    yield Need("prepare a day", events / rates.prepare_events_s / 3600, "core hours", "events / events a core and s")
    yield Need("dataset of a day", events * rates.dataset_bytes / 1e9, "GB", "events x bytes an event")
    yield Need("decode all pictures, once", pictures / rates.pictures_s / 3600, "core hours", "pictures / rate")
    stored, held = pictures * 3 * STORED**2 * rates.picture_packed, pictures * 3 * size**2
    yield Need("pictures as prepare stores them", stored / 1e9, "GB", f"pictures x {STORED}² x 3 bytes x packed")
    yield Need("pictures in a training worker", held / 1e9, "GB", f"pictures x {size}² x 3 bytes; or a share")


def _training(shop: Shop, rates: Rates, config: Config) -> Iterator[Need]:
    model, train = config.model, config.train
    width, hidden = model.width, model.hidden_width
    lstm = 2 * 4 * hidden * (width + hidden + (model.layers - 1) * 2 * hidden)
    softmax = 2 * width * how_many(round(shop.items), train)
    cnn = _cnn(shop, config)
    flops = BACKWARD * (lstm + softmax) + cnn
    events = shop.events_a_day * shop.epochs
    table = shop.items * width * FLOAT_BYTES * ADAM_COPIES
    rowwise = shop.items * (width + 1) * FLOAT_BYTES
    yield Need("arithmetic an event", flops / 1e6, "MFLOP", "3 x (LSTM + sampled softmax) + CNN")
    yield Need("of which the CNN", cnn / 1e6, "MFLOP", "(3 x image_budget + image_refresh) pictures / events of a step")
    yield Need("train a day on CPUs", events / rates.train_events_s / 3600, "core hours", "events x epochs / rate")
    yield Need("train a day by arithmetic alone", events * flops / rates.gpu_flops / 60, "GPU minutes", "not measured")
    yield Need("events of a GPU by arithmetic alone", rates.gpu_flops / flops / 1e6, "million/s", "not measured")
    yield Need("fed to it meanwhile", rates.gpu_flops / flops * 17 / 1e6, "MB/s", "17 bytes an event, at that speed")
    yield Need("table of item ids in training", table / 1e9, "GB", f"items x {width} x 4 bytes x 4: it and Adam's")
    yield Need("the same by rows", rowwise / 1e9, "GB", "train.id_optimizer=rowwise_adagrad: it and one number a row")
    yield Need(
        "of a GPU's memory", table / rates.gpu_bytes, "times", "above 1 it does not fit: by rows, shared (below)"
    )


def _cnn(shop: Shop, config: Config) -> float:
    """FLOP an event of the CNN from scratch: a step learns from some pictures, and only encodes others."""
    model, train = config.model, config.train
    picture, side = 0, model.image_size
    for before, after in zip((3, *model.cnn_channels), model.cnn_channels, strict=False):
        side = (side + 1) // 2
        picture += 2 * 9 * before * after * side**2
    picture += 2 * 2 * model.cnn_channels[-1] * model.width
    events = train.batch_size * model.max_len
    all_scored = events + how_many(round(shop.items), train)
    learned = all_scored if train.image_budget == "all" else train.image_budget
    return model.use_image * picture * (BACKWARD * learned + train.image_refresh) / events


def costs(shop: Shop, rates: Rates, prices: Prices, config: Config) -> list[Cost]:
    """What those needs cost a day; training on CPUs, as it was measured, is in the sum; on GPUs beside it."""
    need = {one.what: one.amount for one in needs(shop, rates, config)}
    serving = max(need["cores for them"], need["memory of all"] * 1e3 / prices.core_gb)
    data, pictures = need["dataset of a day"] * shop.days_kept, need["pictures as prepare stores them"]
    stored = data + pictures + need["state"] * 1e3
    found = [
        Cost("prepare", need["prepare a day"] * prices.core_hour, "core hours x price"),
        Cost("train, on CPUs", need["train a day on CPUs"] * prices.core_hour, "core hours x price"),
        Cost("serve", serving * 24 * prices.core_hour, "cores, or as many as bring the memory, x 24 x price"),
        Cost("store", stored * prices.gb_month / MONTH_DAYS, "(dataset x days + pictures + state, on disk) x price"),
    ]
    gpu = need["train a day by arithmetic alone"] / 60 * prices.gpu_hour
    return [
        *found,
        Cost("all of it", sum(one.a_day for one in found), "the sum"),
        Cost("instead of CPUs, GPUs", gpu, "GPU hours by arithmetic alone x price: the least it can be"),
    ]


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


def rates_table(*given: Rates | Prices) -> str:
    """What is reckoned with, and where each figure comes from, as Markdown."""
    rows = [
        f"| `{one.name}` | {_told(getattr(all_, one.name))} {one.metadata['unit']} | {one.metadata['source']} |"
        for all_ in given
        for one in fields(all_)
    ]
    return "\n".join(["| rate | value | from |", "| --- | --- | --- |", *rows])


def cost_table(found: Sequence[Cost]) -> str:
    """As Markdown.

    >>> print(cost_table([Cost("serve", 2.0, "cores x 24 x price")]))
    | what | a day | a month | how |
    | --- | --- | --- | --- |
    | serve | 2 | 60 | cores x 24 x price |
    """
    rows = [f"| {one.what} | {_round(one.a_day)} | {_round(one.a_day * MONTH_DAYS)} | {one.sum} |" for one in found]
    return "\n".join(["| what | a day | a month | how |", "| --- | --- | --- | --- |", *rows])


def _round(amount: float) -> str:
    """To three digits that mean something."""
    rounded = float(f"{amount:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"


def _told(rate: float) -> str:
    return f"{rate:.3g}" if rate >= 1e9 else _round(rate)


def changed(given: Sequence[str]) -> tuple[Shop, Rates, Prices]:
    """Shop, rates and prices with `name=number` put in. Raises UsageError."""
    kinds: dict[str, Any] = {one.name: kind for kind in (Shop, Rates, Prices) for one in fields(kind)}
    values: dict[Any, dict[str, float]] = {Shop: {}, Rates: {}, Prices: {}}
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
    return Shop(**values[Shop]), Rates(**values[Rates]), Prices(**values[Prices])
