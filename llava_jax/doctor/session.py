"""Runs the checks on all processes, one after another, and ends all of them with the same exit code.

After each check the processes exchange their lines. A thread reports a process that misses that exchange, because it
hangs or has died, as one FAIL line, and prints the table all the same.
"""

import contextlib
import dataclasses
import os
import platform
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from llava_jax import config as configs
from llava_jax import distributed, files
from llava_jax.doctor import devices, kernels, report, rows, speed, storage, training, trial
from llava_jax.doctor.machine import Machine, detect
from llava_jax.doctor.report import FAIL, Line
from llava_jax.errors import UsageError

TOTAL_SECS = 300.0
START_SECS = 120.0  # for all processes to come together and to find their devices
GRACE_SECS = 20.0  # for the others, after one process has broken off a check that they do together
LATE_SECS = 30.0  # after which the other processes end, where process 0 does not end them
CAUGHT = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
ENVIRONMENT = ("JAX_PLATFORMS", "LIBTPU_INIT_ARGS", "LLAVA_JAX_MULTIHOST", "XLA_FLAGS")  # in the file of --json


class Check(NamedTuple):
    """`run` yields lines, on every process.

    limit_secs: a process that takes longer counts as one that hangs.
    collective: processes wait for each other in it.
    needs: the name of a check; after a FAIL in that one this one is skipped.
    """

    name: str
    run: Callable[[Machine], Iterable[Line]]
    limit_secs: float
    collective: bool = True
    needs: str = ""


CHECKS = (
    Check("devices", devices.check, 30.0),
    Check("rows", rows.check, 60.0),
    Check("kernels", kernels.check, 110.0, collective=False),
    Check("speed", speed.check, 60.0),
    Check("workdir", storage.check, 90.0),
    Check("training", training.check, 240.0, needs="workdir"),
)


def examine(
    sizes: configs.Mesh, workdir: epath.PathLike | None, json_path: epath.PathLike | None,
    checks: Sequence[Check] | None = None,
) -> int:  # fmt: skip
    """Runs the checks (None: all of them); the exit code, which is the same on all processes: 0, or 1 where one fails.

    Raises:
      UsageError: the mesh does not fit the devices, several processes have no workdir, or json_path is no place for a
        file.
    """
    record = Record(json_path)
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(Watch(record).watching())
        watch.expect("start", START_SECS)
        distributed.join()
        if workdir is None and distributed.count() > 1:
            raise UsageError("--workdir is missing: several processes want a directory that all of them share, such as "
                             "gs://BUCKET/doctor")  # fmt: skip
        local = stack.enter_context(tempfile.TemporaryDirectory(prefix="llava_jax-doctor-"))
        machine = detect(sizes, local if workdir is None else workdir, Path(local))
        trial.write_files(machine.local)
        record.begin(machine)
        stack.callback(_delete, machine.folder)
        for check in CHECKS if checks is None else checks:
            watch.expect(check.name, min(check.limit_secs, record.remaining_secs()), check.collective)
            record.add(check.name, _lines(check, machine, record))
        watch.expect("end", LATE_SECS)
        record.add("end", [record.agreement()])
    return record.conclude()


def _lines(check: Check, machine: Machine, record: "Record") -> list[Line]:
    """This process's lines of a check; whether it is done at all is the same on all processes."""
    if check.needs in record.failed:
        return [report.skipped_line(check.name, f"the check of {check.needs} fails")]
    if record.remaining_secs() < check.limit_secs / 2:
        return [report.skipped_line(check.name, f"{TOTAL_SECS:.0f} s are nearly over")]
    lines = list[Line]()
    try:
        for line in check.run(machine):
            lines.append(line)
    except CAUGHT as error:
        message = (str(error).strip().splitlines() or [""])[0][:300]
        lines.append(Line(f"{check.name}: comes to its end", FAIL, f"{type(error).__name__}: {message}", "no exception",
                          "the traceback is in the file of --json; please send it to us",
                          detail=traceback.format_exc(), broken=True))  # fmt: skip
    return lines


def _delete(folder: epath.Path) -> None:
    if distributed.index() == 0:
        with contextlib.suppress(OSError, ValueError):
            files.delete(folder)


