"""The workdir: whether a disk or a bucket does what checkpoints and logs need of it, for all processes at once."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from llava_jax import distributed, files
from llava_jax.doctor import report
from llava_jax.doctor.machine import Machine
from llava_jax.doctor.report import FAIL, OK, WARN, Line

FILE_BYTES = 2**23
LEAST_BYTES_PER_SEC = 5e6  # of a process; a slower store takes an hour and more for what one host saves of a 7B
LISTED_SECS = 5.0  # how long a new or deleted entry may stay unseen before it counts as never
PROBE_SECS = 5.0  # for errors that pass
CLOCK_SECS = 60.0
LEAST_FREE_BYTES = 2**31
SHARED = ("want a directory that all hosts share: gs://BUCKET/RUN, or a network disk mounted at the same path on each")
_WRITE = "import sys; from llava_jax import files; files.write_whole(sys.argv[1], b'written by another process')"
_DELETE = "import sys; from llava_jax import files; files.delete(sys.argv[1])"


def check(found: Machine) -> Iterator[Line]:
    """Lines about the workdir. Where some process cannot write there, the first is the only one."""
    folder, mine = found.folder, f"{distributed.index()}.bin"
    content = np.random.default_rng(distributed.index()).bytes(FILE_BYTES)
    fault, _ = _tried(lambda: _written(folder / mine, b""))  # its connection and its caches are not what is measured
    if not fault:
        fault, secs = _tried(lambda: _written(folder / mine, content))
    faults = distributed.exchange("doctor written", fault)
    if any(faults):
        remedy = "name another --workdir, or let this user (on Google Cloud: the machine's service account) write there"
        yield Line("workdir: write", FAIL, fault or f"process {_first(faults)} cannot write", "every process writes",
                   remedy)  # fmt: skip
        return
    yield _speed("workdir: write", secs)
    yield _read(folder / mine, content)
    seen = _seen(folder)
    yield seen
    if seen.verdict == FAIL:
        return
    yield from _listings(folder)
    yield _renamed(folder / f"renamed-{distributed.index()}")
    yield _clock(folder / f"clock-{distributed.index()}")
    yield _free(folder)


def _tried(call: Callable[[], Any]) -> tuple[str, float]:
    """(what went wrong, or nothing; seconds)."""
    begin = time.monotonic()
    try:
        call()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}", 0.0
    return "", time.monotonic() - begin


def _written(path: epath.Path, content: bytes) -> None:
    files.retried(lambda: None if files.is_bucket(path) else os.makedirs(path.parent, exist_ok=True), path, PROBE_SECS)
    files.retried(lambda: path.write_bytes(content), path, PROBE_SECS)


def _first(faults: list[str]) -> int:
    return next(i for i, fault in enumerate(faults) if fault)


def _speed(name: str, secs: float) -> Line:
    speed = FILE_BYTES / max(secs, 1e-6)
    return report.against(
        name, speed, f"{speed / 1e6:.3g} MB/s a process", LEAST_BYTES_PER_SEC,
        f"at least {LEAST_BYTES_PER_SEC / 1e6:.0f} MB/s", "want a bucket in the machine's own region, or a faster disk",
    )  # fmt: skip


def _read(path: epath.Path, content: bytes) -> Line:
    """Each process reads what it has written."""
    begin = time.monotonic()
    found = files.retried(path.read_bytes, path, PROBE_SECS)
    secs = time.monotonic() - begin
    if found != content:
        return Line("workdir: read", FAIL, f"{len(found)} bytes, other than the {len(content)} that were written",
                    "the same bytes", "this store damages files: name another --workdir")  # fmt: skip
    return _speed("workdir: read", secs)


def _seen(folder: epath.Path) -> Line:
    """Every process reads what process 0 and its neighbour have written."""
    name, expectation, count = "workdir: seen by all", "all processes see each other's files", distributed.count()
    if count == 1:
        return report.skipped(name, "there is one process")
    missing = []
    for number in {0, (distributed.index() + 1) % count}:
        path = folder / f"{number}.bin"
        fault, _ = _tried(lambda path=path: files.retried(path.read_bytes, path, PROBE_SECS))
        missing += [number] if fault else []
    everywhere = distributed.exchange("doctor seen", missing)
    blind = [i for i, numbers in enumerate(everywhere) if numbers]
    if blind:
        fault = f"process {blind[0]} does not see what process {everywhere[blind[0]][0]} has written"
        return Line(name, FAIL, fault, expectation, SHARED)
    return Line(name, OK, f"{count} of {count}", expectation)


def _listings(folder: epath.Path) -> Iterator[Line]:
    """Whether a listing shows at once what somebody else has written and deleted: the last process of several, or a
    process that is started for it. This process has listed before, so that whatever remembers listings does."""
    path = folder / "later"
    for name, program, present in (("workdir: list", _WRITE, True), ("workdir: delete", _DELETE, False)):
        files.listed(folder)
        distributed.exchange(f"doctor before {name}", True)
        if distributed.count() == 1:
            subprocess.run([sys.executable, "-c", program, str(path)], check=True, capture_output=True, timeout=60)
        elif distributed.index() == distributed.count() - 1:
            files.write_whole(path, b"written by another process") if present else files.delete(path)
        distributed.exchange(f"doctor after {name}", True)
        secs = _until_listed(folder, path.name, present)
        distributed.exchange(f"doctor through {name}", True)
        yield _listing(name, secs, "a new file" if present else "a deleted file", "seen" if present else "gone")


def _until_listed(folder: epath.Path, name: str, present: bool) -> float | None:
    """Seconds until the listing is right; None: it was wrong all the time."""
    begin = time.monotonic()
    while time.monotonic() - begin < LISTED_SECS:
        if (name in {entry.name for entry in files.listed(folder)}) == present:
            return time.monotonic() - begin
        time.sleep(0.1)
    return None


def _listing(name: str, secs: float | None, what: str, state: str) -> Line:
    expectation = f"{what} of another process is {state} at once"
    remedy = ("listings of this store are stale: unset use_listings_cache in FSSPEC_GS; mount a network disk with "
              "lookupcache=none and actimeo=0")  # fmt: skip
    if secs is None:
        return Line(name, FAIL, f"{what} is not {state} after {LISTED_SECS:.0f} s", expectation, remedy)
    late = secs > 1.0
    return Line(name, WARN if late else OK, f"{state} after {secs:.2f} s", expectation, remedy if late else "")


def _renamed(path: epath.Path) -> Line:
    """Directories get their final name when they are whole, and a file replaces another."""
    name, expectation = "workdir: rename", "a directory and a file take a new name, whole"
    if files.is_bucket(path):
        return report.skipped(name, "nothing is renamed in a bucket")
    target = path.with_name(f"{path.name}-final")

    def rename() -> None:
        for directory, text in ((path, "new"), (target, "old")):
            directory.mkdir(parents=True)
            (directory / "file").write_text(text)
        (path / "file").replace(target / "file")
        path.rename(path.with_name(f"{path.name}-moved"))

    fault, _ = _tried(rename)
    if not fault and ((target / "file").read_text() != "new" or path.exists()):
        fault = "the old name or the old content is still there"
    if fault:
        remedy = "want a disk with POSIX renames, or gs:// in place of a mounted bucket"
        return Line(name, FAIL, fault, expectation, remedy)
    return Line(name, OK, "both", expectation)


def _clock(path: epath.Path) -> Line:
    """The store's clock against this machine's: when a file is said to have been written."""
    before = time.time()
    files.write_whole(path, b"now")
    after = time.time()
    stamp = float(path.stat().mtime) if files.is_bucket(path) else os.stat(path).st_mtime
    apart = max(0.0, before - stamp - 2.0, stamp - after - 2.0)  # some stores count whole seconds, or two
    good = apart <= CLOCK_SECS
    remedy = "" if good else "synchronise this host's clock (chrony): tokens and locks are dated"
    return Line("workdir: clock", OK if good else WARN, f"{apart:.1f} s from this machine's",
                f"at most {CLOCK_SECS:.0f} s", remedy, -apart)  # fmt: skip


def _free(folder: epath.Path) -> Line:
    if files.is_bucket(folder):
        return report.skipped("workdir: free space", "a bucket has no end")
    free = shutil.disk_usage(folder).free
    return report.against(
        "workdir: free space", free, f"{free / 1e9:.3g} GB", LEAST_FREE_BYTES,
        f"at least {LEAST_FREE_BYTES / 1e9:.1f} GB; a save of the 7B's stage 2 takes 80",
        "free some, or name another --workdir",
    )  # fmt: skip
