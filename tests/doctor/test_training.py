"""A tiny run that is ended in its middle, resumed, preempted and resumed: what is the same, and what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import config as configs
from llava_jax import sharding
from llava_jax.doctor import training, trial
from llava_jax.doctor.report import FAIL, OK, SKIPPED
from llava_jax.doctor.training import KILLED, PREEMPTED
from tests.doctor import plants


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the run."""
    place = tmp_path_factory.mktemp("trial")
    trial.write_files(place)
    return place


@pytest.fixture
def check(folder, monkeypatch):
    """{check: line}; the run is ended in this process, as on an accelerator."""
    monkeypatch.setattr(training, "_has_child", lambda machine: False)
    return lambda: {line.check: line for line in training.check(plants.look(folder))}


def flip_bit(array):
    """The array with the lowest bit of its first value the other way."""
    bits = np.array(array)
    bits.view(np.uint32).reshape(-1)[0] ^= 1
    return jax.device_put(jnp.asarray(bits), array.sharding)


def test_a_run_that_is_ended_and_resumed_is_the_same_bit_for_bit(check):
    lines = check()
    assert [lines[name].verdict for name in (KILLED, PREEMPTED, training.ELSEWHERE)] == [OK, OK, SKIPPED], lines
    assert lines[KILLED].figure.startswith("ended in step 6") and "resumed after 4" in lines[KILLED].figure


@pytest.mark.parametrize("start, name", [(1, KILLED), pytest.param(2, PREEMPTED, marks=pytest.mark.slow)])
def test_a_resume_that_differs_in_one_bit_is_found(check, monkeypatch, start, name):
    restore, calls = training._restore, []

    def damage_restored(run, checkpoints):
        saved = restore(run, checkpoints)
        calls.append(saved)
        if saved is None or len(calls) - 1 != start:
            return saved
        kernel = saved.params["projector"]["0"]["kernel"]
        projector = {**saved.params["projector"], "0": {**saved.params["projector"]["0"], "kernel": flip_bit(kernel)}}
        return saved._replace(params={**saved.params, "projector": projector})

    monkeypatch.setattr(training, "_restore", damage_restored)
    line = check()[name]
    assert line.verdict == FAIL and "arrays differ" in line.figure and line.remedy


def test_a_child_that_saves_nothing_is_named_with_its_last_words(folder, monkeypatch):
    monkeypatch.setattr(training, "_has_child", lambda machine: True)
    monkeypatch.setattr(training.sys, "executable", "/bin/echo")
    [line] = training.check(plants.look(folder))
    assert line.verdict == FAIL and "saves nothing" in line.figure and "llava_jax.train" in line.figure


@pytest.mark.parametrize("count, sizes, other", [
    (1, {}, None), (8, {}, {"fsdp": 4, "tensor": 2}), (8, {"tensor": 2}, {"fsdp": 8}), (3, {}, {"fsdp": 1, "data": 3}),
    (16, {"slices": 2}, {"fsdp": 4, "tensor": 2, "slices": 2}),
])  # fmt: skip
def test_another_mesh_divides_the_same_devices_otherwise(count, sizes, other):
    wish = configs.Mesh(**sizes)
    shape = dict(zip(sharding.AXES, sharding.fill(vars(wish), count)))
    assert training.other_mesh(wish, shape) == (None if other is None else configs.Mesh(**other))
