"""How many copies of a model a number of devices hold, and what each parameter's device holds of it."""

import pytest

from llava_jax import chips
from llava_jax.errors import UsageError
from llava_jax.generate import placement

GIB = chips.GIB
V5E = 15.75 * GIB
# Weights, and the cache of a row of 4,096 tokens, of LLaVA-1.5 in bfloat16.
SEVEN, THIRTEEN = (13 * GIB, 2 * GIB), (25 * GIB, int(3.125 * GIB))


@pytest.mark.parametrize("model, slots, devices, copies", [
    ((GIB, 0), 16, 8, 8),  # fits everywhere: as many copies as devices
    ((GIB, 0), 4, 8, 4), ((GIB, 0), 6, 8, 2), ((GIB, 0), 5, 8, 1),  # each copy has as many rows
    (SEVEN, 1, 4, 1),  # a single answer takes all devices
    (SEVEN, 16, 8, 4), (SEVEN, 16, 4, 1), (SEVEN, 8, 4, 2),
    (THIRTEEN, 16, 8, 1), (THIRTEEN, 8, 8, 2),
    (THIRTEEN, 64, 8, 1),  # too many long rows: there is no better mesh than one that cuts everything
])  # fmt: skip
def test_copies_have_rows_of_their_own_and_fit(model, slots, devices, copies):
    assert placement.copies(*model, slots, devices, V5E) == copies


def test_one_device_needs_no_mesh():
    assert placement.choose_mesh(*SEVEN, 16, [None], V5E) is None


def test_a_model_that_no_device_can_hold_is_refused_with_both_sizes():
    with pytest.raises(UsageError, match=r"weights take 25.0 GiB, and 1 device\(s\) have 15.8 GiB.*--dtype bfloat16"):
        placement.copies(*THIRTEEN, 1, 1, V5E)


def test_a_model_that_is_too_large_for_a_process_takes_the_devices_of_all(monkeypatch):
    monkeypatch.setattr(placement.jax, "local_devices", lambda: ["a", "b"])
    monkeypatch.setattr(placement.jax, "devices", lambda: ["a", "b", "c", "d"])
    monkeypatch.setattr(placement, "memory_bytes", lambda device: V5E)
    monkeypatch.setattr(placement.distributed, "count", lambda: 2)
    assert placement.choose_devices(SEVEN[0]) == ["a", "b"]
    assert placement.choose_devices(THIRTEEN[0]) == ["a", "b", "c", "d"]
    monkeypatch.setattr(placement.distributed, "count", lambda: 1)  # of others' devices nobody would compute
    assert placement.choose_devices(THIRTEEN[0]) == ["a", "b"]
