"""A 7B model with random weights on this machine's accelerator: stage 1, stage 2 by LoRA, and greedy answers, with MFU.

It was tried on a CPU at the preset "tiny" only: no accelerator was at hand where it was written.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax import chips, params
from llava_jax import config as configs
from llava_jax.batch import Example, Span
from llava_jax.data.packing import packed
from llava_jax.generate.engine import Engine, Request, shape_of
from llava_jax.models import lora, presets
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.models.presets import LlavaConfig
from llava_jax.train import flops, measure
from llava_jax.train import program as programs
from llava_jax.train.step import State
from tests.benchmarks.bench import where

# LLaVA's own recipes: scripts/v1_5/{pretrain,finetune_lora}.sh; see configs/.
STAGE_1 = (("projector/.*", 1e-3), (".*", None))
LORA = ((r"llm/blocks/.*/lora_[ab]", 2e-4), ("projector/.*", 2e-5), (".*", None))
ADAPTERS = ((r"llm/blocks/.*", configs.Lora(128, 256.0)), (".*", None))
WARM, MEASURED = 3, 10  # updates


class Load(NamedTuple):
    """What is asked of a model: packed rows of equal samples, each with one picture, and answers to prompts."""

    rows: int
    row_tokens: int
    stage_1_tokens: int  # of a sample
    stage_2_tokens: int
    text_tokens: int  # of a prompt, beside its picture
    new_tokens: int
    batches: tuple[int, ...]  # answers at a time


# Samples as long as LLaVA's are on average. Source: research/jax_anchors.md 2a.
LOADS = {
    "tiny": Load(2, 64, 16, 24, 8, 8, (2,)),
    "default": Load(8, 2048, 605, 850, 64, 128, (1, 8, 32)),
}


def table(preset: str) -> str:
    """Markdown: tokens/s and MFU of each, and where they were measured."""
    model, load = presets.get(preset), LOADS.get(preset, LOADS["default"])
    lines = [_trained(model, load, "stage 1", load.stage_1_tokens, STAGE_1, ()),
             _trained(model, load, "stage 2, LoRA r128", load.stage_2_tokens, LORA, ADAPTERS)]  # fmt: skip
    lines += _answered(model, load)
    head = [f"| {preset}, random weights, {_dtype().__name__} | tokens/s | MFU |", "|---|---|---|"]
    found = jax.devices()
    return "\n".join([*head, *lines, "", f"{len(found)} x {found[0].device_kind}; {where(('jax', 'jaxlib'))}"]) + "\n"


def _dtype() -> Any:
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _trained(
    model: LlavaConfig, load: Load, name: str, tokens: int, rates: Sequence[Any], adapters: Sequence[Any]
) -> str:
    """A line of the table: updates on one batch of packed rows."""
    samples = load.row_tokens // tokens  # of a row
    config = configs.Config(
        data=configs.Data(sources=(configs.Source("unused"),), layout="packed", rows_per_chip=load.rows,
                          row_tokens=load.row_tokens, images_per_group=samples),
        train=configs.Train(lr=1e-3, steps=1000), rates=rates, init=((".*", "random"),), lora=adapters,
        model=configs.Model(dtype=_dtype().__name__, remat="full"),
    )  # fmt: skip
    program = programs.build(config, model, 1000)
    rows = program.batch.tokens.shape[0]
    row = [_sample(model, tokens) for _ in range(samples)]
    batch = packed([[row]] * rows, load.row_tokens, samples, model.vision.image_size)[0]
    moving = _drawn(program.state.params)
    state = State(jnp.int32(0), moving, jax.jit(program.optimizer.init)(moving))
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, program.state))
    frozen, placed = _drawn(program.frozen), program.put(batch)
    for _ in range(WARM):
        state, scalars = program.step(state, frozen, placed)
    jax.block_until_ready(state)
    begun = time.perf_counter()
    for _ in range(MEASURED):
        state, scalars = program.step(state, frozen, placed)
    jax.block_until_ready(state)
    secs = (time.perf_counter() - begun) / MEASURED
    assert bool(scalars.finite), f"{name}: loss {scalars.loss}"
    counts = measure.count(batch, model.vision.features)
    flops_meter = measure.flops_meter(program)
    mfu = None if flops_meter.peak_flops is None else flops_meter.flops(counts) / secs / flops_meter.peak_flops
    what = f"{name}: {rows} rows of {load.row_tokens} with {samples} samples of {tokens} each, {secs:.3g} s an update"
    return _line(what, counts.tokens / secs, mfu)


def _answered(model: LlavaConfig, load: Load) -> list[str]:
    """Lines of the table: greedy answers of full length, the prompt's reading included."""
    features, lines = model.vision.features, []
    tree = params.flatten(_drawn(_cast(abstract_params(model))))
    for name in [name for name in tree if name.startswith("llm/blocks/")]:  # parts, as `Assistant.open` has them
        tree[name] = tuple(tree[name])
    weights = params.unflatten(tree)
    prompt = _sample(model, features + load.text_tokens)
    shape = shape_of(len(prompt.tokens), 1, load.new_tokens, model.llm.max_positions)
    slots = np.full(len(prompt.tokens), -1, np.int32)
    slots[1 : 1 + features] = np.arange(features)
    for rows in load.batches:
        engine = Engine(Llava(model, _dtype()), rows, model.llm.vocab, (-1,))
        requests = [Request(prompt.tokens, slots, np.stack(prompt.images), load.new_tokens)] * rows
        _answers(engine, weights, requests, shape)
        begun = time.perf_counter()
        _answers(engine, weights, requests, shape)
        secs = time.perf_counter() - begun
        chip = chips.of_kind(jax.devices()[0].device_kind)
        total = len(prompt.tokens) + load.new_tokens - 1
        forward = flops.count(flops.trace(Llava(model), abstract_params(model)), ()).total(
            tokens=total, pairs=total * (total + 1) // 2, supervised=load.new_tokens, images=1
        )
        mfu = None if chip is None else rows * forward / secs / chip.peak_flops
        what = f"greedy, {len(prompt.tokens)} tokens in, {load.new_tokens} out, batch {rows}"
        lines.append(_line(what, rows * load.new_tokens / secs, mfu))
    return lines


