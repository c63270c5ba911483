"""Errors a user can mend. Anything else that is raised is a bug of ours and keeps its traceback."""

from __future__ import annotations


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
