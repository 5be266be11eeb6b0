"""The input of every check: the requested mesh, the chip, and a new folder in the workdir."""

import dataclasses
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

import jax
from etils import epath
from jax.sharding import Mesh

from llava_jax import chips, distributed, sharding
from llava_jax import config as configs
from llava_jax.chips import Chip


@dataclass(frozen=True)
class Machine:
    """All processes and their devices.

    chip: None where `chips` does not describe it.
    folder: in the workdir, the same for all processes; not made yet.
    local: a directory that only this process sees.
    hosts: the name of each process's host.
    """

    sizes: configs.Mesh
    mesh: Mesh
    chip: Chip | None
    folder: epath.Path
    local: Path
    hosts: tuple[str, ...]

    @property
    def devices(self) -> list[jax.Device]:
        """Those of the mesh, in its order."""
        return list(self.mesh.devices.flat)

    @property
    def platform(self) -> str:
        return self.devices[0].platform

    @property
    def accelerated(self) -> bool:
        """Whether speeds are worth a comparison: the devices of a CPU are threads of one."""
        return self.platform != "cpu"

    def slice_of(self, device: jax.Device) -> int:
        """The number of a TPU's slice. (Devices of a single one need not say.)"""
        return device.slice_index if self.sizes.slices > 1 else 0


def detect(sizes: configs.Mesh, workdir: epath.PathLike, local: Path) -> Machine:
    """The machine, as all processes see it.

    Raises:
      UsageError: the sizes of the mesh do not fit the devices.
    """
    mesh = sharding.make_mesh(dataclasses.asdict(sizes))
    chip = chips.of_kind(mesh.devices.flat[0].device_kind)
    name = distributed.exchange("doctor folder", f"doctor-{secrets.token_hex(4)}")[0]
    hosts = distributed.exchange("doctor hosts", socket.gethostname())
    return Machine(sizes, mesh, chip, epath.Path(workdir) / name, local, tuple(hosts))
