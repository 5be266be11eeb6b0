"""Faults that a machine, a library or this package could have, planted one at a time: `python -m tests.doctor.plants`.

The command runs those that want several devices, on as many as the environment forces, and prints {fault: lines}.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from jax.sharding import Mesh

from llava_jax import chips, distributed, sharding
from llava_jax import config as configs
from llava_jax.chips import Chip
from llava_jax.distributed import Rows
from llava_jax.doctor import devices, machine, report, rows, speed, trial
from llava_jax.doctor.machine import Machine
from llava_jax.train.program import Program

FAST_CHIP = Chip("fast", "cpu", peak_flops=1e18, hbm_bytes=1 << 40, hbm_bytes_per_sec=1e15, ici_bytes_per_sec=1e15,
                 dcn_bytes_per_sec=1e15)  # fmt: skip


def reversed_mesh(patch: pytest.MonkeyPatch) -> None:
    """`make_mesh` takes the devices in another order."""
    make = sharding.make_mesh

    def other(sizes, devices=None):
        mesh = make(sizes, devices)
        return Mesh(mesh.devices[:, ::-1], mesh.axis_names, axis_types=mesh.axis_types)

    patch.setattr(sharding, "make_mesh", other)


def rolled_rows(patch: pytest.MonkeyPatch) -> None:
    """Every row of a batch goes where its neighbour belongs."""
    put = Program.put
    patch.setattr(Program, "put", lambda self, local: put(self, jax.tree.map(lambda x: jax.numpy.roll(x, 1, 0), local)))


def lost_rows(patch: pytest.MonkeyPatch) -> None:
    """A process says that it loads fewer rows than its devices hold."""
    count = distributed.rows
    patch.setattr(distributed, "rows", lambda *args: _without_the_last(count(*args)))


def _without_the_last(part: Rows) -> Rows:
    return Rows(part.places[:-1], part.shards[:-1], part.of)


def other_rows(patch: pytest.MonkeyPatch) -> None:
    """The pipeline of a part yields other rows than the pipeline of all."""
    open_pipeline = trial.open_pipeline

    def shifted(run, part):
        count = part.of
        return open_pipeline(run, part._replace(places=tuple((index + 1) % count for index in part.places)))

    patch.setattr(trial, "open_pipeline", shifted)


def no_sum(patch: pytest.MonkeyPatch) -> None:
    """An all-reduce gives each device its own value back."""
    patch.setattr(jax.lax, "psum", lambda x, axis: x)


def slow_machine(patch: pytest.MonkeyPatch) -> None:
    """A chip that ought to be much faster than this CPU."""
    patch.setattr(chips, "of_kind", lambda kind: FAST_CHIP)


class Plant(NamedTuple):
    """A fault, and the check that must find it. None: nothing is planted."""

    fault: Callable[[pytest.MonkeyPatch], None] | None
    check: Callable[[Machine], object]


OF_SEVERAL_DEVICES = {
    "good order": Plant(None, devices.check), "good rows": Plant(None, rows.check),
    "good speed": Plant(None, speed.check), "reversed mesh": Plant(reversed_mesh, devices.check),
    "rolled rows": Plant(rolled_rows, rows.check),
    "lost rows": Plant(lost_rows, rows.check), "other rows": Plant(other_rows, rows.check),
    "no sum": Plant(no_sum, speed.check), "slow machine": Plant(slow_machine, speed.check),
}  # fmt: skip


def look(folder: Path) -> Machine:
    """This process's machine, on the default mesh."""
    return machine.detect(configs.Mesh(), folder, folder)


def run(plant: Plant, folder: Path) -> list[report.Line]:
    """The lines of a check while its fault is planted. (A check that raises has said what is wrong before.)"""
    lines = list[report.Line]()
    with pytest.MonkeyPatch.context() as patch:
        if plant.fault is not None:
            plant.fault(patch)
        try:
            for line in plant.check(look(folder)):
                lines.append(line)
        except ValueError:
            assert lines, "the check ends before it has said anything"
    return lines


if __name__ == "__main__":
    speed.CPU = speed.CPU._replace(rows=64, memory_bytes=2**16, collective_bytes=2**16, host_bytes=2**16)
    with tempfile.TemporaryDirectory() as temp_dir:
        trial.write_files(Path(temp_dir))
        lines_by_fault = {name: run(plant, Path(temp_dir)) for name, plant in OF_SEVERAL_DEVICES.items()}
    print(json.dumps({name: [dataclasses.asdict(line) for line in lines] for name, lines in lines_by_fault.items()}))
