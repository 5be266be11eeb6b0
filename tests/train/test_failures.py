"""One process of two fails, at every place where one can: both end with the same exit code, soon and in one line."""

import signal
import time

import pytest

from llava_jax.checkpoint import reader
from llava_jax.train import metrics
from tests.train import tiny
from tests.train.forks import finish

SETTINGS = ("--config.train.steps=8", "--config.checkpoint.every=4", "--config.train.eval_every=6")
# {where: (what the config file of the process that fails adds, exit code, words of the line)}. The functions are those
# that the place calls; each fault is one that a machine can have.
PLACES = {
    "start": ("inputs._open = failing(errors.DataError('no such data here'))", 65, "no such data here"),
    "restore": ("manager.restore = failing(errors.Unreachable('the bucket is silent'))", 69, "the bucket is silent"),
    "weights": ("init.state = failing(errors.UnusableCheckpoint('a base is damaged'))", 66, "a base is damaged"),
    "data": ("feed.packed = failing(errors.DataError('a bad record'))", 65, "a bad record"),
    "step": ("loop._report = failing(RuntimeError('a chip is lost'))", 1, "RuntimeError"),
    "hook": ("loop.validate = failing(OSError('odd'))", 1, "OSError"),
    "save": ("manager.save = failing(errors.SaveFailed('the disk is full'))", 66, "the disk is full"),
    "end": ("manager.close = failing(errors.SaveFailed('the last save'))", 66, "the last save"),
}
FAILING = """
from llava_jax import errors
from llava_jax.checkpoint import manager
from llava_jax.data import feed
from llava_jax.train import init, inputs, loop, trainer

def failing(error):
    def call(*_, **__):
        raise error
    return call

"""


@pytest.fixture(scope="module")
def config(tmp_path_factory, compiled):
    return tiny.write_run(tmp_path_factory.mktemp("failures") / "run")


def pair(forks, config, workdir, compiled, words=SETTINGS, breaks="", who=1, **settings):
    """Two processes, of which one runs other code."""
    other = config.parent / "breaks.py"
    other.write_text(config.read_text() + FAILING + breaks + "\n")
    configs = [other if number == who else config for number in range(2)]
    return forks.job(2, 1, configs, workdir, *words, **compiled, **settings)


@pytest.mark.parametrize("place", [place if place in ("restore", "save", "hook") else
                                   pytest.param(place, marks=pytest.mark.slow) for place in PLACES])  # fmt: skip
def test_a_failure_of_one_process_ends_both_within_seconds(forks, config, compiled, tmp_path, place):
    breaks, code, words = PLACES[place]
    both = pair(forks, config, tmp_path / "out", compiled, breaks=breaks)
    while both[1].poll() is None:
        time.sleep(0.05)
    ended = time.monotonic()
    one, two = finish(both, code)
    assert time.monotonic() - ended < 15
    (line,) = [line for line in one.err.splitlines() if line.startswith("process 1 of 2: error: ")]
    assert words in line and "Traceback" not in one.err and ("Traceback" in two.err) == (code == 1)
    written = [(tmp_path / "out" / f"error-{number}.txt").exists() for number in range(2)]
    assert written == [False, code == 1]


def test_a_process_that_is_stuck_is_ended_by_its_watchdog_and_takes_the_other_along(forks, config, compiled, tmp_path):
    breaks = "import time\nfeed.packed = lambda *_: time.sleep(1000)"
    words = (*SETTINGS, "--config.train.watchdog_secs=20")
    one, two = finish(pair(forks, config, tmp_path / "out", compiled, words, breaks), 42)
    assert "nothing has happened for 20 s" in one.err + two.err and "packed" in two.err or "lambda" in two.err


def test_sigterm_to_one_of_two_saves_the_same_step_on_both_and_the_same_command_goes_on(
    forks, config, compiled, tmp_path
):
    words = ("--config.train.steps=12", "--config.checkpoint.every=100", "--config.train.eval_every=0")
    finish(forks.job(2, 1, config, tmp_path / "whole", *words, **compiled))
    one, two = finish(pair(forks, config, tmp_path / "out", compiled, words, tiny.TERMINATED), 75)
    assert "preempted and saved" in one.out and "SIGTERM: stops after this step and saves" in two.err
    assert 5 <= reader.latest_step(tmp_path / "out") == len(metrics.read(tmp_path / "out")) < 12
    finish(forks.job(2, 1, config, tmp_path / "out", *words, **compiled))
    losses = [[row["loss"] for row in metrics.read(tmp_path / name)] for name in ("out", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 12


def test_sigterm_before_the_first_step_ends_both_with_75(forks, config, compiled, tmp_path):
    breaks = "import time\nfeed.packed = lambda *_: time.sleep(1000)"
    both = pair(forks, config, tmp_path / "out", compiled, breaks=breaks.replace("feed.packed", "trainer._restore"))
    while not (tmp_path / "out").exists():
        assert both[0].poll() is None, both[0].wait()
        time.sleep(0.05)
    both[0].signal(signal.SIGTERM)
    one, two = finish(both, 75)
    assert "nothing is lost" in one.err and "Traceback" not in one.err + two.err


def test_a_second_run_on_the_same_workdir_is_refused_and_the_first_goes_on(forks, config, compiled, tmp_path):
    words = ("--config.train.steps=3", "--config.train.eval_every=0")
    busy = config.parent / "busy.py"
    busy.write_text(config.read_text() + FAILING + "import time\nloop.train = lambda *_: time.sleep(1000)\n")
    first = forks.job(1, 1, busy, tmp_path / "out", *words, **compiled)
    while not (tmp_path / "out" / "lock.json").exists():
        assert first[0].poll() is None, first[0].wait()
        time.sleep(0.02)
    (second,) = finish(forks.job(1, 1, config, tmp_path / "out", *words, **compiled), 64)
    assert f"process {first[0].pid} on " in second.err and "two runs cannot share a directory" in second.err
    first[0].kill()
    finish(forks.job(1, 1, config, tmp_path / "out", *words, **compiled))
