"""What all commands share: how they parse arguments, and how an exception becomes one line and an exit code."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from llava_jax import errors

INTERRUPTED = 130  # a shell's own after Ctrl-C


class Parser(argparse.ArgumentParser):
    """An argument parser that ends with exit code 64 where the arguments do not fit."""

    def error(self, message: str) -> NoReturn:
        self.exit(errors.USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def run(name: str, command: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code of a command. An exception of `errors` is one line that begins with `name`; others go through.

    interrupted: what Ctrl-C prints, such as how to resume.
    """
    try:
        return command()
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return errors.DONE
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    except ImportError as error:
        if not any(package in str(error) for package in ("gcsfs", "fsspec")):
            raise
        print(f'{name}: gs:// wants the package gcsfs, which is missing: `pip install ".[gcs]"` in the clone, or name '
              "a path on a disk", file=sys.stderr)  # fmt: skip
        return errors.USAGE
    except (ValueError, OSError, ArithmeticError) as error:
        code = errors.exit_code(error)
        if code is None:
            raise
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return code
