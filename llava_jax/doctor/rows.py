"""Whether each device holds the rows that the pipeline assigns to it: on every process, and gathered from all."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from llava_jax import distributed, sharding
from llava_jax.batch import Batch
from llava_jax.distributed import WHOLE, Rows
from llava_jax.doctor import trial as trials
from llava_jax.doctor.machine import Machine
from llava_jax.doctor.report import FAIL, OK, Line
from llava_jax.doctor.trial import Trial

REMEDY = "a fault of llava_jax or JAX on this topology: please send us the file of --json"


def check(machine: Machine) -> Iterator[Line]:
    """Lines about the rows of one step of a real pipeline."""
    trial = trials.open_trial(machine.sizes, len(machine.devices), machine.platform, machine.local)
    parts = [Rows(*map(_tuple, answer)) for answer in distributed.exchange("doctor rows", trial.program.rows)]
    yield _owner_line(trial, parts)
    full_batch, local_batch = (next(iter(trials.open_pipeline(trial, part)))[0] for part in (WHOLE, trial.program.rows))
    yield _pipeline_line(trial, full_batch, local_batch)
    yield from _placement_lines(trial, parts, full_batch, trial.program.put(local_batch))


def _tuple(value: list[int] | int) -> tuple[int, ...] | int:
    return tuple(value) if isinstance(value, list) else value


def _owner_line(trial: Trial, parts: Sequence[Rows]) -> Line:
    """Every part of a step is loaded, by exactly the processes whose devices hold it."""
    tokens, name, expectation = trial.program.batch.tokens, "rows: who loads them", "all of them, on their devices"
    size = tokens.shape[0] // parts[0].of
    required = dict[int, set[int]]()
    for device, index in tokens.sharding.devices_indices_map(tokens.shape).items():
        required.setdefault(device.process_index, set()).add((index[0].start or 0) // size)
    wrong = [i for i, part in enumerate(parts) if set(part.shards) != required[i] or part.of != parts[0].of]
    step_parts = _step_parts(parts)
    if wrong or sorted(step_parts.values()) != list(range(parts[0].of)):
        fault = f"parts {sorted(step_parts.values())} of {parts[0].of}; process {wrong} loads what it does not hold"
        return Line(name, FAIL, fault, expectation, REMEDY)
    owners = ", ".join(f"{i}: {_range_text(part.places)}" for i, part in enumerate(parts[:4]))
    more = " ..." if len(parts) > 4 else ""
    return Line(name, OK, f"{tokens.shape[0]} rows in {parts[0].of} parts; process {owners}{more}", expectation)


def _step_parts(parts: Sequence[Rows]) -> dict[int, int]:
    """{part of the global array: part of the pipeline's step}, by the last process that holds it."""
    return {shard: step_part for part in parts for step_part, shard in zip(part.places, part.shards)}


def _range_text(numbers: Sequence[int]) -> str:
    contiguous = list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if contiguous and len(numbers) > 2 else " ".join(map(str, numbers))


def _pipeline_line(trial: Trial, full_batch: Batch, local_batch: Batch) -> Line:
    """This process's pipeline yields the rows that a single process reads at those places."""
    part, fields = trial.program.rows, full_batch._asdict()
    differ = [name for name, field in local_batch._asdict().items()
              if not np.array_equal(field, _select_parts(fields[name], part.places, part.of))]  # fmt: skip
    name, expectation = "rows: as one process reads them", "the same"
    if differ:
        return Line(name, FAIL, f"{', '.join(differ)} differ", expectation, REMEDY)
    return Line(name, OK, f"{len(local_batch)} fields the same", expectation)


def _select_parts(field: np.ndarray, numbers: Sequence[int], of: int) -> np.ndarray:
    """The parts of a whole step's field at these places, in this order."""
    size = field.shape[0] // of
    return np.concatenate([field[number * size : (number + 1) * size] for number in numbers])


def _placement_lines(trial: Trial, parts: Sequence[Rows], full_batch: Batch, device_batch: Batch) -> Iterator[Line]:
    """What lies on this process's devices, and what all devices together hold when one of them gathers it."""
    step_parts = _step_parts(parts)
    order = [step_parts[shard] for shard in range(parts[0].of)]
    expected = {name: _select_parts(field, order, parts[0].of) for name, field in full_batch._asdict().items()}
    wrong = sorted({
        f"{name} on device {shard.device.id}" for name, field in device_batch._asdict().items()
        for shard in field.addressable_shards if not np.array_equal(shard.data, expected[name][shard.index])
    })  # fmt: skip
    figure = f"{len(expected)} fields on {len(jax.local_devices())} devices"
    yield _comparison_line("rows: on each device", wrong, figure)
    gathered = jax.jit(lambda batch: batch, out_shardings=sharding.replicated(trial.program.mesh))(device_batch)
    wrong = [name for name, field in gathered._asdict().items()
             if not np.array_equal(field.addressable_data(0), expected[name])]  # fmt: skip
    yield _comparison_line("rows: gathered from all devices", wrong, f"{len(expected)} fields, {len(order)} parts")


def _comparison_line(name: str, wrong: Sequence[str], figure: str) -> Line:
    expectation = "row i is the pipeline's"
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return Line(name, FAIL, f"{', '.join(wrong[:3])}{more} hold other rows", expectation, REMEDY)
    return Line(name, OK, figure, expectation)
