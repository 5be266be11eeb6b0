"""The long loops of kills and stops: `python -m tests.reliability --kills 200 [--processes 2] [--bucket]`.

A tiny run is trained again and again. It is killed at random moments, or stopped by SIGTERM, and the same command goes
on; every loss must be that of a run that nobody disturbed, bit for bit, and no step that was whole may be lost or set
aside. It prints a line for each run that came to its end, and exits with 1 where anything differed.
"""

import argparse
import contextlib
import itertools
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from llava_jax import files
from llava_jax.checkpoint import reader
from llava_jax.train import metrics
from tests import buckets
from tests.ports import free_port
from tests.train import forks, tiny
from tests.train.forks import Ended, Process

STEPS, SAVES = 60, 5
SETTINGS = (f"--config.train.steps={STEPS}", f"--config.checkpoint.every={SAVES}", "--config.log.every=20",
            "--config.train.eval_every=20")  # fmt: skip
PATIENCE_SECS = 180  # for a run that nobody disturbs; a machine may be busy
SURVIVOR_SECS = 15  # for a process to notice that another has died


class Wrong(Exception):
    """A run that was disturbed is not what it must be."""


class Loop:
    """One kind of run, started again and again.

    counts: what happened, for the last line.
    """

    def __init__(self, server: forks.Parent, folder: Path, root: str, processes: int, chance: random.Random):
        self.server, self.root, self.processes, self.random = server, root, processes, chance
        self.config = tiny.write_run(folder / "run")
        self.cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
                      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
        self.counts: Counter[str] = Counter()
        whole = self.workdir("whole")
        self.finish(self.start(whole))
        begin = time.monotonic()
        again = self.workdir("again")
        self.finish(self.start(again))
        self.secs = time.monotonic() - begin  # of a whole run with a warm cache
        self.losses = rows(whole)
        self.compare(again)

    def workdir(self, name: str) -> str:
        return f"{self.root}/{name}"

    def start(self, workdir: str) -> list[Process]:
        return self.server.job(self.processes, 1, self.config, workdir, *SETTINGS, **self.cache)

    def finish(self, job: Sequence[Process], codes: Sequence[int] = (0,), secs: float = PATIENCE_SECS) -> list[Ended]:
        ended = [process.wait(secs) for process in job]
        if any(one.code not in codes for one in ended):
            raise Wrong(f"exit codes {[one.code for one in ended]}\n" + "".join(one.err[-2000:] for one in ended))
        return ended

    def compare(self, workdir: str) -> None:
        """The losses, validations and steps of a run that came to its end."""
        if rows(workdir) != self.losses:
            different = [(a, b) for a, b in zip(rows(workdir), self.losses) if a != b]
            raise Wrong(f"{workdir}: {len(rows(workdir))} rows, losses differ: {different[:3]}")
        if [row["step"] for row in metrics.read(workdir, metrics.VALIDATION)] != list(range(20, STEPS + 1, 20)):
            raise Wrong(f"{workdir}: validations {metrics.read(workdir, metrics.VALIDATION)}")
        aside = [str(path) for path in files.listed(workdir) if path.name.endswith(".corrupt")]
        steps = [epath.Path(workdir) / str(step) for step in reader.numbered(workdir)]
        aside += [str(step) for step in steps if files.exists(step / "corrupt.txt")]
        if aside:
            raise Wrong(f"{workdir}: {aside} set aside")
        self.counts["runs"] += 1
        self.counts["rows compared"] += len(self.losses)

    def kill(self, workdir: str) -> bool:
        """Starts or goes on with a run and kills it at a random moment; whether it came to its end before that."""
        before = reader.latest_step(workdir) or 0
        job = self.start(workdir)
        self.goes_on(job, workdir, before)
        if all(process.poll() for process in job):
            self.finish(job)
            return True
        victims = self.random.choice([job[:1], job[1:], job]) if len(job) > 1 else job
        for process in victims:
            if process.poll() is None:
                process.signal(signal.SIGKILL)
        self.counts["kills"] += 1
        end = time.monotonic() + SURVIVOR_SECS
        for process in job:  # who notices nothing would wait for JAX's heartbeats
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            if process.poll() is None:
                self.counts["survivors that noticed nothing"] += 1
                process.kill()
        self.committed(workdir, before, job)
        return False

    def goes_on(self, job: Sequence[Process], workdir: str, before: int) -> None:
        """Waits for a random moment, which half of the times is one of the updates."""
        if self.random.random() < 0.5:
            end = time.monotonic() + self.random.uniform(0, self.secs)
        else:
            goal, end = before + self.random.randrange(1, STEPS), time.monotonic() + PATIENCE_SECS
            while time.monotonic() < end and all(process.poll() is None for process in job):
                if last_row(workdir) >= goal:
                    break
                time.sleep(0.01)
            end = min(end, time.monotonic() + self.random.uniform(0, 0.1))
        while time.monotonic() < end and any(process.poll() is None for process in job):
            time.sleep(0.005)

    def committed(self, workdir: str, before: int, job: Sequence[Process]) -> None:
        """No step that was whole is lost: the run went on from the newest one, and it is still there or a newer is."""
        went_on = re.search(r"goes on after step (\d+)", (job[0].folder / "out").read_text())
        if went_on and int(went_on[1]) != before:
            raise Wrong(f"{workdir}: step {before} was whole, it went on from {went_on[1]}")
        if (reader.latest_step(workdir) or 0) < before:
            raise Wrong(f"{workdir}: step {before} was whole, now the newest is {reader.latest_step(workdir)}")


