"""Model FLOPs of the connectors against what XLA counts in models without loops, and against sums made by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from llava_jax.models import presets
from llava_jax.models.llava import Llava
from llava_jax.models.presets import (
    CrossConfig,
    EvaConfig,
    LlamaConfig,
    LlavaConfig,
    PerceiverConfig,
    QFormerConfig,
    VisionConfig,
)
from tests.train.test_flops import FROZEN, counted, shapes_of

# Wide enough that norms, softmax and the like, which XLA counts too, are few.
LLM = LlamaConfig(vocab=50, width=256, mlp_width=512, layers=1, heads=4, kv_heads=2, head_width=64)
CLIP = VisionConfig(image_size=8, patch_size=2, width=256, mlp_width=512, layers=1, heads=2, select_layer=-1)
EVA = EvaConfig(image_size=8, patch_size=2, width=256, mlp_width=512, layers=1, heads=2)
QFORMER = QFormerConfig(queries=8, width=192, mlp_width=512, layers=1, heads=3, cross_every=1)
PERCEIVER = PerceiverConfig(latents=8, layers=1, heads=2, head_width=64, mlp_ratio=2)
ONE = {
    "qformer": LlavaConfig(EVA, "qformer", LLM, ln_vision_eps=1e-5, resampler=QFORMER),
    "concat4_linear": LlavaConfig(replace(EVA, select_feature="patch"), "concat4_linear", LLM, ln_vision_eps=1e-5),
    "perceiver": LlavaConfig(CLIP, "perceiver", LLM, resampler=PERCEIVER),
    "flamingo_xattn": LlavaConfig(CLIP, "flamingo_xattn", LLM, resampler=PERCEIVER,
                                  cross=CrossConfig(media_width=256, every=1, heads=2, mlp_ratio=2)),
}  # fmt: skip


def flops(config, rates=(FROZEN,), tokens=32, images=1, supervised=0):
    pairs = tokens * tokens
    return counted(config, rates).total(tokens=tokens, pairs=pairs, supervised=supervised, images=images)


@pytest.mark.parametrize("connector", ONE)
def test_a_forward_is_what_xla_counts_where_there_is_no_loop(connector):
    config = ONE[connector]
    row = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    pixels = jax.ShapeDtypeStruct((1, 1, 8, 8, 3), jnp.uint8)

    def forward(parameters, *fields):
        return Llava(config).apply({"params": parameters}, *fields)

    compiled = jax.jit(forward).lower(shapes_of(config), row, row, row, row, pixels).compile()
    assert 1 < compiled.cost_analysis()["flops"] / flops(config) < 1.025


def test_of_minigpt4_only_the_linear_layer_and_what_lies_above_it_has_gradients():
    config = presets.get("minigpt4_13b")
    linear = 2 * 32 * 768 * 5120
    images, text = flops(config, tokens=0), flops(config, images=0, supervised=10)
    attention = 4 * 40 * 32 * 32 * 5120
    assert flops(config, "projector/.*", supervised=10) == images + linear + 2 * text + attention
    # With the Q-Former too (BLIP-2): its kernels' and its activations' gradients, none of the tower's.
    tower = flops(replace(config, projector="linear", resampler=None), tokens=0) - 2 * 257 * 1408 * 5120
    looks = 2 * 6 * 257 * 1408 * 2 * 768  # keys and values of the picture: nothing moves under them
    assert flops(config, "(projector|resampler)/.*", tokens=0) == tower + 3 * (images - tower) - looks


def test_below_the_first_gated_block_of_flamingo_nothing_has_gradients():
    config = replace(ONE["flamingo_xattn"], llm=replace(LLM, layers=4))
    config = replace(config, cross=replace(config.cross, every=2))
    forward, layer = flops(config, images=0), flops(replace(ONE["perceiver"], llm=LLM), images=0)
    gated = forward - 4 * layer
    found = flops(config, "llm/cross/ff_gate", images=0) - forward
    # The last three layers, attention with two factors, and the second gated block, whose first gate lies under it;
    # of that one's attention the queries and the weights: its keys and values are the image's.
    assert found == 3 * layer + 3 * 4 * 32 * 32 * 256 + gated // 2