class Record:
    """The lines of all processes so far. Process 0 prints them one by one, and writes the file."""

    def __init__(self, json_path: epath.PathLike | None):
        self.begin_secs = time.monotonic()
        self.failed = set[str]()
        self._stdout = sys.stdout  # a check may redirect it
        self._json, self._header = json_path, dict[str, Any]()
        self._hosts, self._lines = [_host()], [list[Line]()]
        self._elapsed_secs, self._exchanges = 0.0, list[float]()

    def begin(self, machine: Machine) -> None:
        """Raises UsageError where the file cannot be written."""
        self._hosts = distributed.exchange("doctor processes", _host())
        self._lines = [list[Line]() for _ in self._hosts]
        chip = machine.chip.name if machine.chip else None
        sizes = dataclasses.asdict(machine.sizes)
        self._header = {"mesh": sizes, "chip": chip, "devices": devices.device_list(machine)}
        fault = ""
        try:
            self._write()
        except (OSError, ValueError) as error:
            fault = f"--json {self._json}: cannot be written ({error}); name a file in a directory that exists"
        if fault := distributed.exchange("doctor file", fault)[0]:
            raise UsageError(fault)

    def remaining_secs(self) -> float:
        """Seconds left of TOTAL_SECS: by process 0's clock, at the last exchange."""
        return TOTAL_SECS - self._elapsed_secs

    def add(self, name: str, lines: Sequence[Line]) -> None:
        """Adds this process's lines of a check and waits for those of all others."""
        begin = time.monotonic()
        answers = distributed.exchange(exchange_of(name), self._own_answer(lines))
        self._exchanges.append(time.monotonic() - begin)
        self.take(name, [[Line(**line) for line in answer["lines"]] for answer in answers])
        self._elapsed_secs = answers[0]["secs"]

    def take(self, name: str, answers: Sequence[Sequence[Line]]) -> None:
        """Adds the lines of all processes."""
        for lines, answer in zip(self._lines, answers, strict=True):
            lines.extend(answer)
        if any(line.verdict == FAIL for answer in answers for line in answer):
            self.failed.add(name)
        for line in report.merge(answers):
            self._print(f"{self._secs():4.0f} s  {line.verdict:7}  {line.check}: {line.figure}")
        self._write()

    def _own_answer(self, lines: Sequence[Line]) -> dict[str, Any]:
        return {"secs": self._secs(), "lines": report.as_json(lines)}

    def agreement(self) -> Line:
        """The line about the processes themselves: all others have answered this process every time."""
        count, slowest = distributed.count(), max(self._exchanges)
        verdict = f"exit code {int(bool(self.failed))} on all"
        figure = f"{count} of {count} answered {len(self._exchanges)} times ({slowest:.1f} s); {verdict}"
        return Line("processes", report.OK, figure, "all of them, each time")

    def conclude(self) -> int:
        """Prints the table; the exit code."""
        lines = report.merge(self._lines)
        self._print(f"\n{report.table(lines)}\n\n{report.summary(lines, self._secs())}")
        return int(report.verdict(lines) == FAIL)

    def _print(self, text: str) -> None:
        if distributed.index() == 0:
            print(text, file=self._stdout, flush=True)

    def _write(self) -> None:
        if self._json is not None and distributed.index() == 0:
            processes = [{**host, "lines": report.as_json(lines)} for host, lines in zip(self._hosts, self._lines)]
            epath.Path(self._json).write_text(report.document(self._header, processes, self._secs()))

    def _secs(self) -> float:
        return time.monotonic() - self.begin_secs


def exchange_of(name: str) -> str:
    """The name of the exchange after a check."""
    return f"doctor lines {name}"


def _host() -> dict[str, Any]:
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return {"process": distributed.index(), "host": socket.gethostname(), "system": platform.platform(),
            "cpus": os.cpu_count(), "environment": environment, "versions": devices.versions()}  # fmt: skip


class Watch:
    """A thread that ends all processes where one of them does not finish a check.

    The thread of process 0 does; those of the others only where process 0 does not.
    """

    def __init__(self, record: Record):
        self._record, self._finished = record, threading.Event()
        self.expect("start", START_SECS)

    def expect(self, name: str, limit_secs: float, collective: bool = True) -> None:
        """A check begins."""
        self._current = (name, time.monotonic(), limit_secs, collective)

    @contextlib.contextmanager
    def watching(self) -> Iterator["Watch"]:
        threading.Thread(target=self._watch, daemon=True, name="doctor").start()
        try:
            yield self
        finally:
            self._finished.set()

    def _watch(self) -> None:
        broken_since = None
        while not self._finished.wait(0.5):
            current = self._current
            name, begin, limit_secs, collective = current
            if distributed.index() and name != "start":
                limit_secs += LATE_SECS
            answers = self._answers(name)
            if not any(line.broken for lines in answers.values() for line in lines):
                broken_since = None
            elif broken_since is None:
                broken_since = time.monotonic()
            late = collective and broken_since is not None and time.monotonic() - broken_since > GRACE_SECS
            if (late or time.monotonic() - begin > limit_secs) and self._current is current:
                self._end(name, time.monotonic() - begin, answers)

    def _answers(self, name: str) -> dict[int, list[Line]]:
        if name == "start" or distributed.index():
            return {}
        answers = distributed.answers(exchange_of(name))
        return {number: [Line(**line) for line in answer["lines"]] for number, answer in answers.items()}

    def _end(self, name: str, secs: float, answers: dict[int, list[Line]]) -> None:
        """Ends all processes from this thread: the main one may never come back."""
        threading.Timer(15, os._exit, (1,)).start()  # where the other processes do not answer
        if name == "start":
            message = (f"FAIL: after {secs:.0f} s the processes have not come together, or a device does not answer. "
                       "Start the command on every process at once; no other program may hold the devices")  # fmt: skip
        elif distributed.index():
            message = f"process 0 does not end the check of {name} after {secs:.0f} s"
        else:
            silent = [number for number in range(distributed.count()) if number not in answers]
            broken = [number for number, lines in answers.items() if any(line.broken for line in lines)]
            awaited = distributed.awaited()
            responsible = broken or ([awaited] if awaited in silent else silent)
            verb = "breaks off" if broken else "does not answer in"
            message = f"process {', '.join(map(str, responsible))} {verb} the check of {name}"
            self._record.take(name, [answers.get(i, [_timeout_line(name, secs)]) for i in range(distributed.count())])
            self._record.conclude()
        distributed.leave(1, message)


def _timeout_line(name: str, secs: float) -> Line:
    trace = "".join("".join(traceback.format_stack(frame)) for frame in sys._current_frames().values())
    return Line(f"{name}: comes to its end", FAIL, f"no answer after {secs:.0f} s", "an answer",
                "see the lines of the other processes; a process that was ended, or that waits for one, cannot answer",
                detail=trace if distributed.count() == 1 else "")  # fmt: skip
