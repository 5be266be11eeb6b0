"""EVA, the Q-Former and the whole MiniGPT-4 against transformers' BLIP-2, which is the same network.

Against its recorded arrays without torch, and live with it.
"""

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
from llava_jax.models.qformer import QFormer
from tests.golden import make_blip2 as golden
from tests.models import blip2
from tests.models.test_parity import CLOSE, difference, loss_of

SOURCES = {"recorded": golden.recorded, "live": golden.live}
BOTH = {f"{source}: {case}": (source, case) for source in SOURCES for case in blip2.CASES}
LIVE = {name: found for name, found in BOTH.items() if found[0] == "live"}  # with every gradient


@pytest.fixture(scope="module", params=BOTH.values(), ids=BOTH)
def both(request):
    """(config, our parameters, a batch, what transformers computes)"""
    source, case = request.param
    if source == "live":
        pytest.importorskip("torch")
    config, (flat, batch, expected) = blip2.CASES[case], SOURCES[source](case)
    shapes = {name: leaf.shape for name, leaf in names.flatten(abstract_params(config)).items()}
    assert {name: array.shape for name, array in flat.items()} == shapes
    return config, names.unflatten({name: jnp.asarray(array) for name, array in flat.items()}), batch, expected


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(model, tree, *args, method):
    return model.apply({"params": tree}, *args, method=method)


@functools.partial(jax.jit, static_argnums=0)
def slopes(model, tree, batch):
    """((loss, logits), the projection's gradient)"""
    compute = jax.value_and_grad(lambda own: loss_of(model, tree | {"projector": own}, batch), has_aux=True)
    return compute(tree["projector"])


def test_every_hidden_state_of_the_tower_is_that_of_transformers(both):
    config, tree, batch, expected = both
    pixels = jnp.asarray(batch["pixels"])[:, 0]
    states = apply(EvaTower(config.vision), tree["vision"], pixels, method="hidden_states")
    assert len(states) == config.vision.layers + 1
    for index, state in enumerate(states):
        assert difference(state, expected[f"vision/{index}"]) < CLOSE, index
    assert difference(apply(Llava(config), tree, states[-1], method=_ln_vision), expected["normed"]) < CLOSE


def _ln_vision(model, features):
    return model.ln_vision(features)


def test_every_hidden_state_of_the_q_former_is_that_of_transformers(both):
    config, tree, _, expected = both
    features = jnp.asarray(expected["normed"])
    states = apply(QFormer(config.resampler), tree["resampler"], features, method="hidden_states")
    assert len(states) == config.resampler.layers + 1
    for index, state in enumerate(states):
        assert difference(state, expected[f"resampler/{index}"]) < CLOSE, index


def test_features_logits_loss_and_the_projections_gradient_are_those_of_transformers(both):
    config, tree, batch, expected = both
    model = Llava(config)
    features = apply(model, tree, jnp.asarray(batch["pixels"]), method="encode_images")
    assert difference(features, expected["features"]) < CLOSE
    (loss, logits), gradients = slopes(model, tree, batch)
    assert difference(logits, expected["logits"]) < CLOSE
    assert difference(loss, expected["loss"]) < CLOSE
    for name in ("kernel", "bias"):
        assert np.abs(expected[f"grad/projector/0/{name}"]).max() > 0.01  # no comparison of nothing with nothing
        assert difference(gradients["0"][name], expected[f"grad/projector/0/{name}"]) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("both", LIVE.values(), ids=LIVE, indirect=True)
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
        found = model.apply({"params": {"ln_vision": ones}}, features, method=_ln_vision)
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
