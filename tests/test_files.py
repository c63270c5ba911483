"""Places mean the same in every process, whatever folder it runs in."""

from __future__ import annotations

from pathlib import Path

import pytest
from tinyshop import write

from rayrec.data.dataset import Dataset
from rayrec.errors import UsageError
from rayrec.files import absolute, download, filesystem, is_uri, upload


def test_a_relative_path_becomes_absolute_and_a_uri_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("shop/") == str(tmp_path / "shop")
    assert absolute("s3://bucket/shop/") == "s3://bucket/shop"
    assert not is_uri("shop")


def test_a_dataset_opened_by_a_relative_path_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "dataset")
    monkeypatch.chdir(tmp_path)
    dataset = Dataset.open("dataset")
    monkeypatch.chdir("/")
    assert len(dataset.catalogue()) > 0


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot open this location"):
        filesystem("gopher://host/shop")


def test_the_last_file_of_an_upload_comes_after_all_others(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "vocab").mkdir(parents=True)
    for name in ("a.txt", "manifest.json", "vocab/z.json"):
        (source / name).write_text(name)
    upload(source, (tmp_path / "far").as_uri(), last="manifest.json")
    copies = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "far").rglob("*.*")}
    assert max(copies, key=copies.__getitem__) == "manifest.json"
    assert len(copies) == 3


def test_a_download_is_made_once_for_the_same_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.txt").write_text("one")
    first = download((tmp_path / "far").as_uri(), key="1")
    (tmp_path / "far" / "a.txt").write_text("two")
    assert download((tmp_path / "far").as_uri(), key="1") == first
    assert (first / "a.txt").read_text() == "one"
    assert (download((tmp_path / "far").as_uri(), key="2") / "a.txt").read_text() == "two"
