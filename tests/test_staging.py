"""A dataset folder exists whole or not at all, whenever the work on it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from rayrec.data.staging import Folder, Staging
from rayrec.errors import ResourceError


@pytest.mark.parametrize(
    ("happens", "said"), [(KeyboardInterrupt(), "^$"), (OSError(28, "full"), "cannot write there")]
)
def test_what_ends_the_very_beginning_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, happens: BaseException, said: str
) -> None:
    def ends(folder: Folder, name: str, value: object) -> None:
        assert list(tmp_path.iterdir()), "the folder is there by now"
        raise happens

    monkeypatch.setattr(Folder, "json", ends)
    expected = KeyboardInterrupt if isinstance(happens, KeyboardInterrupt) else ResourceError
    with pytest.raises(expected, match=said), Staging(str(tmp_path / "dataset")):
        raise AssertionError("the work must not begin")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_work_leaves_the_older_dataset(tmp_path: Path) -> None:
    staging = Staging(str(tmp_path / "dataset"))
    with staging as folder:
        folder.json("first.json", 1)
        staging.commit({})

    def interrupted() -> None:
        with Staging(str(tmp_path / "dataset")) as folder:
            folder.json("second.json", 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]
    assert (tmp_path / "dataset" / "first.json").is_file()
    assert not (tmp_path / "dataset" / "second.json").exists()


def test_a_file_in_parts_has_a_row_group_for_each_and_is_not_there_without_any(tmp_path: Path) -> None:
    folder, schema = Folder(pafs.LocalFileSystem(), str(tmp_path)), pa.schema([("n", pa.int64())])
    parts = [pa.table({"n": [1, 2]}, schema), pa.table({"n": [3]}, schema)]
    folder.parquet_parts("some.parquet", schema, iter(parts), compression="zstd")
    written = pq.ParquetFile(tmp_path / "some.parquet")
    assert written.num_row_groups == 2
    assert written.read() == pa.concat_tables(parts)
    folder.parquet_parts("none.parquet", schema, [])
    assert not (tmp_path / "none.parquet").exists()

    def breaks() -> Iterator[pa.Table]:
        yield parts[0]
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        folder.parquet_parts("some.parquet", schema, breaks())
    assert not (tmp_path / "some.parquet").exists(), "what there is of it would read as a whole file"
    with pytest.raises(OSError, match="Failed to open"):
        folder.parquet_parts("missing/some.parquet", schema, parts)
