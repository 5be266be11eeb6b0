"""The processes of one job: what they must agree on, how they stop together, and which rows of a step each one holds.

They talk through the key-value store of `jax.distributed`, not through devices, so that they also understand each
other while a device waits for somebody who will never come. A single process never waits here.
"""

import contextlib
import functools
import itertools
import json
import os
import sys
import threading
import time
import traceback
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
from etils import epath
from jax._src import distributed as internal

from llava_jax import errors, files
from llava_jax.errors import UsageError

_POLL_SECS = 0.5
_LEAVE_SECS = 10.0  # for the others to hear that a process ends
_WAIT_MS = 24 * 3600 * 1000  # a peer that never comes is the watchdog's affair
_SIGNALS, _POINTS, _LEFT = "llava_jax/signals", "llava_jax/points", "llava_jax/left"
_END, _STOP = "end", "stop"

_rounds: dict[str, Iterator[int]] = defaultdict(itertools.count)
_awaited: list[int] = []


def index() -> int:
    """The number of this process, from 0."""
    return internal.global_state.process_id or 0


def count() -> int:
    """How many processes the job has."""
    return internal.global_state.num_processes or 1


def joins() -> bool:
    """Whether the environment says that this process is one of several."""
    return os.environ.get("LLAVA_JAX_MULTIHOST") == "1"


def join() -> None:
    """Joins the other processes of this job, where LLAVA_JAX_MULTIHOST=1; on a TPU pod or under Slurm JAX finds them.

    From here on a process that calls `leave` ends all of them.

    Raises:
      UsageError: several processes share the devices and nobody said so.
    """
    if joins() and not jax.distributed.is_initialized():
        jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, which `lifecycle` hears
        processes, number = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(num_processes=processes and int(processes), process_id=number and int(number))
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UsageError(f"{jax.process_count()} processes share these devices: set LLAVA_JAX_MULTIHOST=1 on each, "
                         "so that they agree on what they do and where they stop")  # fmt: skip
    if count() > 1:
        _signals()


def exchange(name: str, value: Any) -> list[Any]:
    """The JSON value of every process, in their order. All must call it, with the same names in the same order."""
    if count() == 1:
        return [value]
    place = f"llava_jax/exchange/{name}/{next(_rounds[name])}"
    client = internal.global_state.client
    client.key_value_set(f"{place}/{index()}", json.dumps(value))
    values = list[Any]()
    for number in range(count()):
        _awaited[:] = [number]
        values.append(json.loads(client.blocking_key_value_get(f"{place}/{number}", _WAIT_MS)))
    _awaited.clear()
    return values


def awaited() -> int | None:
    """The process that `exchange` waits for here, for another thread that asks; None: this process waits for none."""
    return next(iter(_awaited), None)


def answers(name: str) -> dict[int, Any]:
    """{process: value} of the first `exchange` of that name, of those that have called it by now; waits for nobody."""
    if count() == 1:
        return {}
    pairs = internal.global_state.client.key_value_dir_get(f"llava_jax/exchange/{name}/0")
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in pairs}


def agree(values: Mapping[str, Any]) -> None:
    """Compares values that must be the same on all processes.

    Raises:
      UsageError: on all of them; names what differs, its values and the process.
    """
    everywhere = exchange("agree", values)
    for number, others in enumerate(everywhere[1:], 1):
        for key in {**everywhere[0], **others}:
            first, other = (one.get(key, "nothing") for one in (everywhere[0], others))
            if first != other:
                raise UsageError(
                    f"{key} is {_brief(first)} on process 0 and {_brief(other)} on process {number} of {count()}: all "
                    "processes of a run want the same command, code, data and --workdir"
                )


def leave(code: int, message: str) -> NoReturn:
    """Ends every process of the job with the same exit code, at once and without any barrier.

    The first that calls it decides the code and the message, which process 0 prints.
    """
    _signals().leave(code, message)


