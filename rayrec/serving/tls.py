"""TLS by files: a certificate and its private key, looked into before a server starts on them.

In: two PEM files. Out: files that fit, and whom a client of our own may trust. It must not know who speaks TLS.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rayrec.errors import UsageError
from rayrec.progress import step

NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python does not name."""


@dataclass(frozen=True)
class Tls:
    """A certificate, with its chain if it has one, and its key. `opened` makes one of files that fit."""

    certificate: Path
    key: Path

    @classmethod
    def opened(cls, certificate: Path | None, key: Path | None) -> Tls | None:
        """What two options name; None without both. Tells of a certificate that has expired, or is not valid yet.

        Raises UsageError for a file that is missing or cannot be read or used, and a key of another certificate.
        """
        if certificate is None or key is None:
            if certificate or key:
                given, other = ("--tls-cert", "--tls-key") if certificate else ("--tls-key", "--tls-cert")
                raise UsageError(f"{given} needs {other}: a certificate and its private key, as PEM files")
            return None
        tls = cls(certificate, key)
        try:
            read = tls._handshake(_server_side(certificate, key))
        except ssl.SSLError as error:  # one for clients, say
            raise UsageError(f"--tls-cert {certificate}: is not for a server ({error.reason})") from None
        tls._warn_of_dates(read)
        return tls

    def trust(self) -> ssl.SSLContext:
        """For a client on this machine: trusts this certificate alone, by whatever name and however old it is."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # it names the shop, and is asked at a loopback address
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME
        # The first of the file is the server's own; to trust its issuers would be to trust all that they sign.
        own = re.search(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", self.certificate.read_text(), re.S)
        context.load_verify_locations(cadata=own[0] if own else "")
        return context

    def _handshake(self, server_side: ssl.SSLContext) -> Mapping[str, object]:
        """What a client of our own reads in the certificate; no socket is needed for that."""
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = server_side.wrap_bio(to_server, to_client, server_side=True)
        client = self.trust().wrap_bio(to_client, to_server)
        for side in (client, server, client):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
        return client.getpeercert() or {}

    def _warn_of_dates(self, read: Mapping[str, object]) -> None:
        not_before, not_after = str(read["notBefore"]), str(read["notAfter"])
        if ssl.cert_time_to_seconds(not_after) < time.time():
            step(f"warning: {self.certificate} expired on {not_after}; clients will refuse it until it is renewed")
        elif ssl.cert_time_to_seconds(not_before) > time.time():
            step(f"warning: {self.certificate} is not valid before {not_before}; clients will refuse it until then")


def _server_side(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    text = _read("--tls-cert", certificate)
    _read("--tls-key", key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except ssl.SSLError:
        raise UsageError(f"--tls-cert {certificate}: is no certificate; give a PEM file, its chain below it") from None
    try:
        context.load_cert_chain(certificate, key, password=_refuse_to_ask(key))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"--tls-key {key}: is not the key of {certificate}; give the one of that") from None
        raise UsageError(
            f"--tls-key {key}: cannot be used ({error.reason}); give the private key of {certificate}, as a PEM file"
        ) from None
    return context


def _read(option: str, file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except FileNotFoundError:
        raise UsageError(f"{option} {file}: no such file") from None
    except OSError as error:
        raise UsageError(f"{option} {file}: cannot be read ({error.strerror}); let this user read it") from None
    except UnicodeDecodeError:
        raise UsageError(f"{option} {file}: is no PEM file; convert it: openssl x509 or openssl pkey") from None


def _refuse_to_ask(key: Path) -> Callable[[], str]:
    def refuse() -> str:
        raise UsageError(f"--tls-key {key}: asks for a passphrase; store it without one: openssl pkey -in {key}")

    return refuse
