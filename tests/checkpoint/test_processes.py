"""Two processes restore the same step, or end with the same error, whichever of them cannot read it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import free_port


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """(the folder, what each of the two processes of `two` printed)."""
    folder = tmp_path_factory.mktemp("two")
    address = f"127.0.0.1:{free_port()}"
    settings = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen([sys.executable, "-m", "tests.checkpoint.two", str(folder)], cwd=Path(__file__).parents[2],
                         env=settings | {"JAX_PROCESS_ID": str(i)}, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE)
        for i in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    return folder, [out for out, _ in ended]


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_step_that_one_process_finds_damaged_is_given_up_by_both(printed):
    folder, outs = printed
    assert all("damaged: step 1, right: True" in out for out in outs), outs
    assert _names(folder / "damaged") == ["1", "2.corrupt"]


def test_a_part_that_differs_from_its_checksum_is_noticed_by_both(printed):
    folder, outs = printed
    assert all("flipped: step 1, right: True" in out for out in outs), outs
    assert _names(folder / "flipped") == ["1", "2.corrupt"]


def test_a_step_that_one_process_cannot_reach_ends_both_and_stays_as_it_is(printed):
    folder, outs = printed
    assert "unreachable: Unreachable: process 1: gs://planted: no answer" in outs[0], outs
    assert "unreachable: Unreachable: gs://planted: no answer" in outs[1], outs
    assert _names(folder / "unreachable") == ["1", "2"]


def test_a_base_is_read_by_halves_and_refused_by_both_where_one_is_damaged(printed):
    _, outs = printed
    assert all("base: right: True" in out for out in outs), outs
    assert all("llm/w differs from its checksum" in out for out in outs), outs
