"""`model.remat=auto`: the rematerialisation that fits into a device's memory, found with the compiler.

What a policy keeps costs about as many bytes for each product that it spares, so that any order of them is as good: the
layers go up the ladder one by one, the last first, whose activations make way for the gradients of those before.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from llava_jax import config as configs
from llava_jax import distributed, lifecycle, params, sharding
from llava_jax.chips import GIB
from llava_jax.errors import UsageError
from llava_jax.models.presets import LlavaConfig
from llava_jax.models.remat import Remat
from llava_jax.train import memory
from llava_jax.train import program as programs
from llava_jax.train.loss import Loss
from llava_jax.train.program import Program

AUTO = "auto"
LADDER = ("full", "save_qkv", "save_linear", "save_dots")  # each keeps more
SHARE = 0.965  # of a device's memory that a step may take: the next batch is on it too
# What takes more than 76 to 80 % of a GPU's memory, of which launch/ gives JAX 92 %, XLA rematerialises on its own, and
# badly: stage 2 of the 7B on 8 H100 then executes 1.25 FLOPs for each of the model's with save_dots (jax 0.10.2).
SHARES = {"gpu": 0.82}
COMPILATIONS = 4  # at most; each takes a minute or more for a large model


def resolve(config: configs.Config, model: LlavaConfig, steps: int, loss: Loss | None = None) -> Program:
    """The program of a config for this machine's devices, with the policies that fit where it says `auto`.

    All processes must call it: they take the policies that fit everywhere.

    Raises:
      ValueError: nothing fits, or as `program.build`.
    """
    if config.model.remat != AUTO:
        return programs.build(config, model, steps, loss=loss)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")

    def build(policies: Remat) -> Program:
        return programs.build(with_remat(config, policies), model, steps, loss=loss)

    def peak(program: Program) -> int:
        peak_bytes = memory.compile_step(program)[1].peak
        lifecycle.beat()  # each compilation may take as long as one at all
        return max(distributed.exchange("remat peak", peak_bytes))

    if limit is None:
        return build(LADDER[-1])  # a CPU
    # Devices of two hosts may differ by some bytes, but all processes must run the same program.
    return fit(build, peak, min(distributed.exchange("remat limit", limit)))


def with_remat(config: configs.Config, policies: Remat) -> configs.Config:
    """The config with other policies."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policies))


def policies(steps: int, layers: int) -> Remat:
    """Those of layers that went so many steps up the ladder together."""
    level, upper = divmod(steps, layers)
    if not upper:
        return LADDER[level]
    return (LADDER[level],) * (layers - upper) + (LADDER[level + 1],) * upper


def fit(build: Callable[[Remat], Program], peak: Callable[[Program], int], limit: int, first: int = 0) -> Program:
    """The program that keeps most within `SHARE` (or its platform's) of `limit` bytes.

    Args:
      peak: bytes of one device, by the compiler.
      first: steps of the ladder that fit anyway.

    Raises:
      ValueError: nothing fits, or the model takes one policy only.
    """
    best = build(policies(first, 1))
    if best.model.config.cross is not None:
        raise UsageError("model.remat=auto: a decoder with gated blocks between its layers takes one policy for all; "
                         f"want one of {', '.join(LADDER)}")  # fmt: skip
    limit = int(SHARES.get(best.mesh.devices.flat[0].platform, SHARE) * limit)
    layers, sizes = best.model.config.llm.layers, _step_bytes(best)
    low, high = first * layers, (len(LADDER) - 1) * layers + 1  # of steps: what fits, what does not
    least = peak(best)
    spare = float(limit - least)
    if spare < 0:
        raise _nothing_fits(best, least, limit)
    for _ in range(COMPILATIONS - 1):
        steps = _affordable(sizes, layers, low, high - 1, spare)
        if steps == low:
            break
        program = build(policies(steps, layers))
        taken = peak(program) - limit + spare
        scale = max(0.1, taken / sum(sizes[step // layers] for step in range(low, steps)))
        sizes = [scale * size for size in sizes]
        if taken <= spare:
            low, best, spare = steps, program, spare - taken
        else:
            high = steps
    return best


def _affordable(sizes: Sequence[float], layers: int, steps: int, most: int, spare: float) -> int:
    """How many steps, from so many on and up to the most, so many bytes are enough for."""
    while steps < most and sizes[steps // layers] <= spare:
        spare -= sizes[steps // layers]
        steps += 1
    return steps


def _step_bytes(program: Program) -> Sequence[float]:
    """Bytes of a device that a layer's step up the ladder takes, from each policy to the next."""
    llm, tokens = program.model.config.llm, program.batch.tokens
    heads, kv_heads = llm.heads * llm.head_width, llm.kv_heads * llm.head_width
    scalars = (heads + 2 * kv_heads, llm.width + 2 * llm.mlp_width, 2 * heads)  # attention's are float32
    rows = tokens.sharding.shard_shape(tokens.shape)[0]
    parts, size = sharding.shards(program.mesh, "heads"), jnp.dtype(program.model.dtype).itemsize
    return [float(rows * tokens.shape[1] * each * size // parts) for each in scalars]


def _nothing_fits(program: Program, needed: int, limit: int) -> UsageError:
    """Each layer takes its weights, moments, a gradient and its input."""
    llm, of_state = program.model.config.llm, memory.arguments_of(program)
    blocks = [x for name, x in params.flatten(program.state.params).items() if name.startswith("llm/blocks/")]
    trained = params.count(program.state.params)
    share = sum(x.size for x in blocks) / trained if trained else 0.0
    tokens = program.batch.tokens
    input_items = tokens.sharding.shard_shape(tokens.shape)[0] * tokens.shape[1] * llm.width
    inputs = input_items * jnp.dtype(program.model.dtype).itemsize // sharding.shards(program.mesh, "tokens")
    weights = share * (2 * of_state.trainable + of_state.optimizer) + (0 if blocks else of_state.frozen)
    layers = max(0, llm.layers - math.ceil((needed - limit) / (weights / llm.layers + inputs)))
    return UsageError(
        f"model.remat=auto: a step takes {needed / GIB:.2f} GiB of a device where nothing is kept, and may take "
        f"{limit / GIB:.2f}; about {layers} of the {llm.layers} layers would fit. Fewer rows (data.rows_per_chip, "
        "data.batch_samples, or train.accumulate), more chips for mesh.fsdp, train.offload_optimizer, adapters (lora) "
        "and model.frozen_dtype=int8 take less"
    )
