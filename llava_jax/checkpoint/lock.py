"""One run a directory: a small file says who writes there, and a thread renews it while that process lives.

One mechanism serves disks and buckets. A lock whose process is gone is taken over: at once where this machine can see
that it is, else when nobody has renewed it for a while.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from llava_jax import files, lifecycle
from llava_jax.errors import Unreachable, UsageError

FILE = "lock.json"
RENEW_SECS = 15.0
STALE_SECS = 45.0  # without a renewal; longer than a bucket's hiccup


@contextlib.contextmanager
def hold(
    directory: epath.PathLike,
    lost: Callable[[str], Any],
    renew_secs: float = RENEW_SECS,
    stale_secs: float = STALE_SECS,
) -> Iterator[None]:
    """Holds a directory's lock inside the block. Of a run's processes the first alone calls it.

    Where a lock lies there that this machine cannot judge, it waits for `stale_secs` for a sign of life.

    Args:
      lost: called with a message, in a thread, when another run has taken the lock: this process did not renew it in
        time. It must end the run.
      renew_secs, stale_secs: how often the lock is renewed, and after what time without it is taken over.

    Raises:
      UsageError: a run that lives writes to the directory.
      Unreachable, UsageError: as `files.retried`.
    """
    path = epath.Path(directory) / FILE
    mine = _identity() | {"nonce": secrets.token_hex(8), "renewed": 0}
    _take(path, mine, stale_secs)
    over = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, mine, over, renew_secs, lost), daemon=True, name="lock")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5.0)
        with contextlib.suppress(OSError, ValueError):  # who comes next finds that nobody renews it
            if _is_mine(_read(path), mine):
                files.delete(path)


def holder(directory: epath.PathLike, stale_secs: float = STALE_SECS) -> str:
    """Who holds a directory's lock; "" where nobody does. Waits for `stale_secs` where this machine cannot judge."""
    path = epath.Path(directory) / FILE
    found = _read(path)
    lives = found is not None and _lives(found)
    if lives is None:
        lives = _watch(path, found, stale_secs)
    return _who(found) if lives else ""


def _take(path: epath.Path, mine: dict[str, Any], stale_secs: float) -> None:
    holding = holder(path.parent, stale_secs)
    if holding:
        raise _refusal(path, holding)
    _write(path, mine)
    found = _read(path)
    if not _is_mine(found, mine):
        raise _refusal(path, _who(found or {}))


def _watch(path: epath.Path, found: dict[str, Any], stale_secs: float) -> bool:
    """Whether the lock is renewed in that time."""
    print(f"{path.parent}: {_who(found)} may be writing there; waits {stale_secs:.0f} s for a sign of it",
          file=sys.stderr, flush=True)  # fmt: skip
    begin = time.monotonic()
    while time.monotonic() - begin < stale_secs:
        time.sleep(min(1.0, stale_secs / 10))
        lifecycle.beat()
        now = _read(path)
        if now != found:
            return now is not None
    return False


def _renew(
    path: epath.Path, mine: dict[str, Any], over: threading.Event, renew_secs: float, lost: Callable[[str], Any]
) -> None:
    while not over.wait(renew_secs):
        try:
            found = _read(path)
            # A lock that somebody deleted by hand is written anew.
            if found is not None and not _is_mine(found, mine):
                lost(f"{path.parent}: {_who(found)} has taken over this directory, as this run's lock was not renewed "
                     "in time")  # fmt: skip
                return
            mine["renewed"] += 1
            _write(path, mine, renew_secs)
        except (Unreachable, OSError, UsageError) as error:  # saves will meet it too, and say so
            print(f"the lock could not be renewed: {error}", file=sys.stderr, flush=True)


def _refusal(path: epath.Path, holding: str) -> UsageError:
    return UsageError(
        f"--workdir {path.parent}: {holding} is writing here, and two runs cannot share a directory. Wait for its "
        f"end, stop it, or name another directory (if nothing runs there, delete {path})"
    )


def _read(path: epath.Path) -> dict[str, Any] | None:
    """The lock, None where there is none; one that cannot be understood is {}: nobody renews it."""
    try:
        content = json.loads(files.read(path))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: epath.Path, lock: dict[str, Any], secs: float | None = None) -> None:
    content = lock | {"time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
    files.write_whole(path, json.dumps(content, indent=1).encode(), secs)


def _is_mine(found: dict[str, Any] | None, mine: dict[str, Any]) -> bool:
    return found is not None and found.get("nonce") == mine["nonce"]


def _who(found: dict[str, Any]) -> str:
    return (f"process {found.get('pid', '?')} on {found.get('host', '?')} (since {found.get('since', '?')}, renewed "
            f"{found.get('time', '?')})")  # fmt: skip


def _identity() -> dict[str, Any]:
    """Host, process and what tells this process from later ones of the same number."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "namespace": _namespace(), "pid": pid, "started": _started(pid),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}  # fmt: skip


def _lives(found: dict[str, Any]) -> bool | None:
    """Whether the process of a lock lives; None where this machine cannot say: its numbers mean something only here."""
    here = _identity()
    if not found.get("namespace") or any(found.get(key) != here[key] for key in ("host", "namespace")):
        return None
    return isinstance(found.get("pid"), int) and _started(found["pid"]) == found.get("started")


def _namespace() -> str:
    """The set of process numbers that this process is numbered in (a container has its own); "" where unknown."""
    try:
        return os.readlink("/proc/self/ns/pid") + " " + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; "" where there is none. Source: man 5 proc, field 22 of stat."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if status[0] in "ZX" else status[19]  # a zombie writes no more
