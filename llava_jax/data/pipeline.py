"""From sources to batches: deterministic, resumable at any step, and never stopped by a bad record unnamed.

Grain's threads read and encode samples ahead; which sample comes when is `orders.Schedule`'s, so the whole state of
a run's data is one number of steps.
"""

import difflib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from etils import epath

from llava_jax.batch import Batch, Example
from llava_jax.data.index import token_lengths, word_lengths
from llava_jax.data.orders import ORDERS, Schedule
from llava_jax.data.packing import cut, padded
from llava_jax.data.sources import DataError, Record, Source
from llava_jax.data.validate import REASONS, Finding, Problem, brief, check, found, rules
from llava_jax.prompt.encode import Format, encode

_log = logging.getLogger(__name__)
_FOREVER = 2**62
_STATE_VERSION = 1


class _Loaded(NamedTuple):
    """A sample on its way through grain: an example, or an empty one and why."""

    example: Example
    record: int  # -1 for a row that only fills the last batch of one pass
    finding: Finding | None


class _Samples:
    """The sample numbers of this host, as grain's random-access source."""

    def __init__(self, first: int, count: int, batch_samples: int, host: int, rows: int):
        self.first, self.count = first, count
        self.batch_samples, self.host, self.rows = batch_samples, host, rows

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        step, row = divmod(index, self.rows)
        return (self.first + step) * self.batch_samples + self.host * self.rows + row


