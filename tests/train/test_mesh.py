"""The same program on other meshes: eight forced CPU devices in a process of their own (`tests.train.meshes`)."""

import itertools
import os
import subprocess
import sys

import pytest

from tests.train import tiny

EVERY = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if sizes[0] * sizes[1] * sizes[2] * sizes[3] == 8]
SOME = [(1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 1, 4)]


def run(command, meshes, compiled):
    words = [",".join(map(str, sizes)) for sizes in meshes]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-m", "tests.train.meshes", command, *words], cwd=tiny.ROOT, text=True,
                          env=os.environ | flags | compiled, capture_output=True, timeout=1500)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_a_step_on_eight_devices_is_the_step_on_one(compiled):
    assert len(run("step", SOME, compiled).splitlines()) == len(SOME)


def test_losses_over_log_probabilities_are_those_of_one_device(compiled):
    assert len(run("losses", [(2, 2, 2, 1), (1, 2, 1, 4), (1, 1, 4, 2)], compiled).splitlines()) == 4


def test_records_of_one_picture_in_a_tree_learn_what_they_learn_apart_on_meshes_of_eight_devices(compiled):
    assert len(run("trees", SOME, compiled).splitlines()) == len(SOME)


@pytest.mark.slow
def test_a_step_is_the_same_in_every_shape_that_a_mesh_of_eight_can_have(compiled):
    assert len(EVERY) == 20
    assert len(run("step", EVERY, compiled).splitlines()) == 20


def test_a_run_goes_on_bit_for_bit_from_eight_devices_to_four_to_one(compiled):
    run("resume", [(1, 8, 1, 1), (1, 4, 1, 1), (1, 1, 1, 1)], compiled)


@pytest.mark.slow
def test_a_run_goes_on_from_every_kind_of_mesh_to_another(compiled):
    for first in ((2, 4, 1, 1), (1, 4, 2, 1), (1, 2, 2, 2), (2, 1, 1, 4)):
        run("resume", [first, (1, 1, 1, 1), (1, 2, 1, 1)], compiled)
