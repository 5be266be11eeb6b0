"""Argument parsing, exit codes and error lines of all commands."""

import argparse
import difflib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from llava_jax import errors, known_names
from llava_jax.errors import UsageError
from llava_jax.files import is_bucket, other_store

INTERRUPTED = 130  # a shell's own after Ctrl-C
# Earlier names of options, and names from other projects -> ours.
RENAMED = {"--budget-usd": "--max-usd", "--budget-tokens": "--max-tokens-spent", "--max-tokens": "--max-new-tokens"}


class _StoreOnce(argparse.Action):
    """Stores the value of an option that may be given once: of two values, one would be ignored silently."""

    _last_namespace: argparse.Namespace | None = None

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if option is not None and self._last_namespace is namespace:
            raise argparse.ArgumentError(self, "is given more than once")
        self._last_namespace = namespace
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An argument parser that ends with exit code 64 where the arguments do not fit.

    Every option has one name, may be given once (unless it collects values), and is looked for by its whole name.
    """

    def register(self, registry_name: str, value: Any, object: Any) -> None:
        stores = registry_name == "action" and value in (None, "store")
        super().register(registry_name, value, _StoreOnce if stores else object)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """All arguments: a left-over one is an error here, where the parser of a verb still knows its name."""
        self.allow_abbrev = False
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._nearest(unknown[0].partition('=')[0])}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(errors.USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def _nearest(self, word: str) -> str:
        options_by_name = {name.lstrip("-"): name for action in self._actions for name in action.option_strings}
        if RENAMED.get(word) in options_by_name.values():
            return f"; did you mean {RENAMED[word]}?"
        plain = word.lstrip("-").replace("_", "-")
        renamed = known_names.hint(word, "--config.") if plain not in options_by_name else ""
        matches = difflib.get_close_matches(plain, options_by_name, n=1) if word.startswith("-") and not renamed else []
        return f"; did you mean {options_by_name[matches[0]]}?" if matches else renamed


def overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The other arguments, and {"train.lr": "1e-4"} of `--config.train.lr=1e-4` or `--config.train.lr 1e-4`.

    Raises:
      UsageError: one lacks its value, or a key is given twice.
    """
    rest, settings, remaining = list[str](), dict[str, str](), iter(argv)
    for arg in remaining:
        if not arg.startswith("--config."):
            rest.append(arg)
            continue
        option, equals, text = arg.partition("=")
        text = text if equals else next(remaining, "")
        key = option.removeprefix("--config.")
        if key in settings:
            raise UsageError(f"{option} is given more than once")
        if not text and not equals:
            raise UsageError(f"{option} wants a value")
        settings[key] = text
    return rest, settings


class Command(NamedTuple):
    """A config file, the directory of a run, and `overrides`."""

    config: str
    workdir: str
    overrides: dict[str, str]


def command(argv: Sequence[str], program: str, description: str = "") -> Command:
    """Reads `--config FILE --workdir DIR` and `overrides` in any order.

    Raises:
      UsageError: an argument is none of these or is given twice, or one of the first two is missing. SystemExit: after
        `--help`.
    """
    usage = f"usage: {program} --config FILE --workdir DIR [--config.BRANCH.KEY=VALUE ...]"
    if any(arg in ("-h", "--help") for arg in argv):
        print(f"{description}\n{usage}")
        raise SystemExit(0)
    rest, config_overrides = overrides(argv)
    options, remaining = dict[str, str](), iter(rest)
    for arg in remaining:
        option, equals, text = arg.partition("=")
        if option not in ("--config", "--workdir"):
            raise UsageError(f"unknown argument {arg!r}{known_names.hint(option, '--config.')}; {usage}")
        if option in options:
            raise UsageError(f"{option} is given more than once; {usage}")
        options[option] = text if equals else next(remaining, "")
    for option in ("--config", "--workdir"):
        if not options.get(option):
            raise UsageError(f"{option} is missing; {usage}")
    return Command(options["--config"], options["--workdir"], config_overrides)


def show_progress() -> None:
    """Prints the packages' log messages, one plain line each; the logs of other libraries are unchanged."""
    logger = logging.getLogger("llava_jax")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def on_disk(text: str) -> Path:
    """A path of an option whose files only a disk can hold; the `type` of such an option."""
    if is_bucket(text):
        raise argparse.ArgumentTypeError(f"{text}: want a path on a disk; copy it with `gcloud storage cp -r`")
    return Path(text)


def step(text: str) -> int | str:
    """The value of `--step`: the number of a checkpoint's step, or "best"; the `type` of that option."""
    if text != "best" and not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text}: want the number of a step, or best")
    return text if text == "best" else int(text)


def _scheme(error: KeyError | ImportError) -> str:
    """How the paths begin that etils cannot read, of a store that it does not know or whose client is missing; "" where
    the exception says something else."""
    if isinstance(error, KeyError):
        return str(error.args[0]) if re.fullmatch(r"\('[a-zA-Z][a-zA-Z0-9+.-]*://',\)", str(error.args)) else ""
    clients = {"gcsfs": "gs://", "s3fs": "s3://", "adlfs": "az://", "fsspec": "gs://"}
    return next((scheme for package, scheme in clients.items() if package in str(error)), "")


def run(name: str, command: Callable[[], int], interrupt_message: str = "interrupted") -> int:
    """The exit code of a command. An exception of `errors` is one line that begins with `name`; others propagate.

    interrupt_message: printed on Ctrl-C, such as how to resume.
    """
    for stream in (sys.stdout, sys.stderr):  # data may hold what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return command()
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return errors.DONE
    except KeyboardInterrupt:
        print(f"{name}: {interrupt_message}", file=sys.stderr)
        return INTERRUPTED
    except (KeyError, ImportError) as error:
        scheme = _scheme(error)
        if not scheme:
            raise
        if scheme != "gs://":
            print(f"{name}: {other_store(scheme)}", file=sys.stderr)
            return errors.USAGE
        print(f'{name}: gs:// wants the package gcsfs, which is missing: `pip install ".[gcs]"` in the clone, or name '
              "a path on a disk", file=sys.stderr)  # fmt: skip
        return errors.USAGE
    except (ValueError, OSError, ArithmeticError) as error:
        code = errors.exit_code(error)
        if code is None:
            raise
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return code
