"""Adapters and int8 kernels: nothing at the start, their own formula afterwards, and how far int8 is from the truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import params as names
from llava_jax.models import lora, presets
from llava_jax.models.layers import Dense
from llava_jax.models.llava import Llava, abstract_params
from tests.models.test_models import TINY, batch

RANK, ALPHA = 4, 6.0


def random_leaf(name, shape, rng):
    """Weights of a size at which every part of the model counts."""
    leaf = rng.normal(1.0 if name.endswith("/scale") else 0.0, 0.1, shape).astype(np.float32)
    return np.full(shape, ALPHA / RANK, np.float32) if name.endswith(lora.SCALE) else leaf


@functools.cache
def trees():
    """(parameters without adapters, the same with one beside every kernel that can have one), float32."""
    shapes = abstract_params(TINY)
    every = {name: (RANK, ALPHA) for name in lora.targets(names.flatten(shapes))}
    rng = np.random.default_rng(0)
    flat = {n: random_leaf(n, s.shape, rng) for n, s in names.flatten(lora.add(shapes, every)).items()}
    return names.unflatten({n: leaf for n, leaf in flat.items() if lora.kernel_of(n) is None}), names.unflatten(flat)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, tree):
    fields = batch(1, 12, 1, 1)
    hidden = model.apply({"params": tree}, **fields)
    return model.apply({"params": tree}, hidden, method="head")


def int8(tree):
    """The tree with the decoder's matrices in int8, and the same with what these stand for."""
    flat, small, wide = names.flatten(tree), {}, {}
    for name, struct in names.flatten(lora.quantised(tree)).items():
        if name not in flat:
            continue
        small[name] = wide[name] = flat[name]
        if struct.dtype == jnp.int8:
            small[name], scale = lora.quantise(flat[name])
            small[lora.beside(name, lora.KERNEL_SCALE)] = scale
            wide[name] = small[name] * scale[..., None, :]
    return names.unflatten(small), names.unflatten(wide)


def test_every_kernel_that_multiplies_can_have_an_adapter_and_no_other():
    found = lora.targets(names.flatten(abstract_params(TINY)))
    blocks = [f"llm/blocks/{part}/kernel" for part in ("down", "gate", "k", "o", "q", "up", "v")]
    tower = [f"vision/blocks/{part}/kernel" for part in ("fc1", "fc2", "k", "o", "q", "v")]
    assert found == [*blocks, "projector/0/kernel", "projector/2/kernel", *tower]


def test_leaves_have_the_stack_of_their_kernel():
    shapes = names.flatten(abstract_params(TINY))
    added = names.flatten(lora.add(abstract_params(TINY), {"llm/blocks/up/kernel": (4, 8.0)}))
    layers, width, mlp = shapes["llm/blocks/up/kernel"].shape
    new = {name: leaf.shape for name, leaf in added.items() if name not in shapes}
    assert new == {
        "llm/blocks/up/lora_a": (layers, width, 4), "llm/blocks/up/lora_b": (layers, 4, mlp),
        "llm/blocks/up/lora_scale": (layers,),
    }  # fmt: skip


def test_the_published_adapters_of_7b_have_the_published_size():
    shapes = abstract_params(presets.get("llava15_7b"))
    chosen = [name for name in lora.targets(names.flatten(shapes)) if name.startswith("llm/")]
    added = names.flatten(lora.add(shapes, {name: (128, 256.0) for name in chosen}))
    assert sum(leaf.size for name, leaf in added.items() if name.endswith((lora.A, lora.B))) == 319_815_680


def test_a_model_begins_exactly_as_it_is_without_adapters():
    plain, adapted = trees()
    key, flat = jax.random.key(0), names.flatten(adapted)
    for name in (name for name in flat if lora.kernel_of(name)):
        flat[name] = lora.initial(name, flat[name].shape, key, ALPHA / RANK)
    model = Llava(TINY)
    np.testing.assert_array_equal(logits(model, names.unflatten(flat)), logits(model, plain))


def test_first_values_are_pefts_and_do_not_depend_on_each_other():
    draw = functools.partial(lora.initial, key=jax.random.key(1), scale=1.5)
    a = np.asarray(draw("llm/blocks/q/lora_a", (3, 64, 8)))
    assert np.abs(a).max() <= 1 / 8 and np.abs(a).max() > 0.99 / 8 and abs(a.mean()) < 0.005
    assert a.std() == pytest.approx(1 / 8 / np.sqrt(3), rel=0.03)
    assert not np.array_equal(a, draw("llm/blocks/k/lora_a", (3, 64, 8)))
    assert not np.asarray(draw("llm/blocks/q/lora_b", (3, 8, 64))).any()
    np.testing.assert_array_equal(draw("llm/blocks/q/lora_scale", (3,)), np.full(3, 1.5, np.float32))


def test_the_formula_is_the_papers():
    rng = np.random.default_rng(0)
    x, kernel, a, b = (rng.normal(size=s).astype(np.float32) for s in ((5, 6), (6, 7), (6, 2), (2, 7)))
    leaves = {"kernel": kernel, "lora_a": a, "lora_b": b, "lora_scale": np.float32(0.75)}
    found = Dense(7).apply({"params": leaves}, jnp.asarray(x))
    np.testing.assert_allclose(found, x @ kernel + 0.75 * x @ a @ b, atol=1e-5)


