"""Whether each device holds the rows that the pipeline says: on every process, and as other devices see them."""

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


def check(found: Machine) -> Iterator[Line]:
    """Lines about the rows of one step of a real pipeline."""
    trial = trials.open_trial(found.sizes, len(found.devices), found.platform, found.local)
    parts = [Rows(*map(_tuple, answer)) for answer in distributed.exchange("doctor rows", trial.program.rows)]
    yield _holders(trial, parts)
    whole, local = (next(iter(trials.open_pipeline(trial, part)))[0] for part in (WHOLE, trial.program.rows))
    yield _loaded(trial, whole, local)
    yield from _placed(trial, parts, whole, trial.program.put(local))


def _tuple(value: list[int] | int) -> tuple[int, ...] | int:
    return tuple(value) if isinstance(value, list) else value


def _holders(trial: Trial, parts: Sequence[Rows]) -> Line:
    """Every part of a step is loaded, by exactly the processes whose devices hold it."""
    tokens, name, expectation = trial.program.batch.tokens, "rows: who loads them", "all of them, on their devices"
    size = tokens.shape[0] // parts[0].of
    needed = dict[int, set[int]]()
    for device, index in tokens.sharding.devices_indices_map(tokens.shape).items():
        needed.setdefault(device.process_index, set()).add((index[0].start or 0) // size)
    wrong = [i for i, part in enumerate(parts) if set(part.shards) != needed[i] or part.of != parts[0].of]
    places = _places(parts)
    if wrong or sorted(places.values()) != list(range(parts[0].of)):
        fault = f"parts {sorted(places.values())} of {parts[0].of}; process {wrong} loads what it does not hold"
        return Line(name, FAIL, fault, expectation, REMEDY)
    words = ", ".join(f"{i}: {_brief(part.places)}" for i, part in enumerate(parts[:4]))
    more = " ..." if len(parts) > 4 else ""
    return Line(name, OK, f"{tokens.shape[0]} rows in {parts[0].of} parts; process {words}{more}", expectation)


def _places(parts: Sequence[Rows]) -> dict[int, int]:
    """{part of the global array: part of the pipeline's step}, as the last process that holds it says."""
    return {shard: place for part in parts for place, shard in zip(part.places, part.shards)}


def _brief(places: Sequence[int]) -> str:
    whole = list(places) == list(range(places[0], places[-1] + 1))
    return f"{places[0]}-{places[-1]}" if whole and len(places) > 2 else " ".join(map(str, places))


def _loaded(trial: Trial, whole: Batch, local: Batch) -> Line:
    """This process's pipeline yields the rows that a single process would find at those places."""
    part, fields = trial.program.rows, whole._asdict()
    differ = [name for name, field in local._asdict().items()
              if not np.array_equal(field, _picked(fields[name], part.places, part.of))]  # fmt: skip
    name, expectation = "rows: as one process reads them", "the same"
    if differ:
        return Line(name, FAIL, f"{', '.join(differ)} differ", expectation, REMEDY)
    return Line(name, OK, f"{len(local)} fields the same", expectation)


def _picked(field: np.ndarray, places: Sequence[int], of: int) -> np.ndarray:
    """The parts of a whole step's field at these places, in this order."""
    size = field.shape[0] // of
    return np.concatenate([field[place * size : (place + 1) * size] for place in places])


def _placed(trial: Trial, parts: Sequence[Rows], whole: Batch, placed: Batch) -> Iterator[Line]:
    """What lies on this process's devices, and what all devices together hold when one of them gathers it."""
    places = _places(parts)
    order = [places[shard] for shard in range(parts[0].of)]
    expected = {name: _picked(field, order, parts[0].of) for name, field in whole._asdict().items()}
    wrong = sorted({
        f"{name} on device {shard.device.id}" for name, field in placed._asdict().items()
        for shard in field.addressable_shards if not np.array_equal(shard.data, expected[name][shard.index])
    })  # fmt: skip
    yield _compared("rows: on each device", wrong, f"{len(expected)} fields on {len(jax.local_devices())} devices")
    gathered = jax.jit(lambda batch: batch, out_shardings=sharding.replicated(trial.program.mesh))(placed)
    wrong = [name for name, field in gathered._asdict().items()
             if not np.array_equal(field.addressable_data(0), expected[name])]  # fmt: skip
    yield _compared("rows: gathered from all devices", wrong, f"{len(expected)} fields, {len(order)} parts")


def _compared(name: str, wrong: Sequence[str], words: str) -> Line:
    expectation = "row i is the pipeline's"
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return Line(name, FAIL, f"{', '.join(wrong[:3])}{more} hold other rows", expectation, REMEDY)
    return Line(name, OK, words, expectation)
