"""Training's saves in a bucket: kills, damage, and a store that gives errors are three different things."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from llava_jax import files
from llava_jax.checkpoint import manager, reader
from llava_jax.errors import Unreachable, UnusableCheckpoint, UsageError
from tests import buckets
from tests.checkpoint.test_manager import content, restore, structs, write


def _every(nth, status):
    count, lock = [0], threading.Lock()

    def plan(method, path):
        with lock:
            count[0] += 1
            return status if count[0] % nth == 0 else None

    return plan


def _flip(run, step):
    """Changes a bit of the largest array of a step."""
    objects = buckets.objects(os.environ["STORAGE_EMULATOR_HOST"], f"{run}/{step}/params/")
    largest = epath.Path(max(objects, key=lambda found: found[1])[0])
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)


def test_saves_in_a_bucket_come_back_and_are_read_with_their_checksums(bucket):
    run = epath.Path(bucket) / "run"
    assert restore(run) is None
    write(run, [1, 2, 3])
    assert reader.steps(run) == [2, 3] and [entry.name for entry in files.listed(run)] == ["2", "3"]
    jax.tree.map(np.testing.assert_array_equal, restore(run), content(3))
    jax.tree.map(np.testing.assert_array_equal, reader.load_params(run), content(3).params)
    _flip(run, 3)
    with pytest.raises(UnusableCheckpoint, match="projector/0/kernel is damaged"):
        reader.load_params(run)


def test_orbax_and_we_agree_on_what_is_finished(bucket):
    run = epath.Path(bucket) / "run"
    write(run, [1])
    for step, finished in ((run / "1", True), (run / "2", False)):
        assert reader.is_finished(step) == manager.ocp.utils.is_checkpoint_finalized(step) == finished
    files.delete(run / "1" / "commit_success.txt")
    assert not reader.is_finished(run / "1") and not manager.ocp.utils.is_checkpoint_finalized(run / "1")
    assert reader.steps(run) == []


def test_a_damaged_step_of_a_bucket_is_marked_passed_over_and_written_anew(bucket, capsys):
    run = epath.Path(bucket) / "run"
    write(run, [1, 2])
    _flip(run, 2)
    for _ in range(2):  # at the next start too
        jax.tree.map(np.testing.assert_array_equal, restore(run), content(1))
    assert "step 2 is damaged" in capsys.readouterr().err
    assert "projector/0/kernel" in (run / "2" / "corrupt.txt").read_text()
    write(run, [2])
    assert not (run / "2" / "corrupt.txt").exists()
    jax.tree.map(np.testing.assert_array_equal, restore(run), content(2))


def test_when_every_step_of_a_bucket_is_damaged_the_run_does_not_begin_anew(bucket):
    run = epath.Path(bucket) / "run"
    write(run, [1])
    _flip(run, 1)
    for _ in range(2):
        with pytest.raises(UnusableCheckpoint, match=r"\(1 are damaged\)"):
            restore(run)


@pytest.mark.parametrize("first, uploads", [((), 3), ((500,), 8)], ids=["before any step", "after one"])
def test_a_save_that_is_killed_in_a_bucket_loses_nothing_and_leaves_nothing(bucket, bucket_proxy, first, uploads):
    """The process ends while the bucket holds some of the step's objects; which ones, the proxy decides."""
    run = epath.Path(bucket) / "run"
    write(run, first)
    process = subprocess.Popen([sys.executable, "-c", SAVE, str(run)], cwd=Path(__file__).parents[2])
    count, killed = [0], threading.Event()

    def plan(method, path):
        count[0] += "/upload/" in path and "1000" in path
        if count[0] > uploads:
            process.kill()
            killed.set()
        return None

    with buckets.faults(bucket_proxy, plan):
        process.wait(timeout=120)
    assert killed.is_set() and process.returncode
    assert files.exists(run / "1000") and reader.steps(run) == list(first)
    saved = restore(run)
    assert (saved and saved.step) == (first[0] if first else None)
    assert [entry.name for entry in files.listed(run)] == [str(step) for step in first]


