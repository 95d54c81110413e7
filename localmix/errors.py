"""What a user can be told: one class for each exit code, a sentence, and the next step.

Only these classes become sentences on the terminal (see `localmix.__main__`); any other exception is a bug
and keeps its traceback.
"""

from __future__ import annotations


class LocalmixError(Exception):
    """A problem that is not a bug of localmix.

    Args:
        message: one sentence that names the thing and the file.
        hint: what to do next, usually a command; may be empty.
    """

    exit_code = 70

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(LocalmixError):
    """The command line asks for something that does not exist or contradicts itself."""

    exit_code = 2


class InputError(LocalmixError):
    """A checkpoint, GGUF, imatrix, corpus or preset file is broken, incomplete or of another model."""

    exit_code = 3


class CapacityError(LocalmixError):
    """Not enough memory or disk for what was asked."""

    exit_code = 4


class FileError(LocalmixError):
    """The file system refused: missing, read-only, locked by another run."""

    exit_code = 5


class NetworkError(LocalmixError):
    """The hub could not be reached, or did not give what it promised."""

    exit_code = 6


class Interrupted(LocalmixError):
    """The user stopped the run (Ctrl-C, SIGTERM); nothing was lost."""

    exit_code = 130