def test_merged_equals_unmerged():
    _, adapted = trees()
    model, merged = Llava(TINY), lora.merge(adapted)
    assert not any(lora.kernel_of(name) for name in names.flatten(merged))
    one, two = logits(model, adapted), logits(model, merged)
    assert np.abs(one - two).max() <= 1e-5 * np.abs(one).max()
    assert np.abs(one - logits(model, trees()[0])).max() > 0.1 * np.abs(one).max()  # the adapters count


def test_dropout_takes_its_share_of_the_adapters_input_in_training_only():
    width = 4000
    leaves = {"kernel": jnp.eye(width), "lora_a": jnp.eye(width), "lora_b": jnp.eye(width), "lora_scale": 2.0}
    layer, x = Dense(width, dropout=0.2), jnp.ones((1, width))
    np.testing.assert_array_equal(layer.apply({"params": leaves}, x), 3 * x)
    drop = functools.partial(layer.apply, {"params": leaves}, x)
    values, counts = np.unique(drop(rngs={"dropout": jax.random.key(0)}), return_counts=True)
    np.testing.assert_allclose(values, [1, 1 + 2 / 0.8], rtol=1e-6)  # what goes past the adapter is never dropped
    assert counts[0] / width == pytest.approx(0.2, abs=0.02)
    assert not np.array_equal(drop(rngs={"dropout": jax.random.key(0)}), drop(rngs={"dropout": jax.random.key(1)}))


def test_each_layer_and_each_matrix_drops_its_own():
    """q, k and v see the same input; with one mask for all they would lose the same part of it."""
    _, adapted = trees()
    model, fields = Llava(TINY, lora_dropout=0.5), batch(1, 12, 1, 1)
    run = jax.jit(lambda key: model.apply({"params": adapted}, **fields, rngs={"dropout": key}))
    one, two = run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(one, run(jax.random.key(0)))
    assert np.abs(one - two).max() > 0.01 * np.abs(one).max()


def test_int8_keeps_each_weight_within_half_a_step_of_its_column():
    kernel = np.random.default_rng(0).normal(size=(2, 32, 5)).astype(np.float32) * [1, 10, 1e-3, 0, 5]
    small, scale = lora.quantise(kernel.astype(np.float32))
    assert small.dtype == np.int8 and scale.shape == (2, 5)
    np.testing.assert_allclose(scale, np.abs(kernel).max(axis=1) / 127, rtol=1e-6)
    assert (np.abs(small).max(axis=1)[:, [0, 1, 2, 4]] == 127).all() and not small[..., 3].any()
    assert (np.abs(small * scale[:, None] - kernel) <= 0.5001 * scale[:, None]).all()


def test_an_int8_model_is_exactly_the_model_of_its_rounded_weights():
    small, wide = int8(trees()[1])
    one, two = logits(Llava(TINY), small), logits(Llava(TINY), wide)
    assert np.abs(one - two).max() <= 1e-5 * np.abs(two).max()


def test_int8_changes_a_product_by_seven_and_the_logits_by_fourteen_thousandths():
    """Relative, in the 2-norm, float32; the logits of this tiny model of normal weights. bfloat16 alone: 0.011."""
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=(256, 256)).astype(np.float32) for _ in range(2))
    small, scale = lora.quantise(kernel)
    assert relative(x @ (small * scale), x @ kernel) == pytest.approx(0.0070, rel=0.05)
    plain = trees()[0]
    found = relative(logits(Llava(TINY), int8(plain)[0]), logits(Llava(TINY), plain))
    assert found == pytest.approx(0.0139, rel=0.1)


def test_the_gradient_flows_through_the_weights_that_int8_stands_for():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(3, 16)).astype(np.float32), rng.normal(size=(16, 8)).astype(np.float32)
    small, scale = lora.quantise(kernel)
    layer = {"kernel": small, "kernel_scale": scale, "lora_a": np.zeros((16, 2), np.float32)}
    layer |= {"lora_b": rng.normal(size=(2, 8)).astype(np.float32), "lora_scale": np.float32(2)}

    def loss(a, x, tree):
        return jnp.sum(jnp.sin(Dense(8).apply({"params": tree | {"lora_a": a}}, x)))

    ours = jax.grad(loss, (0, 1))(layer["lora_a"], x, layer)
    plain = {name: leaf for name, leaf in layer.items() if name != "kernel_scale"} | {"kernel": small * scale}
    theirs = jax.grad(loss, (0, 1))(layer["lora_a"], x, plain)
    for one, two in zip(ours, theirs):
        np.testing.assert_allclose(one, two, atol=2e-5)


def test_scales_stay_float32_in_a_bfloat16_program():
    assert lora.running_dtype("llm/blocks/q/kernel", jnp.float32, jnp.bfloat16) == jnp.bfloat16
    assert lora.running_dtype("llm/blocks/q/kernel", jnp.int8, jnp.bfloat16) == jnp.int8
    for name in ("llm/blocks/q/lora_scale", "llm/blocks/q/kernel_scale"):
        assert lora.running_dtype(name, jnp.float32, jnp.bfloat16) == jnp.float32


def test_int8_where_the_decoder_moves_is_refused():
    with pytest.raises(ValueError, match=r"frozen_dtype=int8: no matrix of the decoder's blocks is frozen"):
        lora.quantised({"vision": abstract_params(TINY)["vision"]})


def relative(found, wanted):
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
