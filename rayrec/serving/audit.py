"""Who read, joined or erased whom, and who changed an item or the live model: one JSON line each.

In: a caller, a deed, what it is about. Out: a line of the log `rayrec.audit`, and of a file if one is named. It holds
no visitor's id: whom a deed is about is a keyed hash, which only who knows the id and the key can tell.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import time
from pathlib import Path

from rayrec.serving.keys import Caller

log = logging.getLogger("rayrec.audit")


class Audit:
    """Writes the lines. secret: of the hash; a server without one writes hashes of its process."""

    def __init__(self, file: str, secret: bytes | None) -> None:
        self._file, self._secret = Path(file) if file else None, secret or os.urandom(32)

    def of_visitor(self, caller: Caller, deed: str, visitor: str) -> None:
        """Note a deed. Raises OSError if the file cannot be written: what is not noted must not happen."""
        self._note(caller, deed, hmac.new(self._secret, visitor.encode(), hashlib.sha256).hexdigest()[:32])

    def of_shop(self, caller: Caller, deed: str, what: str) -> None:
        """Note that an item or a model is asked to be another. Raises as `of_visitor`."""
        self._note(caller, deed, what)

    def _note(self, caller: Caller, deed: str, about: str) -> None:
        line = json.dumps({"time_ms": time.time_ns() // 1_000_000, "who": caller.name, "did": deed, "about": about})
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        log.info(line)
