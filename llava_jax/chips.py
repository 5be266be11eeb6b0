"""What the accelerators are: peak speed, memory, links, the compiler options that suit them, and the slices on offer.

All numbers are of one JAX device, which is one chip, except TPU7x, whose two cores are a device each. Memory is what
a program may use: on TPU the limit that XLA compiles against, which is below the nominal size; on GPUs `GPU_SHARE`.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from llava_jax.errors import UsageError

GIB = 2**30
# Of a GPU's memory, that JAX takes for arrays where launch/ starts it (XLA_CLIENT_MEM_FRACTION); the rest is for CUDA,
# NCCL and cuBLAS themselves.
GPU_SHARE = 0.92


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    name: what people type, the part of a topology before the colon.
    kind: what JAX says, `device.device_kind`.
    peak_flops: bfloat16 operations a second with float32 sums; a multiply and an add are two.
    ici_bytes_per_sec: of all links to the neighbours together, in one direction (half of what is sold as
      bidirectional); a chip has two links for each dimension of its slices (a GPU's NVLinks meet in a switch).
    dcn_bytes_per_sec: this device's share of its host's network, in one direction.
    ring: sizes of a slice's dimension that are multiples of this close to a ring; other dimensions are lines.
    shapes: slices on offer, "4x4"; of GPUs, so many of one machine.
    chips_per_host: of slices with more than one host.
    compiler_options: what XLA is told beside its defaults when a step is compiled for this chip.
    cuda: compute capability of an NVIDIA GPU, "9.0".
    """

    name: str
    kind: str
    peak_flops: float
    hbm_bytes: int
    hbm_bytes_per_sec: float
    ici_bytes_per_sec: float
    dcn_bytes_per_sec: float
    ring: int = 1
    shapes: tuple[str, ...] = ()
    chips_per_host: int = 8
    devices_per_chip: int = 1
    compiler_options: Mapping[str, str | int | bool] = field(default_factory=dict)
    cuda: str = ""


# Shapes: Google Cloud's tables for Cloud TPU and GKE. v4, v5p and TPU7x are also leased twisted and in other
# multiples of 4x4x4, which are left out.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
LARGE = ("16x16x16", "16x16x24")
NODE = ("1", "2", "4", "8")

