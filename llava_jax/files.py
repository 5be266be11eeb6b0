"""Paths that may lie in a bucket (gs://): what is there now, writes that are whole, and stores that do not answer.

A store that answers with a passing error is asked again for a while; what a user can mend is one line.
"""

import errno
import itertools
import logging
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from etils import epath

from llava_jax.errors import MissingFile, Unreachable, UsageError

T = TypeVar("T")

RETRY_SECS = 120.0  # no new attempt begins after it; gcsfs itself repeats each request for about half a minute
LONGEST_WAIT_SECS = 16.0

# gcsfs keeps listings for ever and answers `exists` and `is_dir` from them, while TensorStore and other machines
# write; where TensorFlow is installed, etils would take its client, which raises other exceptions.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("FSSPEC_GS", '{"use_listings_cache": false}')
# TensorStore (Orbax's too) waits for ever on a connection that died without a word; gcsfs gives up after 300 s.
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "60")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
if "fsspec.config" in sys.modules:  # it has read the environment already
    sys.modules["fsspec.config"].conf.setdefault("gs", {})["use_listings_cache"] = False
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs the traceback of what it also raises
_log = logging.getLogger(__name__)

_PASSING_ERRNO = frozenset((
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED,
    errno.EPIPE, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET,
    errno.EREMOTEIO,
))  # fmt: skip
_REFUSED_ERRNO = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))
_DEFINITE_ERRNO = _REFUSED_ERRNO | {errno.ENOSPC, errno.EDQUOT}
# TensorStore 0.1.86 raises ValueError("STATUS: ..."), with the status of abseil and what it stands for in brackets.
_TENSORSTORE = re.compile(r"([A-Z_]+): ")
_OS_ERROR = re.compile(r"\[OS error (\d+)")
_HTTP_CODE = re.compile(r"http_response_code='(\d+)'")
_APPENDED = re.compile(r" \[(tensorstore_spec|http_response_body)='.*?'\]")
_PASSING, _REFUSED = "passing", "refused"
_STATUS = {
    "UNAVAILABLE": _PASSING, "DEADLINE_EXCEEDED": _PASSING, "ABORTED": _PASSING, "CANCELLED": _PASSING,
    "PERMISSION_DENIED": _REFUSED, "UNAUTHENTICATED": _REFUSED,
}  # fmt: skip


def is_bucket(path: epath.PathLike) -> bool:
    """Whether a path lies in a store of objects: no directories of their own, no rename, whole objects only."""
    return "://" in os.fspath(path)


def listed(path: epath.PathLike) -> list[epath.Path]:
    """The entries of a directory, sorted, as they are now; none where there is no such directory.

    (A bucket has no empty directories, and cannot tell one from a directory that was never made.)

    Raises:
      NotADirectoryError: it is a file.
      Unreachable, UsageError: as `retried`.
    """
    path = epath.Path(path)
    try:
        entries = retried(lambda: sorted(path.iterdir()), path)
    except FileNotFoundError:
        return []
    if is_bucket(path) and [entry.name for entry in entries] == [path.name] and not exists(entries[0]):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(path))  # a bucket lists an object
    return entries


def exists(path: epath.PathLike) -> bool:
    """Whether there is such a file or directory now. (etils' `is_dir` says no where a bucket gives any error.)

    Raises:
      Unreachable, UsageError: as `retried`.
    """
    path = epath.Path(path)
    return retried(path.exists, path)


def is_file(path: epath.PathLike) -> bool:
    """Whether there is such a file now. Raises as `exists`."""
    return _is_directory(path) is False


def is_dir(path: epath.PathLike) -> bool:
    """Whether there is such a directory now; one without a file is none in a bucket. Raises as `exists`."""
    return _is_directory(path) is True


def _is_directory(path: epath.PathLike) -> bool | None:
    """None: there is nothing, or what is neither."""
    if not is_bucket(path):
        return False if os.path.isfile(path) else True if os.path.isdir(path) else None
    path = epath.Path(path)
    try:
        return retried(lambda: path.stat().is_directory, path)
    except FileNotFoundError:
        return None


def missing(folder: epath.PathLike, names: Iterable[str]) -> set[str]:
    """The names of which there is no file in a folder. A bucket's folders are listed: that is one request for each
    thousand of names, where looking for a file takes up to three. Raises as `exists`."""
    folder = epath.Path(folder)
    if not is_bucket(folder):
        return {name for name in names if not (folder / name).exists()}
    places = {name: folder / name for name in names}
    there = {entry for parent in {place.parent for place in places.values()} for entry in listed(parent)}
    return {name for name, place in places.items() if place not in there}


