"""Model FLOPs against sums made by hand, published sizes, and what was recorded of formulas for each architecture."""

import functools
import time
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from llava_jax import config as configs
from llava_jax import params
from llava_jax.models import lora, presets
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.models.presets import LlamaConfig, LlavaConfig, VisionConfig
from llava_jax.train import flops as model_flops
from llava_jax.train import program as programs
from tests.train.recorded_flops import ALMOST, CONFIGS, NEWER, OTHERS, PRESETS, SAME
from tests.train.test_step import STAGE_1, build

TINY = LlavaConfig(
    VisionConfig(image_size=4, patch_size=2, width=6, mlp_width=10, layers=2, heads=2), "mlp2x_gelu",
    LlamaConfig(vocab=50, width=8, mlp_width=20, layers=2, heads=4, kv_heads=2, head_width=2),
)  # fmt: skip
NOTHING = {"tokens": 0, "pairs": 0, "supervised": 0, "images": 0}
BODY = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 20  # weights of one decoder block that multiply
SEVEN = presets.get("llava15_7b")
FROZEN = (".*", None)
PROJECTOR, DECODER = "projector/.*", "(projector|llm)/.*"
shapes_of = functools.cache(abstract_params)


@functools.cache
def forward_of(config, table=()):
    """The forward pass of a model with the adapters of a table `lora`."""
    adapters = programs.adapters(table, shapes_of(config))
    return model_flops.trace(Llava(config), lora.add(shapes_of(config), adapters))


def counted(config, rates=(FROZEN,), table=()):
    """ModelFlops by the tables `rates` (or the one pattern of what is trainable) and `lora`."""
    forward = forward_of(config, table)
    rates = params.lookup(forward.names, ((rates, 1.0), FROZEN) if isinstance(rates, str) else rates, "rates")
    return model_flops.count(forward, [name for name, rate in rates.items() if rate is not None])


def flops(rates=(FROZEN,), config=TINY, table=(), **counts):
    return counted(config, rates, table).total(**NOTHING | counts)


@pytest.mark.parametrize("preset, stage", PRESETS)
def test_of_every_preset_they_are_those_of_the_formulas(preset, stage):
    found, recorded = counted(presets.get(preset), stage), PRESETS[preset, stage]
    assert found == (pytest.approx(recorded, rel=1e-3) if preset in ALMOST else recorded)


@pytest.mark.parametrize("name", NEWER)
def test_a_decoder_of_a_newer_preset_costs_what_a_llama_of_its_sizes_does_and_its_tower_the_sum_made_by_hand(name):
    *decoder, images = counted(presets.get(name))
    assert tuple(decoder) == NEWER[name]
    patches, width, mlp, llm = 27 * 27, 1152, 4304, presets.get(name).llm.width
    block = 2 * patches * (4 * width * width + 2 * width * mlp) + 4 * patches * patches * width
    assert images == 2 * patches * (14 * 14 * 3 * width + width * llm + llm * llm) + 26 * block


def test_a_model_with_tiles_costs_a_tile_what_the_one_without_costs_a_picture():
    for name, other in SAME.items():
        assert counted(presets.get(name)) == counted(presets.get(other))
    *decoder, images = counted(presets.get("llava16_mistral_7b"))
    assert decoder == [13958643712, 524288, 262144000] and images == counted(presets.get("llava15_7b"))[-1]


def test_every_preset_is_compared_with_the_formulas():
    assert {name for name, _ in PRESETS} | {*NEWER, *SAME, "llava16_mistral_7b"} == set(presets.PRESETS)


@pytest.mark.parametrize("name", CONFIGS)
def test_of_every_config_they_are_those_of_the_formulas(name):
    config = configs.load(Path(__file__).parents[2] / "configs" / f"{name}.py", {})
    assert counted(presets.get(config.model.preset), config.rates, config.lora) == CONFIGS[name]


@pytest.mark.parametrize("name", OTHERS)
def test_of_other_connectors_and_other_trainable_parts_they_are_those_of_the_formulas(name):
    config, table, rates, recorded = OTHERS[name]
    found = counted(config, rates, table)
    assert found == (pytest.approx(recorded, rel=1e-3) if name in ALMOST else recorded)


