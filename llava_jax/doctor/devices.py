"""Checks of versions, devices and their order in the mesh, their memory, and the processes' clocks."""

import functools
import hashlib
import importlib.metadata
import itertools
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llava_jax import chips, distributed, sharding
from llava_jax.doctor import report
from llava_jax.doctor.machine import Machine
from llava_jax.doctor.report import FAIL, OK, WARN, Line

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy")
# TPUs report the memory that XLA may use, as `chips` does; JAX takes three quarters of a GPU by default.
MEMORY_SHARE = {"tpu": 0.97, "gpu": 0.7}
# Neighbours on the innermost axis of a mesh that `make_mesh` makes are at most so far apart on average, on all
# topologies of `chips` (tests/doctor/test_devices.py); in a random order of 16 chips they are 2.7 apart.
MEAN_HOPS = 2.0
CLOCK_SECS = 5.0


def check(machine: Machine) -> Iterator[Line]:
    """Lines about versions, devices, order, memory and clocks."""
    yield _versions()
    yield _devices(machine)
    yield _order(machine)
    yield _memory(machine)
    yield _clocks()


@functools.cache
def versions() -> dict[str, str]:
    """Versions of everything that changes numbers; equal on all processes of a correct job."""
    package = Path(__file__).parent.parent
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))).hexdigest()
    installed = {name: _installed(name) for name in PACKAGES}
    return {"llava_jax": f"{_installed('llava_jax')} (code {code[:8]})", "python": platform.python_version(),
            **{name: version for name, version in installed.items() if version != "none"}}  # fmt: skip


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def device_list(machine: Machine) -> list[dict[str, Any]]:
    """Every device, in the order of the mesh."""
    return [
        {"id": device.id, "process": device.process_index, "kind": device.device_kind, "coords": _coords(device)}
        for device in machine.devices
    ]


def _versions() -> Line:
    all_versions = distributed.exchange("doctor versions", versions())
    shown = ("llava_jax", "jax", "libtpu", "python")
    figure = ", ".join(f"{name} {all_versions[0].get(name, 'none')}" for name in shown)
    differences = [
        f"{name} is {all_versions[0].get(name, 'none')} on process 0 and {other.get(name, 'none')} on process {number}"
        for number, other in enumerate(all_versions) for name in {**all_versions[0], **other}
        if other.get(name) != all_versions[0].get(name)
    ]  # fmt: skip
    if differences:
        return Line("versions", FAIL, "; ".join(differences[:3]), "the same on all processes",
                    "install the same commit and the same packages on every host")  # fmt: skip
    return Line("versions", OK, figure, "the same on all processes")


def _devices(machine: Machine) -> Line:
    """Every process must see the same devices, and as many of its own as each other process."""
    visible = [[device.id, device.process_index, _coords(device)] for device in jax.devices()]
    everywhere = distributed.exchange("doctor devices", [visible, len(jax.local_devices())])
    processes, local = jax.process_count(), everywhere[0][1]
    faults = [f"process {i} sees other devices than process 0" for i, (visible_there, _) in enumerate(everywhere)
              if visible_there != everywhere[0][0]]  # fmt: skip
    faults += [f"process {i} has {number} devices, process 0 has {local}" for i, (_, number) in enumerate(everywhere)
               if number != local]  # fmt: skip
    if processes != distributed.count():
        faults.append(f"JAX counts {processes} processes, {distributed.count()} have joined")
    if len(visible) != len(machine.devices):
        faults.append(f"the mesh holds {len(machine.devices)} of {len(visible)} devices")
    sizes = " x ".join(f"{axis} {size}" for axis, size in machine.mesh.shape.items() if size > 1)
    expectation = f"{processes * local} devices for the mesh {sizes or 'of one device'}"
    figure = f"{len(visible)} x {machine.devices[0].device_kind}: {processes} process(es) with {local}"
    if faults:
        return Line("devices", FAIL, "; ".join(faults[:3]), expectation,
                    "restart every host's process with one environment (JAX_*, TPU_*, XLA_FLAGS)")
    return Line("devices", OK, figure, expectation)


