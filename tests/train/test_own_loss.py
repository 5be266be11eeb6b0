"""A loss of one's own is a function in one's own file: of each token by itself, or of whole answers."""

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax import config as configs
from llava_jax import params
from llava_jax.train import program as programs
from llava_jax.train.loss import Logps, logps, summed
from tests.train import tiny
from tests.train.test_step import batch, start


def focal(tokens):
    """Tokens that are known already count less. Source: Lin et al. 2017, section 3.2."""
    return -((1 - jnp.exp(tokens.target)) ** 2) * tokens.target


def answers(hidden, kernel, batch):
    """-log sigmoid of the log-probability of each answer: a sample of a row, which has a segment's number."""
    tokens = logps(hidden, kernel, batch.targets, batch.weights)
    inside = batch.segments[:, None] == jnp.arange(1, 3)[:, None]
    answer, share = (jnp.sum(inside * x[:, None], axis=-1) for x in (tokens.target, batch.weights))
    return -jnp.sum(share * jax.nn.log_sigmoid(0.1 * answer))


def mixed(hidden, kernel, batch):
    return summed(focal)(hidden, kernel, batch) + answers(hidden, kernel, batch)


def targets(model, parameters, rows):
    """Log-probabilities of the targets, from all logits at once."""
    hidden = model.apply({"params": parameters}, rows.tokens, rows.positions, None, rows.image_slots, rows.pixels)
    every = jax.nn.log_softmax(model.apply({"params": parameters}, hidden, method="head"))
    return jnp.take_along_axis(every, rows.targets[..., None], -1)[..., 0]


def test_a_loss_of_ones_own_is_minimised():
    config = configs.Config(
        data=configs.Data(sources=(configs.Source("unused"),), batch_samples=4, row_tokens=24),
        train=configs.Train(lr=1e-1, steps=10, warmup_ratio=0.0, accumulate=2),
        rates=(("projector/0/.*|llm/head/.*", 1e-1), (".*", None)), init=((".*", "random"),),
        model=configs.Model(dtype="float32", remat="none"),
    )  # fmt: skip
    program = programs.build(config, tiny.MODEL, 10, loss=mixed)
    state, frozen = start(program)
    rows = program.put(batch())
    target = jax.jit(targets, static_argnums=0)(program.model, params.merge(state.params, frozen), rows)
    tokens = (rows.weights * focal(Logps(target, target, target))).sum() / rows.weights.sum()
    wanted, found = tokens - jax.nn.log_sigmoid(0.1 * (rows.weights * target).sum(1)).mean(), []
    for _ in range(10):
        state, metrics = program.step(state, frozen, rows)
        found.append(float(metrics.loss))
    np.testing.assert_allclose(found[0], wanted, rtol=1e-6)
    assert found[-1] < 0.8 * found[0]
