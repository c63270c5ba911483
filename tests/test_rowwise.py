"""Row-wise Adagrad of the table of ids: its steps, what does not move, several workers, and a training that resumes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tinyshop
import torch
from torch import Tensor, nn

from rayrec.config import TrainConfig
from rayrec.errors import UsageError
from rayrec.model.recommender import Recommender, build
from rayrec.settings import with_settings
from rayrec.training.local import train_alone
from rayrec.training.loop import Learner
from rayrec.training.rowwise import RowwiseAdagrad

ROWWISE = ("train.id_optimizer=rowwise_adagrad", "train.id_lr=3", "train.negatives=8")


def by_hand(table_ND: Tensor, sum_N: Tensor, grad_ND: Tensor, lr: float, decay: float) -> None:
    """A step, row by row, of a dense gradient."""
    for row, grad_D in enumerate(grad_ND):
        if grad_D.any():
            sum_N[row] += float((grad_D**2).sum()) / len(grad_D)
            table_ND[row] *= 1 - lr * decay
            table_ND[row] -= lr * grad_D / sum_N[row].sqrt()


def test_its_steps_are_those_by_hand_and_other_rows_stay() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(9, 4, sparse=True)
    begun, wanted, sum_N = table.weight.detach().clone(), table.weight.detach().clone(), torch.zeros(9)
    optimizer = RowwiseAdagrad([table.weight], lr=0.1, weight_decay=0.5)
    for read in ([1, 2, 2, 5], [2, 7], [5, 5, 5]):  # a row read twice gets one gradient, the sum
        weight_PD = torch.randn(len(read), 4)
        optimizer.zero_grad()
        (table(torch.tensor(read)) * weight_PD).sum().backward()
        by_hand(wanted, sum_N, torch.zeros(9, 4).index_add(0, torch.tensor(read), weight_PD), 0.1, 0.5)
        optimizer.step()
    torch.testing.assert_close(table.weight.detach(), wanted)
    unread = [0, 3, 4, 6, 8]
    assert torch.equal(table.weight[unread], begun[unread])
    (state,) = optimizer.state.values()
    assert [tensor.shape for tensor in state.values()] == [(9,)], "one number a row"


class Lookup(nn.Module):
    """Rows of a table, and a dense layer over them."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 1)

    def forward(self, batch: Tensor, scale: float = 1e3) -> Tensor:
        return (self.layer(self.table(batch)) ** 2).sum() * scale


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_a_sparse_gradient_is_clipped_and_accumulated_as_a_dense_one(clip_norm: float) -> None:
    gradients = []
    for sparse in (False, True):
        model = Lookup(sparse)
        config = TrainConfig(clip_norm=clip_norm)
        learner = Learner(
            model, list(model.parameters()), config, 9, torch.device("cpu"), tables=[model.table.weight] * sparse
        )
        learner.step_on([(torch.tensor([1, 2, 2]), None), (torch.tensor([2, 4]), None)])
        gradients.append([p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()])
    for dense, sparse_ in zip(*gradients, strict=True):
        torch.testing.assert_close(sparse_, dense, rtol=1e-4, atol=1e-6)
    norm = torch.nn.utils.get_total_norm(gradients[1])
    assert (norm > 10) if not clip_norm else norm == pytest.approx(clip_norm, rel=1e-3)


def test_a_step_of_the_model_moves_the_ids_it_read_alone(tmp_path: Path) -> None:
    shop = tinyshop.write(tmp_path / "dataset")
    (tmp_path / "out").mkdir()
    short = ("train.max_samples=4", "train.batch_size=4", "train.epochs=1", "train.refit_epochs=0", "train.negatives=1")
    config = tinyshop.tiny(*ROWWISE, "train.fusion_epochs=0", *short)
    torch.manual_seed(config.train.seed)
    begun = build(config, shop.catalogue())
    assert isinstance(begun, Recommender)
    before_ND = begun.item_encoder.id.weight  # type: ignore[union-attr]
    after_ND = train_alone(shop, config, tmp_path / "out").model.state_dict()["item_encoder.id.weight"]
    moved_N = (after_ND != before_ND).any(1)
    assert 0 < int(moved_N.sum()) < 30
    assert not moved_N[[0, *tinyshop.COLD]].any()


def test_it_learns_and_a_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    shop = tinyshop.write(tmp_path / "dataset")
    config = tinyshop.tiny(*ROWWISE, "train.epochs=2", "train.fusion_epochs=0", "train.refit_epochs=1")
    for name in ("whole", "first", "second"):
        (tmp_path / name).mkdir()
    whole = train_alone(shop, config, tmp_path / "whole")
    assert whole.history[1]["loss"] < whole.history[0]["loss"]

    class StopError(Exception):
        pass

    def stop(line: dict[str, object]) -> None:
        if line["epoch"] == 1:  # the checkpoint of the first epoch is what is left
            raise StopError

    with pytest.raises(StopError):
        train_alone(shop, config, tmp_path / "first", on_epoch=stop)
    again = train_alone(shop, config, tmp_path / "second", resume=tmp_path / "first")
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, atol=0, rtol=0, msg=name)


def test_where_there_is_no_table_of_ids_it_is_refused() -> None:
    for setting in ("model.use_id=false", "model.kind=paper"):
        with pytest.raises(UsageError, match="this model has no table of ids"):
            with_settings(tinyshop.tiny(), [*ROWWISE, setting])


WORKER = """
import json, sys
import torch, test_rowwise
from rayrec.config import TrainConfig
from rayrec.training.group import Group
from rayrec.training.loop import Learner

rank, port, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
device = torch.device("cpu" if backend == "gloo" else f"cuda:{rank}")
torch.set_num_threads(1)
torch.distributed.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
peers, model = Group(rank, 2, device), test_rowwise.Lookup(sparse=True).to(device)
tables = [model.table.weight]
learner = Learner(peers.wrap(model, tables), list(model.parameters()), TrainConfig(), 9, device,
                  tables=tables, average=peers.average)
for first, second in (([1, 2, 2], [2, 4]), ([], []), ([3], []), ([5, 6, 5, 5], [5])):
    learner.train_step(torch.tensor(second if rank else first, dtype=torch.int64, device=device))
print(json.dumps([p.tolist() for p in model.parameters()]))
torch.distributed.destroy_process_group()
"""


def weights_of_two_workers(backend: str) -> list[list[Tensor]]:
    """What each of two workers ends with."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(port), backend],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [json.loads(one.communicate(timeout=100)[0].splitlines()[-1]) for one in started]
    finally:
        for one in started:
            one.kill()
    return [[torch.tensor(weights) for weights in one] for one in said]


def weights_of_one_with_both() -> list[Tensor]:
    model = Lookup(sparse=True)
    learner = Learner(
        model, list(model.parameters()), TrainConfig(), 9, torch.device("cpu"), tables=[model.table.weight]
    )
    for both in ([1, 2, 2, 2, 4], [], [3], [5, 6, 5, 5, 5]):
        learner.step_on([(torch.tensor(both, dtype=torch.int64), 500.0)])  # the mean of two workers
    return [p.detach() for p in model.parameters()]


@pytest.mark.timeout(120)
def test_two_workers_take_the_steps_of_one_with_both_batches() -> None:
    first, second = weights_of_two_workers("gloo")
    for ours, theirs, whole in zip(first, second, weights_of_one_with_both(), strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-4)
