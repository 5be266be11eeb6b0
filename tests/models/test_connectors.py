"""Every connector on every tower: the cache, the merge, Flamingo's gates and masks, and what no model can be."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import params as names
from llava_jax.models import decoder, flamingo, presets
from llava_jax.models.flamingo import Perceiver
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.models.presets import CrossConfig, EvaConfig, LlavaConfig, QFormerConfig
from tests.golden import make_blip2
from tests.models import idefics
from tests.models.test_parity import CLOSE, difference

TINY = replace(presets.get("tiny"), vision=replace(presets.get("tiny").vision, image_size=56))  # 16 patches
EVA = EvaConfig(image_size=56, patch_size=14, width=32, mlp_width=64, layers=2, heads=2)
QFORMER = QFormerConfig(queries=3, width=24, mlp_width=40, layers=4, heads=3)
PERCEIVER = idefics.CONFIG
PATCHES = replace(EVA, select_feature="patch")


def flamingo_config(every: int = 2) -> LlavaConfig:
    cross = CrossConfig(media_width=32, every=every, heads=2, head_width=8)
    return replace(TINY, projector="flamingo_xattn", resampler=PERCEIVER, cross=cross)


CONNECTORS = {
    "clip linear": replace(TINY, projector="linear"),
    "clip mlp3x_gelu": replace(TINY, projector="mlp3x_gelu"),
    "clip qformer": replace(TINY, projector="qformer", resampler=QFORMER, ln_vision_eps=1e-5),
    "clip perceiver": replace(TINY, projector="perceiver", resampler=PERCEIVER),
    "clip concat4_linear": replace(TINY, projector="concat4_linear"),
    "eva linear": replace(TINY, vision=EVA, projector="linear"),
    "eva qformer": replace(TINY, vision=EVA, projector="qformer", resampler=QFORMER, ln_vision_eps=1e-5),
    "eva concat4_linear": replace(TINY, vision=PATCHES, projector="concat4_linear", ln_vision_eps=1e-5),
    "clip flamingo_xattn": flamingo_config(),
    "eva flamingo_xattn": replace(flamingo_config(1), vision=PATCHES),
}


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "cache_tokens"))
def apply(model, tree, *args, **fields):
    return model.apply({"params": tree}, *args, **fields)


@functools.cache
def drawn(config: LlavaConfig, scale: float = 0.2):
    """Parameters of which none is 0, gates included."""
    leaves, rng = names.flatten(abstract_params(config)), np.random.default_rng(0)
    flat = {name: jnp.asarray(scale * rng.standard_normal(x.shape, np.float32)) for name, x in leaves.items()}
    return names.unflatten({n: 1 + x if n.endswith("scale") else x for n, x in flat.items()})


def batch(config: LlavaConfig, rows: int = 2, tokens: int = 24, groups: int = 2, images: int = 1):
    """One picture a row after its first two tokens; row i of a group shows picture i of it."""
    rng, features, side = np.random.default_rng(0), config.image_features, config.vision.image_size
    slots = np.full((rows, tokens), -1, np.int32)
    for row in range(rows):
        slots[row, 2 : 2 + features] = row % (rows // groups) % images * features + np.arange(features)
    return {
        "tokens": jnp.asarray(rng.integers(0, config.llm.vocab, (rows, tokens)), jnp.int32),
        "positions": jnp.tile(jnp.arange(tokens), (rows, 1)),
        "segments": jnp.ones((rows, tokens), jnp.int32),
        "image_slots": jnp.asarray(slots),
        "pixels": jnp.asarray(rng.integers(0, 256, (groups, images, side, side, 3)), jnp.uint8),
    }


@pytest.mark.parametrize("connector", [name for name in CONNECTORS if name not in ("clip mlp3x_gelu", "eva linear")])
def test_cached_decoding_equals_the_full_forward_and_pictures_are_seen(connector):
    config = CONNECTORS[connector]
    fields, tree, model = batch(config), drawn(config), Llava(config)
    whole = apply(model, tree, **fields)
    other = apply(model, tree, **fields | {"pixels": 255 - fields["pixels"]})
    assert difference(other[:, -1], whole[:, -1]) > 1e-3  # what follows is no comparison of blind models
    start = 20
    prompt = {name: fields[name][:, :start] for name in ("tokens", "positions", "image_slots")}
    # Padding on the right, as the engine pads.
    prompt = {name: jnp.pad(array, ((0, 0), (0, 2)), constant_values=-(name == "image_slots"))
              for name, array in prompt.items()}  # fmt: skip
    hidden, cache = apply(model, tree, **prompt, pixels=fields["pixels"], cache_tokens=32, method="prefill")
    assert difference(hidden[:, :start], whole[:, :start]) < CLOSE
    for t in range(start, 24):
        step = (fields["tokens"][:, t : t + 1], fields["positions"][:, t : t + 1])
        hidden, cache = apply(model, tree, *step, cache, method="decode")
        assert difference(hidden[:, 0], whole[:, t]) < CLOSE


@pytest.mark.parametrize("connector", CONNECTORS)
def test_a_config_survives_json_and_says_how_many_features_an_image_has(connector):
    config = CONNECTORS[connector]
    assert presets.config_from_json(presets.config_to_json(config)) == config
    features = apply(Llava(config), drawn(config), batch(config)["pixels"], method="encode_images")
    rows = PERCEIVER.latents if config.cross else config.image_features
    assert features.shape == (2, rows, config.vision.width if config.cross else config.llm.width)


def test_a_llava_card_is_what_it_has_always_been():
    data = presets.config_to_json(presets.get("llava15_7b"))
    assert set(data) == {"vision", "projector", "llm", "image_newline"} and "kind" not in data["vision"]


@pytest.mark.parametrize("change, message", [
    ({"projector": "qformer"}, "resampler=None: want QFormerConfig for the projector 'qformer'"),
    ({"resampler": PERCEIVER}, "want NoneType for the projector 'mlp2x_gelu'"),
    ({"projector": "flamingo_xattn", "resampler": PERCEIVER}, "cross=None"),
    ({"projector": "concat4_linear", "vision": EVA}, "vision.features=17: want a multiple of 4"),
    ({"projector": "flamingo_xattn", "resampler": PERCEIVER, "cross": CrossConfig(media_width=8)}, "media_width=8"),
])  # fmt: skip
def test_parts_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_four_neighbours_of_a_row_become_one_feature_in_reading_order():
    config = CONNECTORS["clip concat4_linear"]
    tree, pixels = drawn(config), batch(config)["pixels"]
    model = Llava(config)
    patches = apply(model, tree, pixels[:, 0], method=_tower)
    kernel, bias = (tree["projector"]["0"][name] for name in ("kernel", "bias"))
    four = np.asarray(patches[0, 4:8])  # the second row of patches: 56 / 14 = 4 columns
    features = apply(model, tree, pixels, method="encode_images")
    assert difference(features[0, 1], np.concatenate(list(four)) @ kernel + bias) < CLOSE


def _tower(model, pixels):
    return model.vision(pixels)


@pytest.mark.parametrize("source", [make_blip2.recorded, make_blip2.live], ids=["recorded", "live"])
def test_the_perceiver_is_that_of_transformers_idefics_with_gelu(source):
    if source is make_blip2.live:
        pytest.importorskip("torch")
    flat, inputs, expected = source("perceiver")
    tree, ours = names.unflatten({name: jnp.asarray(array) for name, array in flat.items()}), Perceiver(idefics.CONFIG)
    features = jnp.asarray(inputs["features"])
    shapes = jax.eval_shape(lambda: ours.init(jax.random.key(0), features))["params"]
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, shapes)
    assert difference(apply(ours, tree, features), expected["latents"]) < CLOSE


def test_gates_at_their_start_give_exactly_the_plain_decoder(monkeypatch):
    monkeypatch.setattr(decoder, "FEW_LAYERS", 0)  # both loop over their layers; unrolled, XLA fuses otherwise
    config = flamingo_config()
    tree, fields = drawn(config), batch(config)
    for gate in ("attn_gate", "ff_gate"):
        closed = tree["llm"]["cross"] | {gate: jnp.zeros(1)}
        tree = tree | {"llm": tree["llm"] | {"cross": closed}}
    plain = replace(TINY, projector="identity")
    alone = {"llm": {name: leaf for name, leaf in tree["llm"].items() if name != "cross"}}
    text = apply(Llava(plain), alone, *(fields[name] for name in ("tokens", "positions")), method=_plain)
    np.testing.assert_array_equal(apply(Llava(config), tree, **fields), text)


def _plain(model, tokens, positions):
    return model.llm(model.llm.embed(tokens), positions, None)


def test_a_token_sees_the_last_image_of_its_own_sample_and_before_that_none():
    slots = jnp.array([[-1, 0, -1, 1, -1, -1, -1, 2, -1]])
    segments = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 0]])
    seen = flamingo.media(jnp.zeros((1, 3, 4)), slots, segments).seen
    np.testing.assert_array_equal(seen, [[-1, 0, 0, 1, 1, -1, -1, 2, -1]])
    again = flamingo.media(jnp.zeros((1, 3, 4)), seen, segments).seen
    np.testing.assert_array_equal(again, seen)


def test_gated_attention_is_the_sum_worked_out_in_numpy():
    config = CrossConfig(media_width=6, every=1, heads=2, head_width=4, mlp_ratio=2)
    block, rng = flamingo.GatedBlock(config, rows=3), np.random.default_rng(0)
    x, pictures = rng.standard_normal((1, 4, 10)), rng.standard_normal((1, 2 * 3, 6))  # two images of three features
    seen = flamingo.Media(jnp.asarray(pictures, jnp.float32), jnp.array([[-1, 0, 0, 1]]))
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), jnp.asarray(x, jnp.float32), seen))["params"]
    p = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), shapes)
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), p)
    found, last = jax.jit(block.apply)({"params": single}, jnp.asarray(x, jnp.float32), seen)

    def norm(y, name):
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        return y * p[name]["scale"] + p[name]["bias"]

    def looked(y, image):
        if image < 0:
            return np.zeros(8)
        own = pictures[0, 3 * image : 3 * image + 3]
        q, k, v = y @ p["q"]["kernel"], own @ p["k"]["kernel"], own @ p["v"]["kernel"]
        heads = []
        for cut in (slice(0, 4), slice(4, 8)):
            weights = np.exp(k[:, cut] @ q[cut] / 2)
            heads.append(weights / weights.sum() @ v[:, cut])
        return np.concatenate(heads)

    def gelu(y):
        return np.asarray(jax.nn.gelu(jnp.asarray(y, jnp.float32), approximate=False), np.float64)

    y = np.stack([looked(norm(x, "ln1")[0, t], image) for t, image in enumerate((-1, 0, 0, 1))])
    y = x[0] + np.tanh(p["attn_gate"]) * (y @ p["o"]["kernel"])
    y = y + np.tanh(p["ff_gate"]) * (gelu(norm(y, "ln2") @ p["fc1"]["kernel"]) @ p["fc2"]["kernel"])
    assert difference(found[0], y) < CLOSE
    assert difference(last.v.swapaxes(1, 2).reshape(3, 8), pictures[0, 3:] @ p["v"]["kernel"]) < CLOSE


def test_rows_of_a_group_and_samples_of_a_row_look_at_their_own_pictures():
    config = flamingo_config()
    tree, model = drawn(config), Llava(config)
    fields = batch(config, rows=2, groups=1, images=2)
    apart = apply(model, tree, **fields)
    packed = {name: fields[name].reshape(1, -1) for name in ("tokens", "positions", "image_slots")}
    packed["segments"] = jnp.repeat(jnp.array([[1, 2]]), 24, axis=1)
    together = apply(model, tree, **packed, pixels=fields["pixels"])
    assert difference(together.reshape(apart.shape), apart) < CLOSE


def test_a_prompt_without_a_picture_gets_nothing_from_the_attention_but_passes_the_mlp():
    config = flamingo_config()
    tree, model, fields = drawn(config), Llava(config), batch(config)
    blind = fields["image_slots"] * 0 - 1
    whole = apply(model, tree, **fields | {"image_slots": blind})
    prompt = {name: fields[name] for name in ("tokens", "positions")} | {"image_slots": blind}
    hidden, _ = apply(model, tree, **prompt, pixels=None, cache_tokens=32, method="prefill")
    assert difference(hidden, whole) < CLOSE
    silent = drawn(config)
    silent = silent | {"llm": silent["llm"] | {"cross": silent["llm"]["cross"] | {"ff_gate": jnp.zeros(1)}}}
    plain = apply(model, silent, **prompt, pixels=None, cache_tokens=32, method="prefill")[0]
    assert difference(plain, whole) > 1e-3


def test_remat_between_gated_blocks_changes_no_gradient():
    config = flamingo_config()
    tree, fields = drawn(config), batch(config)

    def slope(policy):
        return jax.jit(jax.grad(lambda cross: jnp.sum(
            Llava(config, remat=policy).apply({"params": tree | {"llm": tree["llm"] | {"cross": cross}}}, **fields) ** 2
        )))(tree["llm"]["cross"])  # fmt: skip

    plain, other = slope("none"), slope("full")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max())),
                 other, plain)  # fmt: skip