def end_together(
    workdir: epath.Path, kind: type[BaseException] | None, error: BaseException | None,
    trace: types.TracebackType | None,
) -> bool:  # fmt: skip
    """Ends the other processes where this one fails; writes down, in WORKDIR/error-PROCESS.txt, what no message of ours
    explains. An exit callback of `contextlib.ExitStack`, with a workdir; a single process goes on with its exception.
    """
    if error is None or isinstance(error, KeyboardInterrupt | SystemExit):
        return False
    code = errors.exit_code(error)
    message = f"error: {error}"
    if code is None and not is_ending():
        code, place = errors.CRASHED, workdir / f"error-{index()}.txt"
        text = "".join(traceback.format_exception(kind, error, trace))
        with contextlib.suppress(OSError, ValueError, *files.client_errors()):  # the disk may be what is wrong
            place.write_text(text)
            message = f"error: {type(error).__name__}, a fault of the program or a library; traceback: {place}"
        if count() > 1:
            print(text, file=sys.stderr, flush=True)
    if count() > 1:
        leave(errors.CRASHED if code is None else code, message)
    return False


def is_ending() -> bool:
    """Whether some process has ended the job: what fails here from then on fails because of that."""
    return count() > 1 and _signals().is_ending()


class Stop:
    """Where all processes stop, once one of them was asked to (`request`, from any thread).

    All processes pass the same points, such as the ends of steps, though not in the same moment: each says which it
    has come to, and all go on to the latest.
    """

    def __init__(self) -> None:
        self._signals = _signals() if count() > 1 else _Signals()  # runs of one process know nothing of each other
        self._signals.begin()
        self._fault: Exception | None = None

    def request(self) -> None:
        """Asks all processes to stop soon."""
        self._signals.request()

    def fail(self, fault: Exception) -> None:
        """Makes the next `point` of this process raise the exception; from any thread."""
        self._fault = fault

    def point(self) -> bool:
        """Whether to stop here. All processes must call it as often; once True it stays True."""
        if self._fault is not None:
            raise self._fault
        return self._signals.point()


