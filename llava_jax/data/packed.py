"""Packed batches: as many samples a row as fit, the rows of a group sharing one pool of images."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from llava_jax.data import index, trees
from llava_jax.data.feed import Feed, check_sources
from llava_jax.data.orders import Schedule
from llava_jax.data.planner import Plans
from llava_jax.data.sources import Source
from llava_jax.distributed import WHOLE, Rows
from llava_jax.errors import UsageError
from llava_jax.prompt.encode import Format

_ORDERS = ("shuffle", "sequential")
_WORDS = 64  # positions beside an image for the template and a short question: advice, no limit


class Packed(Feed):
    """Batches of this process, several samples a row, step after step; each epoch shows every sample once.

        pipeline = Packed(sources=[open_source("data.json", "images")], format=format, rows=64, row_tokens=2048,
                          rows_per_group=4, images_per_group=9)
        for batch, ids in pipeline: ...

    Rows hold neighbours of the order, see `planner.plan`, and with `share_images` trees, see `planner.plan_trees`. A
    record that proves bad when it is read leaves a hole of padding. Of two mixtures like LLaVA-1.5's 665k
    (`tests/data/test_planner.py`), in which a sample has 850 tokens and 94 % have an image, this share of positions
    and image slots is used:

        row_tokens  rows_per_group  images_per_group     positions       slots
             2,048               4                 9     89, 93 %    90, 94 %    no packer exceeds 90, 95 %
             3,072               4                14     99, 98 %    96, 94 %
             4,096               4                19     99, 99 %    93, 92 %
             4,096               2                10     99, 99 %    89, 88 %

    An empty slot costs 1 % of what a sample costs, and a pool that is too small leaves rows empty: choose
    images_per_group a tenth above what a group's rows hold on average. Where samples are alike, as in stage 1 with
    its 605 tokens, row_tokens should be just above a multiple of their mean: 3,072 holds five of them (98 %, with
    images_per_group=5) and 2,432 four (99 %), while 2,048 and 4,096 are 89 % full.
    """

    def __init__(
        self, *, sources: Sequence[Source], format: Format, rows: int, row_tokens: int, rows_per_group: int = 1,
        images_per_group: int = 1, order: str = "shuffle", seed: int = 42, part: Rows = WHOLE,
        skip_budget: float | int = 0.0, threads: int = 8, start_step: int = 0,
        cache_dir: epath.PathLike | None = None, one_pass: bool = False,
        sample_tokens: int = 0, share_images: bool = False,
    ):  # fmt: skip
        """
        Args:
          rows: of one global step, of which this process yields its part.
          row_tokens: of each row, image features counted; longer samples are cut, never inside an image.
          sample_tokens: longer samples are cut at; 0: row_tokens. A row may hold more than the model has positions.
          rows_per_group: neighbouring rows that share a pool; part.of x rows_per_group divides `rows`.
          images_per_group: images of a pool.
          order: that samples are packed in, "shuffle" or "sequential".
          part: the parts of each step that this process yields.
          one_pass: each record once, then the end.
          share_images: records of one picture come together, and what is equal stands once (`planner.plan_trees`).
          the others: as `pipeline.Pipeline`'s.

        Raises:
          ValueError: an argument that does not fit; names it.
        """
        check_sources(sources, skip_budget)
        _check_sizes(rows, rows_per_group, images_per_group, part.of)
        if order not in _ORDERS:
            raise UsageError(f"data order={order!r}: packed rows come in order {' or '.join(_ORDERS)}")
        if row_tokens <= format.image_features:
            raise UsageError(
                f"data row_tokens={row_tokens} is too short for an image, whose features take {format.image_features} "
                f"positions and its words some more: want at least {format.image_features + _WORDS}"
            )
        schedule = Schedule(
            sizes=tuple(map(len, sources)), weights=tuple(1.0 if one_pass else source.weight for source in sources),
            order="sequential" if one_pass else order, seed=seed, batch_samples=1, group_samples=1, word_lengths=None,
        )  # fmt: skip
        measures = [index.measures(source, format, cache_dir) for source in sources]
        sizes = np.concatenate(measures)[:, :2]
        super().__init__(
            sources=sources, format=format, schedule=schedule, groups=rows // rows_per_group, row_tokens=row_tokens,
            images_per_group=images_per_group, part=part, skip_budget=skip_budget, threads=threads,
            start_step=start_step, one_pass=one_pass, sample_tokens=sample_tokens, sizes=sizes,
            share_images=share_images,
        )  # fmt: skip
        # What is cut ends at the row's end or before; what has too many images is bad, and what it leaves is a hole.
        tokens, images = np.minimum(sizes, [self.sample_tokens, images_per_group]).T
        parts = [trees.prefixes(own, source.images, self.sample_tokens) for own, source in zip(measures, sources)]
        prefixes = trees.Prefixes(*map(np.concatenate, zip(*parts))) if share_images else None
        self.plans = Plans(schedule, tokens, images, row_tokens, rows_per_group, images_per_group, self.groups,
                           prefixes)  # fmt: skip
        first = self.plans.epoch(0)
        self._digest = hashlib.sha256(first.samples.tobytes() + first.starts.tobytes()).hexdigest()

    @property
    def contents(self) -> str:
        rows, fill = self.groups * self.plans.rows_per_group, self.plans.fill()
        trees = f" in {fill.trees_a_row:.2f} trees" if self.share_images else ""
        return (f"{rows} rows of {self.row_tokens:,} tokens ({fill.samples_a_row:.2f} samples a row{trees}; "
                f"{fill.positions:.1%} of positions and {fill.slots:.1%} of image slots are used)")  # fmt: skip

    def steps_of(self, epochs: float | int) -> int:
        return self.plans.steps_of(epochs)

    @property
    def step_samples(self) -> float:
        return self.groups * self.plans.rows_per_group * self.plans.fill().samples_a_row

    def _rows(self, group: int) -> list[list[int]]:
        return self.plans.rows(group)

    def _settings(self) -> dict[str, Any]:
        return {
            "rows": self.groups * self.plans.rows_per_group, "row_tokens": self.row_tokens,
            "rows_per_group": self.plans.rows_per_group, "images_per_group": self.images_per_group,
            "plan": self._digest,  # of the first epoch: another tokenizer or another packer would go on elsewhere
        }  # fmt: skip


def _check_sizes(rows: int, rows_per_group: int, images_per_group: int, parts: int) -> None:
    for name, value in {"rows": rows, "rows_per_group": rows_per_group, "images_per_group": images_per_group}.items():
        if value < 1:
            raise UsageError(f"data {name}={value}: want at least 1")
    if rows % (parts * rows_per_group):
        raise UsageError(f"data rows={rows}: want a multiple of {parts * rows_per_group}, which is mesh.data x "
                         f"mesh.fsdp={parts} x rows_per_group={rows_per_group}")  # fmt: skip
