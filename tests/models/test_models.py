"""What the models promise beside parity: shapes of the released ones, the cache, the merge, packing, refusals."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import params as names
from llava_jax.errors import UsageError
from llava_jax.models import clip, presets, registry, remat
from llava_jax.models.llava import Llava, abstract_params, init_params
from llava_jax.models.presets import LlavaConfig, RopeScaling, VisionConfig
from llava_jax.models.vit import normalise

TINY = presets.get("tiny")
FEATURES = TINY.vision.features


def batch(rows: int, tokens: int, groups: int, images: int, config: LlavaConfig = TINY) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    side = config.vision.image_size
    return {
        "tokens": jnp.asarray(rng.integers(0, config.llm.vocab, (rows, tokens)), jnp.int32),
        "positions": jnp.tile(jnp.arange(tokens), (rows, 1)),
        "segments": jnp.ones((rows, tokens), jnp.int32),
        "image_slots": jnp.full((rows, tokens), -1).at[:, 2 : 2 + config.vision.features].set(
            jnp.arange(config.vision.features)),
        "pixels": jnp.asarray(rng.integers(0, 256, (groups, images, side, side, 3)), jnp.uint8),
    }  # fmt: skip


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "cache_tokens"))
def apply(model: Llava, tree, *args, **fields):
    """`model.apply` compiled as a whole: op by op it takes ten times as long."""
    return model.apply({"params": tree}, *args, **fields)


draw = jax.jit(init_params, static_argnums=0)


@pytest.fixture(scope="module")
def tiny():
    return draw(TINY, jax.random.key(0))


@pytest.mark.parametrize(
    ("preset", "count"), [("llava10_7b", 7_045_793_792), ("llava10_13b", 13_324_292_096),
                          ("llava15_7b", 7_062_902_784), ("llava15_13b", 13_350_839_296)])  # fmt: skip
def test_full_size_presets_have_the_published_number_of_parameters(preset, count):
    # LLaVA-1.5's hub files hold 7,063,427,072 and 13,351,494,656: ours plus 64 padded rows in table and head.
    tree = abstract_params(presets.get(preset))
    assert names.count(tree) == count


@pytest.mark.parametrize(("layer", "run"), [(-2, 23), (-1, 24), (0, 0), (5, 5), (-25, 0)])
def test_the_tower_stacks_only_the_blocks_that_run(layer, run):
    config = replace(presets.get("llava15_7b"), vision=replace(clip.L14_336, select_layer=layer))
    flat = names.flatten(abstract_params(config)["vision"])
    assert flat["blocks/q/kernel"].shape[0] == run
    assert flat["tail/blocks/q/kernel"].shape[0] == 24 - run if run < 24 else "tail/blocks/q/kernel" not in flat


def test_cache_equals_no_cache_at_every_position(tiny):
    fields = batch(2, 12, 2, 1)
    model = Llava(TINY)
    whole = apply(model, tiny, **fields)
    prompt = {name: fields[name][:, :8] for name in ("tokens", "positions", "image_slots")}
    hidden, cache = apply(model, tiny, **prompt, pixels=fields["pixels"], cache_tokens=16, method="prefill")
    np.testing.assert_allclose(hidden, whole[:, :8], atol=2e-6)
    for t in range(8, 12):
        step = (fields["tokens"][:, t : t + 1], fields["positions"][:, t : t + 1])
        hidden, cache = apply(model, tiny, *step, cache, method="decode")
        np.testing.assert_allclose(hidden[:, 0], whole[:, t], atol=2e-6)


def test_two_samples_in_one_row_see_nothing_of_each_other(tiny):
    fields = batch(2, 10, 1, 2)
    rows = {name: fields[name] for name in ("tokens", "positions", "segments", "image_slots")}
    rows["image_slots"] = rows["image_slots"].at[1, 2 : 2 + FEATURES].add(FEATURES)
    packed = {name: array.reshape(1, -1) for name, array in rows.items()}
    packed["segments"] = jnp.repeat(jnp.array([[1, 2]]), 10, axis=1)
    model = Llava(TINY)
    apart = apply(model, tiny, **rows, pixels=fields["pixels"])
    together = apply(model, tiny, **packed, pixels=fields["pixels"])
    np.testing.assert_allclose(together.reshape(apart.shape), apart, atol=2e-6)


def test_each_group_reads_its_own_pictures_and_a_row_without_slots_none(tiny):
    fields = batch(2, 8, 2, 1)
    fields["image_slots"] = fields["image_slots"].at[1].set(-1)
    model = Llava(TINY)
    before = apply(model, tiny, **fields)
    other = apply(model, tiny, **fields | {"pixels": fields["pixels"].at[1].set(0)})
    np.testing.assert_array_equal(before, other)
    other = apply(model, tiny, **fields | {"pixels": fields["pixels"].at[0].set(0)})
    assert float(jnp.abs(before[0] - other[0]).max()) > 1e-3
    np.testing.assert_array_equal(before[1], other[1])


def test_image_newline_is_the_last_slot_of_the_pool():
    config = replace(TINY, image_newline=True)
    tree = draw(config, jax.random.key(0))
    features = apply(Llava(config), tree, batch(1, 8, 1, 2)["pixels"], method="encode_images")
    assert features.shape == (1, 2 * FEATURES + 1, config.llm.width)
    np.testing.assert_array_equal(features[0, -1], tree["image_newline"])


def test_rows_added_to_the_vocabulary_are_leaves_of_their_own_and_used():
    config = replace(TINY, llm=replace(TINY.llm, added_tokens=2))
    tree = draw(config, jax.random.key(0))
    fields = batch(1, 8, 1, 1) | {"tokens": jnp.array([[1, 2, 3, 4, 5, 6, 960, 961]])}
    rows = apply(Llava(config), tree, fields["tokens"], jnp.full((1, 8), -1),
                               jnp.zeros((1, 1, config.llm.width)), method="embed")  # fmt: skip
    np.testing.assert_array_equal(rows[0, -2:], tree["llm"]["embed"]["added"])
    hidden = apply(Llava(config), tree, **fields)
    logits = apply(Llava(config), tree, hidden, method="head")
    assert logits.shape[-1] == 962 and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[0, 0, 960:], hidden[0, 0] @ tree["llm"]["head"]["added"], rtol=1e-5)


def gradients(tree, policy):
    fields, model = batch(2, 8, 2, 1), Llava(TINY, remat=policy)
    slope = jax.value_and_grad(lambda llm: jnp.sum(model.apply({"params": tree | {"llm": llm}}, **fields) ** 2))
    return jax.jit(slope)(tree["llm"]), str(jax.make_jaxpr(slope)(tree["llm"]))


@pytest.fixture(scope="module")
def without_remat(tiny):
    return gradients(tiny, "none")[0]


@pytest.mark.parametrize("policy", [*remat.POLICIES, ("full", "save_qkv", "save_qkv"), ("save_dots", "full", "full")])
def test_every_remat_policy_gives_the_same_loss_and_gradients(tiny, without_remat, policy):
    found, program = gradients(tiny, policy)

    def close(ours, wanted):
        """As a whole: where terms cancel, an element of a sum in another order has no small error of its own."""
        assert jnp.linalg.norm(ours - wanted) <= 1e-5 * jnp.linalg.norm(wanted)

    jax.tree.map(close, found, without_remat)
    assert ("<host>" in program) == remat.only(policy).startswith("offload")


def test_a_policy_keeps_what_its_name_says(tiny):
    """Scalars that the backward pass finds kept; TINY has widths 48 (D), 96 (mlp) and 3 layers; 16 tokens."""
    fields, kept = batch(2, 8, 2, 1), {}

    def residuals(policy, llm):
        model = Llava(TINY, remat=policy)
        return jax.tree.leaves(jax.vjp(lambda llm: model.apply({"params": tiny | {"llm": llm}}, **fields), llm)[1])

    for policy in remat.NAMES:
        found = jax.eval_shape(functools.partial(residuals, policy), tiny["llm"])
        kept[policy] = sum(x.size for x in found if x.shape[:3] == (3, 2, 8) or x.shape[:2] == (3, 16))
    order = ("full", "save_qkv", "save_linear", "save_dots", "none")
    assert sorted(order, key=kept.get) == list(order) and kept["full"] == 3 * 16 * 48, kept


def test_layers_with_policies_of_their_own_keep_what_each_says_and_no_copy_of_their_weights(tiny):
    fields = batch(2, 8, 2, 1)

    def kept(policy):
        model = Llava(TINY, remat=policy)
        forward = functools.partial(lambda model, llm: model.apply({"params": tiny | {"llm": llm}}, **fields), model)
        found = jax.eval_shape(lambda llm: jax.tree.leaves(jax.vjp(forward, llm)[1]), tiny["llm"])
        activations = sum(x.size for x in found if x.shape[1:3] == (2, 8))
        return activations, sum(x.size for x in found if x.shape[:1] == (3,) and x.shape[1:3] != (2, 8))

    (full, weights), (qkv, _), (mixed, own) = kept("full"), kept("save_qkv"), kept(("full", "save_qkv", "save_qkv"))
    assert mixed == full + (qkv - full) * 2 // 3
    assert own == weights


@pytest.mark.parametrize("policies, message", [
    (("full", "save_qkv"), "2 policies for 3 layers"), (("none", "full", "full"), "none is a policy of all layers"),
])  # fmt: skip
def test_policies_that_fit_no_stack_are_refused(tiny, policies, message):
    with pytest.raises(ValueError, match=message):
        gradients(tiny, policies)


def test_an_unknown_policy_is_refused_with_the_list(tiny):
    with pytest.raises(ValueError, match="unknown remat policy 'some': there are none, full, save_qkv"):
        gradients(tiny, "some")


def test_pixels_are_normalised_as_the_reference_does():
    """numpy, in the order that CLIP's processor uses: float64 rescale, then float32."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3)).astype(np.uint8)
    config = clip.L14_336
    wanted = ((pixels * (1 / 255)).astype(np.float32) - np.float32(config.mean)) / np.float32(config.std)
    np.testing.assert_allclose(normalise(jnp.asarray(pixels), config), wanted, atol=1e-6)


