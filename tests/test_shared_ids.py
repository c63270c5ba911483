"""A table of ids shared by workers: what is read, what is learned, and what is kept are those of a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tinyshop
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_together import WORKER, said_by
from torch import Tensor, nn

from rayrec.errors import UsageError
from rayrec.model.recommender import Recommender, build
from rayrec.model.shared_ids import SharedIds
from rayrec.settings import with_settings
from rayrec.training.local import train_alone

ROWWISE = ("train.id_optimizer=rowwise_adagrad", "train.id_lr=3", "train.negatives=8")
SHARED = (*ROWWISE, "train.id_held=share")


def alone(table_ND: Tensor) -> SharedIds:
    return SharedIds(table_ND, 0, 1, list)


@given(n=st.integers(1, 40), world=st.integers(1, 9), wide=st.booleans())
def test_the_parts_are_the_whole(n: int, world: int, wide: bool) -> None:
    whole = torch.arange(1, 3 * n + 1).reshape(n, 3) if wide else torch.arange(1, n + 1)
    parts = [SharedIds(torch.zeros(n, 2), rank, world, list).part_of(whole) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1, "collectives take equal shapes"
    assert torch.equal(torch.cat(parts)[:n], whole)
    assert not torch.cat(parts)[n:].any()


@given(st.lists(st.integers(0, 8)), st.lists(st.integers(0, 8)))
def test_one_worker_reads_and_learns_what_an_embedding_does(first: list[int], second: list[int]) -> None:
    whole = nn.Embedding(9, 4, padding_idx=0)
    with torch.no_grad():
        whole.weight[0] = 0
    ids = alone(whole.weight)
    for row in first, second:
        row_R = torch.tensor(row, dtype=torch.int64)
        got, wanted = ids(row_R), whole(row_R)
        assert torch.equal(got, wanted)
        (got**2).sum().backward() if len(row) else None
        (wanted**2).sum().backward() if len(row) else None
    grad = ids.gradient()
    wanted = whole.weight.grad if whole.weight.grad is not None else torch.zeros(9, 4)
    torch.testing.assert_close(torch.zeros(9, 4) if grad is None else grad.to_dense(), wanted)
    assert ids.gradient() is None, "what was learned is told once"


def test_what_is_read_without_gradients_owes_none() -> None:
    ids = alone(torch.rand(5, 2))
    with torch.no_grad():
        ids(torch.tensor([1, 2]))
    ids.weight.requires_grad_(False)
    ids(torch.tensor([3]))
    assert ids._due == []


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.timeout(300)
def test_two_workers_that_share_it_learn_what_two_that_hold_it_do(tmp_path: Path) -> None:
    """By uneven shards: one has no batches of the first stage at all, and answers for its rows all the same."""
    said: dict[str, list[Any]] = {}
    for held in ("all", "share"):
        tinyshop.write(tmp_path / held / "dataset")
        said[held] = said_by(WORKER, 2, tmp_path / held, *ROWWISE, f"train.id_held={held}", "train.accumulate=2")
    for ours, theirs in zip(said["share"], said["all"], strict=True):
        for (stage, loss, *counts), (stage_, loss_, *counts_) in zip(ours[0], theirs[0], strict=True):
            assert (stage, counts) == (stage_, counts_)
            assert loss == pytest.approx(loss_, rel=1e-4)
    shared, whole = weights(tmp_path / "share"), weights(tmp_path / "all")
    assert shared["item_encoder.id.weight"].shape == (tinyshop.N_ITEMS + 1, shared["item_encoder.id.weight"].shape[1])
    first_stage = [name for name in whole if not name.startswith("fusion.")]
    for name in first_stage:  # the fusion learns from lists, whose last candidates may be as near as others
        torch.testing.assert_close(shared[name], whole[name], rtol=1e-3, atol=1e-4, msg=name)


def test_alone_it_goes_on_from_a_checkpoint_and_a_bundle_has_the_table_whole(tmp_path: Path) -> None:
    shop = tinyshop.write(tmp_path / "dataset")
    config = tinyshop.tiny(*SHARED, "train.epochs=2", "train.fusion_epochs=0")
    for name in ("whole", "first", "second"):
        (tmp_path / name).mkdir()

    class StopError(Exception):
        pass

    def stop(line: dict[str, object]) -> None:
        if line["epoch"] == 1:
            raise StopError

    train_alone(shop, config, tmp_path / "whole")
    with pytest.raises(StopError):
        train_alone(shop, config, tmp_path / "first", on_epoch=stop)
    train_alone(shop, config, tmp_path / "second", resume=tmp_path / "first")
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "second")[name], value, atol=0, rtol=0, msg=name)
    served = build(config, shop.catalogue(), weights=weights(tmp_path / "whole"))
    assert isinstance(served, Recommender)
    assert isinstance(served.item_encoder.id, nn.Embedding), "a bundle knows nothing of workers"


def test_only_rows_that_move_alone_can_be_shared() -> None:
    with pytest.raises(UsageError, match=r"train\.id_held=share needs train\.id_optimizer=rowwise_adagrad"):
        with_settings(tinyshop.tiny(), ["train.id_held=share"])


RESUMING = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa, tinyshop, torch
from rayrec.data.dataset import Dataset
from rayrec.training.fit import EndedError, Fit, Job
from rayrec.training.group import Group
from rayrec.training.local import Alone, LocalFeed
from rayrec.training.survey import survey

rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

class Half(LocalFeed):
    def chunks(self, table, rng):
        for rows in super().chunks(table, np.random.default_rng(7)):
            yield rows.take(pa.array(range(rank, len(rows), 2)))

class Pair(Group, Alone):
    def __init__(self, out, end_after=0):
        Alone.__init__(self, folder / out)
        Group.__init__(self, rank, 2, torch.device("cpu"))
        self.steps, self.end_after = 0, end_after

    def _put(self, save):
        if rank == 0:
            super()._put(save)

    def keep(self, place, save):
        save(self.folder)
        torch.distributed.barrier()

    def ending(self):
        self.steps += rank == 0
        return self.steps == self.end_after > 0

shop = Dataset.open(str(folder / "dataset"))
config = tinyshop.tiny("train.workers=2", "train.epochs=2", "train.fusion_epochs=0", *sys.argv[4:])
facts = survey(shop, tinyshop.N_ITEMS, config)
job = Job(config, shop.path, facts.first_stage, facts.rows)
Fit(job, Half(shop, config), Pair("whole")).run()
try:
    Fit(job, Half(shop, config), Pair("cut", end_after=5)).run()
except EndedError as ended:
    torch.distributed.barrier()
    Fit(job, Half(shop, config), Pair("again"), resume=folder / "cut").run()
    print(f'"{ended}"')
torch.distributed.destroy_process_group()
"""


@pytest.mark.timeout(300)
def test_two_workers_that_were_ended_within_an_epoch_go_on_as_if_they_had_not_been(tmp_path: Path) -> None:
    tinyshop.write(tmp_path / "dataset")
    for name in ("whole", "cut", "again"):
        (tmp_path / name).mkdir()
    assert all("step" in told for told in said_by(RESUMING, 2, tmp_path, *SHARED, "train.clip_norm=0.1"))
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert weights(tmp_path / "cut")["item_encoder.id.weight"].shape == whole["item_encoder.id.weight"].shape
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0, msg=name)
