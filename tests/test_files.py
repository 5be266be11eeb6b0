import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tensorstore
from aiohttp import ServerDisconnectedError
from etils import epath
from gcsfs.retry import HttpError
from google.auth.exceptions import DefaultCredentialsError
from requests.exceptions import ProxyError

from llava_jax import files
from llava_jax.errors import MissingFile, Unreachable, UsageError
from tests import buckets


def _store(path: str) -> tensorstore.KvStore:
    bucket, _, inside = path.removeprefix("gs://").partition("/")
    retries = {"max_retries": 1, "initial_delay": "10ms", "max_delay": "10ms"}
    spec = {"driver": "gcs", "bucket": bucket, "path": f"{inside}/", "gcs_request_retries": retries}
    return tensorstore.KvStore.open(spec).result()


def _first(count, status):
    """A plan that answers the first `count` requests with a status, and passes the others on."""
    left, lock = [count], threading.Lock()

    def plan(method, path):
        with lock:
            left[0] -= 1
            return status if left[0] >= 0 else None

    return plan


def test_a_directory_that_is_not_there_has_no_entries(place):
    assert files.listed(place / "nothing" / "here") == []


def test_a_write_is_whole_and_listed_without_leftovers(place):
    files.write_whole(place / "a" / "f.json", b"old")
    files.write_whole(place / "a" / "f.json", b"new")
    assert (place / "a" / "f.json").read_bytes() == b"new"
    assert files.listed(place / "a") == [place / "a" / "f.json"]


def test_delete_removes_a_file_a_tree_and_what_is_not_there(place):
    (place / "a" / "b").mkdir(parents=True)
    for name in ("a/f", "a/b/g", "h"):
        files.write_whole(place / name, b"1")
    for name in ("a", "h", "never"):
        files.delete(place / name)
    assert files.listed(place) == []


def test_a_listing_shows_what_another_client_wrote(bucket):
    files.write_whole(f"{bucket}/run/a", b"1")
    assert [entry.name for entry in files.listed(f"{bucket}/run")] == ["a"]
    _store(f"{bucket}/run").write("b", b"2").result()
    assert [entry.name for entry in files.listed(f"{bucket}/run")] == ["a", "b"]
    assert epath.Path(f"{bucket}/run/b").exists()
    _store(f"{bucket}/run").write("a", None).result()
    assert not epath.Path(f"{bucket}/run/a").exists()


