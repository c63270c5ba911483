"""Certificates and keys in files: those that fit, and what is wrong with the others."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from certificates import certificate, certificate_between

from rayrec.errors import UsageError
from rayrec.serving.tls import Tls

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def ours(folder: Path) -> tuple[Path, Path]:
    return certificate(folder, "shop")


def test_files_that_fit(ours: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    tls = Tls.opened(*ours)
    assert tls is not None
    assert (tls.certificate, tls.key) == ours
    assert "warning" not in capsys.readouterr().err


def test_without_files_there_is_no_tls() -> None:
    assert Tls.opened(None, None) is None


def test_one_needs_the_other(ours: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="--tls-cert needs --tls-key"):
        Tls.opened(ours[0], None)
    with pytest.raises(UsageError, match="--tls-key needs --tls-cert"):
        Tls.opened(None, ours[1])


def test_what_is_wrong_is_told_with_the_file(ours: tuple[Path, Path], folder: Path) -> None:
    other = certificate(folder, "other")
    for files, said in (
        ((folder / "none.pem", ours[1]), r"--tls-cert .*none.pem: no such file"),
        ((ours[0], folder / "none.key"), r"--tls-key .*none.key: no such file"),
        ((folder, ours[1]), r"--tls-cert .*: cannot be read \(Is a directory\)"),
        ((ours[0], other[1]), r"--tls-key .*other.key: is not the key of .*shop.pem"),
        ((ours[1], ours[1]), r"--tls-cert .*shop.key: is no certificate"),
        ((ours[0], ours[0]), r"--tls-key .*shop.pem: cannot be used"),
    ):
        with pytest.raises(UsageError, match=said):
            Tls.opened(*files)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_this_user_may_not_read(folder: Path, ours: tuple[Path, Path]) -> None:
    secret = folder / "secret.key"
    shutil.copy(ours[1], secret)
    secret.chmod(0)
    with pytest.raises(UsageError, match=r"secret.key: cannot be read .*let this user read it"):
        Tls.opened(ours[0], secret)


def test_a_file_in_another_format_is_told(folder: Path, ours: tuple[Path, Path]) -> None:
    subprocess.run(["openssl", "x509", "-in", ours[0], "-outform", "DER", "-out", folder / "shop.der"], check=True)
    with pytest.raises(UsageError, match=r"shop.der: is no PEM file"):
        Tls.opened(folder / "shop.der", ours[1])


def test_a_passphrase_is_not_asked_for(folder: Path, ours: tuple[Path, Path]) -> None:
    locked = folder / "locked.key"
    subprocess.run(
        ["openssl", "pkey", "-in", ours[1], "-aes256", "-passout", "pass:secret", "-out", locked], check=True
    )
    with pytest.raises(UsageError, match=r"locked.key: asks for a passphrase"):
        Tls.opened(ours[0], locked)


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [("20200101", "20210101", "expired on Jan"), ("20900101", "20910101", "is not valid before Jan")],
)
def test_dates_are_warned_of_and_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str, last: str, said: str
) -> None:
    assert Tls.opened(*certificate_between(tmp_path, first, last)) is not None
    assert said in " ".join(capsys.readouterr().err.split())


def test_our_own_client_trusts_this_certificate_alone(ours: tuple[Path, Path], folder: Path) -> None:
    tls, other = Tls.opened(*ours), Tls.opened(*certificate(folder, "stranger"))
    assert tls is not None
    assert other is not None
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    stranger.load_cert_chain(other.certificate, other.key)
    with pytest.raises(ssl.SSLCertVerificationError):
        tls._handshake(stranger)
