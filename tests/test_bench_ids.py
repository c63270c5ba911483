"""The bench of large tables of ids: what each optimiser holds, of the same table."""

from __future__ import annotations

import pytest
import tinyshop

from rayrec.bench.id_table import SHARED, run
from rayrec.errors import UsageError


def test_row_wise_state_is_a_number_a_row_and_its_gradient_what_was_read() -> None:
    result = run(3000, 2, 1, [*tinyshop.TINY, "train.negatives=8"])
    dense, rowwise = result["median"]["adamw"], result["median"]["rowwise_adagrad"]
    assert dense["table_bytes"] == rowwise["table_bytes"] == 3001 * 16 * 4
    assert dense["gradient_bytes"] == 3001 * 16 * 4
    assert dense["state_bytes"] == 2 * 3001 * 16 * 4
    assert rowwise["state_bytes"] == 3001 * 4
    assert 0 < rowwise["gradient_bytes"] <= (16 * 11 + 8) * (16 * 4 + 8)
    assert all(one["step_s"] > 0 for one in (dense, rowwise))


def test_two_workers_that_share_the_table_hold_half_of_it_each() -> None:
    result = run(3000, 2, 1, [*tinyshop.TINY, "train.negatives=8"], workers=2)
    whole, shared = result["median"]["rowwise_adagrad"], result["median"][SHARED]
    assert whole["table_bytes"] == 3001 * 16 * 4
    assert shared["table_bytes"] == 1501 * 16 * 4
    assert shared["state_bytes"] == 1501 * 4
    assert 0 < shared["gradient_bytes"] < 1501 * (16 * 4 + 8)


def test_a_mistaken_setting_is_told_before_any_worker_starts() -> None:
    with pytest.raises(UsageError, match=r"train\.lr"):
        run(3000, 1, 1, ["train.lr=no"], workers=2)


@pytest.mark.slow
def test_workers_that_fail_are_told_of() -> None:
    with pytest.raises(RuntimeError, match="workers failed"):
        run(3000, 1, 1, ["train.loss=gbce", "train.negatives=100000000000"], workers=2)