def test_fsspec_that_was_imported_before_keeps_no_listings_either():
    code = """
import fsspec
from llava_jax import files
import gcsfs
assert gcsfs.GCSFileSystem(token="anon").dircache.use_listings_cache is False
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=120)


@pytest.mark.parametrize("status", [503, 0])
def test_an_error_that_passes_costs_only_time(bucket, bucket_proxy, status):
    path = epath.Path(bucket) / "run" / "f"
    files.write_whole(path, b"1")
    with buckets.faults(bucket_proxy, _first(1, status)):
        assert files.retried(path.read_bytes, path) == b"1"
    with buckets.faults(bucket_proxy, _first(1, status)):
        assert files.listed(path.parent) == [path]
    with buckets.faults(bucket_proxy, _first(3, status)):
        assert files.retried(lambda: _store(f"{bucket}/run").read("f").result().value, path) == b"1"


def test_a_store_that_never_answers_is_named_with_its_last_error(bucket, bucket_proxy):
    with buckets.faults(bucket_proxy, lambda method, path: 503):
        with pytest.raises(Unreachable, match=f"{bucket}/run: no answer for .*503.*goes on once it answers"):
            files.retried(lambda: _store(f"{bucket}/run").read("f").result(), f"{bucket}/run", secs=0.0)


@pytest.mark.parametrize("status", [401, 403])
def test_refused_access_is_one_line_at_once(bucket, bucket_proxy, status):
    path = epath.Path(bucket) / "run" / "f"
    calls = [
        path.read_bytes, lambda: files.listed(path), lambda: files.write_whole(path, b"1"),
        lambda: _store(f"{bucket}/run").read("f").result(), lambda: _store(f"{bucket}/run").write("f", b"1").result(),
    ]  # fmt: skip
    with buckets.faults(bucket_proxy, lambda method, path: status):
        for call in calls:
            with pytest.raises(UsageError, match=f"{bucket}/run.*access is refused.*gcloud auth"):
                files.retried(call, path)


def test_a_request_that_the_store_does_not_accept_is_one_line(bucket, bucket_proxy):
    with buckets.faults(bucket_proxy, lambda method, path: 400):
        with pytest.raises(UsageError, match=f"{bucket}/f: the store does not accept this .*400"):
            files.write_whole(f"{bucket}/f", b"1")


def test_a_bucket_that_does_not_exist_is_empty_and_refuses_writes(bucket_server):
    assert files.listed("gs://no-such-bucket/run") == []
    with pytest.raises(MissingFile, match="no bucket gs://no-such-bucket; make it with"):
        files.write_whole("gs://no-such-bucket/run/f", b"1")


def test_a_disk_that_fails_for_a_moment_is_asked_again():
    answers = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle"), b"1"]

    def read():
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert files.retried(read, "/mnt/a") == b"1"


def test_a_file_has_no_entries(place):
    files.write_whole(place / "file", b"1")
    with pytest.raises(NotADirectoryError):
        files.listed(place / "file")
    (place / "same").mkdir()
    files.write_whole(place / "same" / "same", b"1")
    assert files.listed(place / "same") == [place / "same" / "same"]


def test_an_error_of_the_disk_that_stays_is_raised_as_it_is(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileExistsError):
        files.write_whole(tmp_path / "file" / "f", b"1")
    full = ValueError("RESOURCE_EXHAUSTED: Error writing [OS error 28: ENOSPC No space left on device]")
    with pytest.raises(OSError, match="No space left.*/mnt/a") as error:
        files.retried(lambda: (_ for _ in ()).throw(full), "/mnt/a")
    assert error.value.errno == errno.ENOSPC


def test_a_write_makes_the_directories_above_it_and_a_failed_one_leaves_nothing(tmp_path):
    files.write_whole(tmp_path / "a" / "b" / "f", b"1")
    (tmp_path / "d").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write_whole(tmp_path / "d", b"1")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "b", "f", "d"]


def test_a_part_of_a_file_is_one_request_in_a_bucket(place, request):
    files.write_whole(place / "f", bytes(range(100)))
    files.write_whole(place / "empty", b"")
    for start, size in ((0, None), (0, 5), (95, 20), (100, 10), (3, 0), (5, None)):
        end = 100 if size is None else start + size
        assert files.read_range(place / "f", start, size) == bytes(range(100))[start:end], (start, size)
    assert files.read(place / "empty") == files.read_range(place / "empty", 0, 10) == b""
    with pytest.raises(FileNotFoundError) as raised:
        files.read(place / "gone")
    assert raised.value.filename == str(place / "gone")
    if files.is_bucket(place):
        proxy = request.getfixturevalue("bucket_proxy")
        with buckets.faults(proxy, lambda method, path: None):
            files.read(place / "f")
            files.read_range(place / "f", 7, 7)
            assert [one.method for one in proxy.requests] == ["GET", "GET"]


def test_what_wants_a_disk_names_the_option_the_path_and_the_remedy(tmp_path):
    files.want_disk(tmp_path, "--out", "it grows")
    with pytest.raises(UsageError, match="^--out gs://b/x: want a path on a disk, as it grows; .*`gcloud storage cp "):
        files.want_disk("gs://b/x", "--out", "it grows")


def test_the_size_of_a_file_whose_owner_has_no_name_is_known(place):
    files.write_whole(place / "f", b"12345")
    if os.geteuid() == 0 and not files.is_bucket(place):
        os.chown(place / "f", 54321, 54321)
    assert files.size_bytes(place / "f") == 5


@pytest.mark.parametrize(
    "error, kind",
    [
        (HttpError({"code": 429, "message": "slower"}), "passing"),
        (HttpError({"code": 504, "message": "late"}), "passing"),
        (HttpError({"code": 400, "message": "no"}), ""),
        (ProxyError(), "passing"),
        (ServerDisconnectedError(), "passing"),
        (DefaultCredentialsError("log in"), "refused"),
        (ValueError("UNKNOWN: Error reading /a/b [OS error 5: EIO Input/output error]"), "passing"),
        (ValueError("PERMISSION_DENIED: Error opening /a/b [OS error 13: EACCES Permission denied]"), "refused"),
        (ValueError("RESOURCE_EXHAUSTED: writing [OS error 28: ENOSPC No space left on device]"), ""),
        (ValueError("RESOURCE_EXHAUSTED: x [http_response_code='429']"), "passing"),
        (ValueError("DATA_LOSS: Error reading chunk {0}: x [http_response_code='200']"), ""),
        (ValueError("NOT_FOUND: Metadata at gs://a/b does not exist"), ""),
        (ValueError("the loss is 503"), ""),
        (ConnectionResetError("reset"), "passing"),
        (TimeoutError("slow"), "passing"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ""),
        (KeyError("a"), ""),
        (Unreachable("again"), ""),
    ],
)
def test_errors_of_stores_are_told_apart(error, kind):
    assert files.fault(error) == kind


def test_a_directory_that_cannot_be_made_is_one_line_with_a_remedy(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for place, reason in (("file", "File exists"), ("file/below", "Not a directory")):
        with pytest.raises(UsageError, match=f"{place}: no directory can be made there .{reason}.: name another place"):
            files.make_directory(tmp_path / place)
    files.make_directory(tmp_path / "a" / "b")
    files.make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