def rows(workdir: str) -> list[tuple[int, float]]:
    """(step, loss) of every update."""
    return [(row["step"], row["loss"]) for row in metrics.read(workdir)]


def last_row(workdir: str) -> int:
    """The last update that is written down; in a bucket, of the last save."""
    with contextlib.suppress(ValueError, OSError):  # a line that is being written
        return max((row["step"] for row in metrics.read(workdir)), default=0)
    return 0


def kills(loop: Loop, count: int) -> None:
    """`count` kills of as many runs as it takes."""
    for number in itertools.count():
        workdir = loop.workdir(f"killed-{number}")
        while loop.counts["kills"] < count:
            if loop.kill(workdir):
                break
        else:
            loop.finish(loop.start(workdir))
        loop.compare(workdir)
        print(f"run {number}: {dict(loop.counts)}", flush=True)
        if loop.counts["kills"] >= count:
            return


def sigterms(loop: Loop, count: int) -> None:
    """SIGTERM at random moments from exec to exit of real starts; then the run goes on and must be whole."""
    environment = loop.cache
    for number in range(count):
        workdir, port = loop.workdir(f"stopped-{number}"), free_port()
        if loop.processes > 1:
            environment = loop.cache | {"LLAVA_JAX_MULTIHOST": "1", "JAX_NUM_PROCESSES": str(loop.processes),
                                        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}  # fmt: skip
        begin = time.monotonic()
        job = [tiny.start(loop.config, workdir, *SETTINGS, **environment, JAX_PROCESS_ID=str(i))
               for i in range(loop.processes)]  # fmt: skip
        # An interpreter's own start, some 50 ms, is nobody's: Python dies by the signal there (143).
        time.sleep(loop.random.uniform(0.3, 1.5 * loop.secs + 8))
        loop.random.choice(job).send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=PATIENCE_SECS) for process in job]
        codes = [process.returncode for process in job]
        loop.counts[f"exit codes {codes}"] += 1
        if len(set(codes)) > 1 or codes[0] not in (0, 75):
            raise Wrong(f"SIGTERM after {time.monotonic() - begin:.1f} s: {codes}\n{outputs}")
        loop.finish(loop.start(workdir))
        loop.compare(workdir)
    print(dict(loop.counts), flush=True)


def faulty(loop: Loop, passing: buckets.Proxy, runs: int) -> None:
    """Runs beside a bucket that answers 1 of 20 requests with 503, and 1 of 50 after 5 s."""
    def plan(method: str, path: str) -> int | None:
        if loop.random.random() < 1 / 50:
            time.sleep(5)
        return 503 if loop.random.random() < 1 / 20 else None

    with buckets.faults(passing, plan):
        for number in range(runs):
            loop.finish(loop.start(loop.workdir(f"faulty-{number}")), secs=5 * PATIENCE_SECS)
    for number in range(runs):
        loop.compare(loop.workdir(f"faulty-{number}"))
    print(f"a bucket with faults: {dict(loop.counts)}", flush=True)


@contextlib.contextmanager
def bucket() -> Iterator[tuple[buckets.Proxy, str]]:
    """A bucket server for this process and all that it starts."""
    with buckets.serve() as url, buckets.proxy(url) as passing:
        os.environ.update(buckets.environment(passing.url))
        yield passing, buckets.make(url, "reliability")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, metavar="N")
    parser.add_argument("--sigterms", type=int, default=0, metavar="N", help="real starts, stopped by SIGTERM")
    parser.add_argument("--faulty", type=int, default=0, metavar="N", help="runs beside a bucket that has faults")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument("--bucket", action="store_true", help="workdirs in a bucket, on a server of this machine")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        place = tempfile.TemporaryDirectory(prefix="reliability-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(place))
        passing, root = stack.enter_context(bucket()) if options.bucket or options.faulty else (None, str(folder))
        server = stack.enter_context(forks.parent(folder))
        begin, loop = time.monotonic(), Loop(server, folder, root, options.processes, random.Random(options.seed))
        print(f"a whole run takes {loop.secs:.1f} s; {options.processes} process(es), workdirs in {root}", flush=True)
        try:
            if options.kills:
                kills(loop, options.kills)
            if options.sigterms:
                sigterms(loop, options.sigterms)
            if options.faulty and passing is not None:
                faulty(loop, passing, options.faulty)
        except Wrong as error:
            print(f"WRONG: {error}", flush=True)
            return 1
        print(f"0 losses differ, 0 whole steps lost, 0 set aside: {dict(loop.counts)}, "
              f"{time.monotonic() - begin:.0f} s", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
