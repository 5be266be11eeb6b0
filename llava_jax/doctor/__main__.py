"""Checks a machine before anything is trained on it.

    python -m llava_jax.doctor [--workdir DIR] [--mesh.tensor=N ...] [--json FILE]

Run it on every process that would train, at once; it takes at most five minutes. Process 0 prints a table with a
verdict, a figure and an expectation for each check. The exit code is 0, or 1 where something FAILs, on all processes.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence

from llava_jax import cli, errors
from llava_jax import config as configs


def main(argv: Sequence[str] | None = None) -> int:
    """Checks; the exit code: 0 no check fails, 1 some do, 64 a wrong argument."""
    return cli.run("error", functools.partial(_run, sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    mesh = configs.Mesh(**{f.name: vars(options)[f"mesh.{f.name}"] for f in dataclasses.fields(configs.Mesh)})
    from llava_jax import distributed  # it brings jax, which takes seconds
    from llava_jax.doctor import session

    try:
        return session.examine(mesh, options.workdir, options.json)
    except errors.UsageError as error:
        if distributed.count() > 1:
            distributed.leave(errors.USAGE, f"error: {error}")
        raise


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m llava_jax.doctor", description=__doc__, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--workdir", metavar="DIR", help="a directory or gs:// path that all processes share, as "
                        "train's; what is written there is deleted again (default for one process: a temporary one)")
    parser.add_argument("--json", metavar="FILE", help="process 0 writes all lines of all processes there")
    for field in dataclasses.fields(configs.Mesh):
        parser.add_argument(f"--mesh.{field.name}", type=int, default=field.default, metavar="N",
                            help=f"as train's --config.mesh.{field.name} (default {field.default})")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
