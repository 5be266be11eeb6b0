"""llava_jax: the same training step, greedy generation and input pipeline, by the functions that a run calls."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax import config as configs
from llava_jax import params
from llava_jax.batch import Batch, Example
from llava_jax.checkpoint import reader
from llava_jax.data import planner, trees
from llava_jax.data.packing import packed
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.sources import open_source
from llava_jax.generate.assistant import Assistant
from llava_jax.generate.engine import Engine, Request, shape_of
from llava_jax.train import program as programs
from llava_jax.train.step import State
from tests.benchmarks import same
from tests.benchmarks.same import Sizes

Turn = Callable[[], tuple[float, list[float]]]

# YNNPACK for products alone: jaxlib 0.10.2 also gives it sums of the softmax, and a turn takes 7.2 s instead of 6.7
# then (2 cores of AMD EPYC, 2026-11-21).
OPTIONS = (("xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_DOT"),)


def train(folder: Path, sizes: Sizes, kind: str, rate: float) -> Turn:
    """Full fine-tuning of projector and decoder, the tower frozen; a turn is one step on each batch of `kind`.

    Samples of one length have a row each; others are packed into a fixed number of longer rows, those of a mixture
    into as many as the planner makes, one after the other, those of a picture as a tree where kind is "shared".
    """
    steps = same.batches(folder)[kind]
    shares = kind == "shared"
    if shares or kind == "mixture":
        tokens = sizes.mixture[2]
        groups, images = _planned(steps[0], tokens, shares)
        rows, accumulate = 1, len(groups)
        batches = [packed(groups, tokens, images, sizes.model.vision.image_size, share_images=shares)[0]]
    else:
        rows, tokens = (sizes.samples, sizes.longest) if kind == "full" else sizes.packed
        batches, images, accumulate = [_rows(examples, rows, tokens, sizes) for examples in steps], sizes.samples, 1
    rates = (("vision/.*", None), (".*", rate))
    config = configs.Config(
        data=configs.Data(sources=(configs.Source("unused"),), layout="packed", rows_per_chip=rows * accumulate,
                          rows_per_group=rows, row_tokens=tokens, images_per_group=images,
                          sample_tokens=sizes.mixture[1] if tokens == sizes.mixture[2] else 0, share_images=shares),
        train=configs.Train(lr=rate, steps=1_000_000, warmup_ratio=0.0, schedule="constant", accumulate=accumulate),
        rates=rates,
        init=((".*", "random"),), model=configs.Model(dtype="float32", remat="save_dots"), compiler_options=OPTIONS,
    )  # fmt: skip
    program = programs.build(config, sizes.model, config.train.steps)
    loaded = reader.load_params(folder / same.OURS, put=lambda name, leaf: jnp.asarray(leaf))
    moving, frozen = params.split(loaded, params.flatten(program.state.params))
    state = State(jnp.int32(0), moving, program.optimizer.init(moving))
    state, frozen = jax.device_put((state, frozen), jax.tree.map(lambda x: x.sharding, (program.state, program.frozen)))

    def turn() -> tuple[float, list[float]]:
        nonlocal state
        begun, losses = time.perf_counter(), []
        for batch in batches:
            state, scalars = program.step(state, frozen, program.put(batch))
            losses.append(scalars.loss)
        losses = [loss.item() for loss in losses]
        return time.perf_counter() - begun, losses

    return turn


def generate(folder: Path, sizes: Sizes, rows: int) -> Turn:
    """Greedy answers of exactly `new_tokens` to `rows` prompts; the check is the ids."""
    opened = Assistant.open(folder / same.OURS, slots=rows, dtype="float32")
    # Every row of the head may be said and none ends an answer, as on the other side.
    engine = Engine(opened.model, rows, sizes.model.llm.vocab, (-1,))
    requests = [_request(example, sizes.new_tokens) for example in same.prompts(folder, sizes, rows)]
    shape = shape_of(sizes.prompt_tokens, 1, sizes.new_tokens, sizes.model.llm.max_positions)

    def turn() -> tuple[float, list[float]]:
        begun = time.perf_counter()
        state, made = engine.start(opened.params, requests, shape)
        ids = [made]
        while sum(part.shape[1] for part in ids) < sizes.new_tokens:
            state, made = engine.advance(opened.params, state, [False] * rows)
            ids.append(made)
        answer = np.concatenate(ids, axis=1)[:, : sizes.new_tokens]
        return time.perf_counter() - begun, answer.flatten().tolist()

    return turn


def read(folder: Path, sizes: Sizes, batch: int, tiled: bool, workers: int) -> Turn:
    """Records to padded batches of ids and pixels; the check: places of images, and the first picture's mean."""
    vision = sizes.model.vision
    features = (sizes.image_size // vision.patch_size) ** 2
    form = same.format_of(folder, sizes.image_size, features, tiled)
    source = open_source(folder / same.RECORDS, folder / same.PICTURES)
    mean, std = np.float32(vision.mean), np.float32(vision.std)

    def turn() -> tuple[float, list[float]]:
        begun, places, pixels = time.perf_counter(), 0.0, 0.0
        for fields, _ in Pipeline(
            sources=[source], format=form, batch_samples=batch, row_tokens=4096 if tiled else 2048, threads=workers,
            images_per_group=same.TILES if tiled else 1, one_pass=True,
        ):  # fmt: skip
            places += float((fields.image_slots >= 0).sum())
            pixels = pixels or float(((fields.pixels[0].mean((0, 1, 2)) / 255 - mean) / std).mean())
        return time.perf_counter() - begun, [places, pixels]

    return turn


def _rows(examples: Sequence[Example], rows: int, tokens: int, sizes: Sizes) -> Batch:
    """The samples in rows that share their pictures: longest first, each in the first row with room."""
    group: list[list[Example]] = [[] for _ in range(rows)]
    for example in sorted(examples, key=lambda example: -len(example.tokens)):
        used = [sum(len(one.tokens) for one in row) for row in group]
        next(row for row, n in zip(group, used) if n + len(example.tokens) <= tokens).append(example)
    return packed([group], tokens, len(examples), sizes.model.vision.image_size)[0]


def _planned(examples: Sequence[Example], row_tokens: int, shares: bool) -> tuple[list[list[list[Example]]], int]:
    """Groups of one row, as training's planner lays them, and the most pictures of one."""
    count, name = len(examples), lambda example: example.id if shares else None
    measures = np.array([(len(one.tokens), 1, *trees.column(one, [name(one)])) for one in examples], np.int32)
    tokens, images, prefixes = measures[:, 0], measures[:, 1], trees.prefixes(measures, None, row_tokens)
    samples, starts = planner.plan_trees(tokens, images, prefixes, np.arange(count), row_tokens, 1, count,
                                         np.random.RandomState(0))  # fmt: skip
    again = trees.repeated(prefixes.keys[samples], starts)
    rows = [[examples[i] for i in samples[a:b]] for a, b in zip(starts, starts[1:])]
    return [[row] for row in rows], max(int((~again[a:b]).sum()) for a, b in zip(starts, starts[1:]))


def _request(example: Example, new_tokens: int) -> Request:
    slots = np.full(len(example.tokens), -1, np.int32)
    for i, span in enumerate(example.image_spans):
        slots[span.start : span.start + span.length] = i * span.length + np.arange(span.length)
    return Request(example.tokens, slots, np.stack(example.images), new_tokens)