class _Signals:
    """What comes from other processes while this one computes: a thread looks for it twice a second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._round, self._points, self._requested, self._stopped = 0, 0, False, False
        self._exiting = threading.Lock()
        if count() > 1:
            threading.Thread(target=self._watch, daemon=True, name="signals").start()

    def begin(self) -> None:
        """Begins the next round: a stop that was asked for in an earlier one is over."""
        with self._lock:
            self._round += 1
            self._points, self._requested, self._stopped = 0, False, False

    def request(self) -> None:
        number = self._round
        if count() > 1:
            self._set(f"{_STOP}-{number}", "")
        self._hold(number)

    def point(self) -> bool:
        with self._lock:
            if not self._requested:
                self._points += 1
                return False
        if not self._stopped:
            last = max(map(int, self._gathered())) if count() > 1 else self._points
            self._stopped = self._points >= last
            self._points += 1
        return self._stopped

    def is_ending(self) -> bool:
        try:
            return _END in self._read(_SIGNALS)
        except jax.errors.JaxRuntimeError:  # process 0 does not answer
            return False

    def leave(self, code: int, message: str) -> NoReturn:
        if count() == 1:
            _end(code, message)
        # Where process 0 does not answer, nobody can be told.
        threading.Timer(_LEAVE_SECS + 3, os._exit, (code,)).start()
        self._set(_END, json.dumps([code, index(), message]))
        self._exit(*json.loads(self._read(_SIGNALS)[_END]))

    def _watch(self) -> None:
        while True:
            time.sleep(_POLL_SECS)
            try:
                signals = self._read(_SIGNALS)
            except jax.errors.JaxRuntimeError:  # the coordinator is gone: JAX itself ends this process
                return
            number = self._round
            if f"{_STOP}-{number}" in signals:
                self._hold(number)
            if _END in signals:
                self._exit(*json.loads(signals[_END]))

    def _read(self, place: str) -> dict[str, str]:
        pairs = internal.global_state.client.key_value_dir_get(place)
        return {key.rpartition("/")[2]: value for key, value in pairs}

    def _set(self, name: str, value: str) -> None:
        try:
            internal.global_state.client.key_value_set(f"{_SIGNALS}/{name}", value)
        except jax.errors.JaxRuntimeError:
            if name not in self._read(_SIGNALS):  # else another process was first: its word counts
                raise

    def _hold(self, number: int) -> None:
        """Says once which point this process comes to next, which it does not pass before it has heard the others.

        number: of the round that is to stop; one that is over is not.
        """
        with self._lock:
            if self._requested or number != self._round:
                return
            self._requested, points = True, self._points
        if count() > 1:
            internal.global_state.client.key_value_set(f"{_POINTS}/{number}/{index()}", str(points))

    def _gathered(self) -> list[str]:
        get = internal.global_state.client.blocking_key_value_get
        return [get(f"{_POINTS}/{self._round}/{number}", _WAIT_MS) for number in range(count())]

    def _exit(self, code: int, number: int, message: str) -> NoReturn:
        """Ends this process. Process 0 speaks for all of them, and stays until the others have gone: they need it."""
        client = internal.global_state.client
        self._exiting.acquire()  # a second thread that comes here waits for the end
        if index() == 0:
            _say(message if number == 0 else f"process {number} of {count()}: {message}")
        client.key_value_set(f"{_LEFT}/{index()}", "")
        expected = count() if index() == 0 else 1
        end = time.monotonic() + _LEAVE_SECS
        while time.monotonic() < end:
            left = self._read(_LEFT)
            if len(left) == expected or (index() and "0" in left):
                time.sleep(0.5 if index() == 0 else 0)  # from what the others say to their end
                _end(code)
            time.sleep(0.05)
        _end(code, message if index() and number == index() else "")


@functools.cache
def _signals() -> _Signals:
    return _Signals()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _end(code: int, message: str = "") -> NoReturn:
    if message:
        _say(message)
    sys.stdout.flush()
    os._exit(code)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Rows(NamedTuple):
    """The rows of a step that one process holds, in parts of equal size.

    places: which parts of the pipeline's step, ascending. shards: the part of the global array that each becomes.
    of: parts of a step.
    """

    places: tuple[int, ...] = (0,)
    shards: tuple[int, ...] = (0,)
    of: int = 1


WHOLE = Rows()  # of a single process


def rows(held: Mapping[Any, tuple[slice, ...]], size: int, process: int | None = None) -> Rows:
    """What a process (None: this one) loads of a step of `size` rows.

    held: {device: index of its part}, as `sharding.devices_indices_map(shape)` says.

    Neighbouring devices of a real mesh are not neighbours of a process, and where other axes span processes several
    hold the same rows. The pipeline's parts are dealt to the processes in order, so each reads neighbours.
    """
    holders = dict[int, set[int]]()
    for device, part in held.items():
        start, end, _ = part[0].indices(size)
        holders.setdefault(start, set()).add(device.process_index)
        assert size % (end - start) == 0, part  # `sharding._fit` cuts nothing into unequal parts
    starts = sorted(holders)
    order = sorted(starts, key=lambda start: (min(holders[start]), start))
    process = jax.process_index() if process is None else process
    pairs = [(place, starts.index(start)) for place, start in enumerate(order) if process in holders[start]]
    return Rows(tuple(place for place, _ in pairs), tuple(shard for _, shard in pairs), len(starts))


class SharedSet:
    """A set of whole numbers that every process adds to, without waiting for any other."""

    def __init__(self, name: str, values: Iterable[int] = ()):
        """All processes make it, in the same order, with the same values."""
        self._place = f"llava_jax/sets/{name}/{next(_rounds[name])}"
        self._local, self._common = set[int](), set(values)

    def add(self, value: int) -> None:
        """Adds a value, which the others see from now on."""
        if value not in self._local:
            self._local.add(value)
            if count() > 1:
                internal.global_state.client.key_value_set(f"{self._place}/{value}-{index()}", "")

    def values(self) -> set[int]:
        """What all processes have added so far."""
        if count() == 1:
            return self._common | self._local
        names = (key.rpartition("/")[2] for key, _ in internal.global_state.client.key_value_dir_get(self._place))
        return self._common | {int(name.partition("-")[0]) for name in names}

    def agreed(self) -> list[int]:
        """What all processes have added before each of them called this; the same on all, ascending."""
        return sorted(set().union(self._common, *exchange("set", sorted(self._local))))
