"""What every pipeline does: deterministic, resumable at any step, and never stopped by a bad record unnamed.

Grain's threads read and encode groups of rows ahead; which record goes where is the pipeline's own, so the whole
state of a run's data is one number of steps.
"""

import abc
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from llava_jax.batch import AnyBatch, Example
from llava_jax.data.check import Checks, allowed_bad, example, read, rules_of
from llava_jax.data.orders import Schedule
from llava_jax.data.packing import cut, packed
from llava_jax.data.problems import Finding, Problem, brief
from llava_jax.data.records import found
from llava_jax.data.sources import Source
from llava_jax.data.tally import Tally
from llava_jax.distributed import Rows, SharedSet
from llava_jax.errors import DataError, UsageError
from llava_jax.prompt.encode import Format

_log = logging.getLogger(__name__)
_FOREVER = 2**62
_STATE_VERSION = 1


class _Loaded(NamedTuple):
    """A sample on its way through grain: an example, or an empty one and why; unknown: its keys that nothing reads."""

    example: Example
    record: int
    finding: Finding | None
    unknown: tuple[Finding, ...] = ()


class _Naming(NamedTuple):
    """Names the record in what is raised while it is read, which grain does not know."""

    source: Source
    index: int

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            error.add_note(f"while reading {self.source.path}[{self.index}]")


class _Groups:
    """The numbers of the groups that this process loads, as grain's random-access source.

    places: of the groups within each step.
    """

    def __init__(self, first_step: int, steps: int, groups: int, places: Sequence[int]):
        self.first_step, self.steps, self.groups, self.places = first_step, steps, groups, places

    def __len__(self) -> int:
        return self.steps * len(self.places)

    def __getitem__(self, index: int) -> int:
        step, place = divmod(index, len(self.places))
        return (self.first_step + step) * self.groups + self.places[place]


