"""What can go wrong, and the exit code that each kind of it ends with."""

from __future__ import annotations

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 64
EXIT_NO_INPUT = 66
EXIT_TRY_AGAIN = 75


class HippocampusError(Exception):
    """An error that a user can act on: one line of what, one line of what to do about it."""

    exit_code = EXIT_BUG

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(HippocampusError):
    """A wrong field, argument, or a run folder that cannot be used as asked."""

    exit_code = EXIT_USAGE


class DataError(HippocampusError):
    """Nothing usable to read: a missing, empty or binary text, or a damaged file."""

    exit_code = EXIT_NO_INPUT


class CheckpointError(HippocampusError):
    """No checkpoint that can be restored."""

    exit_code = EXIT_NO_INPUT


class OutOfMemoryError(HippocampusError):
    """The device or the host ran out of memory; smaller settings are the remedy."""

    exit_code = EXIT_USAGE


class Diverged(HippocampusError):
    """Training does not recover: the settings are at fault, not what is around them."""


class Stopped(HippocampusError):
    """A signal stopped the run and everything is saved: start it again to go on."""

    exit_code = EXIT_TRY_AGAIN