def write_whole(path: epath.PathLike, content: bytes, secs: float | None = None) -> None:
    """Writes a file so that a reader finds the old content or the new one, never a part, also after a loss of power.
    Directories above it are made.

    secs: as for `retried`.

    Raises:
      MissingFile: the bucket does not exist.
      Unreachable, UsageError: as `retried`.
    """
    path = epath.Path(path)
    try:
        retried(lambda: _write_object(path, content) if is_bucket(path) else _replace_file(path, content), path, secs)
    except FileNotFoundError as error:
        if not is_bucket(path):
            raise
        raise no_bucket(path) from error


def read(path: epath.PathLike) -> bytes:
    """The whole file. In a bucket this is one request, where etils looks three times before it reads.

    Raises:
      FileNotFoundError: there is none; names it. Unreachable, UsageError: as `retried`.
    """
    return read_range(path, 0, None)


def read_range(path: epath.PathLike, start: int, size: int | None) -> bytes:
    """`size` bytes of a file from `start` on (None: all), fewer where it ends before. In a bucket: one request.

    Raises:
      FileNotFoundError: there is none; names it. Unreachable, UsageError: as `retried`.
    """
    name = os.fspath(path)
    return retried(lambda: (_object_range if is_bucket(name) else _file_range)(name, start, size), name)


def make_directory(path: epath.PathLike) -> None:
    """Makes a directory and those above it. A bucket has none (and etils' `mkdir` would make the bucket itself).

    Raises:
      UsageError: a file lies in its place or above it, or nobody may write there.
    """
    if is_bucket(path):
        return
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{os.fspath(path)}: no directory can be made there ({error.strerror}): name another place, or remove what "
            "is in the way"
        ) from None


def set_aside(path: epath.PathLike) -> epath.Path:
    """Gives a damaged file (on a disk, or a directory in its place) a name that ends in ".damaged"; returns it.

    Raises:
      Unreachable, UsageError: as `retried`.
    """
    path = epath.Path(path)
    names = (f"{path.name}.damaged{number or ''}" for number in itertools.count())
    target = next(place for place in map(path.with_name, names) if not exists(place))
    if is_bucket(path):
        write_whole(target, read(path))
        delete(path)
    else:
        path.rename(target)
    return target


def size_bytes(path: epath.PathLike) -> int:
    """Of a file. (etils' own `stat` fails where a file's owner has no name, as in many containers.)"""
    if not is_bucket(path):
        return os.stat(path).st_size
    path = epath.Path(path)
    return retried(lambda: path.stat().length, path)


def want_disk(path: epath.PathLike, name: str, why: str) -> None:
    """Raises UsageError for a path into a bucket. `name` is the option that holds it."""
    if is_bucket(path):
        raise UsageError(f"{name} {path}: want a path on a disk, as {why}; copy it with `gcloud storage cp -r`")


def delete(path: epath.PathLike) -> None:
    """Deletes a file or a whole directory, where there is one. Raises as `retried`."""
    path = epath.Path(path)
    retried(lambda: path.rmtree(missing_ok=True), path)


def other_store(path: str) -> UsageError:
    """What to raise for a URL, or for a bucket of another store than Google's."""
    scheme = path.partition("://")[0]
    return UsageError(f"a path that begins with {scheme}://: want a path on a disk, or gs://BUCKET/PATH; download it "
                      "first (`hf download ORG/NAME --local-dir DIR` from Hugging Face)")  # fmt: skip


def no_bucket(path: epath.PathLike) -> MissingFile:
    """What to raise where a write says that nothing can be there."""
    bucket = "/".join(os.fspath(path).split("/")[:3])
    return MissingFile(
        f"{path}: there is no bucket {bucket}; make it with `gcloud storage buckets create {bucket}`, or name another"
    )


