"""The bench of large tables of ids: what each optimiser holds, of the same table."""

from __future__ import annotations

import tinyshop

from rayrec.bench.id_table import run


def test_row_wise_state_is_a_number_a_row_and_its_gradient_what_was_read() -> None:
    result = run(3000, 2, 1, [*tinyshop.TINY, "train.negatives=8"])
    dense, rowwise = result["median"]["adamw"], result["median"]["rowwise_adagrad"]
    assert dense["table_bytes"] == rowwise["table_bytes"] == 3001 * 16 * 4
    assert dense["gradient_bytes"] == 3001 * 16 * 4
    assert dense["state_bytes"] == 2 * 3001 * 16 * 4
    assert rowwise["state_bytes"] == 3001 * 4
    assert 0 < rowwise["gradient_bytes"] <= (16 * 11 + 8) * (16 * 4 + 8)
    assert all(one["step_s"] > 0 for one in (dense, rowwise))
