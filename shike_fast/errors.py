"""Exceptions whose message is one clear line for the user.

The commands print such an exception as ``error: <message>`` and end with its exit status, without a traceback.
"""

import sys


class ShikeError(Exception):
    """Base class: the message names the argument or file at fault and what to do about it."""

    exit_status = 2


class ConfigError(ShikeError, ValueError):
    """A command-line argument or configuration value is unusable."""


class DataError(ShikeError, ValueError):
    """A data set is missing, incomplete, corrupt or not what its format says."""


class RunError(ShikeError):
    """The input was accepted, but the work could not be finished."""

    exit_status = 1


class CheckpointError(ShikeError, ValueError):
    """A checkpoint or weight file is missing, damaged, or belongs to another model or run."""


def warn(message: str) -> None:
    """Tell the user of something that does not end the command."""
    print(f"warning: {message}", file=sys.stderr)
