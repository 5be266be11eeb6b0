"""Model FLOPs against sums made by hand, published sizes, and what XLA counts in a model without loops."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from llava_jax import params
from llava_jax.models import presets
from llava_jax.models.flops import ranks_of, step_flops
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.models.presets import LlamaConfig, LlavaConfig, VisionConfig

TINY = LlavaConfig(
    VisionConfig(image_size=4, patch_size=2, width=6, mlp_width=10, layers=2, heads=2), "mlp2x_gelu",
    LlamaConfig(vocab=50, width=8, mlp_width=20, layers=2, heads=4, kv_heads=2, head_width=2),
)  # fmt: skip
NOTHING = {"tokens": 0, "pairs": 0, "supervised": 0, "images": 0}
BODY = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 20  # weights of one decoder block that multiply
SEVEN = presets.get("llava15_7b")
NAMES = list(params.flatten(abstract_params(SEVEN)))
DECODER = [name for name in NAMES if name.startswith(("llm/", "projector/"))]
PROJECTOR = [name for name in NAMES if name.startswith("projector/")]


def flops(moving=(), config=TINY, ranks=None, **counts):
    return step_flops(config, moving, **NOTHING | counts, ranks=ranks or {})


def sample(tokens, moving=(), supervised=None, images=0):
    """FLOPs of one sample of LLaVA-1.5-7B."""
    supervised = tokens if supervised is None else supervised
    pairs = tokens * (tokens + 1) // 2
    return step_flops(SEVEN, moving, tokens=tokens, pairs=pairs, supervised=supervised, images=images)


def test_each_part_of_a_forward_is_the_sum_made_by_hand():
    assert flops(tokens=3) == 2 * 3 * 2 * BODY
    assert flops(pairs=5) == 2 * 5 * 2 * 4 * 2 * 2  # 2 products x 2 operations, 2 layers, 4 heads of 2
    assert flops(supervised=7) == 2 * 7 * 8 * 50
    # One image: 4 patches of 12 numbers, one block that runs over 5 tokens, 4 features through the projector.
    block = 2 * 5 * (4 * 6 * 6 + 2 * 6 * 10) + 4 * 5 * 5 * 6
    assert flops(images=1) == 2 * 4 * 12 * 6 + block + 2 * 4 * (6 * 8 + 8 * 8)


def test_a_backward_reaches_down_to_the_lowest_parameter_that_moves():
    forward = flops(tokens=3, pairs=5, supervised=7)
    head = flops(supervised=7)
    assert flops(["llm/head/kernel"], tokens=3, pairs=5, supervised=7) == forward + head  # its own gradient alone
    assert flops(["llm/norm/scale"], tokens=3, pairs=5, supervised=7) == forward + head  # the gradient of its input
    embed = flops(["llm/embed/table"], tokens=3, pairs=5, supervised=7)
    assert embed == 2 * forward + flops(pairs=5)  # both factors of attention need a gradient
    # Under the first layer nothing moves, so the products that read its input need only their kernels' gradient.
    blocks = [name for name in NAMES if name.startswith("llm/blocks") and "ln1" not in name]
    assert flops(blocks, tokens=3) == 3 * flops(tokens=3) - 2 * 3 * (8 * 8 + 2 * 8 * 4)
    down = flops(["llm/blocks/down/kernel"], tokens=3)  # the gate's, the up's and all below are free in layer 0
    assert down == flops(tokens=3) + 2 * (2 * 3 * 20 * 8) + 2 * 3 * BODY


def test_a_frozen_tower_is_run_forward_only_and_one_that_moves_costs_thrice():
    image, projector = flops(images=1), 2 * 4 * (6 * 8 + 8 * 8)
    assert flops(PROJECTOR, images=1) == image + projector + 2 * 4 * 8 * 8  # the second layer's input has a gradient
    below = flops(["vision/cls"], images=1) - image
    patch = 2 * 4 * 12 * 6
    assert below == image - patch + 4 * 5 * 5 * 6  # no kernel moves; attention's two factors
    assert flops([*NAMES], images=1) == 3 * image - patch


def test_adapters_add_their_own_small_products_and_no_gradient_of_the_kernel():
    ranks = {"llm/blocks/q/kernel": 3, "llm/blocks/down/kernel": 3}
    moving = [name.replace("kernel", f"lora_{half}") for name in ranks for half in "ab"]
    small_in, small_out = 2 * 5 * 3 * (8 + 20), 2 * 5 * 3 * (8 + 8)  # of one layer: x a, and that times b
    forward = flops(tokens=5, ranks=ranks)
    assert forward == flops(tokens=5) + 2 * (small_in + small_out)
    shared = 2 * 5 * (8 * 8 + 2 * 8 * 4)  # q, k and v of the first layer: nothing moves under them
    gradients = flops(tokens=5) - shared + 2 * (2 * small_out + 2 * small_in) - 2 * 5 * 3 * 8
    assert flops(moving, tokens=5, ranks=ranks) == forward + gradients
    assert ranks_of({"llm/blocks/q/lora_a": (2, 8, 3), "llm/blocks/q/kernel": (2, 8, 8)}) == {"llm/blocks/q/kernel": 3}


def test_tied_and_added_rows_of_the_head_count_as_they_are_multiplied():
    llm = replace(TINY.llm, tie_embeddings=True, added_tokens=5)
    tied = replace(TINY, llm=llm)
    assert flops(config=tied, supervised=7) == 2 * 7 * 8 * 55
    assert flops(["llm/embed/table"], tied, supervised=7) == 2 * 7 * 8 * (2 * 55 + 50)


def test_llava_15_7b_costs_what_was_derived_for_it():
    # Source: research/jax_anchors.md 2a, which takes the decoder alone and logits at every position.
    assert sample(850, DECODER) == pytest.approx(34.3e12, rel=2e-3)
    assert sample(620, PROJECTOR) == pytest.approx(16.6e12, rel=1e-2)
    assert sample(0, images=1) == pytest.approx(0.366e12 + 0.024e12, rel=1e-2)
    # What a step must do: logits of about 200 supervised positions, and the picture.
    assert sample(850, DECODER, 200, 1) / sample(850, DECODER) == pytest.approx(0.997, abs=1e-3)
    assert sample(605, PROJECTOR, 25, 1) == pytest.approx(16.4e12, rel=1e-2)


def test_a_forward_is_what_xla_counts_where_there_is_no_loop():
    one = LlavaConfig(  # wide enough that norms, softmax and the like, which XLA counts too, are few
        VisionConfig(image_size=8, patch_size=2, width=256, mlp_width=512, layers=1, heads=2, select_layer=-1),
        "linear",
        LlamaConfig(vocab=50, width=256, mlp_width=512, layers=1, heads=4, kv_heads=2, head_width=64),
    )  # fmt: skip
    row = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    pixels = jax.ShapeDtypeStruct((1, 1, 8, 8, 3), jnp.uint8)

    def forward(parameters, *fields):
        return Llava(one).apply({"params": parameters}, *fields)

    compiled = jax.jit(forward).lower(abstract_params(one), row, row, row, row, pixels).compile()
    ours = step_flops(one, (), tokens=32, pairs=32 * 32, supervised=0, images=1)  # XLA looks at all pairs
    assert 1 < compiled.cost_analysis()["flops"] / ours < 1.02