def test_they_are_counted_in_less_than_two_seconds_for_the_7b():
    """Half a second on this project's machines."""
    shapes, begun = shapes_of(SEVEN), time.process_time()
    model_flops.count(model_flops.trace(Llava(SEVEN, jnp.bfloat16, "full"), shapes), ())
    assert time.process_time() - begun < 2


def test_each_part_of_a_forward_is_the_sum_made_by_hand():
    assert flops(tokens=3) == 2 * 3 * 2 * BODY
    assert flops(pairs=5) == 2 * 5 * 2 * 4 * 2 * 2  # 2 products x 2 operations, 2 layers, 4 heads of 2
    assert flops(supervised=7) == 2 * 7 * 8 * 50
    # One image: 4 patches of 12 numbers, one block that runs over 5 tokens, 4 features through the projector.
    block = 2 * 5 * (4 * 6 * 6 + 2 * 6 * 10) + 4 * 5 * 5 * 6
    assert flops(images=1) == 2 * 4 * 12 * 6 + block + 2 * 4 * (6 * 8 + 8 * 8)


def test_a_backward_reaches_down_to_the_lowest_trainable_parameter():
    forward = flops(tokens=3, pairs=5, supervised=7)
    head = flops(supervised=7)
    assert flops("llm/head/kernel", tokens=3, pairs=5, supervised=7) == forward + head  # its own gradient alone
    assert flops("llm/norm/scale", tokens=3, pairs=5, supervised=7) == forward + head  # the gradient of its input
    embed = flops("llm/embed/table", tokens=3, pairs=5, supervised=7)
    assert embed == 2 * forward + flops(pairs=5)  # both factors of attention need a gradient
    # Under the first layer all is frozen, so the products that read its input need only their kernels' gradient.
    assert flops("llm/blocks/(?!ln1).*", tokens=3) == 3 * flops(tokens=3) - 2 * 3 * (8 * 8 + 2 * 8 * 4)
    down = flops("llm/blocks/down/kernel", tokens=3)  # the gate's, the up's and all below are free in layer 0
    assert down == flops(tokens=3) + 2 * (2 * 3 * 20 * 8) + 2 * 3 * BODY


def test_a_frozen_tower_is_run_forward_only_and_a_trainable_one_costs_thrice():
    image, projector = flops(images=1), 2 * 4 * (6 * 8 + 8 * 8)
    assert flops(PROJECTOR, images=1) == image + projector + 2 * 4 * 8 * 8  # the second layer's input has a gradient
    below = flops("vision/cls", images=1) - image
    patch = 2 * 4 * 12 * 6
    assert below == image - patch + 4 * 5 * 5 * 6  # all kernels are frozen; attention's two factors
    assert flops(".*", images=1) == 3 * image - patch


def test_adapters_add_their_own_small_products_and_no_gradient_of_the_kernel():
    table = (("llm/blocks/(q|down)/.*", configs.Lora(3, 6.0)), FROZEN)
    small_in, small_out = 2 * 5 * 3 * (8 + 20), 2 * 5 * 3 * (8 + 8)  # of one layer: x a, and that times b
    forward = flops(tokens=5, table=table)
    assert forward == flops(tokens=5) + 2 * (small_in + small_out)
    shared = 2 * 5 * (8 * 8 + 2 * 8 * 4)  # q, k and v of the first layer: all under them is frozen
    gradients = flops(tokens=5) - shared + 2 * (2 * small_out + 2 * small_in) - 2 * 5 * 3 * 8
    assert flops(".*/lora_[ab]", tokens=5, table=table) == forward + gradients


def test_tied_and_added_rows_of_the_head_count_as_they_are_multiplied():
    tied = replace(TINY, llm=replace(TINY.llm, tie_embeddings=True, added_tokens=5))
    assert flops(config=tied, supervised=7) == 2 * 7 * 8 * 55
    assert flops("llm/embed/table", tied, supervised=7) == 3 * 2 * 7 * 8 * 55  # one product, one gradient of it