SAVE = """
import sys
from llava_jax.checkpoint import manager
from tests.checkpoint.test_manager import content

checkpoints = manager.open_checkpoints(sys.argv[1], 2)
manager.save(checkpoints, content(1000))
manager.wait(checkpoints)
"""


def test_a_bucket_that_fails_now_and_then_costs_only_time(bucket, bucket_proxy):
    run = epath.Path(bucket) / "run"
    with buckets.faults(bucket_proxy, _every(20, 503)):
        write(run, [1])
        jax.tree.map(np.testing.assert_array_equal, restore(run), content(1))
    assert [entry.name for entry in files.listed(run)] == ["1"] and reader.steps(run) == [1]


def test_a_step_that_cannot_be_reached_is_left_alone(bucket, bucket_proxy, monkeypatch):
    run = epath.Path(bucket) / "run"
    write(run, [1, 2])
    checkpoints = manager.open_checkpoints(run, 2)
    monkeypatch.setattr(files, "RETRY_SECS", 0.5)
    monkeypatch.setattr(manager.sharded.tensor_files, "_RETRIES", {"max_retries": 1, "initial_delay": "10ms"})
    arrays = "ocdbt.process_0%2Fd%2F"
    for status, error in ((503, Unreachable), (403, UsageError)):
        with buckets.faults(bucket_proxy, lambda method, path, status=status: status if arrays in path else None):
            with pytest.raises(error, match=f"{run}/2"):
                manager.restore(checkpoints, *structs(content(2)))
    assert manager.restore(checkpoints, *structs(content(2))).step == 2
    manager.close(checkpoints)


def test_a_bucket_that_does_not_exist_or_refuses_is_one_line_before_any_work(bucket, bucket_proxy):
    with buckets.faults(bucket_proxy, lambda method, path: 403):
        with pytest.raises(UsageError, match="access is refused"):
            manager.open_checkpoints(f"{bucket}/run", 2)
    with pytest.raises(UsageError, match="no bucket gs://missing-bucket"):
        manager.open_checkpoints("gs://missing-bucket/run", 2)


def test_a_tree_that_is_written_leaf_by_leaf_appears_with_its_last_object(bucket, bucket_proxy):
    run = epath.Path(bucket) / "run"
    leaf = np.arange(6, dtype=np.float32)
    with pytest.raises(RuntimeError), reader.TensorWriter(run / "0" / "params") as writer:
        writer.write("a", leaf)
        raise RuntimeError
    assert files.listed(run) == []
    killed = reader.TensorWriter(run / "0" / "params")
    killed.write("old", leaf)
    assert reader.steps(run) == []
    bucket_proxy.requests.clear()
    with reader.TensorWriter(run / "0" / "params") as writer:  # what was left is deleted
        writer.write("a", leaf)
    assert not [request for request in bucket_proxy.requests if "rewriteTo" in request.path]  # nothing is copied
    assert reader.steps(run) == [0] and reader.own_tensors(run).names == ("a",)
    assert manager.ocp.utils.is_checkpoint_finalized(run / "0")
    with pytest.raises(UsageError, match="exists already"):
        reader.TensorWriter(run / "0" / "params")


def test_a_staged_directory_of_a_bucket_is_complete_without_its_mark(bucket):
    place = epath.Path(bucket) / "export"
    with pytest.raises(RuntimeError), reader.staged(place) as partial:
        files.write_whole(partial / "a", b"1")
        raise RuntimeError
    assert not files.exists(place)
    files.write_whole(place / ".partial", b"killed here")
    files.write_whole(place / "old", b"1")
    with reader.staged(place) as partial:
        files.write_whole(partial / "a", b"1")
    assert [entry.name for entry in files.listed(place)] == ["a"]
    with pytest.raises(UsageError, match="exists already"):
        with reader.staged(place):
            raise AssertionError