def _answers(engine: Engine, weights: Any, requests: Sequence[Request], shape: Any) -> None:
    state, made = engine.start(weights, requests, shape)
    count = made.shape[1]
    while count < requests[0].max_new_tokens:
        state, made = engine.advance(weights, state, [False] * len(requests))
        count += made.shape[1]


def _sample(model: LlavaConfig, tokens: int) -> Example:
    """A sample with a picture right after its first token; the last third is learned."""
    rng = np.random.default_rng(0)
    side = model.vision.image_size
    ids = rng.integers(3, model.llm.vocab, tokens).astype(np.int32)
    learned = np.arange(tokens) >= max(1 + model.vision.features, tokens * 2 // 3)
    picture = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
    return Example(ids, learned, (Span(1, model.vision.features),), (picture,), "random")


def _cast(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, _dtype()), shapes)


def _drawn(shapes: Any) -> Any:
    """Random values, made on the device leaf by leaf; an adapter as it begins."""
    flat = params.flatten(shapes)

    def draw(kind: str, x: Any) -> jax.Array:
        key = jax.random.key(0, impl="unsafe_rbg")  # quick to compile, and who looks at the values?
        if kind in lora.LEAVES:
            return lora.initial(kind, x.shape, key, 2.0)
        return ((kind == "scale") + 0.02 * jax.random.normal(key, x.shape)).astype(x.dtype)

    drawn = jax.jit(draw, static_argnums=(0, 1))
    made = {name: jax.device_put(drawn(name.rpartition("/")[2], x), x.sharding) for name, x in flat.items()}
    return params.unflatten(made)


def _line(what: str, speed: float, mfu: float | None) -> str:
    return f"| {what} | {speed:,.0f} | {'unknown chip' if mfu is None else f'{mfu:.1%}'} |"
