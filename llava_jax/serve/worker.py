"""The thread that owns the model: requests go in through a queue, updates come out on the event loop."""

import asyncio
import gc
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable

from llava_jax.generate.scheduler import Job, Scheduler, Update

WEDGED_SECS = 120.0  # a dispatch that takes longer has hung; a long prompt's page takes a second on a CPU
log = logging.getLogger("llava_jax.serve")


class Ended(Exception):
    """The worker has ended, or is told to, before an answer did."""


class Stream:
    """Where the updates of one request go: to a queue, with the number of its choice; None: there will be no more."""

    def __init__(self, updates: "asyncio.Queue[tuple[int, Update | None]]", choice: int) -> None:
        self._updates, self._choice = updates, choice
        self.ended = False

    def put(self, update: Update | None) -> None:
        """Adds an update, on the event loop."""
        self.ended = self.ended or update is None or bool(update.ended_by)
        self._updates.put_nowait((self._choice, update))


class Worker:
    """Runs a scheduler in a thread of its own.

    make: the scheduler, which allocates the pages. ready: all is compiled. failed: the thread has died by an error.
    active: slots that are taken.
    """

    def __init__(self, make: Callable[[], Scheduler]) -> None:
        self._make = make
        self._inbox: queue.SimpleQueue[tuple[str, Stream | None, Job | None]] = queue.SimpleQueue()
        self._streams: dict[int, Stream] = {}  # of the thread
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.ready = self.failed = self._closed = False
        self.active = 0
        self._step_began: float | None = None

    def start(self, loop: asyncio.AbstractEventLoop, on_failure: Callable[[], None]) -> None:
        """Starts the thread; updates and `on_failure` are called on the loop."""
        self._loop, self._on_failure = loop, on_failure
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its present step; streams that have not ended raise Ended."""
        self._inbox.put(("stop", None, None))
        self._thread.join()

    def submit(self, job: Job, stream: Stream) -> Stream:
        """Puts a job into the queue. Raises Ended. On the event loop, as `cancel`."""
        if self._closed:
            raise Ended
        self._inbox.put(("submit", stream, job))
        return stream

    def cancel(self, stream: Stream) -> None:
        """Frees what a request has, within a step."""
        if not stream.ended:
            stream.ended = True
            self._inbox.put(("cancel", stream, None))

    @property
    def answers(self) -> bool:
        """Whether it takes requests: ready, and not stuck in a step."""
        began = self._step_began
        return self.ready and (began is None or time.monotonic() - began < WEDGED_SECS)

    def _run(self) -> None:
        fine = False
        try:
            scheduler = self._make()
            self._compile(scheduler)
            while self._take(scheduler):
                self._step_began = time.monotonic()
                updates = scheduler.step()
                self._step_began = None
                self.active = scheduler.active
                self._call(_deliver, [(self._streams[number], update) for number, update in updates])
                for number, update in updates:
                    if update.ended_by:
                        del self._streams[number]
            fine = True
        finally:  # of an error threading prints the traceback
            self.ready, self.failed = False, not fine
            self._call(self._close)

    def _compile(self, scheduler: Scheduler) -> None:
        names, start = list[str](), time.monotonic()
        for name in itertools.chain(scheduler.compile(), [""]):
            if names:
                log.info("compiled %d of 3: %s, %.1f s", len(names), names[-1], time.monotonic() - start)
            names.append(name)
            start = time.monotonic()
        gc.freeze()  # what compiling leaves: a collection that looks through it all stops every thread for 0.15 s
        self.ready = True

    def _take(self, scheduler: Scheduler) -> bool:
        """Passes on what came in; waits for it where there is nothing to do. False: the thread shall end."""
        while True:
            try:
                what, stream, job = self._inbox.get(timeout=0 if scheduler.busy else None)
            except queue.Empty:
                return True
            if what == "stop":
                return False
            if job is not None:
                self._streams[scheduler.submit(job)] = stream
                continue
            for number in [number for number, one in self._streams.items() if one is stream]:
                scheduler.cancel(number)
                del self._streams[number]
            self.active = scheduler.active

    def _close(self) -> None:
        """Ends all streams, those of the inbox too."""
        self._closed = True
        while not self._inbox.empty():
            _, stream, job = self._inbox.get()
            if job is not None:
                stream.put(None)
        for stream in self._streams.values():
            stream.put(None)
        if self.failed:
            self._on_failure()

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _deliver(updates: list[tuple[Stream, Update]]) -> None:
    for stream, update in updates:
        stream.put(update)
