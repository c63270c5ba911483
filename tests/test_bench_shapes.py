"""The awkward logs of `rayrec bench shapes` are as awkward as they say, and a run that loses rows is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from rayrec.bench.shapes import DAY_S, SHAPES, files, log, require_whole, robot, run, written
from rayrec.errors import UsageError

TABLE = log(1200, np.random.default_rng(0))


def test_a_robot_has_five_rows_in_six_within_its_time(tmp_path: Path) -> None:
    robot(DAY_S)(tmp_path / "raw", TABLE)
    rows = pacsv.read_csv(tmp_path / "raw" / "events.csv").to_pandas()
    own = rows[rows.user_id == "robot"]
    assert (len(rows), len(own)) == (1200, 1000)
    assert own.timestamp.max() - own.timestamp.min() == DAY_S


def test_one_huge_file_holds_what_many_do(tmp_path: Path) -> None:
    files(30)(tmp_path / "many", TABLE)
    SHAPES["one file"](tmp_path / "one", TABLE)
    parts = [pacsv.read_csv(path) for path in sorted((tmp_path / "many" / "events").iterdir())]
    assert [len(part) for part in parts] == [40] * 30
    assert pa.concat_tables(parts) == pacsv.read_csv(tmp_path / "one" / "events.csv")
    assert written(tmp_path / "many")["files"] == 30
    assert written(tmp_path / "one") == {"files": 1, "largest_bytes": (tmp_path / "one" / "events.csv").stat().st_size}


def test_tiny_files_are_five_thousand(tmp_path: Path) -> None:
    SHAPES["tiny files"](tmp_path / "raw", log(5000, np.random.default_rng(0)))
    assert written(tmp_path / "raw")["files"] == 5000


def test_one_group_cannot_be_cut(tmp_path: Path) -> None:
    SHAPES["one group"](tmp_path / "raw", TABLE)
    meta = pq.read_metadata(tmp_path / "raw" / "events.parquet")
    assert (meta.num_rows, meta.num_row_groups) == (1200, 1)
    assert pq.read_table(tmp_path / "raw" / "events.parquet").column_names == TABLE.column_names


@pytest.mark.parametrize(
    ("name", "read", "rejected"),
    [("one file", 9, {}), ("one file", 10, {"bot": 1}), ("fast robot", 10, {}), ("tiny files", 10, {"no_user": 1})],
)
def test_what_is_lost_is_told(name: str, read: int, rejected: dict[str, int]) -> None:
    with pytest.raises(RuntimeError, match=name):
        require_whole(name, 10, {"events": {"read": read, "rejected": rejected}})
    require_whole("fast robot", 10, {"events": {"read": 10, "rejected": {"bot": 3}}})
    require_whole("one file", 10, {"events": {"read": 10, "rejected": {}}})


def test_a_shape_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--only round: there is no such shape; there are many files, one file"):
        run(1000, 1, ["round"])