class Feed(abc.ABC):
    """Batches of this process, step after step, without end (or once through, with `one_pass`).

    A step is so many groups of rows; groups are numbered from the first step on, and a process yields its part of each
    step. A subclass says which records are in a group.

    sizes: int [records, 2], tokens and images by which rows were planned; None: rows do not depend on them. A record
      whose picture was replaced, so that it has other tiles by now, is bad.

    share_images: samples of one picture that are neighbours in a row are a tree (`packing.packed`).

    mean_groups: for the loss "group_mean", so many neighbouring groups of rows share a mean. A process loads them whole
      even where it yields a part, as the weight of a target depends on the other targets of its group.

    tally: what of the data was not learned from so far.
    """

    def __init__(
        self, *, sources: Sequence[Source], format: Format, schedule: Schedule, groups: int, row_tokens: int,
        images_per_group: int, part: Rows, skip_budget: float | int, threads: int, start_step: int, one_pass: bool,
        mean_groups: int | None = None, sample_tokens: int = 0, sizes: np.ndarray | None = None,
        share_images: bool = False,
    ):  # fmt: skip
        self.sources, self.format, self.schedule, self.one_pass = tuple(sources), format, schedule, one_pass
        self.groups, self.mean_groups = groups, mean_groups
        size, whole = groups // part.of, mean_groups or 1
        self._own = [place * size + i for place in part.places for i in range(size)]
        starts = {place // whole * whole for place in self._own}
        self._read = sorted(start + i for start in starts for i in range(whole))
        self.row_tokens, self.images_per_group = row_tokens, images_per_group
        self.sample_tokens, self.sizes, self.share_images = sample_tokens or row_tokens, sizes, share_images
        self.skip_budget, self.threads = skip_budget, threads
        self.tally = Tally(self._own, self.sample_tokens)
        self._starts = np.cumsum([0, *schedule.sizes])
        self._checks = Checks(rules_of(format), format, self.sample_tokens, images_per_group)
        self._bad: dict[int, Finding] = {}
        self._bad_everywhere = SharedSet("bad")
        self._step = start_step

    @property
    @abc.abstractmethod
    def contents(self) -> str:
        """What one step holds, in words."""

    @abc.abstractmethod
    def steps_of(self, epochs: float | int) -> int:
        """Steps of so many passes over the samples, at least 1."""

    @abc.abstractmethod
    def _rows(self, group: int) -> list[list[int]]:
        """The record numbers in each row of a group. Grain's threads call it."""

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What of the subclass's own decides which record comes when; JSON-safe."""

    def _row_length(self) -> int:
        """Tokens of the rows of the step that comes next, the same on all hosts."""
        return self.row_tokens

    @property
    def records(self) -> int:
        """Distinct records of all sources."""
        return sum(self.schedule.sizes)

    @property
    def samples(self) -> int:
        """Samples of one epoch: the records times their source's weight."""
        return self.schedule.samples

    @property
    def lost_targets(self) -> int:
        """Supervised tokens that `sample_tokens` has cut off so far."""
        return int(self.tally.targets[:, 1].sum())

    @property
    @abc.abstractmethod
    def step_samples(self) -> float:
        """Samples of one step; of packed rows, on average."""

    @property
    def bad(self) -> tuple[Finding, ...]:
        """The records that this process has skipped, in the order of meeting; a record counts once."""
        return tuple(self._bad.values())

    def bad_records(self) -> int:
        """How many records all processes have skipped so far."""
        return len(self._bad_everywhere.values())

    def __iter__(self) -> Iterator[tuple[AnyBatch, tuple[str, ...]]]:
        """(this process's rows of the global batch, their record ids) from the state's step on.

        Raises:
          DataError: the batch that would come next holds a bad record and the skip budget is spent; names it.
        """
        steps = self.steps_of(1) - self._step if self.one_pass else _FOREVER // self.groups
        source = _Groups(self._step, steps, self.groups, self._read)
        ahead = max(2 * len(self._read), self.threads) * bool(self.threads)
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=ahead)
        loaded = iter(grain.MapDataset.source(source).map(self._load).to_iter_dataset(options))
        try:
            for _ in range(steps):
                groups = {place: next(loaded) for place in self._read}
                self._note([sample for group in groups.values() for row in group for sample in row])
                examples = self._examples(groups)
                batch, _ = packed(
                    examples, self._row_length(), self.images_per_group, self.format.image_size, self.format.resizes,
                    self.sample_tokens, self.share_images,
                )  # fmt: skip
                self.tally.note_targets(examples, batch.weights)
                self._step += 1
                yield batch, tuple(example.id for group in examples for row in group for example in row)
        finally:
            loaded.close()

    def rewind(self) -> None:
        """Begins again with the first step; what was bad stays known."""
        self._step = 0

    def state(self, step: int | None = None) -> dict[str, Any]:
        """What `restore` needs, JSON-safe and the same on every process; all of them must call it.

        step: steps consumed, by default those that this object has handed out. A loop that fetches ahead gives its
          own number.
        """
        digest = hashlib.sha256(json.dumps([[s.fingerprint, float(s.weight)] for s in self.sources]).encode())
        return {
            "version": _STATE_VERSION, "step": self._step if step is None else step, "fingerprint": digest.hexdigest(),
            "records": self.records, "seed": self.schedule.seed, "order": self.schedule.order, **self._settings(),
            "bad": self._bad_everywhere.agreed(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the step of a state; any number of processes may have saved it.

        Raises:
          ValueError: the state belongs to other data or another order; names every difference.
        """
        mine = self.state()
        differences = [
            f"{key}: saved {brief(state.get(key, 'nothing'))}, now {brief(value)}"
            for key, value in mine.items() if key not in ("step", "bad") and state.get(key) != value
        ]  # fmt: skip
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            differences.append(f"step: saved {brief(step)}, want a number of steps")
        if differences:
            raise UsageError(
                f"the saved data state does not fit this run ({'; '.join(differences)}): resume with the same data "
                "and settings, or start a new run in another directory"
            )
        self._step = step
        self._bad_everywhere = SharedSet("bad", state.get("bad", []))

    def _examples(self, groups: Mapping[int, list[list[_Loaded]]]) -> list[list[list[Example]]]:
        """The examples of this process's groups of a step, with the weights that the loss gives them."""
        if not self.mean_groups:
            return [[[sample.example for sample in row] for row in groups[place]] for place in self._own]
        sums = dict.fromkeys((place // self.mean_groups for place in self._read), 0.0)
        for place, group in groups.items():
            for sample in (sample for row in group for sample in row):
                kept, _ = cut(sample.example, self.sample_tokens)
                sums[place // self.mean_groups] += kept.weight * kept.learned[1:].sum()
        return [
            [[_weighted(sample.example, sums[place // self.mean_groups]) for sample in row] for row in groups[place]]
            for place in self._own
        ]

    def _note(self, samples: Sequence[_Loaded]) -> None:
        """Counts the bad samples of a batch, of all processes; raises DataError when they are too many."""
        for sample in samples:
            if sample.finding is None:
                self.tally.note_keys(sample.unknown)
                continue
            known = sample.record in self._bad
            self._bad[sample.record] = sample.finding
            self._bad_everywhere.add(sample.record)
            bad = self._bad_everywhere.values()
            allowed = allowed_bad(self.skip_budget, self.records)
            if len(bad) > allowed:
                source = self.sources[self._place(sample.record)[0]]
                raise _too_many(source, sample.finding, len(bad), self.skip_budget, self.records)
            if not known:
                _log.warning("skips %s (%d of %d allowed)", sample.finding, len(bad), allowed)
            self._check_source(sample, bad)

    def _check_source(self, sample: _Loaded, bad: set[int]) -> None:
        """Raises DataError where a source has nothing to learn from, whatever the budget."""
        which = self._place(sample.record)[0]
        size = self.schedule.sizes[which]
        refused = sum(int(self._starts[which]) <= number < self._starts[which] + size for number in bad)
        if refused == size and not self.one_pass:
            raise DataError(
                f"{sample.finding}. All {size} records of source {self.sources[which].name!r} are refused: nothing of "
                "it is learned. Repair it, or take it out of data.sources"
            )

    def _place(self, number: int) -> tuple[int, int]:
        """(the source of a record, its number there)."""
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return which, number - int(self._starts[which])

    def _load(self, group: int) -> list[list[_Loaded]]:
        return [[self._sample(record) for record in row] for row in self._rows(group)]

    def _sample(self, number: int) -> _Loaded:
        """The record's example, or an empty one and what is wrong.

        Runs in grain's threads, where an exception loses the rest of the batch: only a store that does not answer, or a
        fault of a library, may raise one.
        """
        which, index = self._place(number)
        source = self.sources[which]
        with _Naming(source, index):
            record = source[index]
            reading = read(record, self._checks.rules, source.images)
            result = example(reading, self._checks, source.images)
        if isinstance(result, Example):
            result = self._replaced(result, number) or result
        if isinstance(result, Problem):
            return _Loaded(_empty(record.id), number, found(record, result))
        return _Loaded(result, number, None, reading.unknown)

    def _replaced(self, example: Example, number: int) -> Problem | None:
        """What is wrong where its pictures do not have the tiles that were measured; text cannot change unnoticed."""
        if self.sizes is None or not (self.format.tiling or self.format.video):
            return None
        (tokens, images), new = self.sizes[number].tolist(), (len(example.tokens), example.tiles)
        if new == (tokens, images):
            return None
        return Problem("replaced_image", f"{new[0]} tokens and {new[1]} tiles or frames, where {tokens} and {images} "
                       "were planned: to train on the new picture, delete WORKDIR/lengths and start again")  # fmt: skip


def _weighted(example: Example, total: float) -> Example:
    """The example whose targets count as their share of their group's mean."""
    return dataclasses.replace(example, weight=example.weight / total) if total else example


def _empty(id: str) -> Example:
    return Example(np.zeros(0, np.int32), np.zeros(0, bool), (), (), id)


def _too_many(source: Source, finding: Finding, bad: int, skip_budget: float | int, records: int) -> DataError:
    return DataError(
        f"{finding}. Bad records so far: {bad}; skip_budget={skip_budget} of {records} records allows "
        f"{allowed_bad(skip_budget, records)}. {source.repair}, or raise data.skip_budget"
    )


def check_sources(sources: Sequence[Source], skip_budget: float | int) -> None:
    """Raises ValueError where these arguments of any pipeline do not fit, DataError where too many records are known
    to be unreadable; names them."""
    if not sources:
        raise UsageError("data sources=() is empty: want at least one")
    if not 0 <= skip_budget < 1:
        raise UsageError(f"data skip_budget={skip_budget}: want a part of all records, 0 <= skip_budget < 1")
    bad = [(source, index) for source in sources for index in source.unreadable]
    records = sum(map(len, sources))
    if len(bad) > allowed_bad(skip_budget, records):
        source, index = bad[0]
        record = source.text(index)
        raise _too_many(source, found(record, Problem("unreadable", record.fault)), len(bad), skip_budget, records)
