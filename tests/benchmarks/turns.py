"""Workers, each in a process of its own, that are timed in turn: A B A B ..., never two at once."""

import contextlib
import importlib
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """`module.function(*arguments)` makes what a turn calls: it does one turn and returns (seconds, check).

    root: the checkout whose code that is; `module` may be a file beside this one too.
    """

    module: str
    function: str
    arguments: tuple[Any, ...]
    root: Path = ROOT


@dataclass(frozen=True)
class Timing:
    """Seconds of every turn, and what the turns computed."""

    secs: Sequence[float]
    checks: Sequence[Any]

    @property
    def median(self) -> float:
        return statistics.median(self.secs)


def alternate(jobs: Mapping[str, Job], rounds: int) -> dict[str, Timing]:
    """Runs every job's turn once unmeasured (it compiles, and fills caches), then all in turn, `rounds` times.

    Raises:
      EOFError: a worker died; its own words are on stderr.
    """
    pipes, processes = {}, []
    for name, job in jobs.items():
        pipes[name], far = multiprocessing.Pipe()
        processes.append(subprocess.Popen(
            [sys.executable, __file__, str(far.fileno())], cwd=job.root, pass_fds=[far.fileno()],
            env=os.environ | {"PYTHONPATH": str(job.root)},
        ))  # fmt: skip
        far.close()  # a worker's death is then an end of file here
        pipes[name].send((job.module, job.function, job.arguments))
    found: dict[str, list[tuple[float, Any]]] = {name: [] for name in jobs}
    try:
        for _ in range(rounds + 1):
            for name, pipe in pipes.items():
                pipe.send("go")
                found[name].append(pipe.recv())
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.wait()
    return {
        name: Timing([secs for secs, _ in turns[1:]], [check for _, check in turns[1:]])
        for name, turns in found.items()
    }


def _work(pipe: Connection) -> None:
    module, function, arguments = pipe.recv()
    turn: Callable[[], tuple[float, Any]] = getattr(importlib.import_module(module), function)(*arguments)
    with contextlib.suppress(EOFError):  # there are no more turns
        while pipe.recv():
            pipe.send(turn())


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1])))
