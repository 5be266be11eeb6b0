"""The workdir: whether a disk or a bucket has what checkpoints and logs need, checked by all processes at once."""

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
MAX_LISTING_SECS = 5.0  # how long a new or deleted entry may stay unseen before it counts as never
PROBE_SECS = 5.0  # for errors that pass
CLOCK_SECS = 60.0
LEAST_FREE_BYTES = 2**31
SHARED_REMEDY = (
    "want a directory that all hosts share: gs://BUCKET/RUN, or a network disk mounted at the same path on each"
)
_WRITE = "import sys; from llava_jax import files; files.write_whole(sys.argv[1], b'written by another process')"
_DELETE = "import sys; from llava_jax import files; files.delete(sys.argv[1])"


def check(machine: Machine) -> Iterator[Line]:
    """Lines about the workdir. Where some process cannot write there, the first is the only one."""
    folder, file_name = machine.folder, f"{distributed.index()}.bin"
    content = np.random.default_rng(distributed.index()).bytes(FILE_BYTES)
    fault, _ = _attempt(lambda: _write_file(folder / file_name, b""))  # opens the connection, which is not measured
    if not fault:
        fault, secs = _attempt(lambda: _write_file(folder / file_name, content))
    faults = distributed.exchange("doctor written", fault)
    if any(faults):
        remedy = "name another --workdir, or let this user (on Google Cloud: the machine's service account) write there"
        figure = fault or f"process {_first_faulty(faults)} cannot write"
        yield Line("workdir: write", FAIL, figure, "every process writes", remedy)
        return
    yield _speed_line("workdir: write", secs)
    yield _read_line(folder / file_name, content)
    visibility = _visibility_line(folder)
    yield visibility
    if visibility.verdict == FAIL:
        return
    yield from _listing_lines(folder)
    yield _rename_line(folder / f"renamed-{distributed.index()}")
    yield _clock_line(folder / f"clock-{distributed.index()}")
    yield _free_space_line(folder)


def _attempt(call: Callable[[], Any]) -> tuple[str, float]:
    """(what went wrong, or nothing; seconds)."""
    start = time.monotonic()
    try:
        call()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}", 0.0
    return "", time.monotonic() - start


def _write_file(path: epath.Path, content: bytes) -> None:
    files.retried(lambda: None if files.is_bucket(path) else os.makedirs(path.parent, exist_ok=True), path, PROBE_SECS)
    files.retried(lambda: path.write_bytes(content), path, PROBE_SECS)


def _first_faulty(faults: list[str]) -> int:
    return next(i for i, fault in enumerate(faults) if fault)


def _speed_line(name: str, secs: float) -> Line:
    speed = FILE_BYTES / max(secs, 1e-6)
    return report.threshold_line(
        name, speed, f"{speed / 1e6:.3g} MB/s a process", LEAST_BYTES_PER_SEC,
        f"at least {LEAST_BYTES_PER_SEC / 1e6:.0f} MB/s", "want a bucket in the machine's own region, or a faster disk",
    )  # fmt: skip


def _read_line(path: epath.Path, content: bytes) -> Line:
    """Each process reads what it has written."""
    start = time.monotonic()
    content_read = files.retried(path.read_bytes, path, PROBE_SECS)
    secs = time.monotonic() - start
    if content_read != content:
        figure = f"{len(content_read)} bytes, other than the {len(content)} that were written"
        return Line("workdir: read", FAIL, figure, "the same bytes",
                    "this store damages files: name another --workdir")  # fmt: skip
    return _speed_line("workdir: read", secs)


def _visibility_line(folder: epath.Path) -> Line:
    """Every process reads what process 0 and its neighbour have written."""
    name, expectation, count = "workdir: seen by all", "all processes see each other's files", distributed.count()
    if count == 1:
        return report.skipped_line(name, "there is one process")
    missing = []
    for number in {0, (distributed.index() + 1) % count}:
        path = folder / f"{number}.bin"
        fault, _ = _attempt(lambda path=path: files.retried(path.read_bytes, path, PROBE_SECS))
        missing += [number] if fault else []
    everywhere = distributed.exchange("doctor seen", missing)
    blind = [i for i, numbers in enumerate(everywhere) if numbers]
    if blind:
        fault = f"process {blind[0]} does not see what process {everywhere[blind[0]][0]} has written"
        return Line(name, FAIL, fault, expectation, SHARED_REMEDY)
    return Line(name, OK, f"{count} of {count}", expectation)


