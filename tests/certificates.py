"""Certificates that sign themselves, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

# The one way to choose both dates that OpenSSL 3.0 has.
AUTHORITY = """[ca]
default_ca = own
[own]
database = {folder}/index
serial = {folder}/serial
new_certs_dir = {folder}
default_md = sha256
policy = any
[any]
commonName = supplied
"""


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for localhost and its key, in files, good for two days."""
    pem, key = folder / f"{name}.pem", folder / f"{name}.key"
    _openssl(
        "req", "-x509", *_new(key), "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-days", 2, "-out", pem
    )
    return pem, key


def certificate_between(folder: Path, first: str, last: str) -> tuple[Path, Path]:
    """As `certificate`, good from one date to another, as 20260101. The folder is empty."""
    pem, key = folder / "dated.pem", folder / "dated.key"
    (folder / "index").touch()
    (folder / "serial").write_text("01\n")
    (folder / "authority").write_text(AUTHORITY.format(folder=folder))
    _openssl("req", "-new", *_new(key), "-out", folder / "request")
    dates = ("-startdate", f"{first}000000Z", "-enddate", f"{last}000000Z")
    files = ("-config", folder / "authority", "-keyfile", key, "-in", folder / "request", "-out", pem)
    _openssl("ca", "-selfsign", "-batch", "-notext", *dates, *files)
    return pem, key


def _new(key: Path) -> tuple[object, ...]:
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
    return (*curve, "-noenc", "-subj", "/CN=localhost", "-keyout", key)


def _openssl(*words: object) -> None:
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
