"""Two workers, each in a process of its own, that are timed in turn: A B A B ..., never both at once."""

import contextlib
import importlib
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any


@dataclass(frozen=True)
class Job:
    """`module.function(*arguments)` makes what a turn calls: it does one turn and returns (seconds, check)."""

    module: str
    function: str
    arguments: tuple[Any, ...]


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
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, job in jobs.items():
        pipes[name], far = context.Pipe()
        processes.append(context.Process(target=_work, args=(job, far)))
        processes[-1].start()
        far.close()  # a worker's death is then an end of file here
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
            process.join()
    return {
        name: Timing([secs for secs, _ in turns[1:]], [check for _, check in turns[1:]])
        for name, turns in found.items()
    }


def _work(job: Job, pipe: Connection) -> None:
    turn: Callable[[], tuple[float, Any]] = getattr(importlib.import_module(job.module), job.function)(*job.arguments)
    with contextlib.suppress(EOFError):  # there are no more turns
        while pipe.recv():
            pipe.send(turn())
