"""Counts of a batch by hand, and the measures that need no run."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llava_jax import chips
from llava_jax.batch import Batch
from llava_jax.distributed import Rows
from llava_jax.train import measure
from llava_jax.train.measure import RecompileWatch, Window
from tests.train.test_step import STAGE_1, build


def packed_batch():
    """Two rows that share two pictures of 2 features; the first row holds two samples."""
    slots = [[-1, 0, 1, -1, -1, 2, 3, 4], [-1] * 8]  # of two pictures 4 is `image_newline`
    segments = [[1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0, 0]]
    positions = [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 0, 0, 0, 0, 0]]
    weights = [[0, 0, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    ids = np.zeros((2, 8), np.int32)
    return Batch(
        tokens=ids, targets=ids, weights=np.array(weights, np.float32), positions=np.array(positions, np.int32),
        segments=np.array(segments, np.int32), image_slots=np.array(slots, np.int32),
        pixels=np.zeros((1, 4, 2, 2, 3), np.uint8),
    )  # fmt: skip


def test_a_batch_is_counted_by_what_is_learned_from_it():
    found = measure.count(packed_batch()._replace(pixels=np.zeros((1, 2, 2, 2, 3), np.uint8)), 2)
    # Pairs: 1 + 2 + 3 + 4 of each sample of four, 1 + 2 + 3 of the one of three.
    assert found == (11, 10 + 10 + 6, 5, 2, round(11 / 16, 4), 1.0)
    assert measure.count(packed_batch(), 2)[3:] == (3, round(11 / 16, 4), 0.75)  # of four pictures 4 is in the third


def test_other_rows_of_the_step_are_taken_to_hold_as_much():
    one, four = measure.count(packed_batch(), 2), measure.count(packed_batch(), 2, Rows((0, 1), (0, 3), 8))
    assert four[:4] == tuple(4 * n for n in one[:4]) and four[4:] == one[4:]


@pytest.fixture(scope="module")
def program():
    return build(STAGE_1)


def test_flops_are_those_of_what_a_batch_holds(program):
    counts = measure.count(packed_batch(), 2)
    each = program.flops
    wanted = 11 * each.tokens + 26 * each.pairs + 5 * each.supervised + 3 * each.images
    assert measure.flops_meter(program).flops(counts) == wanted > 0


def test_mfu_is_of_the_peak_of_all_devices_and_nothing_where_the_device_is_unknown(program, monkeypatch):
    since = Window(begun=10.0, waited=0.5, tokens=400, supervised=100, flops=6_000_000)
    found = measure.speeds(measure.flops_meter(program), since, 12.0)
    assert found == {"positions_per_sec": 200.0, "tokens_per_sec": 50.0, "mfu": None, "data_wait": 0.25}
    monkeypatch.setattr(chips, "of_kind", lambda kind: SimpleNamespace(peak_flops=10e6 if kind == "cpu" else 0))
    assert measure.speeds(measure.flops_meter(program), since, 12.0)["mfu"] == round(3e6 / 10e6 / program.mesh.size, 4)


def test_the_memory_that_counts_is_the_fullest_device_of_those_that_say(monkeypatch):
    said = [{"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7}, None, {}]
    for devices, wanted in ((said, 7), (said[2:], None)):
        fakes = [SimpleNamespace(memory_stats=lambda stats=stats: stats) for stats in devices]
        monkeypatch.setattr(jax, "local_devices", lambda fakes=fakes: fakes)
        assert measure.hbm_peak_bytes() == wanted


def test_programs_that_jax_builds_are_counted_and_those_it_has_are_not():
    double = jax.jit(lambda x: 2 * x)
    with measure.compilations() as built:
        double(np.float32(1))
        assert built() == 1
        double(np.float32(2))
        assert built() == 1
        double(np.zeros(3, np.float32))
        assert built() == 2
    double(np.zeros(4, np.float32))
    assert built() == 2


def test_a_step_that_compiles_again_is_spoken_of_once_and_a_new_length_is_not(capsys):
    lengths = [packed_batch()._replace(tokens=np.zeros((2, length), np.int32)) for length in (8, 4, 8, 8, 4)]
    recompiles = RecompileWatch()
    for step, (batch, built) in enumerate(zip(lengths, (3, 1, 0, 1, 1)), 1):
        recompiles = recompiles.after(step, batch, built)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step 4: the training step compiled again, for a batch of 2 rows of 8 tokens")