class Pipeline:
    """Batches of this host, step after step, without end (or once through, with `one_pass`).

        pipeline = Pipeline(sources=[open_source("data.json", "images")], format=format, batch_samples=128,
                            row_tokens=2048, order="modality_length", seed=42)
        for batch, ids in pipeline: ...

    lost_targets: learned tokens that `row_tokens` has cut off so far.
    """

    def __init__(
        self, *, sources: Sequence[Source], format: Format, batch_samples: int, row_tokens: int,
        images_per_group: int = 1, order: str = "shuffle", seed: int = 42, host: int = 0, hosts: int = 1,
        skip_budget: float | int = 0.0, threads: int = 8, start_step: int = 0, lengths: Sequence[int] = (),
        group_samples: int | None = None, cache_dir: epath.PathLike | None = None, one_pass: bool = False,
    ):  # fmt: skip
        """
        Args:
          sources: from `open_source`; each is visited `weight` times an epoch.
          format: template, tokenizer and image size that samples are encoded with.
          batch_samples: rows of one global step; `hosts` divides it, and host h yields the h-th part.
          row_tokens: longest row, image features counted.
          images_per_group: most images of a record.
          order, seed: see `orders`.
          skip_budget: part of all records that may be bad and skipped; at 0 the first bad one raises.
          threads: that read and encode; 0 does it in the caller's.
          start_step: steps that were consumed before.
          lengths: row lengths below row_tokens that a batch may take if its longest record fits.
          group_samples: samples of one device for order="modality_length", which deals like sums of length to each;
            None is the whole batch.
          cache_dir: where record lengths are kept between runs; None measures them at each start.
          one_pass: each record once in order, the last batch filled up with rows of weight 0, then the end.

        Raises:
          ValueError: an argument that does not fit; names it.
        """
        group = group_samples or batch_samples
        _check_order(order)
        _check_sizes(batch_samples, group, hosts, host, row_tokens, images_per_group, lengths, skip_budget)
        if not sources:
            raise ValueError("data sources=() is empty: want at least one")
        self.sources, self.format, self.one_pass = tuple(sources), format, one_pass
        self.host, self.rows, self.threads, self.skip_budget = host, batch_samples // hosts, threads, skip_budget
        self.row_tokens, self.images_per_group, self.lengths = row_tokens, images_per_group, (*lengths, row_tokens)
        self.lost_targets = 0
        words = None
        if order == "modality_length" and not one_pass:
            words = np.concatenate([word_lengths(source, cache_dir) for source in sources])
        self._tokens = None
        if lengths:
            self._tokens = np.concatenate([token_lengths(source, format, cache_dir) for source in sources])
        self.schedule = Schedule(
            sizes=tuple(map(len, sources)), weights=tuple(1.0 if one_pass else source.weight for source in sources),
            order="sequential" if one_pass else order, seed=seed, batch_samples=batch_samples, group_samples=group,
            word_lengths=words,
        )  # fmt: skip
        self._starts = np.cumsum([0, *self.schedule.sizes])
        self._rules = rules(format.template, format.tokenizer)
        self._bad: dict[int, Finding] = {}
        self._step = start_step

    @property
    def records(self) -> int:
        """Distinct records of all sources."""
        return sum(self.schedule.sizes)

    @property
    def samples(self) -> int:
        """Samples of one epoch: the records times their source's weight."""
        return self.schedule.samples

    @property
    def bad(self) -> tuple[Finding, ...]:
        """The records that were skipped, in the order of meeting; a record counts once."""
        return tuple(self._bad.values())

    def __iter__(self) -> Iterator[tuple[Batch, tuple[str, ...]]]:
        """(this host's rows of the global batch, their record ids) from the state's step on.

        Raises:
          DataError: the batch that would come next holds a bad record and the skip budget is spent; names it.
        """
        steps = self.schedule.steps - self._step if self.one_pass else _FOREVER // self.rows
        places = _Samples(self._step, steps * self.rows, self.schedule.batch_samples, self.host, self.rows)
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.rows * bool(self.threads))
        loaded = iter(grain.MapDataset.source(places).map(self._load).to_iter_dataset(options))
        try:
            for _ in range(steps):
                samples = [next(loaded) for _ in range(self.rows)]
                self._note(samples)
                examples = [sample.example for sample in samples]
                batch, lost = padded(examples, self._row_length(), self.images_per_group, self.format.image_size)
                self.lost_targets += lost
                self._step += 1
                yield batch, tuple(example.id for example in examples)
        finally:
            loaded.close()

    def state(self, step: int | None = None) -> dict[str, Any]:
        """What `restore` needs, JSON-safe and the same on every host.

        step: steps consumed, by default those that this object has handed out. A loop that fetches ahead gives its
          own number.
        """
        digest = hashlib.sha256(json.dumps([[s.fingerprint, float(s.weight)] for s in self.sources]).encode())
        plan = self.schedule
        return {
            "version": _STATE_VERSION, "step": self._step if step is None else step, "fingerprint": digest.hexdigest(),
            "records": self.records, "seed": plan.seed, "order": plan.order, "batch_samples": plan.batch_samples,
            "group_samples": plan.group_samples,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the step of a state; any number of hosts may have saved it.

        Raises:
          ValueError: the state belongs to other data or another order; names every difference.
        """
        mine = self.state()
        differences = [
            f"{key}: saved {brief(state.get(key, 'nothing'))}, now {brief(value)}"
            for key, value in mine.items() if key != "step" and state.get(key) != value
        ]  # fmt: skip
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            differences.append(f"step: saved {brief(step)}, want a number of steps")
        if differences:
            raise ValueError(
                f"the saved data state does not fit this run ({'; '.join(differences)}): resume with the same data "
                "and settings, or start a new run in another directory"
            )
        self._step = step

    def _note(self, samples: list[_Loaded]) -> None:
        """Counts the bad samples of a batch; raises DataError when they are too many."""
        allowed = int(self.skip_budget * self.records + 1e-9)
        for sample in samples:
            if sample.finding is None:
                continue
            known = sample.record in self._bad
            self._bad[sample.record] = sample.finding
            if len(self._bad) > allowed:
                raise DataError(
                    f"{sample.finding}. Bad records so far: {len(self._bad)}; skip_budget={self.skip_budget} of "
                    f"{self.records} records allows {allowed}. Repair the data (python -m llava_jax.data validate "
                    f"{sample.finding.path} lists all), or raise data.skip_budget"
                )
            if not known:
                _log.warning("skips %s (%d of %d allowed)", sample.finding, len(self._bad), allowed)

    def _row_length(self) -> int:
        """The smallest row that holds every record of the *global* batch, so that all hosts choose the same."""
        if self._tokens is None:
            return self.row_tokens
        plan = self.schedule
        first = self._step * plan.batch_samples
        last = min(first + plan.batch_samples, plan.samples) if self.one_pass else first + plan.batch_samples
        longest = max(self._tokens[plan.record(sample)] for sample in range(first, last))
        return next((length for length in self.lengths if longest <= length), self.row_tokens)

    def _load(self, sample: int) -> _Loaded:
        """The sample's example, or an empty one and what is wrong. Runs in grain's threads and must not raise there:
        grain loses the rest of the batch, and does not know the record."""
        if self.one_pass and sample >= self.schedule.samples:
            return _Loaded(_empty(""), -1, None)
        number = self.schedule.record(sample)
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        source, index = self.sources[which], number - int(self._starts[which])
        try:
            record = source[index]
        except (ValueError, OSError) as error:
            record = Record(source.path, index, None, None)
            return _Loaded(_empty(record.id), number, found(record, Problem("unreadable", str(error))))
        fatal = [problem for problem in check(record, self._rules) if REASONS[problem.reason][0]]
        result = fatal[0] if fatal else self._encoded(record, source)
        if isinstance(result, Problem):
            return _Loaded(_empty(record.id), number, found(record, result))
        return _Loaded(result, number, None)

    def _encoded(self, record: Record, source: Source) -> Example | Problem:
        try:
            example = encode(record.conversation, self.format, source.images)
        except (ValueError, OSError) as error:
            missing = isinstance(error.__cause__, FileNotFoundError)
            reason = "missing_image" if missing else "bad_image" if record.raw.get("image") else "bad_text"
            return Problem(reason, str(error))
        kept, lost = cut(example, self.row_tokens)
        if len(kept.images) > self.images_per_group:
            return Problem("too_many_images", f"{len(kept.images)} for images_per_group={self.images_per_group}")
        if not kept.learned[1:].any():
            return Problem("no_learned_tokens", f"{len(example.tokens)} tokens for a row of {self.row_tokens}: all "
                           f"{lost} targets are lost")  # fmt: skip
        return example


def _empty(id: str) -> Example:
    return Example(np.zeros(0, np.int32), np.zeros(0, bool), (), (), id)


def _check_order(order: str) -> None:
    if order not in ORDERS:
        near = difflib.get_close_matches(order, ORDERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"data order={order!r} is unknown: {hint}choose one of {', '.join(ORDERS)}")


def _check_sizes(
    batch_samples: int, group_samples: int, hosts: int, host: int, row_tokens: int, images_per_group: int,
    lengths: Sequence[int], skip_budget: float | int,
) -> None:  # fmt: skip
    for name, value in {"batch_samples": batch_samples, "group_samples": group_samples, "hosts": hosts,
                        "row_tokens": row_tokens, "images_per_group": images_per_group}.items():  # fmt: skip
        if value < 1:
            raise ValueError(f"data {name}={value}: want at least 1")
    if batch_samples % hosts or batch_samples % group_samples:
        raise ValueError(f"data batch_samples={batch_samples}: want a multiple of hosts={hosts} and of "
                         f"group_samples={group_samples}")  # fmt: skip
    if not 0 <= host < hosts:
        raise ValueError(f"data host={host}: want 0 to {hosts - 1}, as hosts={hosts}")
    if list(lengths) != sorted(set(lengths)) or any(not 0 < length <= row_tokens for length in lengths):
        raise ValueError(f"data lengths={tuple(lengths)}: want rising row lengths up to row_tokens={row_tokens}")
    if not 0 <= skip_budget < 1:
        raise ValueError(f"data skip_budget={skip_budget}: want a part of all records, 0 <= skip_budget < 1")
