"""Bundles: written whole or not at all, and refused when anything in them was changed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import torch

from rayrec.bundle import Bundle, BundleWriter, add_file, publish, resolve, versions, write_atomically
from rayrec.config import preset
from rayrec.errors import BundleError, UsageError
from rayrec.schema import BUNDLE_VERSION, ITEM_SCHEMA

VECTORS = np.arange(6, dtype=np.float32).reshape(3, 2)
FOLLOWS = sp.csr_matrix(np.array([[0, 0, 0], [0, 0, 2], [0, 1, 0]], np.float32))


def write(bundles: Path, version: str = "v1") -> Bundle:
    with BundleWriter(bundles, version) as writer:
        writer.json("config.json", preset("base").model_dump(mode="json"))
        writer.tensors({"weight": torch.arange(4.0).reshape(2, 2).T})  # not contiguous
        writer.array("vectors.npy", VECTORS)
        writer.matrix("cooccurrence/next", FOLLOWS)
        writer.matrix("cooccurrence/near", FOLLOWS * 2)
        pq.write_table(ITEM_SCHEMA.empty_table(), writer.file("items/items.parquet"))
        return writer.commit(clock="time", epochs=3)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    bundle = Bundle.open(tmp_path / "v1")
    assert bundle.version == "v1"
    assert bundle.clock == "time"
    assert bundle.manifest["epochs"] == 3
    assert bundle.config == preset("base")
    assert len(bundle.catalogue) == 0
    np.testing.assert_array_equal(bundle.vectors_ND, VECTORS)
    assert isinstance(bundle.vectors_ND, np.memmap)
    np.testing.assert_array_equal(bundle.followers.next.toarray(), FOLLOWS.toarray())
    np.testing.assert_array_equal(bundle.followers.near.toarray(), 2 * FOLLOWS.toarray())
    assert bundle.tensors()["weight"].tolist() == [[0, 2], [1, 3]]


def test_the_writer_returns_what_is_opened(tmp_path: Path) -> None:
    with BundleWriter(tmp_path, "v1") as writer:
        written = writer.commit(clock="order", losses=(0.5, float("inf")), users={"10": 1, "9": 2})
    assert Bundle.open(tmp_path / "v1").manifest == {**written.manifest, "losses": [0.5, float("inf")]}


def test_facts_by_number_are_sealed_as_they_are_read(tmp_path: Path) -> None:
    with BundleWriter(tmp_path, "v1") as writer:
        writer.commit(clock="order", by_epoch={9: 1, 10: 2})
    assert Bundle.open(tmp_path / "v1").manifest["by_epoch"] == {"9": 1, "10": 2}


# ---------------------------------------------------------------- changed bundles


def test_a_flipped_byte_in_any_file_is_found(tmp_path: Path) -> None:
    bundle = write(tmp_path)
    for name in bundle.manifest["files"]:
        file = bundle.path / name
        original = file.read_bytes()
        for place in (0, len(original) // 2, len(original) - 1):
            flipped = bytearray(original)
            flipped[place] ^= 1
            file.write_bytes(flipped)
            with pytest.raises(BundleError, match="was changed"):
                Bundle.open(bundle.path)
        file.write_bytes(original)
    Bundle.open(bundle.path)


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path: Path) -> None:
    bundle = write(tmp_path)
    file = bundle.path / "manifest.json"
    original = file.read_bytes()
    for place in range(0, len(original), 3):
        flipped = bytearray(original)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        try:
            opened = Bundle.open(bundle.path)
        except BundleError:
            continue
        assert opened.manifest == bundle.manifest  # white space between values


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    bundle = write(tmp_path)
    (bundle.path / "vectors.npy").unlink()
    with pytest.raises(BundleError, match=r"vectors\.npy is missing"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a rayrec bundle"),
        ("{}", "not a rayrec bundle"),
        (json.dumps({"format": "rayrec-bundle", "bundle_version": BUNDLE_VERSION + 1}), "train again"),
        (json.dumps({"format": "rayrec-bundle", "bundle_version": BUNDLE_VERSION}), "was changed"),
    ],
)
def test_another_manifest(tmp_path: Path, content: str, message: str) -> None:
    bundle = write(tmp_path)
    (bundle.path / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle.path)


def test_a_bundle_of_another_version_says_both(tmp_path: Path) -> None:
    bundle = write(tmp_path)
    manifest = {**bundle.manifest, "bundle_version": 999}
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"bundle of version 999, this rayrec reads {BUNDLE_VERSION}"):
        Bundle.open(bundle.path)


# ---------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path, "v1")
    before = listing(tmp_path)

    def interrupted() -> None:
        with BundleWriter(tmp_path, "v2") as writer:
            writer.array("deep/vectors.npy", VECTORS)
            raise error

    with pytest.raises(error):
        interrupted()
    assert listing(tmp_path) == before


def test_a_write_that_was_killed_is_no_bundle_and_is_cleared_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from rayrec.bundle import BundleWriter\n"
        "with BundleWriter(sys.argv[1], 'v1') as writer:\n"
        "    writer.json('left-over.json', 1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert versions(tmp_path) == []
    with pytest.raises(UsageError, match="was training interrupted"):
        Bundle.open(tmp_path / "v1")
    assert "left-over.json" not in write(tmp_path, "v1").manifest["files"]
    assert not (tmp_path / "v1" / "left-over.json").exists()


def test_without_commit_there_is_no_bundle(tmp_path: Path) -> None:
    with BundleWriter(tmp_path, "v1") as writer:
        writer.json("config.json", {})
    assert listing(tmp_path) == []


def test_an_existing_version_is_not_overwritten(tmp_path: Path) -> None:
    bundle = write(tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        BundleWriter(tmp_path, "v1")
    assert Bundle.open(bundle.path).manifest == bundle.manifest


@pytest.mark.parametrize("version", ["", ".hidden", "../up", "a/b", "a b", "x" * 81])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path: Path, version: str) -> None:
    with pytest.raises(UsageError, match="cannot name a bundle"):
        BundleWriter(tmp_path, version)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write here"), BundleWriter(tmp_path / "file", "v1"):
        pass


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "CURRENT"
    write_atomically(target, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert listing(tmp_path) == ["CURRENT"]


def test_a_derived_file_is_added_with_its_hash(tmp_path: Path) -> None:
    bundle = add_file(write(tmp_path), "metrics.json", lambda path: path.write_text("1"))
    assert "metrics.json" in bundle.manifest["files"]
    again = add_file(bundle, "metrics.json", lambda path: path.write_text("2"))
    assert Bundle.open(tmp_path / "v1").manifest == again.manifest
    assert Bundle.open(tmp_path / "v1").json("metrics.json") == 2
    (bundle.path / "metrics.json").write_text("3")
    with pytest.raises(BundleError, match=r"metrics\.json was changed"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_whatever_ends_a_replacement_the_bundle_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """moment: before the first manifest, before the file, before the second manifest."""
    bundle = add_file(write(tmp_path), "metrics.json", lambda path: path.write_text("1"))
    replace, left = Path.replace, moment

    def killed(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        add_file(bundle, "metrics.json", lambda path: path.write_text("2"))
    opened = Bundle.open(tmp_path / "v1")
    assert opened.json("metrics.json") == (2 if moment == 3 else 1)
    add_file(opened, "report.html", lambda path: path.write_text("<p>"))
    assert Bundle.open(tmp_path / "v1").manifest["files"].keys() >= {"metrics.json", "report.html"}
    (tmp_path / "v1" / "metrics.json").write_text("3")
    with pytest.raises(BundleError, match=r"metrics\.json was changed"):
        Bundle.open(tmp_path / "v1")


def test_a_derived_file_that_fails_changes_nothing(tmp_path: Path) -> None:
    bundle = write(tmp_path)
    before = listing(tmp_path)

    def fails(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_file(bundle, "metrics.json", fails)
    assert listing(tmp_path) == before
    Bundle.open(bundle.path)


# ---------------------------------------------------------------- which version is live


def test_the_folder_of_bundles_stands_for_its_current_version(tmp_path: Path) -> None:
    first, second = write(tmp_path, "v1"), write(tmp_path, "v2")
    assert versions(tmp_path) == ["v1", "v2"]
    publish(second)
    assert Bundle.open(tmp_path).version == "v2"
    publish(first)
    assert Bundle.open(tmp_path).version == "v1"
    assert Bundle.open(tmp_path / "v2").version == "v2"
    assert (tmp_path / "CURRENT").read_text() == "v1\n"


def test_without_a_published_version_the_others_are_named(tmp_path: Path) -> None:
    write(tmp_path, "v1")
    with pytest.raises(UsageError, match="no version is published; name one: v1"):
        resolve(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such bundle; make one with: rayrec train"):
        Bundle.open(tmp_path / "missing")
    with pytest.raises(UsageError, match="no bundle here"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("content", [b"v9\n", b"../v1\n", b"", b"\xff\xfe"])
def test_a_current_that_names_nothing(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, "v1")
    (tmp_path / "CURRENT").write_bytes(content)
    with pytest.raises(BundleError, match="versions: v1"):
        Bundle.open(tmp_path)


def test_the_catalogue_is_the_table_written(tmp_path: Path) -> None:
    row = {
        "item_index": 1, "item_id": "007", "in_catalogue": True, "has_image": False, "category_codes": [],
        "brand_code": 0, "title_codes": [], "price_scaled": 0.0, "price_bucket": 0, "n_train": 2,
    }  # fmt: skip
    with BundleWriter(tmp_path, "v1") as writer:
        pq.write_table(pa.Table.from_pylist([row], ITEM_SCHEMA), writer.file("items/items.parquet"))
        writer.commit(clock="order")
    assert Bundle.open(tmp_path / "v1").catalogue.index == {"007": 1}


def test_a_bundle_at_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    uri = (tmp_path / "far").as_uri()
    with BundleWriter(uri, "v1") as writer:
        writer.json("config.json", preset("small").model_dump(mode="json"))
        bundle = writer.commit(clock="time")
    assert bundle.uri == f"{uri}/v1"
    publish(bundle)
    assert versions(uri) == ["v1"]
    add_file(bundle, "report.html", lambda path: path.write_text("<p>"))
    opened = Bundle.open(uri)
    assert opened.uri == f"{uri}/v1"
    assert (opened.path / "report.html").read_text() == "<p>"
    (tmp_path / "far" / "v1" / "report.html").write_text("<p>changed</p>")
    (tmp_path / "far" / "v1" / "manifest.json").touch()
    assert Bundle.open(f"{uri}/v1").path == opened.path  # the copy of this content is kept


def test_no_bundle_at_a_uri(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no bundle there"):
        Bundle.open((tmp_path / "none").as_uri())
    with pytest.raises(UsageError, match="cannot open this location"):
        Bundle.open("gopher://host/bundles")
