"""The command in processes of its own: killed and preempted at random moments, it repeats every loss bit for bit."""

import json
import random
import signal
import time

import pytest

from llava_jax.checkpoint import reader
from tests.ports import free_port
from tests.train import tiny
from tests.train.forks import finish as forks_finish

SETTINGS = ("--config.train.steps=150", "--config.checkpoint.every=10", "--config.log.every=50")


def losses(workdir):
    """{step: the loss as it is written}, of the whole lines only."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return {row["step"]: row["loss"] for row in (json.loads(line) for line in lines if line.endswith("\n"))}


def finish(process):
    """(exit code, what it printed)."""
    out, error = process.communicate(timeout=600)
    return process.returncode, out + error


def wait_for(workdir, steps, process):
    """Returns when that many updates are written."""
    while True:
        ended = process.poll() is not None  # before the look at what it wrote
        if len(losses(workdir)) >= steps:
            return
        assert not ended, (workdir, losses(workdir))
        time.sleep(0.01)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, compiled, forks):
    """(config, losses) of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    config = tiny.write_run(folder / "run")
    forks_finish([forks.start(config, folder / "out", *SETTINGS, **compiled)])
    return config, losses(folder / "out")


def compare(folder, wanted):
    """What a killed process had written."""
    found = losses(folder)
    assert found == {step: wanted[step] for step in found}


def compare_all(folder, wanted):
    """What the process that came to the end has written."""
    assert losses(folder) == wanted and len(wanted) == 150
    assert not list(folder.glob("*.corrupt")) and reader.latest_step(folder) == 150


def test_killed_three_times_it_gives_the_same_losses(reference, tmp_path, compiled, forks):
    (config, wanted), moments = reference, random.Random(0)
    for rows in (20, 60, 100):
        process = forks.start(config, tmp_path / "out", *SETTINGS, **compiled)
        wait_for(tmp_path / "out", rows + moments.randrange(30), process)
        process.kill()
        compare(tmp_path / "out", wanted)
    forks_finish([forks.start(config, tmp_path / "out", *SETTINGS, **compiled)])
    compare_all(tmp_path / "out", wanted)


@pytest.mark.slow
def test_killed_twenty_times_at_any_moment_it_gives_the_same_losses(reference, tmp_path, compiled):
    """Half of the kills fall anywhere from the start of Python on, half into the updates and their saves."""
    (config, wanted), moments = reference, random.Random(1)
    for number in range(20):
        process = tiny.start(config, tmp_path / "out", *SETTINGS, **compiled)
        if number % 2:
            wait_for(tmp_path / "out", min(140, len(losses(tmp_path / "out")) + moments.randrange(1, 20)), process)
            time.sleep(moments.uniform(0, 0.1))
        else:
            time.sleep(moments.uniform(0.2, 8))
        process.kill()
        process.communicate()
        compare(tmp_path / "out", wanted)
    code, output = finish(tiny.start(config, tmp_path / "out", *SETTINGS, **compiled))
    assert code == 0, output
    compare_all(tmp_path / "out", wanted)


def test_sigterm_saves_exits_75_and_the_same_command_goes_on(reference, tmp_path, compiled):
    """A whole process: nothing of it is forked."""
    config, wanted = reference
    terminated = config.parent / "terminated.py"
    terminated.write_text(config.read_text() + tiny.TERMINATED)
    code, output = finish(tiny.start(terminated, tmp_path / "out", *SETTINGS, **compiled))
    assert code == 75 and "preempted and saved" in output
    assert 5 <= reader.latest_step(tmp_path / "out") == len(losses(tmp_path / "out")) < 10  # none that it would save
    assert finish(tiny.start(config, tmp_path / "out", *SETTINGS, **compiled))[0] == 0
    assert losses(tmp_path / "out") == wanted


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_one_step_in_both(reference, tmp_path, compiled):
    """Their sums are taken in another order, so the losses are compared with a run of two processes."""
    config, wanted = reference

    def pair(folder):
        settings = compiled | {"LLAVA_JAX_MULTIHOST": "1", "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
                               "JAX_NUM_PROCESSES": "2"}  # fmt: skip
        return [tiny.start(config, folder, *SETTINGS, **settings, JAX_PROCESS_ID=str(i)) for i in range(2)]

    whole = [finish(process) for process in pair(tmp_path / "whole")]
    assert [code for code, _ in whole] == [0, 0], whole
    processes = pair(tmp_path / "out")
    wait_for(tmp_path / "out", 25, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    ended = [finish(process) for process in processes]
    assert [code for code, _ in ended] == [75, 75], ended
    assert reader.latest_step(tmp_path / "out") == len(losses(tmp_path / "out")) < 150
    assert [finish(process)[0] for process in pair(tmp_path / "out")] == [0, 0]
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert all(losses(tmp_path / "out")[step] == pytest.approx(loss, rel=1e-3) for step, loss in wanted.items())
