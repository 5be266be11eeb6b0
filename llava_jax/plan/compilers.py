"""The compilers that `plan` compiles with, and the devices that they make of a topology which is not here."""

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from llava_jax import chips
from llava_jax.chips import GPU_SHARE, Chip
from llava_jax.errors import UsageError

# What XLA's compiler asks of a GPU, by compute capability: A100's die, and H100's and H200's.
# Source: github.com/openxla/xla, xla/backends/gpu/target_config/specs.
GPUS = {
    "8.0": "cuda_compute_capability { major: 8 } core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 "
           "shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 l2_cache_size: 41943040",
    "9.0": "cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } core_count: 132 "
           "fpus_per_core: 128 clock_rate_ghz: 1.98 shared_memory_per_core: 233472 "
           "shared_memory_per_block_optin: 232448 l2_cache_size: 52428800",
}  # fmt: skip
# Without a GPU to time them on, XLA makes every product a Triton kernel of one small tile, and refuses some (float32 of
# width 48, jax 0.10.2); cuBLAS takes all, and its workspace counts.
UNTUNED = (("xla_gpu_enable_triton_gemm", False),)
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
ASSEMBLERS = {"nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc"}  # packages with ptxas and libdevice, which a toolkit has too
TOOLKIT = "/usr/local/cuda/bin/ptxas"


def devices(chip: Chip, topology: str, slices: int) -> Sequence[Any]:
    """The devices of so many slices of a topology, or of the GPUs of a machine; they compile, and hold no array.

    Raises:
      UsageError: their compiler is not installed.
    """
    return _gpus(chip, topology) if chip.cuda else _tpus(chip, topology, slices)


def describe(chip: Chip) -> str:
    """A chip's compiler, with its version."""
    if chip.cuda:
        return f"XLA's compiler for GPUs (jax {jax.__version__})"
    return f"the TPU's compiler (libtpu {importlib.metadata.version('libtpu')})"


def package(chip: Chip) -> str:
    """What brings another version of a chip's compiler."""
    return "jax[cuda12]" if chip.cuda else "libtpu"


def _tpus(chip: Chip, topology: str, slices: int) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "plan compiles with the TPU's own compiler, which is not installed: `pip install libtpu` (it needs no "
            "TPU; `pip install 'jax[tpu]'` takes the version that suits this jax)"
        )
    # libtpu looks for a TPU and its metadata when it is loaded, and locks it; these variables prevent that.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"),
                        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):  # fmt: skip
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if slices > 1:
        options["num_slices"] = slices
    if chips.dimensions(topology) == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # as on TPU VMs: one device a chip; the other chips have it by default
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def missing_packages() -> list[str]:
    """What is to be installed before XLA compiles for GPUs: its plugin, and NVIDIA's assembler with libdevice."""
    missing = []
    if not any(map(importlib.util.find_spec, PLUGINS)):
        missing += [f"{name}=={jax.__version__}" for name in ("jax-cuda12-plugin", "jax-cuda12-pjrt")]
    installed = {each.name for each in importlib.metadata.distributions()}
    if shutil.which("ptxas") is None and not os.path.exists(TOOLKIT) and not installed & ASSEMBLERS:
        missing.append("nvidia-cuda-nvcc-cu12")
    return missing


def _gpus(chip: Chip, topology: str) -> Sequence[Any]:
    if missing := missing_packages():
        raise UsageError(
            "plan compiles for GPUs with XLA's own compiler for them and NVIDIA's assembler, which needs no GPU; not "
            f"everything is installed: `pip install --no-deps {' '.join(missing)}` (600 MB in all)"
        )
    (count,) = chips.dimensions(topology)
    return absent_gpus(chip.kind, GPUS[chip.cuda], round(chip.hbm_bytes / GPU_SHARE), chip.hbm_bytes_per_sec, count)


def absent_gpus(kind: str, die: str, memory: int, bytes_per_sec: float, count: int) -> Sequence[Any]:
    """So many GPUs of one machine. die: as in `GPUS`."""
    config = f"""
        platform_name: "CUDA" device_description_str: "{kind}"
        dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
        gpu_device_info {{
            {die} device_memory_size: {memory} memory_bandwidth: {int(bytes_per_sec)}
            threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
            shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}"""
    return topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x1x{count}").devices