def test_llava_15_7b_costs_what_was_derived_for_it():
    # Source: research/jax_anchors.md 2a, which takes the decoder alone and logits at every position.
    decoder, projector = counted(SEVEN, DECODER), counted(SEVEN, PROJECTOR)

    def sample(found, tokens, supervised, images=0):
        return found.total(tokens=tokens, pairs=tokens * (tokens + 1) // 2, supervised=supervised, images=images)

    assert sample(decoder, 850, 850) == pytest.approx(34.3e12, rel=2e-3)
    assert sample(projector, 620, 620) == pytest.approx(16.6e12, rel=1e-2)
    assert counted(SEVEN).images == pytest.approx(0.366e12 + 0.024e12, rel=1e-2)
    # What a step must do: logits of about 200 supervised positions, and the image.
    assert sample(decoder, 850, 200, 1) / sample(decoder, 850, 850) == pytest.approx(0.997, abs=1e-3)
    assert sample(projector, 605, 25, 1) == pytest.approx(16.4e12, rel=1e-2)


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

    compiled = jax.jit(forward).lower(shapes_of(one), row, row, row, row, pixels).compile()
    ours = flops(config=one, tokens=32, pairs=32 * 32, images=1)  # XLA looks at all pairs
    assert 1 < compiled.cost_analysis()["flops"] / ours < 1.02


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_they_are_the_same_whatever_the_platform_takes_for_attention(platform, monkeypatch):
    here = model_flops.count(forward_of(SEVEN), ())
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    there = model_flops.trace(Llava(SEVEN, jnp.bfloat16), shapes_of(SEVEN))
    assert model_flops.count(there, ()) == here


def test_a_program_counts_its_own_whatever_its_dtypes_remat_and_rows():
    plain = build()
    config = configs.Config(
        data=configs.Data(sources=(configs.Source("unused"),), layout="packed", rows_per_chip=2, row_tokens=96),
        train=configs.Train(lr=1e-2, steps=10), rates=STAGE_1, init=((".*", "random"),),
        model=configs.Model(dtype="bfloat16", remat="save_dots", frozen_dtype="int8"),
    )  # fmt: skip
    assert programs.build(config, plain.model.config, 10).flops == plain.flops
    assert plain.flops == counted(plain.model.config, PROJECTOR) and plain.flops is plain.flops


class Own(Llava):
    """A model that this package does not know: a tower with a convolution, and a decoder that branches."""

    def setup(self):
        self.patch = nn.Conv(6, (2, 2), (2, 2), use_bias=False)
        self.q, self.k, self.out = nn.Dense(8), nn.Dense(8), nn.Dense(50, use_bias=False)
        self.twice = [nn.Dense(8, use_bias=False), nn.Dense(8, use_bias=False)]

    def __call__(self, tokens, positions, segments, image_slots, pixels):
        features = self.patch(pixels[0].astype(jnp.float32)).reshape(1, 4, 6)
        x = jnp.zeros((*tokens.shape, 6)).at[:, :1].add(features[:, :1]) + tokens[..., None]
        scores = jnp.einsum("bth,bsh->bts", self.q(x), self.k(x))
        x = jnp.einsum("bts,bsc->btc", nn.softmax(scores), self.k(x))
        wide, narrow = (layer.variables["params"]["kernel"] for layer in self.twice)
        return jax.lax.cond(tokens[0, 0] > 0, lambda x: x @ wide @ narrow, lambda x: x @ wide, x)

    def head(self, hidden):
        return self.out(hidden)

    def initial(self, *fields):
        return [layer(jnp.zeros(8)) for layer in self.twice] and self.head(self(*fields))


def test_a_model_that_no_formula_was_written_for_is_counted_as_it_is_traced():
    model, row = Own(TINY), jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), row, row, row, row, jnp.zeros((1, 1, 4, 4, 3)),
                                               method="initial"))["params"]  # fmt: skip
    forward = model_flops.trace(model, shapes)
    patch, dense, product, pair, head = 2 * 4 * 6 * 12, 2 * 6 * 8, 2 * 8 * 8, 2 * 8, 2 * 8 * 50
    assert model_flops.count(forward, ()) == (3 * dense + 2 * product, 2 * pair, head, patch)
    # The row holds features, so both factors of attention depend on the tower; the last kernel has a gradient too.
    found = model_flops.count(forward, ["patch/kernel", "twice_1/kernel"])
    assert found == (2 * (3 * dense + 2 * product) + product, 3 * 2 * pair, 2 * head, 2 * patch)
    # What lies below the only trainable kernel has no gradient, what lies above has that of its input.
    found = model_flops.count(forward, ["twice_0/kernel"])
    assert found == (3 * dense + 4 * product, 2 * pair, 2 * head, patch)
