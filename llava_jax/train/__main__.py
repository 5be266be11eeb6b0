"""Trains, or resumes: `python -m llava_jax.train --config configs/X.py --workdir DIR [--config.train.lr=1e-4]`.

The same command after a kill or a preemption goes on from the last whole checkpoint and repeats nothing.
"""

import functools
import os
import signal
import sys
from collections.abc import Sequence

from llava_jax import cli, errors, heap, lifecycle
from llava_jax.lifecycle import Sigterm


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; the exit code. What a user can mend is one line, without a traceback."""
    several = os.environ.get("LLAVA_JAX_MULTIHOST") == "1"  # who joins the others leaves together with them
    with lifecycle.sigterm(None if several else _nothing_lost) as sigterm:
        words = sys.argv[1:] if argv is None else argv
        return cli.run("error", functools.partial(_run, words, sigterm))


def _run(argv: Sequence[str], sigterm: Sigterm) -> int:
    from llava_jax import config  # what follows takes seconds to import

    command = cli.command(argv, "python -m llava_jax.train", __doc__ or "")
    cli.show_progress()  # of what takes minutes: measuring records, planning rows
    settings = config.load(command.config, command.overrides)
    with heap.importing():
        from llava_jax.train import process

    return process.run(settings, command.workdir, sigterm)


def _nothing_lost() -> None:
    print("SIGTERM before anything was begun: the same command begins again", file=sys.stderr, flush=True)
    os._exit(errors.PREEMPTED)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: _nothing_lost())  # before `main` listens
    heap.keep()
    code = main()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python gives up handlers while it ends, but leaves this
    sys.exit(code)
