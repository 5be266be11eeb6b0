"""The speed of the devices' arithmetic, memory and collectives, and of transfers from the host.

Expectations are shares of the chip's peaks in `chips`, with a margin for a good machine; on a CPU, or a chip that
`chips` does not describe, a figure has no expectation.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_jax import distributed, sharding
from llava_jax.doctor import report
from llava_jax.doctor.machine import Machine
from llava_jax.doctor.report import FAIL, Line

COMPUTE_SHARE, MEMORY_SHARE = 0.5, 0.6
LINK_SHARE = 0.25  # of one link, or of the network's port: the expectation for the slowest kind of transfer
# By `plan`, stage 2 of the 7B on v6e takes 8.4 rows a second and chip (launch/README); a row of 2,048 tokens with three
# pictures of 336 pixels is 1.1 MB. Ten times that leaves the input hidden.
HOST_BYTES_PER_SEC = 0.1e9
REPEATS = 3


class Sizes(NamedTuple):
    """Sizes of the transfers. rows: of square matrices; loops: repetitions without a return to the host."""

    rows: int
    loops: int
    memory_bytes: int
    collective_bytes: int
    host_bytes: int


# Memory: well above a chip's on-chip memory (v6e: 128 MiB).
ACCELERATOR = Sizes(rows=4096, loops=64, memory_bytes=2**30, collective_bytes=2**28, host_bytes=2**28)
CPU = Sizes(rows=512, loops=4, memory_bytes=2**25, collective_bytes=2**22, host_bytes=2**25)


def check(machine: Machine) -> Iterator[Line]:
    """Lines about matrix products, memory, the host's link, and each axis of the mesh."""
    sizes = ACCELERATOR if machine.accelerated else CPU
    yield _compute(machine, sizes)
    yield _memory(machine, sizes)
    yield _from_host(machine, sizes)
    axes = [axis for axis in sharding.AXES if machine.mesh.shape[axis] > 1]
    if not axes:
        yield report.skipped_line("collectives", "no axis of the mesh is longer than 1")
    for axis in axes:
        yield _collectives(machine, axis, sizes)


def _compute(machine: Machine, sizes: Sizes) -> Line:
    dtype = jnp.bfloat16 if machine.accelerated else jnp.float32
    n = sizes.rows

    def products(x: jax.Array) -> jax.Array:
        right = jax.random.normal(jax.random.key(0), (n, n), dtype) * n**-0.5  # products keep their size
        return jax.lax.fori_loop(0, sizes.loops, lambda _, x: x @ right, x)

    secs = _on_each_device(products, (n, n), dtype)
    speed = 2 * n**3 * sizes.loops / secs
    peak = machine.chip and machine.chip.peak_flops
    return report.threshold_line(
        "matrix products", speed, f"{speed / 1e12:.3g} TFLOP/s a device in {jnp.dtype(dtype)}",
        peak and COMPUTE_SHARE * peak, _expectation(peak, COMPUTE_SHARE, 1e12, "TFLOP/s"),
        "another program uses the device, or it is throttled (power, heat); the slowest chip sets every step's time",
    )  # fmt: skip


