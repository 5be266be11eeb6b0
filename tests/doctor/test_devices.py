"""Versions, the order of chips, memory and clocks, of machines that are not here."""

import dataclasses
import types

import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh

from llava_jax import config as configs
from llava_jax import distributed, sharding
from llava_jax.doctor import devices
from llava_jax.doctor.machine import Machine
from llava_jax.doctor.report import FAIL, OK, SKIPPED, WARN
from tests.doctor import plants

TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v6e:4x4", "v4:2x2x4", "v5p:2x2x2", "v5p:4x4x4",
              "v5p:4x4x8", "tpu7x:2x2x2")  # fmt: skip
SIZES = ({}, {"tensor": 2}, {"tensor": 4}, {"tensor": 8}, {"data": 2, "tensor": 4}, {"tensor": 2, "context": 2})


@pytest.fixture
def topology(tmp_path):
    pytest.importorskip("libtpu")
    from llava_jax.plan.compile import find_target

    def machine(name, sizes):
        target = find_target(configs.Mesh(**sizes), name)
        return Machine(configs.Mesh(**sizes), target.mesh, target.chip, epath.Path(tmp_path), tmp_path, ("host",))

    return machine


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_order_that_make_mesh_gives_to_real_chips_is_good(topology, name):
    for sizes in SIZES:
        line = devices._order(topology(name, sizes))
        assert line.verdict == OK, (name, sizes, line)


@pytest.mark.parametrize("name", ["v5e:4x4", "v5e:16x16", "v5p:4x4x4"])
def test_chips_in_another_order_are_found(topology, name):
    found = topology(name, {"tensor": 4})
    order = np.random.default_rng(0).permutation(found.mesh.devices.reshape(-1))
    line = devices._order(dataclasses.replace(found, mesh=Mesh(order.reshape(found.mesh.devices.shape), sharding.AXES)))
    assert line.verdict == FAIL and "links apart" in line.figure and line.remedy


def test_a_chip_that_is_missing_is_found(topology):
    found = topology("v5e:4x4", {})
    mesh = Mesh(found.mesh.devices[:, :15], sharding.AXES)
    line = devices._order(dataclasses.replace(found, mesh=mesh))
    assert line.verdict == FAIL and "15 cores at coordinates of 4 x 4" in line.figure


def test_versions_that_differ_are_named_with_their_process(monkeypatch):
    own_versions = devices.versions()
    monkeypatch.setattr(distributed, "exchange", lambda name, value: [own_versions, own_versions | {"jax": "0.1"}])
    line = devices._versions()
    assert line.verdict == FAIL and f"jax is {own_versions['jax']} on process 0 and 0.1 on process 1" in line.figure


def test_a_process_that_sees_other_devices_is_named(monkeypatch, tmp_path):
    found = plants.look(tmp_path)
    monkeypatch.setattr(distributed, "exchange", lambda name, value: [value, [[*value[0], [9, 1, None]], value[1]]])
    line = devices._devices(found)
    assert line.verdict == FAIL and "process 1 sees other devices than process 0" in line.figure


@pytest.mark.parametrize("offset_secs, verdict", [(0.2, OK), (60.0, WARN)])
def test_clocks_that_are_apart_are_a_warning(monkeypatch, offset_secs, verdict):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "exchange", lambda name, value: [value, value + offset_secs])
    line = devices._clocks()
    assert line.verdict == verdict and f"{offset_secs:.3f} s apart" in line.figure


@pytest.mark.parametrize("limit, verdict", [(15.75, OK), (7.9, WARN)])
def test_memory_is_compared_with_the_chips(monkeypatch, topology, limit, verdict):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": int(limit * 2**30), "bytes_in_use": 0})
    monkeypatch.setattr(devices.jax, "local_devices", lambda: [device])
    line = devices._memory(topology("v5e:4x4", {}))
    assert line.verdict == verdict and line.figure == f"{limit:.2f} GiB, 0.00 in use"


def test_a_device_that_does_not_say_its_memory_is_skipped(tmp_path):
    assert devices._memory(plants.look(tmp_path)).verdict == SKIPPED