def _order(machine: Machine) -> Line:
    """Where chips have coordinates, neighbours in the mesh are neighbours there; elsewhere devices are in order."""
    ids = [device.id for device in machine.devices]
    everywhere = distributed.exchange("doctor order", ids)
    differing = [i for i, other in enumerate(everywhere) if other != ids]
    fault = f"process {differing[0]} has another order than this one" if differing else ""
    if machine.platform == "tpu":
        figure, expectation, order_fault = _coordinates(machine)
    else:
        figure, expectation = f"ids {ids[0]} to {ids[-1]} in order", "device ids in order: no coordinates here"
        ranks = [(device.process_index, device.id) for device in machine.devices]
        order_fault = "" if ranks == sorted(ranks) else f"ids {ids[:8]} of processes {[p for p, _ in ranks[:8]]}"
    if fault or order_fault:
        return Line("order in the mesh", FAIL, fault or order_fault, expectation,
                    "unset variables that rename or reorder devices (TPU_VISIBLE_CHIPS, CUDA_VISIBLE_DEVICES, "
                    "TPU_PROCESS_BOUNDS); all hosts want the same")  # fmt: skip
    return Line("order in the mesh", OK, figure, expectation)


def _coordinates(machine: Machine) -> tuple[str, str, str]:
    """(figure, expectation, fault) of chips that have coordinates."""
    slices = dict[int, list[tuple[int, ...]]]()
    for device in machine.devices:
        slices.setdefault(machine.slice_of(device), []).append((*_coords(device), device.core_on_chip))
    for number, coords in slices.items():
        sizes = [len(set(values)) for values in zip(*coords)]
        if len(set(coords)) != np.prod(sizes):
            fault = f"slice {number} has {len(set(coords))} cores at coordinates of {' x '.join(map(str, sizes))}"
            return "", "every core of a whole grid", fault
    axis = max((i for i, size in enumerate(machine.mesh.devices.shape) if size > 1), default=None)
    shape = "x".join(str(len(set(values))) for values in zip(*(coords[:3] for coords in next(iter(slices.values())))))
    if axis is None:
        return "one device", "one device", ""
    hops = mean_hops(np.moveaxis(machine.mesh.devices, axis, -1), machine.chip)
    figure = f"{len(slices)} slice(s) of {shape}; neighbours on {sharding.AXES[axis]} are {hops:.2f} links apart"
    return figure, f"at most {MEAN_HOPS} links on average", figure if hops > MEAN_HOPS else ""


def mean_hops(groups: np.ndarray, chip: chips.Chip | None) -> float:
    """The mean number of links between neighbours on the last axis of an array of TPU devices of one slice each."""
    corner = [max(values) + 1 for values in zip(*(device.coords for device in groups.flat))]
    rings = [size if chip and size > 2 and size % chip.ring == 0 else None for size in corner]
    lengths = [
        _hops(first.coords, second.coords, rings)
        for group in groups.reshape(-1, groups.shape[-1]) for first, second in itertools.pairwise(group)
    ]  # fmt: skip
    return sum(lengths) / len(lengths)


def _hops(first: Sequence[int], second: Sequence[int], rings: Sequence[int | None]) -> int:
    distances = [abs(a - b) for a, b in zip(first, second)]
    return sum(min(n, ring - n) if ring else n for n, ring in zip(distances, rings))


def _coords(device: jax.Device) -> list[int] | None:
    return list(device.coords) if device.platform == "tpu" else None


def _memory(machine: Machine) -> Line:
    stats = [device.memory_stats() for device in jax.local_devices()]
    if not all(stats) or machine.chip is None:
        kind = machine.devices[0].device_kind
        return report.skipped_line("device memory", f"{kind} devices do not say it, or are not in chips.py")
    limit = min(device["bytes_limit"] for device in stats)
    bytes_in_use = max(device["bytes_in_use"] for device in stats)
    share = MEMORY_SHARE[machine.platform]
    least = share * machine.chip.hbm_bytes
    return report.threshold_line(
        "device memory", limit / chips.GIB, f"{limit / chips.GIB:.2f} GiB, {bytes_in_use / chips.GIB:.2f} in use",
        least / chips.GIB, f"at least {least / chips.GIB:.2f} GiB: {share:.0%} of {machine.chip.name}'s",
        "another program holds memory, or the device is cut (MIG); on GPUs set XLA_CLIENT_MEM_FRACTION=0.92",
    )  # fmt: skip


def _clocks() -> Line:
    """The processes' clocks, read when all have come to the same point."""
    if distributed.count() == 1:
        return report.skipped_line("clocks of processes", "there is one process")
    distributed.exchange("doctor clocks begin", True)
    times = distributed.exchange("doctor clocks", time.time())
    spread_secs = max(times) - min(times)
    order = f"process {times.index(max(times))} is ahead of process {times.index(min(times))}"
    good = spread_secs <= CLOCK_SECS
    remedy = "" if good else f"{order}: synchronise the hosts' clocks (chrony, systemd-timesyncd)"
    return Line("clocks of processes", OK if good else WARN, f"{spread_secs:.3f} s apart",
                f"at most {CLOCK_SECS:.0f} s", remedy)  # fmt: skip
