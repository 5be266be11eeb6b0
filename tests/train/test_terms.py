"""Label smoothing and z-loss in a whole step: packed, padded, in micro-batches, under adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import config as configs
from llava_jax import params
from llava_jax.batch import Batch
from llava_jax.errors import UsageError
from llava_jax.train import program as programs
from llava_jax.train.loss import cross_entropy
from tests.train import tiny
from tests.train.test_step import start

SOURCES = (configs.Source("unused"),)
SHARE, FACTOR = 0.1, 1e-2
HEAD = (("projector/0/.*|llm/head/.*", 1e-2), (".*", None))
RUNS = {
    "padded": {"data": configs.Data(sources=SOURCES, batch_samples=4, row_tokens=24), "rates": HEAD},
    "packed, adapters": {
        "data": configs.Data(sources=SOURCES, layout="packed", rows_per_chip=4, row_tokens=24),
        "lora": (("llm/blocks/.*", configs.Lora(4, 6.0)), (".*", None)),
        "rates": ((".*/lora_[ab]", 1e-2), (".*", None)),
    },
}


def build(run, loss=None, **train):
    terms = {"label_smoothing": SHARE, "z_loss": FACTOR}
    config = configs.Config(
        **run, train=configs.Train(**{"lr": 1e-2, "steps": 10, "warmup_ratio": 0.0, "accumulate": 2} | terms | train),
        init=((".*", "random"),), model=configs.Model(dtype="float32", remat="none"),
    )  # fmt: skip
    return programs.build(config, tiny.MODEL, 10, loss=loss)


def rows():
    """Rows of two samples of uneven weights."""
    fields = tiny.batch()
    fields["segments"][:, 20:] = 2
    fields["positions"][:, 20:] -= 20
    fields["weights"] *= np.random.default_rng(0).random(fields["weights"].shape).astype(np.float32)
    return Batch(**fields)


@pytest.mark.parametrize("name", [pytest.param("padded", marks=pytest.mark.slow), "packed, adapters"])
def test_a_step_minimises_the_terms_over_all_logits_at_once_and_validation_is_without_them(name):
    program = build(RUNS[name])
    state, frozen = start(program)
    batch = program.put(rows())
    segments = batch.segments if "packed" in name else None

    @jax.jit
    def losses(trainable):
        whole = {"params": params.merge(trainable, frozen)}
        hidden = program.model.apply(whole, batch.tokens, batch.positions, segments, batch.image_slots, batch.pixels)
        logits = program.model.apply(whole, hidden, method="head")
        every = jax.nn.log_softmax(logits)
        plain = -jnp.take_along_axis(every, batch.targets[..., None], -1)[..., 0]
        each = (1 - SHARE) * plain - SHARE * every.mean(-1) + FACTOR * jax.nn.logsumexp(logits, -1) ** 2
        return jnp.sum(batch.weights * each) / jnp.sum(batch.weights), jnp.sum(batch.weights * plain)

    (loss, plain), gradient = jax.value_and_grad(losses, has_aux=True)(state.params)
    validation = program.evaluate(state.params, frozen, batch)
    state, metrics = program.step(state, frozen, batch)
    np.testing.assert_allclose((metrics.loss, validation[0]), (loss, plain), rtol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    moments = jax.tree.map(lambda x: x / np.float32(0.1), state.opt_state[0].mu)  # b1 = 0.9
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * largest), moments, gradient)


def test_a_loss_of_ones_own_takes_no_terms_from_the_config():
    run = RUNS["padded"]
    with pytest.raises(UsageError, match="label_smoothing=0.1, train.z_loss=0.01: .* the caller's own; want 0"):
        build(run, cross_entropy)
    assert build(run, cross_entropy, label_smoothing=0.0, z_loss=0.0).steps == 10
