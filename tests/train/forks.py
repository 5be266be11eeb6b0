"""Training processes that are forked from one that has imported everything: a start costs milliseconds, not seconds.

A fork is a process of its own in all that these tests look at: devices, signals, exit codes, files. What differs is
that nothing is imported, so tests of the very first seconds use `tiny.start`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.ports import free_port
from tests.train import tiny


class Ended(NamedTuple):
    """How a process ended, and what it printed."""

    code: int
    out: str
    err: str


class Process:
    """A forked training process."""

    def __init__(self, parent: "Parent", pid: int, folder: Path):
        self.parent, self.pid, self.folder = parent, pid, folder
        self.ended: Ended | None = None

    def signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def kill(self) -> Ended:
        """Ends it as a machine that loses power does."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def poll(self) -> Ended | None:
        """How it ended; None while it runs."""
        if self.ended is None:
            code = self.parent.ask({"poll": self.pid})
            if code is not None:
                out, err = ((self.folder / name).read_text() for name in ("out", "err"))
                self.ended = Ended(code, out, err)
        return self.ended

    def wait(self, secs: float = 300) -> Ended:
        """How it ended, when it has; a process that does not end in time is killed."""
        end = time.monotonic() + secs
        while self.poll() is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGABRT)
                time.sleep(2)
                raise AssertionError(f"still runs after {secs} s\n" + (self.folder / "err").read_text()[-4000:])
            time.sleep(0.02)
        assert self.ended is not None
        return self.ended


class Parent:
    """A process that has imported the trainer, and forks when it is asked."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        environment.pop("XLA_FLAGS", None)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.train.forks"], cwd=tiny.ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, question: Mapping[str, Any]) -> Any:
        """The parent's answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, config: Path, workdir: Path | str, *words: str, **environment: str) -> Process:
        """`python -m llava_jax.train` with these words in this environment."""
        self.number += 1
        folder = self.folder / str(self.number)
        folder.mkdir()
        for name in ("out", "err"):
            (folder / name).touch()  # a child may be killed before it has opened them
        argv = ["--config", str(config), "--workdir", str(workdir), *words]
        return Process(self, self.ask({"argv": argv, "env": environment, "folder": str(folder)}), folder)

    def job(
        self, processes: int, devices: int, config: Path | Sequence[Path], workdir: Path | str | Sequence[Path],
        *words: str, each: Sequence[Sequence[str]] = (), **environment: str,
    ) -> list[Process]:  # fmt: skip
        """So many processes of one job, with so many CPU devices each. each: further words of each process."""
        settings = environment | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        if processes > 1:
            settings |= {"LLAVA_JAX_MULTIHOST": "1", "JAX_NUM_PROCESSES": str(processes),
                         "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}  # fmt: skip
        workdirs, configs = ([x] * processes if isinstance(x, Path | str) else x for x in (workdir, config))
        return [
            self.start(configs[i], workdirs[i], *words, *(each[i] if each else ()), **settings, JAX_PROCESS_ID=str(i))
            for i in range(processes)
        ]


@contextlib.contextmanager
def parent(folder: Path) -> Iterator[Parent]:
    """A parent for as long as the block lasts."""
    server = Parent(folder)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def finish(processes: Sequence[Process], code: int = 0) -> list[Ended]:
    """How all of them ended, which must be with this exit code."""
    ended = [process.wait() for process in processes]
    assert [one.code for one in ended] == [code] * len(ended), "\n".join(one.out + one.err[-3000:] for one in ended)
    return ended


def _serve() -> None:
    import jax

    import llava_jax.train.process  # noqa: F401 - all that a start would wait for
    from llava_jax.train import __main__ as command

    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(json.dumps(pid), flush=True)
            continue
        for name, number in (("out", 1), ("err", 2)):
            file = os.open(Path(question["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, number)
        os.environ.update(question["env"])
        for name, value in question["env"].items():  # JAX read its environment when it was imported
            if name.startswith("JAX_") and name.lower() in jax.config.values:
                kind = type(jax.config.values[name.lower()])
                jax.config.update(name.lower(), kind(float(value)) if kind in (int, float) else value)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        signal.signal(signal.SIGTERM, lambda *_: command._nothing_lost())
        code = 1
        try:
            code = command.main(question["argv"])
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # As an interpreter that ends: JAX says goodbye to the other processes.
            if jax.distributed.is_initialized():
                jax.distributed.shutdown()
            os._exit(code)


if __name__ == "__main__":
    _serve()
