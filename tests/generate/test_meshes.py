"""Answers on many devices are those of one, however the devices share the model and the prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.generate import meshes

ROOT = Path(__file__).parents[2]
# (data, fsdp, tensor, context): spread, sharded, and as training has its parameters.
SOME = [(8, 1, 1, 1), (4, 1, 2, 1), (2, 1, 4, 1), (1, 4, 2, 1)]
OTHERS = [(1, 1, 8, 1), (1, 8, 1, 1), (2, 2, 1, 2), (1, 1, 2, 4)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The ids of one device, in a file."""
    speaks, questions = meshes.assistant(), meshes.asked()
    assert speaks.mesh is None
    ids = {"greedy": meshes.ids(speaks.replies(questions, meshes.NEW)),
           "drawn": meshes.ids(speaks.replies(questions[: meshes.SLOTS], meshes.NEW, **meshes.DRAWN))}  # fmt: skip
    assert len({tuple(answer) for answer in ids["greedy"]}) > 40
    path = tmp_path_factory.mktemp("ids") / "one.json"
    path.write_text(json.dumps(ids))
    return path


def run(one, sizes):
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    words = [",".join(map(str, each)) for each in sizes]
    done = subprocess.run([sys.executable, "-m", "tests.generate.meshes", str(one), *words], cwd=ROOT, text=True,
                          env=os.environ | flags, capture_output=True, timeout=1500)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(sizes)


def test_eight_devices_answer_as_one_spread_and_sharded(one):
    run(one, SOME)


@pytest.mark.slow
def test_eight_devices_answer_as_one_in_other_shapes(one):
    run(one, OTHERS)


def test_continuous_batching_on_eight_devices_answers_as_one(one):
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-m", "tests.generate.paged_mesh", str(one)], cwd=ROOT, text=True,
                          env=os.environ | flags, capture_output=True, timeout=1500)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout == "50\n"
