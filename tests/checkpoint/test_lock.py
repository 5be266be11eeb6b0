"""Two runs do not write to one directory; a run that is gone locks nobody out."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from etils import epath

from llava_jax import files
from llava_jax.checkpoint import lock
from llava_jax.errors import UsageError

HOLD = """
import sys, time
from llava_jax.checkpoint import lock

with lock.hold(sys.argv[1], print, 0.2, 1.0):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path) -> epath.Path:
    return epath.Path(tmp_path if request.param == "disk" else request.getfixturevalue("bucket")) / "run"


def _fail(message):
    raise AssertionError(message)


def _hold(place, lost=_fail):
    return lock.hold(place, lost, 0.1, 1.0)


def _elsewhere(place):
    """Makes the lock one of another machine."""
    content = json.loads((place / lock.FILE).read_bytes())
    files.write_whole(place / lock.FILE, json.dumps(content | {"host": "other", "namespace": "pid:[1] x"}).encode())


def _start(place):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parents[2])  # fmt: skip
    assert process.stdout.readline() == "holds\n"
    return process


def test_the_lock_is_there_while_it_is_held_and_is_renewed(place):
    with _hold(place):
        first = json.loads((place / lock.FILE).read_bytes())
        assert first["pid"] == os.getpid() and str(os.getpid()) in lock.holder(place)
        end = time.monotonic() + 60
        while json.loads((place / lock.FILE).read_bytes())["renewed"] < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
    assert lock.holder(place) == "" and not files.exists(place / lock.FILE)
    with _hold(place):
        pass


def test_a_second_run_is_refused_while_the_first_one_lives(place):
    process = _start(place)
    try:
        with pytest.raises(UsageError, match=rf"process {process.pid} on .* is writing here.*name another directory"):
            with _hold(place):
                raise AssertionError
    finally:
        process.kill()
        process.wait()


def test_the_lock_of_a_killed_run_of_this_machine_is_taken_at_once(place, capsys):
    process = _start(place)
    process.kill()
    process.wait()
    assert lock.holder(place) == ""
    begin = time.monotonic()
    with lock.hold(place, _fail, 0.1, stale_secs=100.0):
        assert time.monotonic() - begin < 50
    assert "waits" not in capsys.readouterr().err


def test_the_lock_of_another_machine_is_taken_when_nobody_renews_it(place, capsys):
    with _hold(place):
        content = (place / lock.FILE).read_bytes()
    files.write_whole(place / lock.FILE, content)
    _elsewhere(place)
    begin = time.monotonic()
    with _hold(place):
        assert time.monotonic() - begin >= 1.0
        assert json.loads((place / lock.FILE).read_bytes())["host"] != "other"
    assert "process" in (err := capsys.readouterr().err) and "on other" in err


def test_the_lock_of_another_machine_that_is_renewed_is_refused(tmp_path):
    lost = []
    with lock.hold(tmp_path, lost.append, 1000.0):
        stop = threading.Event()

        def renew():
            count = 0
            while not stop.wait(0.2):
                count += 1
                files.write_whole(tmp_path / lock.FILE, json.dumps({"host": "other", "renewed": count}).encode())

        renew_thread = threading.Thread(target=renew)
        renew_thread.start()
        time.sleep(0.5)
        try:
            with pytest.raises(UsageError, match="on other"):
                with lock.hold(tmp_path, _fail, 0.1, 60.0):  # it waits for the next renewal only
                    raise AssertionError
        finally:
            stop.set()
            renew_thread.join()
    assert (tmp_path / lock.FILE).exists()  # another's is left alone


def test_a_run_that_was_asleep_too_long_hears_that_another_has_taken_over(place):
    lost = threading.Event()
    messages = []

    def hear(message):
        messages.append(message)
        lost.set()

    with _hold(place, hear):
        files.write_whole(place / lock.FILE, json.dumps({"nonce": "another", "host": "other", "pid": 7}).encode())
        assert lost.wait(60)
        assert "process 7 on other" in messages[0]
    assert json.loads((place / lock.FILE).read_bytes())["nonce"] == "another"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"pid": "x"}'])
def test_a_broken_lock_is_taken_over(tmp_path, content):
    (tmp_path / lock.FILE).write_bytes(content)
    with _hold(tmp_path):
        assert lock.holder(tmp_path)
