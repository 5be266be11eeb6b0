"""How a process ends that does not come to its end by itself: SIGTERM, and a watchdog for one that is stuck.

Nothing here imports JAX, so that a command listens to SIGTERM before it imports anything large.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from llava_jax import errors

WATCHDOG_SECS = 1800.0  # longer than any compilation or collective should take


class Sigterm:
    """What SIGTERM does. A thread hears it, as Python's own handlers wait while the main thread compiles.

    received: whether it came.
    """

    def __init__(self) -> None:
        self.received = threading.Event()
        self._lock = threading.Lock()
        self._action: Callable[[], None] | None = None

    def react(self, action: Callable[[], None] | None) -> None:
        """Sets what is called, in the listening thread, when SIGTERM comes, or at once if it came before."""
        with self._lock:
            self._action = action
        if action is not None and self.received.is_set():
            action()

    def _hear(self) -> None:
        with self._lock:
            first, action = not self.received.is_set(), self._action
            self.received.set()
        if first and action is not None:
            action()


@contextlib.contextmanager
def sigterm(action: Callable[[], None] | None = None) -> Iterator[Sigterm]:
    """Listens to SIGTERM inside the block; in a thread other than the main one it hears nothing (Python's rule).

    action: the first `Sigterm.react`.
    """
    notice = Sigterm()
    notice.react(action)
    if threading.current_thread() is not threading.main_thread():
        yield notice
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def listen() -> None:
        while number := reader.recv(1):
            if number[0] == signal.SIGTERM:
                notice._hear()

    threading.Thread(target=listen, daemon=True, name="sigterm").start()
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield notice
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        writer.close()


class Watchdog:
    """Ends this process when `beat` was not called for a while: a process that hangs is noticed by nobody else.

    JAX's own heartbeats come from a thread that lives on (jax issue 38503).
    """

    def __init__(self) -> None:
        self._last = time.monotonic()

    def beat(self) -> None:
        """Says that something has been done."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def watching(self, limit_secs: float, stuck: Callable[[int, str], None]) -> Iterator[None]:
        """After `limit_secs` without a beat all stacks are printed and `stuck(42, message)` must end the process."""
        over = threading.Event()
        self.beat()

        def watch() -> None:
            while not over.wait(min(1.0, limit_secs / 4)):
                if time.monotonic() - self._last > limit_secs:
                    message = f"nothing has happened for {limit_secs:.0f} s (train.watchdog_secs)"
                    print(f"{message}: all threads' stacks follow", file=sys.stderr, flush=True)
                    faulthandler.dump_traceback(all_threads=True)
                    threading.Timer(10, os._exit, (errors.STUCK,)).start()  # where the other processes do not answer
                    stuck(errors.STUCK, message)

        threading.Thread(target=watch, daemon=True, name="watchdog").start()
        try:
            yield
        finally:
            over.set()


WATCHDOG = Watchdog()  # of this process: whoever does something that takes long beats it


def beat() -> None:
    """Says to this process's watchdog that something has been done."""
    WATCHDOG.beat()
