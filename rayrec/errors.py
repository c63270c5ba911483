"""Errors a user can mend. Anything else that is raised is a bug of ours and keeps its traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, None)
"""None: numpy says only that it wrote less than it wanted to."""


class RayrecError(Exception):
    """Something a user can put right; the message says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(RayrecError):
    """The call itself is wrong: an unknown setting, a bad value, an input that does not exist."""

    exit_code = 2


class DataError(RayrecError):
    """The input exists and cannot be used: no `user_id` column, every row rejected, another version."""


class BundleError(RayrecError):
    """A bundle is missing, incomplete, changed on disk, or of another version."""


class ResourceError(RayrecError):
    """The machine or cluster cannot give what was asked for: CPUs, GPUs, a port, disk."""


class StateError(RayrecError):
    """The shared state cannot be read or written: the disk is full, the file is damaged, the server is away."""


@contextmanager
def writing(place: str | Path) -> Iterator[None]:
    """Raise ResourceError, which names `place`, where writing there fails: it is full, read-only or out of reach."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        reason = os.strerror(error.errno) if error.errno else error
        raise ResourceError(f"{place}: cannot write there ({reason}); free space, or name another place") from None
