"""Which rows each process loads, on the meshes of real machines and on every order of devices."""

import importlib.util
import itertools

import numpy as np
import pytest

from llava_jax import config, distributed, sharding
from llava_jax.distributed import Rows

TOPOLOGIES = ("v5e:4x4", "v5e:4x8", "v5e:8x8", "v5p:2x2x4", "v5p:4x4x4", "v6e:8x8")
MESHES = ({}, {"tensor": 4}, {"context": 4}, {"tensor": 8}, {"data": 2, "tensor": 2}, {"fsdp": 1, "tensor": -1})
GROUP = 16  # samples of a group, as in the published recipes


class Device:
    """A device of some process."""

    def __init__(self, process: int):
        self.process_index = process


def held(owners: list[int], size: int, copies: int = 1) -> dict[Device, tuple[slice]]:
    """What devices in this order hold of `size` rows, which neighbouring `copies` hold together."""
    part = size * copies // len(owners)
    starts = [number // copies * part for number in range(len(owners))]
    return {Device(owner): (slice(start, start + part),) for owner, start in zip(owners, starts)}


def test_a_process_loads_the_part_that_its_devices_hold():
    plain = held([0, 0, 1, 1], 8)
    assert [distributed.rows(plain, 8, process) for process in (0, 1)] == [
        Rows((0, 1), (0, 1), 4), Rows((2, 3), (2, 3), 4),
    ]  # fmt: skip
    mixed = held([1, 0, 0, 1], 8)  # the pipeline's parts are dealt in the order of processes
    assert [distributed.rows(mixed, 8, process) for process in (0, 1)] == [
        Rows((0, 1), (1, 2), 4), Rows((2, 3), (0, 3), 4),
    ]  # fmt: skip
    across = held([0, 1, 0, 1], 8, copies=2)  # the rest of the mesh spans both processes, which hold the same rows
    assert [distributed.rows(across, 8, process) for process in (0, 1)] == [Rows((0, 1), (0, 1), 2)] * 2
    uneven = held([0, 1, 1, 1], 8, copies=2)
    assert [distributed.rows(uneven, 8, process) for process in (0, 1)] == [
        Rows((0,), (0,), 2), Rows((0, 1), (0, 1), 2),
    ]  # fmt: skip


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_on_real_machines_every_row_is_loaded_by_all_that_hold_it_and_each_reads_neighbours(topology):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which knows the order of devices, is not installed")
    from llava_jax.plan.compile import find_target

    for sizes in MESHES:
        mesh = find_target(config.Mesh(**sizes), topology).mesh
        parts = sharding.shards(mesh, "batch")
        rows = np.arange(2 * parts)
        cut = sharding.of_array(mesh, (2 * parts, 8), "batch", "tokens")
        placed = cut.devices_indices_map((2 * parts, 8))
        array, owners = np.full(2 * parts, -1), {device.process_index for device in mesh.devices.flat}
        for process in owners:
            own = distributed.rows(placed, 2 * parts, process)
            assert own.of == parts and list(own.places) == sorted(set(own.places))
            for place, shard in zip(own.places, own.shards):
                loaded = rows[2 * place : 2 * place + 2]
                assert set(array[2 * shard : 2 * shard + 2]) in ({-1}, set(loaded)), (topology, sizes)
                array[2 * shard : 2 * shard + 2] = loaded
            here = {(i[0].start or 0) // 2 for device, i in placed.items() if device.process_index == process}
            assert set(own.shards) == here, (topology, sizes, process)
        assert sorted(array) == list(rows), (topology, sizes)


@pytest.mark.parametrize("owners", [[0, 1, 2, 3] * 4, [3, 3, 1, 1, 0, 0, 2, 2] * 2, *itertools.islice(
    (np.random.default_rng(seed).permutation(np.repeat(range(4), 4)).tolist() for seed in range(9)), 3)])  # fmt: skip
def test_whole_groups_lie_on_one_process_wherever_its_devices_are(owners):
    """16 devices of 4 processes, 128 rows in groups of 16: a process reads its own 32 rows and no other."""
    for process in range(4):
        own = distributed.rows(held(owners, 128), 128, process)
        first = own.places[0] * 8
        assert own.places == tuple(range(own.places[0], own.places[0] + 4)) and first % GROUP == 0
