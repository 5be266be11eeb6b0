"""What a command line says of a config: its file, and changes of single keys such as `--config.train.lr=1e-4`."""

from collections.abc import Sequence
from typing import NamedTuple

from llava_jax import known_names
from llava_jax.errors import UsageError


class Command(NamedTuple):
    config: str
    workdir: str
    overrides: dict[str, str]


def overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The other words, and {"train.lr": "1e-4"} of `--config.train.lr=1e-4` or `--config.train.lr 1e-4`.

    Raises:
      ValueError: one lacks its value, or a key is given twice.
    """
    rest, found, words = list[str](), dict[str, str](), iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        option, equals, text = word.partition("=")
        text = text if equals else next(words, "")
        key = option.removeprefix("--config.")
        if key in found:
            raise UsageError(f"{option} is given more than once")
        if not text and not equals:
            raise UsageError(f"{option} wants a value")
        found[key] = text
    return rest, found


def command(argv: Sequence[str], program: str, description: str = "") -> Command:
    """Reads `--config FILE --workdir DIR` and `overrides` in any order.

    Raises:
      ValueError: an argument that is none of these or is given twice, or one of the first two is missing. SystemExit:
        after `--help`.
    """
    usage = f"usage: {program} --config FILE --workdir DIR [--config.BRANCH.KEY=VALUE ...]"
    if any(word in ("-h", "--help") for word in argv):
        print(f"{description}\n{usage}")
        raise SystemExit(0)
    rest, changed = overrides(argv)
    found, words = dict[str, str](), iter(rest)
    for word in words:
        option, equals, text = word.partition("=")
        if option not in ("--config", "--workdir"):
            meant = known_names.hint(option, "--config.")
            raise UsageError(f"unknown argument {word!r}{meant}; {usage}")
        if option in found:
            raise UsageError(f"{option} is given more than once; {usage}")
        found[option] = text if equals else next(words, "")
    for option in ("--config", "--workdir"):
        if not found.get(option):
            raise UsageError(f"{option} is missing; {usage}")
    return Command(found["--config"], found["--workdir"], changed)