def _memory(machine: Machine, sizes: Sizes) -> Line:
    def pass_over(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, sizes.loops, lambda _, x: x * 0.999 + 0.001, x)

    secs = _on_each_device(pass_over, (sizes.memory_bytes // 4,), jnp.float32)
    speed = 2 * sizes.memory_bytes * sizes.loops / secs  # read and written
    peak = machine.chip and machine.chip.hbm_bytes_per_sec
    return report.threshold_line(
        "memory", speed, f"{speed / 1e9:.3g} GB/s a device", peak and MEMORY_SHARE * peak,
        _expectation(peak, MEMORY_SHARE, 1e9, "GB/s"),
        "another program uses the device, or it is damaged: try another one",
    )  # fmt: skip


def _from_host(machine: Machine, sizes: Sizes) -> Line:
    content = np.zeros(sizes.host_bytes, np.uint8)
    devices = jax.local_devices()
    secs = _best(lambda: [jax.device_put(content, device) for device in devices])
    speed = content.nbytes * len(devices) / secs
    least = HOST_BYTES_PER_SEC * len(devices) if machine.accelerated else None
    return report.threshold_line(
        "from host to devices", speed, f"{speed / 1e9:.3g} GB/s to {len(devices)} devices together", least,
        f"at least {(least or 0) / 1e9:.1f} GB/s" if least else "",
        "the host is busy, or its memory is far from the device (numactl --hardware)",
    )  # fmt: skip


def _collectives(machine: Machine, axis: str, sizes: Sizes) -> Line:
    """The bytes that a device must send at least, over the time: what NCCL's tests call bus bandwidth."""
    mesh, parts = machine.mesh, machine.mesh.shape[axis]
    count = sizes.collective_bytes // 4 // parts * parts
    sharded, replicated = NamedSharding(mesh, PartitionSpec(axis)), NamedSharding(mesh, PartitionSpec())
    values = np.arange(count, dtype=np.float32) % 127  # sums of them are exact
    operations: dict[str, tuple[Callable[..., Any], NamedSharding, NamedSharding, int, int]] = {
        "all-gather": (lambda x: jax.lax.all_gather(x, axis, tiled=True), sharded, replicated, 1, 1),
        "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, axis, tiled=True), replicated, sharded, 1, parts),
        "all-reduce": (lambda x: jax.lax.psum(x, axis), replicated, replicated, 2, parts),
    }
    speeds, wrong = dict[str, float](), list[str]()
    for name, (operation, before, after, crossings, factor) in operations.items():
        x = jax.make_array_from_callback((count,), before, lambda index: values[index])
        call = _compile(jax.shard_map(operation, mesh=mesh, in_specs=before.spec, out_specs=after.spec,
                                      check_vma=False), x)  # fmt: skip
        distributed.exchange(f"doctor {axis} {name}", True)  # begin together
        result = call(x)
        if not all(np.array_equal(s.data, factor * values[s.index]) for s in result.addressable_shards[:1]):
            wrong.append(name)
        speeds[name] = crossings * (parts - 1) / parts * 4 * count / _best(lambda call=call, x=x: call(x))
    figure = ", ".join(f"{name} {speed / 1e9:.3g}" for name, speed in speeds.items()) + " GB/s"
    if wrong:
        return Line(f"over {axis} ({parts})", FAIL, f"{', '.join(wrong)}: wrong sums or order", "right results",
                    "a link or a device is damaged, or this version of XLA is: try another slice")  # fmt: skip
    link, network = _link(machine, axis)
    return report.threshold_line(
        f"over {axis} ({parts})", min(speeds.values()), figure, link and LINK_SHARE * link,
        f"at least {(link or 0) * LINK_SHARE / 1e9:.3g} GB/s: {LINK_SHARE:.0%} of {network}",
        "other traffic, a slow link, or (between hosts with GPUs) NCCL over a wrong network: NCCL_DEBUG=INFO shows it",
    )  # fmt: skip


def _link(machine: Machine, axis: str) -> tuple[float | None, str]:
    """Bytes a second that neighbours on an axis of the mesh can exchange, and what that is."""
    if machine.chip is None:
        return None, ""
    index = sharding.AXES.index(axis)
    group = np.moveaxis(machine.mesh.devices, index, -1).reshape(-1, machine.mesh.shape[axis])[0]
    tpu = machine.platform == "tpu"
    groups = {machine.slice_of(device) if tpu else machine.hosts[device.process_index] for device in group}
    if len(groups) > 1:
        return machine.chip.dcn_bytes_per_sec, f"the network's {machine.chip.dcn_bytes_per_sec / 1e9:.3g}"
    links = 2 * len(machine.chip.shapes[-1].split("x")) if tpu else 1
    bytes_per_sec = machine.chip.ici_bytes_per_sec / links
    name = f"one of {links} links'" if tpu else "NVLink's"
    return bytes_per_sec, f"{name} {bytes_per_sec / 1e9:.3g}"


def _expectation(peak: float | None, share: float, unit: float, name: str) -> str:
    return f"at least {share * peak / unit:.3g} {name}: {share:.0%} of {peak / unit:.4g}" if peak else ""


def _on_each_device(function: Callable[[jax.Array], jax.Array], shape: Sequence[int], dtype: Any) -> float:
    """Seconds of a function of one array, on all devices of this process at once."""
    mesh = Mesh(np.asarray(jax.local_devices()), ("device",))
    spec = PartitionSpec("device")
    make = jax.jit(lambda: jnp.ones((mesh.size, *shape), dtype), out_shardings=NamedSharding(mesh, spec))
    call = jax.jit(jax.shard_map(lambda x: function(x[0])[None], mesh=mesh, in_specs=spec, out_specs=spec))
    x = make()
    return _best(lambda: call(x))


def _compile(function: Callable[[jax.Array], Any], x: jax.Array) -> Callable[[jax.Array], Any]:
    return jax.jit(function).lower(x).compile()


def _best(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of some calls, the first of which compiles and does not count: noise only adds."""
    secs = list[float]()
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        secs.append(time.perf_counter() - start)
    return min(secs[1:])
