"""Padded batches: one sample a row, as the reference trains."""

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from llava_jax.data import index
from llava_jax.data.feed import Feed, check_sources
from llava_jax.data.orders import ORDERS, Schedule, resolve_steps
from llava_jax.data.sources import Source
from llava_jax.distributed import WHOLE, Rows
from llava_jax.errors import UsageError
from llava_jax.prompt.encode import Format


class Pipeline(Feed):
    """Batches of this process, one sample a row, step after step.

        pipeline = Pipeline(sources=[open_source("data.json", "images")], format=format, batch_samples=128,
                            row_tokens=2048, order="modality_length", seed=42)
        for batch, ids in pipeline: ...
    """

    def __init__(
        self, *, sources: Sequence[Source], format: Format, batch_samples: int, row_tokens: int,
        images_per_group: int = 1, order: str = "shuffle", seed: int = 42, part: Rows = WHOLE,
        skip_budget: float | int = 0.0, threads: int = 8, start_step: int = 0, lengths: Sequence[int] = (),
        group_samples: int | None = None, cache_dir: epath.PathLike | None = None, one_pass: bool = False,
        group_mean: bool = False,
    ):  # fmt: skip
        """
        Args:
          sources: from `open_source`; each is visited `weight` times an epoch.
          format: template, tokenizer and image size that samples are encoded with.
          batch_samples: rows of one global step, of which this process yields its part.
          row_tokens: longest row, image features counted.
          images_per_group: most images of a record.
          order, seed: see `orders`.
          part: the parts of each step that this process yields; `part.of` divides batch_samples.
          skip_budget: part of all records that may be bad and skipped; at 0 the first bad one raises.
          threads: that read and encode; 0 does it in the caller's.
          start_step: steps that were consumed before.
          lengths: row lengths below row_tokens that a batch may take if its longest record fits.
          group_samples: samples of one device for order="modality_length", which deals like sums of length to each;
            None is the whole batch.
          cache_dir: where record lengths are kept between runs; None measures them at each start.
          group_mean: weigh targets so that the loss is the mean over groups of `group_samples` of each group's mean.
          one_pass: each record once in order, the last batch filled up with rows of weight 0, then the end.

        Raises:
          ValueError: an argument that does not fit; names it.
        """
        group = group_samples or batch_samples
        _check_order(order)
        check_sources(sources, skip_budget)
        _check_sizes(batch_samples, group, part.of, row_tokens, images_per_group, lengths)
        self._group_samples, self._lengths = group, (*lengths, row_tokens)
        words = sizes = None
        if order == "modality_length" and not one_pass:
            words = np.concatenate([index.word_lengths(source, cache_dir) for source in sources])
        if lengths:
            sizes = np.concatenate([index.sizes(source, format, cache_dir) for source in sources])
        schedule = Schedule(
            sizes=tuple(map(len, sources)), weights=tuple(1.0 if one_pass else source.weight for source in sources),
            order="sequential" if one_pass else order, seed=seed, batch_samples=batch_samples, group_samples=group,
            word_lengths=words,
        )  # fmt: skip
        super().__init__(
            sources=sources, format=format, schedule=schedule, groups=batch_samples, row_tokens=row_tokens,
            images_per_group=images_per_group, part=part, skip_budget=skip_budget, threads=threads,
            start_step=start_step, one_pass=one_pass, mean_groups=group if group_mean else None, sizes=sizes,
        )  # fmt: skip

    @property
    def contents(self) -> str:
        return f"{self.groups} samples"

    def steps_of(self, epochs: float | int) -> int:
        return resolve_steps(self.samples, self.groups, epochs)

    @property
    def step_samples(self) -> float:
        return float(self.groups)

    def _rows(self, group: int) -> list[list[int]]:
        """The one sample of the one row; none where the last batch of one pass is filled up."""
        return [[] if self.one_pass and group >= self.samples else [self.schedule.record(group)]]

    def _settings(self) -> dict[str, Any]:
        return {"batch_samples": self.groups, "group_samples": self._group_samples}

    def _row_length(self) -> int:
        """The smallest row that holds every record of the *global* batch, so that all hosts choose the same."""
        if self.sizes is None:
            return self.row_tokens
        first = self._step * self.groups
        last = min(first + self.groups, self.samples) if self.one_pass else first + self.groups
        longest = max(self.sizes[self.schedule.record(sample), 0] for sample in range(first, last))
        return next((length for length in self._lengths if longest <= length), self.row_tokens)


def _check_order(order: str) -> None:
    if order not in ORDERS:
        near = difflib.get_close_matches(order, ORDERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"data order={order!r} is unknown: {hint}choose one of {', '.join(ORDERS)}")


def _check_sizes(
    batch_samples: int, group_samples: int, parts: int, row_tokens: int, images_per_group: int, lengths: Sequence[int]
) -> None:
    for name, value in {"batch_samples": batch_samples, "group_samples": group_samples, "row_tokens": row_tokens,
                        "images_per_group": images_per_group}.items():  # fmt: skip
        if value < 1:
            raise UsageError(f"data {name}={value}: want at least 1")
    if batch_samples % parts or batch_samples % group_samples:
        raise UsageError(f"data batch_samples={batch_samples}: want a multiple of mesh.data x mesh.fsdp={parts} "
                         f"and of group_samples={group_samples}")  # fmt: skip
    if list(lengths) != sorted(set(lengths)) or any(not 0 < length <= row_tokens for length in lengths):
        raise UsageError(f"data lengths={tuple(lengths)}: want rising row lengths up to row_tokens={row_tokens}")