def test_the_projector_starts_as_torch_linear_does():
    kernel = np.asarray(draw(TINY, jax.random.key(3))["projector"]["0"]["kernel"])
    bound = TINY.vision.width**-0.5
    assert np.abs(kernel).max() <= bound and kernel.std() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize("part, key, value", [
    ("llm", "eps", "x"), ("llm", "eps", -1), ("llm", "eps", 0), ("llm", "eps", float("nan")),
    ("llm", "rope_theta", "x"), ("llm", "rope_theta", 0), ("llm", "width", 48.0), ("llm", "heads", "4"),
    ("llm", "heads", True), ("llm", "vocab", -1), ("llm", "layers", 10**12), ("llm", "max_positions", None),
    ("llm", "head_width", 0), ("llm", "kv_heads", 3), ("llm", "tie_embeddings", "no"), ("llm", "rope_scaling", 5),
    ("llm", "rope_scaling", {"kind": "linear", "factor": 0}), ("vision", "mean", [1, 2]), ("vision", "mean", "abc"),
    ("vision", "mean", 5), ("vision", "std", [0, 0, 0]), ("vision", "std", ["a", 1, 1]), ("vision", "image_size", 29),
    ("vision", "act", "x"), ("vision", "select_layer", 99), ("vision", "select_feature", "x"),
    ("vision", "patch_size", 0), ("vision", "kind", "other"), ("vision", "kind", ["clip"]), (None, "vision", 5),
    (None, "vision", None), (None, "llm", None), (None, "llm", []), (None, "projector", ["x"]),
    (None, "projector", None), (None, "image_newline", 1), (None, "ln_vision_eps", -1), (None, "resampler", 5),
    (None, "cross", {}),
])  # fmt: skip
def test_a_value_that_no_model_can_have_is_refused_by_name(part, key, value):
    data = json.loads(json.dumps(presets.config_to_json(TINY)))
    (data if part is None else data[part])[key] = value
    with pytest.raises(UsageError, match=f"{key}|factor"):
        presets.config_from_json(data)


def test_the_model_of_an_older_version_lacks_only_keys_with_a_default():
    data = presets.config_to_json(TINY)
    older = dict(data["llm"])
    for key in ("rope_scaling", "added_tokens", "tie_embeddings"):
        del older[key]
    assert presets.config_from_json(data | {"llm": older}) == TINY


def test_configs_survive_json_and_refuse_what_no_model_has():
    config = replace(TINY, llm=replace(TINY.llm, rope_scaling=RopeScaling("linear", 2.0)))
    data = presets.config_to_json(config)
    assert presets.config_from_json(data) == config
    with pytest.raises(ValueError, match="depth"):
        presets.config_from_json(data | {"depth": 3})
    with pytest.raises(ValueError, match="width"):
        presets.config_from_json(data | {"llm": {k: v for k, v in data["llm"].items() if k != "width"}})
    with pytest.raises(ValueError, match="did you mean 'llava15_7b'"):
        presets.get("llava15_7B")
    with pytest.raises(ValueError, match="multiple of patch_size=14"):
        VisionConfig(image_size=225, patch_size=14, width=8, mlp_width=8, layers=1, heads=1)
    with pytest.raises(ValueError, match="unknown projector 'mlp'"):
        registry.connector("mlp")