def _listing_lines(folder: epath.Path) -> Iterator[Line]:
    """Whether a listing shows at once what another process has written and deleted: the last process of several, or
    one started for it. This process has listed before, so that a cache of listings is filled."""
    path = folder / "later"
    for name, program, present in (("workdir: list", _WRITE, True), ("workdir: delete", _DELETE, False)):
        files.listed(folder)
        distributed.exchange(f"doctor before {name}", True)
        if distributed.count() == 1:
            subprocess.run([sys.executable, "-c", program, str(path)], check=True, capture_output=True, timeout=60)
        elif distributed.index() == distributed.count() - 1:
            files.write_whole(path, b"written by another process") if present else files.delete(path)
        distributed.exchange(f"doctor after {name}", True)
        secs = _listing_delay(folder, path.name, present)
        distributed.exchange(f"doctor through {name}", True)
        yield _listing_line(name, secs, "a new file" if present else "a deleted file", "seen" if present else "gone")


def _listing_delay(folder: epath.Path, name: str, present: bool) -> float | None:
    """Seconds until the listing is right; None: it was wrong all the time."""
    start = time.monotonic()
    while time.monotonic() - start < MAX_LISTING_SECS:
        if (name in {entry.name for entry in files.listed(folder)}) == present:
            return time.monotonic() - start
        time.sleep(0.1)
    return None


def _listing_line(name: str, secs: float | None, file_text: str, state: str) -> Line:
    expectation = f"{file_text} of another process is {state} at once"
    remedy = ("listings of this store are stale: unset use_listings_cache in FSSPEC_GS; mount a network disk with "
              "lookupcache=none and actimeo=0")  # fmt: skip
    if secs is None:
        return Line(name, FAIL, f"{file_text} is not {state} after {MAX_LISTING_SECS:.0f} s", expectation, remedy)
    late = secs > 1.0
    return Line(name, WARN if late else OK, f"{state} after {secs:.2f} s", expectation, remedy if late else "")


def _rename_line(path: epath.Path) -> Line:
    """Directories are renamed once they are complete, and a file replaces another."""
    name, expectation = "workdir: rename", "a directory and a file take a new name, whole"
    if files.is_bucket(path):
        return report.skipped_line(name, "nothing is renamed in a bucket")
    target = path.with_name(f"{path.name}-final")

    def rename() -> None:
        for directory, text in ((path, "new"), (target, "old")):
            directory.mkdir(parents=True)
            (directory / "file").write_text(text)
        (path / "file").replace(target / "file")
        path.rename(path.with_name(f"{path.name}-moved"))

    fault, _ = _attempt(rename)
    if not fault and ((target / "file").read_text() != "new" or path.exists()):
        fault = "the old name or the old content is still there"
    if fault:
        remedy = "want a disk with POSIX renames, or gs:// in place of a mounted bucket"
        return Line(name, FAIL, fault, expectation, remedy)
    return Line(name, OK, "both", expectation)


def _clock_line(path: epath.Path) -> Line:
    """The store's clock against this machine's: the modification time of a new file."""
    before = time.time()
    files.write_whole(path, b"now")
    after = time.time()
    stamp = float(path.stat().mtime) if files.is_bucket(path) else os.stat(path).st_mtime
    difference_secs = max(0.0, before - stamp - 2.0, stamp - after - 2.0)  # some stores count whole seconds, or two
    good = difference_secs <= CLOCK_SECS
    remedy = "" if good else "synchronise this host's clock (chrony): tokens and locks are dated"
    return Line("workdir: clock", OK if good else WARN, f"{difference_secs:.1f} s from this machine's",
                f"at most {CLOCK_SECS:.0f} s", remedy, -difference_secs)  # fmt: skip


def _free_space_line(folder: epath.Path) -> Line:
    if files.is_bucket(folder):
        return report.skipped_line("workdir: free space", "a bucket has no end")
    free = shutil.disk_usage(folder).free
    return report.threshold_line(
        "workdir: free space", free, f"{free / 1e9:.3g} GB", LEAST_FREE_BYTES,
        f"at least {LEAST_FREE_BYTES / 1e9:.1f} GB; a save of the 7B's stage 2 takes 80",
        "free some, or name another --workdir",
    )  # fmt: skip
