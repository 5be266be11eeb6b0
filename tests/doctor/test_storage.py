"""What a workdir must do, on a disk and in a bucket, and what is said of one that does not."""

import errno

import pytest
from etils import epath

from llava_jax import config as configs
from llava_jax import files
from llava_jax.doctor import machine, storage
from llava_jax.doctor.report import FAIL, OK, SKIPPED, WARN


@pytest.fixture
def check(tmp_path):
    """{check: line} of a workdir."""

    def lines(workdir):
        storage_machine = machine.detect(configs.Mesh(), workdir, tmp_path)
        return {line.check.removeprefix("workdir: "): line for line in storage.check(storage_machine)}

    return lines


def test_a_good_disk_and_a_good_bucket_have_no_red_line(check, place):
    lines = check(place)
    skipped = {"seen by all", *(["rename", "free space"] if files.is_bucket(place) else [])}
    assert {name for name, line in lines.items() if line.verdict == SKIPPED} == skipped
    assert {line.verdict for line in lines.values()} <= {OK, SKIPPED}, lines
    assert set(lines) == {"write", "read", "seen by all", "list", "delete", "rename", "clock", "free space"}


def test_a_workdir_that_cannot_be_written_has_one_line(check, tmp_path):
    (tmp_path / "file").write_text("no directory")
    lines = check(epath.Path(tmp_path / "file" / "run"))
    assert [(line.verdict, bool(line.remedy)) for line in lines.values()] == [(FAIL, True)]
    assert "NotADirectoryError" in lines["write"].figure


def test_a_read_only_workdir_is_found(check, tmp_path, monkeypatch):
    def raise_error(path, *given):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", raise_error)
    assert check(epath.Path(tmp_path))["write"].verdict == FAIL


def test_a_bucket_that_does_not_exist_is_found(check, bucket_server):
    assert check(epath.Path("gs://nobody-made-this/run"))["write"].verdict == FAIL


def test_a_store_with_stale_listings_is_found(check, tmp_path, monkeypatch):
    listed, listings = files.listed, {}
    monkeypatch.setattr(files, "listed", lambda path: listings.setdefault(str(path), listed(path)))
    monkeypatch.setattr(storage, "MAX_LISTING_SECS", 0.3)
    lines = check(epath.Path(tmp_path))
    assert lines["list"].verdict == FAIL and "is not seen" in lines["list"].figure and lines["list"].remedy


def test_listings_that_come_late_are_a_warning(check, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_listing_delay", lambda *args: 2.0)
    assert check(epath.Path(tmp_path))["list"].verdict == WARN


def test_a_store_that_damages_files_is_found(check, tmp_path, monkeypatch):
    read = type(epath.Path(tmp_path)).read_bytes
    monkeypatch.setattr(type(epath.Path(tmp_path)), "read_bytes", lambda path: read(path)[:-1])
    assert check(epath.Path(tmp_path))["read"].verdict == FAIL


def test_a_disk_that_renames_by_copying_is_found(check, tmp_path, monkeypatch):
    monkeypatch.setattr(type(epath.Path(tmp_path)), "rename", lambda path, target: epath.Path(target).mkdir())
    assert check(epath.Path(tmp_path))["rename"].verdict == FAIL


def test_a_clock_far_from_the_stores_is_a_warning(check, tmp_path, monkeypatch):
    now = storage.time.time
    monkeypatch.setattr(storage.time, "time", lambda: now() + 3600)
    line = check(epath.Path(tmp_path))["clock"]
    assert line.verdict == WARN and line.figure.startswith("359")


def test_little_space_and_a_slow_store_are_warnings(check, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "LEAST_FREE_BYTES", 1e18)
    monkeypatch.setattr(storage, "LEAST_BYTES_PER_SEC", 1e15)
    lines = check(epath.Path(tmp_path))
    assert [lines[name].verdict for name in ("free space", "write", "read")] == [WARN] * 3
