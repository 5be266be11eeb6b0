"""Two processes of four devices each are one run: each loads its own rows, and the losses are a single process's."""

import socket

import pytest

from llava_jax.train import metrics
from tests.train import tiny

PACKED = ("--config.data.layout=packed", "--config.data.rows_per_chip=1", "--config.data.row_tokens=96",
          "--config.data.images_per_group=3", "--config.train.steps=6", "--config.train.epochs=none",
          "--config.checkpoint.every=2")  # fmt: skip
MESHES = {"fsdp": (), "all axes": ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2",
                                   "--config.data.rows_per_chip=2")}  # fmt: skip


def finish(processes):
    for process in processes:
        out, error = process.communicate(timeout=600)
        assert process.returncode == 0, out + error[-3000:]


def devices(count):
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


def pair(config, folder, words, compiled):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = compiled | devices(4) | {"LLAVA_JAX_MULTIHOST": "1", "JAX_NUM_PROCESSES": "2",
                                        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}  # fmt: skip
    return [tiny.start(config, folder, *PACKED, *words, **settings, JAX_PROCESS_ID=str(i)) for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_of_four_devices_are_one_of_eight(run, tmp_path, compiled, mesh):
    words = MESHES[mesh]
    finish([tiny.start(run, tmp_path / "one", *PACKED, *words, **compiled, **devices(8))])
    finish(pair(run, tmp_path / "two", words, compiled))
    one, two = ([row["loss"] for row in metrics.read(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 6 and two == pytest.approx(one, rel=2e-5)
