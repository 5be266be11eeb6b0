"""Orders against the reference's recordings, and the promises of a schedule."""

import numpy as np
import pytest

from llava_jax.data.orders import (
    Schedule,
    length_grouped,
    modality_length,
    picks,
    randperm,
    resolve_steps,
    twister,
)


def schedule(n=10, batch=4, order="shuffle", seed=0, weights=(1.0,), sizes=None, words=None, group=None):
    return Schedule(sizes or (n,), weights, order, seed, batch, group or batch, words)


def test_randperm_is_torchs(misc):
    assert randperm(20, twister(42)).tolist() == misc["randperm"]["n20_seed42"]
    assert randperm(558128, twister(42))[:5].tolist() == misc["randperm"]["n558128_seed42_first5"]


def test_the_shuffle_of_the_first_epoch_is_the_reference_s_for_665298_records(misc):
    order = schedule(665298, 128, seed=42).epoch(0)
    assert order[:5].tolist() == misc["randperm"]["n665298_seed42_first5"]
    assert np.bincount(order, minlength=665298).max() == 1


@pytest.mark.parametrize("n", [0, 1, 2])
def test_randperm_of_almost_nothing(n):
    assert sorted(randperm(n, twister(1)).tolist()) == list(range(n))


def test_modality_length_matches_both_generators_of_the_reference(misc):
    golden = misc["sampler"]
    lengths, batch, world = np.array(golden["lengths"]), golden["batch"], golden["world"]
    ours = modality_length(lengths, batch, world, twister(42))
    assert ours.tolist() == golden["modality_global_rng_seed42"]
    fresh = twister(golden["default_generator_seed"])
    ours = modality_length(lengths, batch, world, twister(42), fresh)
    assert ours.tolist() == golden["modality_with_default_Generator"]
    ours = length_grouped(np.abs(lengths), batch, world, twister(42))
    assert ours.tolist() == golden["length_grouped_seed42"]


def test_a_schedule_with_groups_of_a_device_repeats_the_reference_s_order(misc):
    golden = misc["sampler"]
    plan = schedule(20, 4, "modality_length", 42, words=np.array(golden["lengths"]), group=2)
    assert plan.epoch(0).tolist() == golden["modality_global_rng_seed42"]


@pytest.mark.parametrize("sign", [1, -1])
def test_one_modality_alone_is_grouped_by_length_only(sign):
    lengths = sign * np.array([5, 3, 8, 1, 9, 2, 7])
    assert np.array_equal(modality_length(lengths, 2, 1, twister(3)), length_grouped(lengths, 2, 1, twister(3)))


def test_batches_of_modality_length_hold_one_modality_but_for_the_tail():
    lengths = np.random.RandomState(0).randint(1, 90, 400) * np.random.RandomState(1).choice([1, 1, -1], 400)
    order = modality_length(lengths, 4, 2, twister(0))
    assert sorted(order.tolist()) == list(range(400))
    mixed = [len({*np.sign(lengths[order[i : i + 8]]).tolist()}) > 1 for i in range(0, 400, 8)]
    assert not any(mixed[:-2])


def test_an_epoch_is_a_pure_function_of_seed_and_epoch():
    one, two = schedule(seed=7), schedule(seed=7)
    later = one.epoch(5).tolist()
    assert [one.epoch(e).tolist() for e in range(3)] == [two.epoch(e).tolist() for e in range(3)]
    assert later == two.epoch(5).tolist() != one.epoch(4).tolist()
    assert schedule(seed=8).epoch(0).tolist() != one.epoch(0).tolist()


def test_the_last_batch_of_an_epoch_wraps_around_to_its_first_samples():
    plan = schedule(5, 2, "sequential")
    assert [plan.record(sample) for sample in range(12)] == [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 0]
    tiny = schedule(2, 5, "sequential")
    assert [tiny.record(sample) for sample in range(5)] == [0, 1, 0, 1, 0]


def test_weights_say_how_often_a_record_is_seen():
    assert picks([3, 2], [1.0, 2.0], 0, 0).tolist() == [0, 1, 2, 3, 4, 3, 4]
    half = [picks([10], [0.5], 0, epoch).tolist() for epoch in range(4)]
    assert [len(set(part)) for part in half] == [5, 5, 5, 5]
    assert sorted(half[0] + half[1]) == sorted(half[2] + half[3]) == list(range(10))
    assert half[0] != half[2]
    odd = np.concatenate([picks([7], [1.5], 0, epoch) for epoch in range(7)])
    assert len(odd) == 70 and set(np.bincount(odd)) == {10}


def test_steps_are_those_of_the_published_runs():
    published = [(665298, 128, 1, 5198), (558128, 256, 1, 2181), (595375, 128, 1, 4652), (157712, 128, 3, 3699),
                 (12726, 32, 12, 4776)]  # fmt: skip
    for records, batch, epochs, steps in published:
        assert resolve_steps(records, batch, epochs) == steps
    assert resolve_steps(100, 10, 0.25) == 3
    with pytest.raises(ValueError, match="epochs=0"):
        resolve_steps(10, 2, 0)
