"""What llava_jax itself raises, and the exit code that each of it ends a command with.

An exception of this file is a message to the user: commands print it as one line. Any other exception is a fault of
ours or of a library, and keeps its traceback.
"""

import errno
from collections.abc import Callable
from types import TracebackType

DONE, CRASHED, STUCK, USAGE, DATA, CHECKPOINT, UNREACHABLE, NONFINITE, PREEMPTED = 0, 1, 42, 64, 65, 66, 69, 70, 75


class UsageError(ValueError):
    """An argument, a setting or a config that does not fit; names it, its value and what is wanted (exit code 64)."""


class MissingFile(FileNotFoundError, UsageError):
    """A file or directory that was named does not exist (exit code 64)."""


class MissingPackage(RuntimeError):
    """A library of an extra is not installed; no record is to blame for that (exit code 64)."""


class DataError(ValueError):
    """The data is bad, not the configuration (exit code 65)."""


class UnusableCheckpoint(ValueError):
    """A checkpoint is missing, damaged, or rests on a base that moved or changed (exit code 66)."""


class MissingWeights(FileNotFoundError, UnusableCheckpoint):
    """A file of weights, or one that belongs to them, does not exist (exit code 66)."""


class SaveFailed(OSError):
    """A checkpoint could not be written; the older ones are untouched (exit code 66)."""


class Unreachable(OSError):
    """A disk or a bucket does not answer, again and again; the same command may succeed later (exit code 69)."""


class NonFinite(ArithmeticError):
    """The loss was not finite in too many updates in a row (exit code 70)."""


# The first class that fits decides.
_CODES = (
    (UnusableCheckpoint, CHECKPOINT), (SaveFailed, CHECKPOINT), (Unreachable, UNREACHABLE), (DataError, DATA),
    (NonFinite, NONFINITE), (MissingPackage, USAGE), (UsageError, USAGE),
)  # fmt: skip
# What the operating system says of a path that the user named: nothing here is a fault of the program.
_PATHS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
          errno.ENAMETOOLONG)  # fmt: skip


def exit_code(error: BaseException) -> int | None:
    """The exit code of an exception that is a message to the user; None: it is a fault, and wants its traceback."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CHECKPOINT
    return USAGE if isinstance(error, OSError) and error.filename is not None and error.errno in _PATHS else None


class Foreign:
    """A block of code that is not ours and may raise anything: a user's config file, a library that raises bare
    Exceptions. What it raises becomes the message that `describe` makes of it; an interrupt goes through."""

    def __init__(self, describe: Callable[[BaseException], UsageError]):
        self._describe = describe

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt):
            raise self._describe(error) from error