def retried(call: Callable[[], T], path: epath.PathLike, secs: float | None = None) -> T:
    """What `call` returns; it is called again while the store of `path` gives errors that pass, at most for `secs`
    (None: RETRY_SECS).

    `call` may use etils' paths or TensorStore, and must be fit to be repeated.

    Raises:
      Unreachable: the store gave such errors all the time.
      UsageError: it refuses access, or such a request; or it is not Google's.
      Whatever else `call` raises, such as FileNotFoundError; a disk's refusal and a full disk are OSErrors.
    """
    if is_bucket(path) and not os.fspath(path).startswith("gs://"):
        raise other_store(os.fspath(path))
    begin, wait = time.monotonic(), 0.5
    secs = RETRY_SECS if secs is None else secs
    while True:
        try:
            return call()
        except (OSError, ValueError, *client_errors()) as error:
            kind = fault(error)
            number = _errno_of(error)
            if number in _DEFINITE_ERRNO:
                raise OSError(number, os.strerror(number), os.fspath(path)) from error
            if kind == _REFUSED and is_bucket(path):
                raise UsageError(
                    f"{path}: access is refused ({_line(error)}); give this machine's account the role "
                    "storage.objectUser on the bucket, or log in with `gcloud auth application-default login`"
                ) from error
            if kind != _PASSING and isinstance(error, client_errors()):
                raise UsageError(f"{path}: the store does not accept this ({_line(error)})") from error
            if kind != _PASSING:
                raise
            passed = time.monotonic() - begin
            if passed + wait > secs:
                raise Unreachable(
                    f"{path}: no answer for {passed:.0f} s ({_line(error)}); the same command goes on once it answers"
                ) from error
            if wait == 0.5:
                _log.warning("%s: %s; it is tried again for %.0f s", path, _line(error), secs)
        time.sleep(wait * random.uniform(0.5, 1.0))  # processes that failed together must not come back together
        wait = min(2 * wait, LONGEST_WAIT_SECS)


def fault(error: BaseException) -> str:
    """What an error of a store is: "passing" (the same call may succeed later), "refused", or "" (anything else)."""
    if isinstance(error, Unreachable):
        return ""
    if type(error).__module__.split(".")[0] in ("aiohttp", "gcsfs", "google", "requests"):
        return _of_client(error)
    if isinstance(error, OSError):
        if error.errno is None:  # gcsfs 2026.10.1 makes a plain OSError of 403
            passes = isinstance(error, (ConnectionError, TimeoutError))
            return _PASSING if passes else _REFUSED if str(error).startswith("Forbidden") else ""
        return _of_errno(error.errno)
    status = _TENSORSTORE.match(str(error)) if isinstance(error, ValueError) else None
    if status is None:
        return ""
    if number := _errno_of(error):
        return _of_errno(number)
    if code := _HTTP_CODE.search(str(error)):
        return _of_http(int(code[1]))
    return _STATUS.get(status[1], "")


def _errno_of(error: BaseException) -> int | None:
    """The operating system's error behind one of TensorStore's."""
    number = _OS_ERROR.search(str(error)) if isinstance(error, ValueError) else None
    return int(number[1]) if number else None


def _of_client(error: BaseException) -> str:
    """gcsfs raises HttpError with a `code`, and lets through what aiohttp, requests and google-auth raise."""
    name = type(error).__name__
    if name == "HttpError":
        return _of_http(int(error.code or 0))
    return _REFUSED if name == "DefaultCredentialsError" else _PASSING


def _of_http(code: int) -> str:
    return _PASSING if code in (408, 429) or code >= 500 else _REFUSED if code in (401, 403) else ""


def _of_errno(number: int) -> str:
    return _PASSING if number in _PASSING_ERRNO else _REFUSED if number in _REFUSED_ERRNO else ""


def client_errors() -> tuple[type[Exception], ...]:
    """What gcsfs raises that is neither OSError nor ValueError. The first path into a bucket loads it."""
    if "gcsfs.retry" not in sys.modules:
        return ()
    import gcsfs.retry as client

    others = (client.aiohttp.client_exceptions.ClientError, client.google.auth.exceptions.GoogleAuthError)
    return (client.HttpError, client.ChecksumError, *others)


def _line(error: BaseException) -> str:
    """An error's message as one line, without the specification and the answer's body that TensorStore appends."""
    words = _APPENDED.sub("", str(error))
    return f"{type(error).__name__}: {' '.join(words.split())[:300]}"


def _file_range(name: str, start: int, size: int | None) -> bytes:
    with open(name, "rb") as file:
        file.seek(start)
        return file.read(-1 if size is None else size)


def _object_range(name: str, start: int, size: int | None) -> bytes:
    """Through etils' own client, which can read a part of an object in one request; etils offers no such call."""
    import fsspec  # of the `gcs` extra

    client = fsspec.filesystem("gcs", finalize_on_close=True)
    try:
        return b"" if size == 0 else client.cat_file(name, start or None, None if size is None else start + size)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None
    except client_errors() as error:
        if str(error).endswith("416"):  # it begins where the object ends
            return b""
        raise


def _write_object(path: epath.Path, content: bytes) -> None:
    path.write_bytes(content)


def _replace_file(path: epath.Path, content: bytes) -> None:
    os.makedirs(path.parent, exist_ok=True)
    # Other processes and machines may write the same file at this moment.
    partial = path.parent / f".{path.name}.{os.getpid()}-{time.time_ns()}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a machine that loses power may keep the new name and no content
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
