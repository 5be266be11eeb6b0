"""EVA, the Q-Former and the whole MiniGPT-4 against transformers' BLIP-2, which is the same network."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import params as names
from llava_jax.models import presets
from llava_jax.models.eva import EvaTower
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.models.presets import QFormerConfig
from llava_jax.models.qformer import QFormer
from tests.golden import make_models as golden
from tests.models import blip2
from tests.models.test_parity import CLOSE, difference, loss_of

CASES = {
    "heads of 22, eps of HF": blip2.CONFIG,
    "another eps, every third layer looks": replace(
        blip2.CONFIG, vision=replace(blip2.CONFIG.vision, width=32, heads=4, eps=1e-3), ln_vision_eps=1e-3,
        resampler=QFormerConfig(queries=3, width=16, mlp_width=20, layers=6, heads=2, cross_every=3, eps=1e-5),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def both(request):
    """(config, our parameters, a batch, what transformers computes)"""
    pytest.importorskip("torch")
    config = CASES[request.param]
    model = blip2.hf_model(config, seed=7)
    flat = blip2.to_names(dict(model.named_parameters()), config)
    shapes = {name: leaf.shape for name, leaf in names.flatten(abstract_params(config)).items()}
    assert {name: array.shape for name, array in flat.items()} == shapes
    batch = golden.inputs(config, seed=3)
    tree = names.unflatten({name: jnp.asarray(array) for name, array in flat.items()})
    return config, tree, batch, blip2.expected(model, batch, config)


def test_every_hidden_state_of_the_tower_is_that_of_transformers(both):
    config, tree, batch, expected = both
    look = jax.jit(functools.partial(EvaTower(config.vision).apply, method="hidden_states"))
    states = look({"params": tree["vision"]}, jnp.asarray(batch["pixels"])[:, 0])
    assert len(states) == config.vision.layers + 1
    for index, state in enumerate(states):
        assert difference(state, expected[f"vision/{index}"]) < CLOSE, index


def test_every_hidden_state_of_the_q_former_is_that_of_transformers(both):
    config, tree, _, expected = both
    look = jax.jit(functools.partial(QFormer(config.resampler).apply, method="hidden_states"))
    states = look({"params": tree["resampler"]}, jnp.asarray(expected["normed"]))
    assert len(states) == config.resampler.layers + 1
    for index, state in enumerate(states):
        assert difference(state, expected[f"resampler/{index}"]) < CLOSE, index


def test_features_logits_loss_and_the_projections_gradient_are_those_of_transformers(both):
    config, tree, batch, expected = both
    model = Llava(config)
    features = jax.jit(functools.partial(model.apply, method="encode_images"))
    assert difference(features({"params": tree}, jnp.asarray(batch["pixels"])), expected["features"]) < CLOSE
    compute = jax.value_and_grad(lambda own: loss_of(model, tree | {"projector": own}, batch), has_aux=True)
    (loss, logits), gradients = jax.jit(compute)(tree["projector"])
    assert difference(logits, expected["logits"]) < CLOSE
    assert difference(loss, expected["loss"]) < CLOSE
    for name in ("kernel", "bias"):
        assert np.abs(expected[f"grad/projector/0/{name}"]).max() > 0.01  # no comparison of nothing with nothing
        assert difference(gradients["0"][name], expected[f"grad/projector/0/{name}"]) < CLOSE


@pytest.mark.slow
def test_every_gradient_is_that_of_transformers(both):
    config, tree, batch, expected = both
    compute = jax.jit(jax.grad(lambda tree: loss_of(Llava(config), tree, batch)[0]))
    for name, gradient in names.flatten(compute(tree)).items():
        if not name.endswith("/k/bias"):  # truly 0: it shifts all scores of a query alike
            assert difference(gradient, expected[f"grad/{name}"]) < 2 * CLOSE, name


def test_the_norm_after_the_tower_has_an_eps_of_its_own():
    """1e-5 in the original, 1e-6 in transformers: seen where the tower's features are small."""
    features = 0.003 * jax.random.normal(jax.random.key(0), (1, 5, blip2.CONFIG.vision.width))
    variance = features.var(axis=-1, keepdims=True)
    ones = {"scale": jnp.ones(features.shape[-1]), "bias": jnp.zeros(features.shape[-1])}
    for eps in (1e-5, 1e-6):
        model = Llava(replace(blip2.CONFIG, ln_vision_eps=eps))
        found = model.apply({"params": {"ln_vision": ones}}, features, method=lambda model, x: model.ln_vision(x))
        wanted = (features - features.mean(axis=-1, keepdims=True)) / jnp.sqrt(variance + eps)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("preset", "llm", "projector", "features"), [
    ("minigpt4_7b", 6_738_415_616, 3_149_824, 32), ("minigpt4_13b", 13_015_864_320, 3_937_280, 32),
    ("minigpt4_llama2_7b", 6_738_415_616, 23_072_768, 64), ("minigptv2_7b", 6_738_415_616, 23_072_768, 256),
])  # fmt: skip
def test_full_size_presets_have_the_published_number_of_parameters(preset, llm, projector, features):
    # Source: research/minigpt4_scienceqa.md 1.1 to 1.3; at 448 pixels 768 more positions of 1,408.
    config = presets.get(preset)
    found = {name: names.count(tree) for name, tree in abstract_params(config).items()}
    tower = 985_894_528 + (768 * 1408 if config.vision.image_size == 448 else 0)
    wanted = {"llm": llm, "ln_vision": 2 * 1408, "projector": projector, "vision": tower}
    assert found == (wanted | {"resampler": 105_162_240} if config.projector == "qformer" else wanted)
    assert config.image_features == features
