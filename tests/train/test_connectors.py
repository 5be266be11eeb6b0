"""Training through the connectors: of MiniGPT-4 only the linear layer moves and has moments; Flamingo's gates open."""

from dataclasses import replace

import jax
import numpy as np

from llava_jax import params
from llava_jax.batch import Batch
from llava_jax.models import presets
from llava_jax.models.presets import CrossConfig, EvaConfig, PerceiverConfig, QFormerConfig
from tests.golden import make_models as golden
from tests.train import tiny
from tests.train.test_step import STAGE_1, build, start

MINIGPT4 = replace(
    tiny.MODEL, vision=EvaConfig(image_size=14, patch_size=7, width=16, mlp_width=24, layers=2, heads=2),
    projector="qformer", ln_vision_eps=1e-5,
    resampler=QFormerConfig(queries=3, width=16, mlp_width=24, layers=2, heads=2),
)  # fmt: skip
FLAMINGO = replace(
    tiny.MODEL, projector="flamingo_xattn", resampler=PerceiverConfig(latents=3, layers=1, heads=2, head_width=8),
    cross=CrossConfig(media_width=16, every=2, heads=2, head_width=8),
)  # fmt: skip


def run(program, model, steps=3):
    state, frozen = start(program)
    batch = Batch(**golden.inputs(model, rows=4))
    before = jax.tree.map(np.array, (state.params, frozen))
    losses = []
    for _ in range(steps):
        state, metrics = program.step(state, frozen, batch)
        losses.append(float(metrics.loss))
    return before, (state.params, frozen), losses


def test_the_optimizer_of_minigpt4_13b_holds_moments_of_3_9_million_parameters():
    program = build(STAGE_1, presets.get("minigpt4_13b"), row_tokens=64, weight_decay=0.05)
    assert params.count(program.state.params) == 3_937_280
    moments = [leaf for leaf in jax.tree.leaves(program.state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * 3_937_280
    assert params.count(program.frozen) == 13_015_864_320 + 985_894_528 + 105_162_240 + 2 * 1408


def test_of_minigpt4_only_the_linear_layers_bytes_differ_after_training():
    (trainable_rates, frozen), (moved, after), losses = run(build(STAGE_1, MINIGPT4), MINIGPT4)
    assert set(params.flatten(trainable_rates)) == {"projector/0/kernel", "projector/0/bias"}
    for name, leaf in params.flatten(moved).items():
        assert (np.asarray(leaf) != params.flatten(trainable_rates)[name]).all(), name
    jax.tree.map(np.testing.assert_array_equal, frozen, after)
    assert losses[-1] < losses[0]


def test_flamingos_new_parts_learn_while_the_tower_and_the_decoder_stay():
    rates = (("resampler/.*|llm/cross/.*", 1e-2), (".*", None))
    (trainable_rates, frozen), (moved, after), losses = run(build(rates, FLAMINGO), FLAMINGO)
    assert {name.split("/")[0] for name in params.flatten(trainable_rates)} == {"llm", "resampler"}
    for name, leaf in params.flatten(moved).items():
        assert np.abs(np.asarray(leaf) - params.flatten(trainable_rates)[name]).max() > 1e-4, name
    jax.tree.map(np.testing.assert_array_equal, frozen, after)
    assert losses[-1] < losses[0]
