"""HAProxy as we want it: as Ray Serve sets it up, less the doors that nobody asked for, with TLS where it is wanted.

In: the configuration that Ray wrote. Out: ours in its place, and HAProxy in the place of this program. Ray has no
setting for either, but one for which program HAProxy is: a script that runs this file. So this file runs by itself, on
the standard library, and must not know the rest of rayrec.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

SCRIPT = "haproxy"
CERTIFICATE = "certificate.pem"
"""In the folder of the script; HAProxy finds its key by itself, in a file of that name and `.key`."""

# Ray's metrics and statistics of HAProxy, on every address of the machine, for whoever asks. Ray itself reads both
# through sockets in its folder, and ours are at /metrics.
UNWANTED = ("frontend prometheus", "listen stats")
FRONTEND = "frontend http_frontend"

# Ray answers a request's id as it was sent; the application would not.
CLEAN_ID = "    http-request del-header X-Request-Id if { req.fhdr(X-Request-Id) -m reg '^$|[^A-Za-z0-9_-]|^.{129}' }\n"

# Ray watches meanwhile whether the client left, in a task of its own for each request. An answer of milliseconds, or an
# event that is being stored, is not broken off for that.
UNWATCHED = "    http-request set-header X-Request-Disconnect-Disabled ?1\n"

# Ray bears with a silent client for an hour, and 4,096 of them are all that fit. A request's head, with as much of its
# body as a buffer holds, is to be there in time, and later bytes are never to be waited for as long.
PATIENCE_S = 10
PATIENCE = "    option http-buffer-request\n    timeout http-request {0}s\n    timeout client {0}s\n"


def install(folder: Path, binary: str, tls: tuple[Path, Path] | None = None) -> Path:
    """The script that is HAProxy for Ray: `binary` on our configuration. tls: files of a certificate and its key."""
    if tls:
        for name, file in zip((CERTIFICATE, f"{CERTIFICATE}.key"), tls, strict=True):
            (folder / name).symlink_to(file.absolute())  # no copy of a private key
    words = [sys.executable, "-IS", str(Path(__file__).absolute()), binary, str(folder / CERTIFICATE) if tls else ""]
    script = folder / SCRIPT
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    script.chmod(0o700)
    return script


def rewritten(config: str, certificate: str = "") -> str:
    """Ray's configuration without `UNWANTED`, ids clean, requests unwatched, clients in time; given a certificate, TLS.

    Raises ValueError if it is not as Ray 2.60 writes it: better no server than one that is open, or speaks no TLS.
    """
    sections = [part for part in re.split(r"(?m)^(?=\S)", config) if not part.startswith(UNWANTED)]
    found = [number for number, part in enumerate(sections) if part.startswith(FRONTEND)]
    if len(found) != 1 or len(bind := re.findall(r"(?m)^ +bind .+\n", sections[found[0]])) != 1:
        raise ValueError("HAProxy's configuration is not as expected of this version of Ray")
    ours = bind[0]
    if certificate:
        ours = f"{bind[0].rstrip()} ssl crt {certificate} alpn h2,http/1.1\n"
        ours += "    http-request set-header X-Forwarded-Proto https\n"
    ours += CLEAN_ID + UNWATCHED + PATIENCE.format(PATIENCE_S)
    sections[found[0]] = sections[found[0]].replace(bind[0], ours)
    return "".join(sections)


def _run(binary: str, certificate: str, *options: str) -> None:
    file = Path(options[options.index("-f") + 1])
    file.write_text(rewritten(file.read_text(encoding="utf-8"), certificate), encoding="utf-8")
    os.execv(binary, [binary, *options])  # the same process: Ray watches its id


if __name__ == "__main__":
    _run(*sys.argv[1:])
