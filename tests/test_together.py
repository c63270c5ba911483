"""Several workers: their gradient is one worker's on all that they hold, and none waits for another's batches."""

from __future__ import annotations

import functools
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tinyshop
import torch
from torch import Tensor, nn

from rayrec.model.candidates import FOLLOW_FEATURES
from rayrec.model.history_tensors import HistoryTensors
from rayrec.model.recommender import Lists, NextItems, Recommender, build
from rayrec.schema import ACTION_CODE
from rayrec.training.batches import history_of
from rayrec.training.group import add_up_alike
from rayrec.training.loop import Learner, dealt, train_epoch, weigh
from rayrec.training.windows import examples, next_item_windows

CPU = torch.device("cpu")
PLAIN = ("model.dropout=0", "model.id_dropout=0", "model.use_image=false", "train.clip_norm=0")


class Others:
    """The sums over workers, of which this is one, as they would be: `sums` are those of the others."""

    def __init__(self, world: int, sums: Sequence[float]) -> None:
        self.world, self.rank, self.sums = world, 0, sums

    def sum(self, values: Sequence[float]) -> list[float]:
        return [a + b for a, b in zip(values, self.sums, strict=True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    shop = tinyshop.write(tmp_path_factory.mktemp("shop") / "dataset")
    torch.manual_seed(0)
    found = build(tinyshop.tiny(*PLAIN), shop.catalogue())
    assert isinstance(found, Recommender)
    return found


def gradients(model: Recommender, batches: Sequence[Any], others: Others | None = None) -> dict[str, Tensor]:
    """Of a step on `batches`."""
    learner = Learner(model, list(model.parameters()), model.config.train, 10, CPU)
    model.zero_grad(set_to_none=True)
    if others is None:
        model(batches[0]).backward()
    else:
        for batch, scale_K in weigh(learner, batches, others, ())[0]:
            model(batch, scale_K).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def windows(n: int) -> NextItems:
    rows = next_item_windows(tinyshop.sequence_table(), 10, 0.3)[:n]
    history = HistoryTensors.of(history_of(rows, 10, "time"), CPU)
    target_BL = torch.zeros_like(history.item_BL)
    for row, targets in enumerate(rows["target"].to_pylist()):
        target_BL[row, : len(targets)] = torch.tensor(targets)
    return NextItems(history, target_BL)


def part(batch: Any, rows: slice) -> Any:
    """Some rows of a batch."""
    history = HistoryTensors(**{name: value[rows] for name, value in vars(batch.history).items()})
    return type(batch)(history, *(value[rows] for name, value in vars(batch).items() if name != "history"))


def lists(n: int) -> Lists:
    rows = examples(tinyshop.sequence_table(), 10)[:n]
    draw = torch.Generator().manual_seed(0)
    action_B = torch.tensor([ACTION_CODE["purchase" if place % 3 == 0 else "view"] for place in range(n)])
    return Lists(
        HistoryTensors.of(history_of(rows, 10, "time"), CPU),
        torch.randint(1, tinyshop.N_ITEMS, (n, 6), generator=draw),
        torch.rand(n, 6, FOLLOW_FEATURES, generator=draw),
        torch.randint(0, 6, (n,), generator=draw),
        action_B,
    )


@pytest.mark.parametrize("kind", ["windows", "lists"])
def test_two_workers_with_uneven_batches_have_the_gradient_of_one_with_both(model: Recommender, kind: str) -> None:
    """A mean of their two means would have another: one holds three rows and the other nine."""
    model.eval()  # the fusion drops out
    batch: Any = windows(12) if kind == "windows" else lists(12)
    model.vector_ND = None if kind == "windows" else model.encode_items()
    halves = [part(batch, slice(0, 3)), part(batch, slice(3, 12))]
    whole = gradients(model, [batch])
    seen = [model.targets(half).tolist() for half in halves]
    ours = [gradients(model, [half], Others(2, [*seen[1 - n], 1.0])) for n, half in enumerate(halves)]
    mean_of_means = [gradients(model, [half]) for half in halves]
    differs = False
    for name, gradient in whole.items():
        zero = torch.zeros_like(gradient)
        averaged = sum(one.get(name, zero) for one in ours) / 2
        torch.testing.assert_close(averaged, gradient, atol=1e-6, rtol=1e-4, msg=name)
        naive = sum(one.get(name, zero) for one in mean_of_means) / 2
        differs = differs or not torch.allclose(naive, gradient, atol=1e-4, rtol=1e-2)
    assert differs, "what is mended here must show in this test"
    model.vector_ND = None


def test_accumulated_batches_have_the_gradient_of_one_batch(model: Recommender) -> None:
    model.train()
    batch = windows(12)
    parts = [part(batch, slice(0, 2)), part(batch, slice(2, 9)), part(batch, slice(9, 12))]
    whole, summed = gradients(model, [batch]), gradients(model, parts, Others(1, [0.0, 0.0]))
    for name, gradient in whole.items():
        torch.testing.assert_close(summed[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        nn.init.ones_(self.layer.weight)
        nn.init.ones_(self.layer.bias)

    def forward(self, batch: Tensor | None, scale_K: Tensor | None = None) -> Tensor:
        if batch is None:
            return 0.0 * self.layer.weight.sum()
        loss: Tensor = (self.layer(batch) ** 2).mean()
        return loss if scale_K is None else loss * scale_K.sum()

    def targets(self, batch: Tensor | None) -> Tensor:
        return torch.tensor([0.0 if batch is None else float(len(batch))])


def lines() -> list[Tensor]:
    """22 batches of one to five rows."""
    draw = torch.Generator().manual_seed(1)
    return [torch.rand(1 + n % 5, 1, generator=draw) for n in range(22)]


@pytest.mark.parametrize("setting", ["accumulate", "workers"])
def test_accumulation_takes_fewer_steps_and_keeps_the_rest(setting: str) -> None:
    """And one of three workers who is left alone learns from as many batches a step as the three."""
    line = Line()
    config = tinyshop.tiny(f"train.{setting}=3").train
    learner = Learner(line, list(line.parameters()), config, 3, CPU)
    stats = train_epoch(learner, "retrieval", 0, [torch.rand(n, 1) for n in (4, 4, 4, 4, 4, 4, 2)])
    assert (stats.steps, stats.samples, learner.step) == (3, 26, 3)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_whoever_is_there_each_step_has_all_batches_of_a_step_and_an_epoch_as_many_steps(world: int) -> None:
    batches, steps = 5 * 3, 23
    shares = [[dealt(n * batches, world, rank) for n in range(steps + 1)] for rank in range(world)]
    taken = [[b - a for a, b in itertools.pairwise(of_rank)] for of_rank in shares]
    assert [sum(step) for step in zip(*taken, strict=True)] == [batches] * steps
    assert all(max(step) - min(step) <= 1 for step in zip(*taken, strict=True))
    assert max(last := [of_rank[-1] for of_rank in shares]) - min(last) <= 1, "they run out of batches together"


ELASTIC = """
import json, sys
import tinyshop, torch
from rayrec.training.group import Group
from rayrec.training.loop import Learner, train_epoch
from test_together import Line, lines

rank, port = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
group, line = Group(rank, 3, torch.device("cpu")), Line()
learner = Learner(group.wrap(line), list(line.parameters()), tinyshop.tiny("train.workers=4").train, 6, group.device)
stats = train_epoch(learner, "retrieval", 0, lines()[rank::3], together=group)
print(json.dumps([stats.steps, stats.loss, *(p.item() for p in line.parameters())]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.timeout(200)
def test_three_of_four_workers_learn_what_one_of_them_does() -> None:
    """The same batches a step, the same rate, so the same weights; only who computes what differs."""
    line = Line()
    learner = Learner(line, list(line.parameters()), tinyshop.tiny("train.workers=4").train, 6, CPU)
    stats = train_epoch(learner, "retrieval", 0, lines())
    alone = [stats.steps, stats.loss, *(p.item() for p in line.parameters())]
    assert alone[0] == 6
    for one in said_by(ELASTIC, 3):
        assert one == pytest.approx(alone, rel=1e-5)


def test_a_worker_without_a_batch_takes_part_with_nothing(model: Recommender) -> None:
    model.train()
    assert gradients(model, [], Others(2, [7.0, 1.0])) == {}
    learner = Learner(model, list(model.parameters()), model.config.train, 10, CPU)
    assert weigh(learner, [], Others(2, [0.0, 0.0]), ())[1] is False, "nobody has any: the epoch is over"


def said_by(code: str, world: int, *words: object) -> list[Any]:
    """What `world` processes that run `code` say at last, given their rank, a port and `words`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(port), *map(str, words)],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        said = [one.communicate(timeout=180)[0] for one in started]
        assert [one.returncode for one in started] == [0] * world
        return [json.loads(lines.splitlines()[-1]) for lines in said]
    finally:
        for one in started:
            one.kill()


WORKER = """
import json, sys
from pathlib import Path
import numpy as np, tinyshop, torch
from rayrec.data.dataset import Dataset
from rayrec.training.fit import Fit, Job
from rayrec.training.group import Group
from rayrec.training.local import Alone, LocalFeed
from rayrec.training.survey import survey

rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

class Uneven(LocalFeed):
    # All rows of the first stage are the first worker's, and nine in ten of the refit's the second's.
    def chunks(self, table, rng):
        for rows in super().chunks(table, np.random.default_rng(7)):
            cut = len(rows) if table == "retrieval" else len(rows) // 10
            yield rows[:cut] if rank == 0 else rows[cut:]

class Pair(Group, Alone):
    def __init__(self):
        Alone.__init__(self, folder)
        Group.__init__(self, rank, 2, torch.device("cpu"))

    def _put(self, save):
        if rank == 0:
            super()._put(save)

shop = Dataset.open(str(folder / "dataset"))
short = ("train.epochs=1", "train.refit_epochs=1", "train.fusion_steps=20")  # the fusion goes through its lists again
config = tinyshop.tiny("train.workers=2", *short, *sys.argv[4:])
facts = survey(shop, tinyshop.N_ITEMS, config)
fit = Fit(Job(config, shop.path, facts.first_stage, facts.rows), Uneven(shop, config), Pair())
fit.run()
lines = [[line["stage"], line["loss"], line["steps"], line["samples"]] for line in fit.history]
encoder = fit.model.item_encoder
shared = fit.parts.ids.weight if fit.parts.ids else None
print(json.dumps([
    lines, sum(float(p.detach().double().sum()) for p in fit.model.parameters() if p is not shared),
    torch.nonzero(fit.model.items.image_row_N >= 0).squeeze(1).tolist(), encoder.image_ND.double().sum(1).tolist(),
]))
torch.distributed.destroy_process_group()
"""


APART = (
    "train.id_optimizer=rowwise_adagrad",
    "train.id_lr=3",
    "train.negatives=8",
    "train.image_held=share",
    "train.image_budget=8",
)
"""What data-parallel wrappers do not bring together: gradients of ids, and pictures, half of them on each worker."""

SHARED = (*APART, "train.id_held=share", "train.clip_norm=0.1")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """What the two of WORKER say with such settings, of one training for each."""

    @functools.cache
    def said(*settings: str) -> list[Any]:
        folder = tmp_path_factory.mktemp("uneven")
        tinyshop.write(folder / "dataset")
        return said_by(WORKER, 2, folder, *settings)

    return said


@pytest.mark.timeout(200)
@pytest.mark.parametrize("settings", [(), APART, pytest.param(SHARED, marks=pytest.mark.slow)])
def test_workers_with_uneven_and_empty_shards_end_together(
    uneven: Callable[..., list[Any]], settings: tuple[str, ...]
) -> None:
    said = uneven(*settings)
    (first, first_sum, first_held, first_table), (second, second_sum, second_held, second_table) = said
    assert [line[:3] for line in first] == [line[:3] for line in second], "the loss is over the targets of both"
    assert first_sum == pytest.approx(second_sum, rel=1e-9), "equal weights"
    pictures = [item for item in range(1, tinyshop.N_ITEMS + 1) if item % 7]
    assert (sorted(first_held + second_held) if settings else first_held) == pictures
    assert first_table == pytest.approx(second_table, abs=1e-6), "each hears of the pictures that the other encodes"
    assert all((value != 0) == (item in pictures) for item, value in enumerate(first_table))
    samples = {one[0]: (one[3], other[3]) for one, other in zip(first, second, strict=True)}
    assert samples["retrieval"][1] == 0 < samples["retrieval"][0]
    assert samples["refit"][0] < samples["refit"][1]


@pytest.mark.timeout(200)
def test_two_workers_with_the_same_seed_and_data_learn_the_same_again(
    uneven: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """To the last bit, in every stage: losses, weights, and the pictures' vectors."""
    tinyshop.write(tmp_path / "dataset")
    before, again = uneven(*APART), said_by(WORKER, 2, tmp_path, *APART)
    assert again == before
    assert [line[0] for line in again[0][0]] == ["retrieval", "fusion", "refit"]


def test_threads_add_up_alike() -> None:
    """Many gradients for few rows of a table, which two threads add to at once."""
    draw, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    row_R = torch.randint(0, 50, (100_000,), generator=draw)
    weight_RD = torch.rand(100_000, 16, generator=draw)
    add_up_alike(2)
    try:
        gradients = []
        for _ in range(4):
            table = torch.zeros(50, 16, requires_grad=True)
            (table[row_R] * weight_RD).sum().backward()
            gradients.append(table.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


APART_DATASETS = """
import json, sys
from pathlib import Path
import tinyshop, torch
from rayrec.data.dataset import Dataset
from rayrec.errors import DataError
from rayrec.training.fit import Fit, Job
from rayrec.training.group import Group
from rayrec.training.local import LocalFeed
from rayrec.training.survey import survey

rank, port, own, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
shop, config = Dataset.open(str(folder / "dataset")), tinyshop.tiny("train.workers=2")
facts = survey(shop, tinyshop.N_ITEMS, config)
path = folder / own if rank == 1 else shop.path
job = Job(config, str(path), facts.first_stage, facts.rows, fingerprint=shop.fingerprint())
try:
    Fit(job, LocalFeed(shop, config), Group(rank, 2, torch.device("cpu"))).run()
except DataError as error:
    print(json.dumps(str(error)))
torch.distributed.barrier()  # neither heard of it by the other's end
torch.distributed.destroy_process_group()
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("found", "said"), [("other", "worker 1 finds another dataset there"), ("none", "worker 1 cannot open the dataset")]
)
def test_workers_of_whom_one_finds_another_dataset_or_none_both_say_so_and_end(
    tmp_path: Path, found: str, said: str
) -> None:
    for name, users in (("dataset", 60), ("other", 20)):
        tinyshop.write(tmp_path / name, users=users)
    began = time.monotonic()
    for line in said_by(APART_DATASETS, 2, found, tmp_path):
        assert said in line
        assert "name a place that all nodes share" in line
    assert time.monotonic() - began < 90, "who waits for the other one waits for minutes"
