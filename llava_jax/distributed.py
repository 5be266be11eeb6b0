"""The processes of one job: what they must agree on, how they stop together, and which rows of a step each one holds.

They talk through the key-value store of `jax.distributed`, not through devices, so that they also understand each
other while a device waits for somebody who will never come. A single process never waits here.
"""

import functools
import itertools
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
from jax._src import distributed as internal

from llava_jax.errors import UsageError

_POLL_SECS = 0.5
_LEAVE_SECS = 10.0  # for the others to hear that a process ends
_WAIT_MS = 24 * 3600 * 1000  # a peer that never comes is the watchdog's affair
_SIGNALS, _END, _STOP = "llava_jax/signals", "end", "stop"

_rounds: dict[str, Iterator[int]] = defaultdict(itertools.count)


def index() -> int:
    """The number of this process, from 0."""
    return internal.global_state.process_id or 0


def count() -> int:
    """How many processes the job has."""
    return internal.global_state.num_processes or 1


def join() -> None:
    """Joins the other processes of this job, where LLAVA_JAX_MULTIHOST=1; on a TPU pod or under Slurm JAX finds them.

    From here on a process that calls `leave` ends all of them.

    Raises:
      UsageError: several processes share the devices and nobody said so.
    """
    if os.environ.get("LLAVA_JAX_MULTIHOST") == "1" and not jax.distributed.is_initialized():
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
    return [json.loads(client.blocking_key_value_get(f"{place}/{i}", _WAIT_MS)) for i in range(count())]


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

    The first that calls it decides the code. `message` is printed by this process, and by process 0 as well.
    """
    _signals().leave(code, message)


class Stop:
    """The step after which all processes stop, once one of them was asked to (`request`, from any thread).

    The processes run in step but not in the same moment: each says which step it is in, and all go on to the latest.
    """

    def __init__(self, first: int):
        """first: the step that comes next."""
        self._signals = _signals()
        self._signals.begin(first)

    def request(self) -> None:
        """Asks all processes to stop soon."""
        self._signals.request()

    def after(self, step: int) -> bool:
        """Whether to stop now that `step` has been given to the device; else the next one is begun."""
        return self._signals.after(step)


class _Signals:
    """What comes from other processes while this one computes: a thread looks for it twice a second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._step, self._requested, self._leaving = 0, False, False
        if count() > 1:
            threading.Thread(target=self._watch, daemon=True, name="signals").start()

    def begin(self, step: int) -> None:
        with self._lock:
            self._step, self._requested = step, False

    def request(self) -> None:
        with self._lock:
            if count() == 1:
                self._requested = True
                return
        self._set(_STOP, "")
        self._hold()

    def after(self, step: int) -> bool:
        with self._lock:
            if not self._requested:
                self._step = step + 1
                return False
        if count() == 1:
            return True
        get = internal.global_state.client.blocking_key_value_get
        return step >= max(int(get(f"{_SIGNALS}-at/{i}", _WAIT_MS)) for i in range(count()))

    def leave(self, code: int, message: str) -> NoReturn:
        if count() == 1:
            _end(code, message)
        with self._lock:
            self._leaving = True  # the thread must not print or end it a second time
        self._set(_END, json.dumps([code, index(), message]))
        first_code, number, _ = json.loads(self._read()[_END])
        _say(message if number == index() else f"{message} (ends with {first_code}, as process {number} does)")
        self._exit(first_code)

    def _watch(self) -> None:
        while True:
            time.sleep(_POLL_SECS)
            try:
                found = self._read()
            except jax.errors.JaxRuntimeError:  # the coordinator is gone: JAX itself ends this process
                return
            if _STOP in found:
                self._hold()
            if _END in found:
                with self._lock:
                    if self._leaving:
                        return
                code, number, message = json.loads(found[_END])
                if index() == 0:
                    _say(f"process {number}: {message}")
                self._exit(code)

    def _read(self) -> dict[str, str]:
        pairs = internal.global_state.client.key_value_dir_get(_SIGNALS)
        return {key.rpartition("/")[2]: value for key, value in pairs}

    def _set(self, name: str, value: str) -> None:
        try:
            internal.global_state.client.key_value_set(f"{_SIGNALS}/{name}", value)
        except jax.errors.JaxRuntimeError:
            if name not in self._read():  # another process was first: its word counts
                raise

    def _hold(self) -> None:
        """Says once which step this process is in, which it does not go beyond before it has heard the others."""
        with self._lock:
            if self._requested:
                return
            self._requested, step = True, self._step
        internal.global_state.client.key_value_set(f"{_SIGNALS}-at/{index()}", str(step))

    def _exit(self, code: int) -> NoReturn:
        """Leaves; process 0, which the others talk through, when they have left or are not expected any more."""
        client = internal.global_state.client
        client.key_value_set(f"{_SIGNALS}-left/{index()}", "")
        end = time.monotonic() + _LEAVE_SECS
        while index() == 0 and time.monotonic() < end and len(client.key_value_dir_get(f"{_SIGNALS}-left")) < count():
            time.sleep(0.05)
        time.sleep(0.5 if index() == 0 else 0)  # between what they say and their end
        _end(code)


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


def row_shards(sharding: jax.sharding.NamedSharding, shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """(which parts of the first dimension the devices of this process hold, into how many it is cut).

    On real machines neighbouring devices of a mesh are not neighbours of a process, and a mesh whose other axes span
    processes gives the same rows to several.

    Raises:
      UsageError: the mesh cuts the dimension into parts of different sizes.
    """
    return parts_of(sharding, shape, lambda device: device.process_index == jax.process_index())


def parts_of(
    sharding: jax.sharding.NamedSharding, shape: Sequence[int], is_local: Callable[[Any], bool]
) -> tuple[tuple[int, ...], int]:
    """`row_shards` of the devices that `is_local` chooses: of another process, or of a topology that is not here."""
    rows = shape[0]
    cuts = {device: place[0].indices(rows)[:2] for device, place in sharding.devices_indices_map(tuple(shape)).items()}
    sizes = {end - start for start, end in cuts.values()}
    if len(sizes) != 1 or rows % (size := next(iter(sizes))):
        raise UsageError(f"{rows} rows: the mesh {dict(sharding.mesh.shape)} does not cut them into equal parts")
    return tuple(sorted({start // size for device, (start, _) in cuts.items() if is_local(device)})), rows // size