# Gathers of the next layer's weights run while this layer computes. Source: MaxText benchmarks/xla_flags_library.py
# (continuation fusion for all-gather). libtpu 0.0.42.1 does so by itself on v5e: there these change nothing, nor does
# MaxText's overlap of data-parallel sums. Sums on the sparse cores are left out on purpose: AXLearn
# (axlearn/common/compiler_options.py) reports wrong ones on v6e and v7x.
GATHER_EARLY = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
# Weights stay in float32 and cut until the layer that uses them. By itself XLA keeps a bfloat16 copy of all layers
# beside them, and the second buffers of products that gather as they go: 15.8 GiB instead of 14.0 for the 7B's stage 2
# (4 rows of 2,048 on v5e:4x4, `plan`, libtpu 0.0.42.1). MaxText turns such products off too.
LEAN = {"xla_jf_bf16_propagation": False, "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
# Memory on the chip that one operation may plan with; the rest is for fetching what the next needs. Source: MaxText
# for v6e, AXLearn for v7x.
VMEM = "xla_tpu_scoped_vmem_limit_kib"

# Speeds: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "specifications", read in 2026; v4's links: Jouppi et al.
# 2023, TPU v4, six of 50 GB/s. Memory: the limit in the error of a program that is too large, libtpu 0.0.42.1.
# GPUs: NVIDIA's data sheets (dense bfloat16, SXM boards); the network is one 400 (A100: 200) Gb/s port for each GPU.
# Their memory: openxla/xla, xla/backends/gpu/target_config/specs, device_memory_size.
CHIPS = (
    Chip(
        "v4", "TPU v4", peak_flops=275e12, hbm_bytes=int(30.75 * GIB), hbm_bytes_per_sec=1200e9,
        ici_bytes_per_sec=300e9, dcn_bytes_per_sec=6.25e9, ring=4, shapes=CUBIC + LARGE[:1], chips_per_host=4,
        compiler_options=LEAN | {"xla_enable_async_all_gather": True},
    ),
    Chip(
        "v5e", "TPU v5 lite", peak_flops=197e12, hbm_bytes=int(15.75 * GIB), hbm_bytes_per_sec=819e9,
        ici_bytes_per_sec=200e9, dcn_bytes_per_sec=3.125e9, ring=16, shapes=FLAT, chips_per_host=4,
        compiler_options=LEAN,
    ),
    Chip(
        "v5p", "TPU v5", peak_flops=459e12, hbm_bytes=int(95.74 * GIB), hbm_bytes_per_sec=2765e9,
        ici_bytes_per_sec=600e9, dcn_bytes_per_sec=6.25e9, ring=4, shapes=CUBIC + LARGE, chips_per_host=4,
        compiler_options=LEAN | GATHER_EARLY | {"xla_tpu_megacore_fusion_allow_ags": False},
    ),
    Chip(
        "v6e", "TPU v6 lite", peak_flops=918e12, hbm_bytes=int(31.25 * GIB), hbm_bytes_per_sec=1638e9,
        ici_bytes_per_sec=400e9, dcn_bytes_per_sec=12.5e9, ring=16, shapes=FLAT, chips_per_host=4,
        compiler_options=LEAN | GATHER_EARLY | {VMEM: 98304},
    ),
    Chip(
        "tpu7x", "TPU7x", peak_flops=2307e12 / 2, hbm_bytes=int(94.75 * GIB), hbm_bytes_per_sec=7380e9 / 2,
        ici_bytes_per_sec=600e9 / 2, dcn_bytes_per_sec=6.25e9, ring=4, shapes=CUBIC + LARGE, chips_per_host=4,
        devices_per_chip=2, compiler_options=LEAN | GATHER_EARLY | {VMEM: 65536},
    ),
    Chip("A100-40", "NVIDIA A100-SXM4-40GB", 312e12, int(GPU_SHARE * 42_331_013_120), 1555e9, 300e9, 25e9,
         shapes=NODE, cuda="8.0"),
    Chip("A100", "NVIDIA A100-SXM4-80GB", 312e12, int(GPU_SHARE * 85_100_068_864), 2039e9, 300e9, 25e9,
         shapes=NODE, cuda="8.0"),
    Chip("H100", "NVIDIA H100 80GB HBM3", 989e12, int(GPU_SHARE * 84_942_979_072), 3350e9, 450e9, 50e9,
         shapes=NODE, cuda="9.0"),
    Chip("H200", "NVIDIA H200", 989e12, int(GPU_SHARE * 151_397_597_184), 4800e9, 450e9, 50e9,
         shapes=NODE, cuda="9.0"),
)  # fmt: skip


def of_kind(device_kind: str) -> Chip | None:
    """The chip whose devices call themselves that; None for one that nobody has described here."""
    return next((chip for chip in CHIPS if chip.kind == device_kind), None)


def of_topology(topology: str) -> Chip:
    """The chip of a slice, "v5e:4x4", or of so many GPUs of a machine, "H100:8".

    Raises:
      ValueError: no such chip, or it is not leased in that shape; the message lists what there is.
    """
    leased = {chip.name: chip for chip in CHIPS}
    name, _, shape = topology.partition(":")
    if name not in leased:
        raise UsageError(f"unknown topology {topology!r}: want CHIP:SHAPE with a chip of {', '.join(leased)}")
    chip = leased[name]
    if shape not in chip.shapes:
        near = difflib.get_close_matches(shape, chip.shapes, n=1)
        hint = f"; did you mean {name}:{near[0]}?" if near else ""
        raise UsageError(f"topology {topology!r} is not leased: {name} comes as {', '.join(chip.shapes)}{hint}")
    return chip


def dimensions(topology: str) -> tuple[int, ...]:
    """Chips along each dimension of a slice: "v5e:4x4" -> (4, 4)."""
    return tuple(map(int, topology.partition(":")[2].split("x")))


def hosts(topology: str) -> int:
    """Machines of a slice, as libtpu counts them; small slices share one."""
    return max(1, math.prod(dimensions(topology)) // of_topology(topology).chips_per_host)
