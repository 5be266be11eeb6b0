"""The loss in chunks and its own gradient, against logits of all positions and JAX's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.train import loss as room
from llava_jax.train.loss import cross_entropy

ROWS, TOKENS, WIDTH, VOCAB = 3, 14, 8, 30


@pytest.fixture(scope="module")
def values():
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(ROWS, TOKENS, WIDTH)), rng.normal(size=(WIDTH, VOCAB))
    weights = rng.random((ROWS, TOKENS)) * (rng.random((ROWS, TOKENS)) < 0.4)
    targets = rng.integers(0, VOCAB, (ROWS, TOKENS))
    return tuple(jnp.asarray(x.astype(kind)) for x, kind in
                 ((hidden, np.float32), (kernel, np.float32), (targets, np.int32), (weights, np.float32)))  # fmt: skip


def plain(hidden, kernel, targets, weights):
    chosen = jnp.take_along_axis(jax.nn.log_softmax(hidden @ kernel), targets[..., None], axis=-1)
    return -jnp.sum(weights * chosen[..., 0])


@pytest.mark.parametrize("chunk", [4, 16, 512])
def test_loss_and_gradients_are_those_of_whole_logits(values, monkeypatch, chunk):
    monkeypatch.setattr(room, "CHUNK", chunk)
    found = jax.jit(jax.value_and_grad(lambda *x: 3 * cross_entropy(*x), (0, 1)))(*values)
    wanted = jax.value_and_grad(lambda *x: 3 * plain(*x), (0, 1))(*values)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), found, wanted)
    np.testing.assert_allclose(cross_entropy(*values), plain(*values), rtol=1e-6)


def test_positions_without_weight_are_never_looked_at(values):
    hidden, kernel, targets, weights = values
    poisoned = jnp.where(weights[..., None] > 0, hidden, jnp.nan)
    # 9 rows of weight 0 fill the only chunk: their logits are computed, but only those.
    loss, gradient = jax.value_and_grad(cross_entropy)(jnp.nan_to_num(poisoned), kernel, targets, weights)
    np.testing.assert_allclose(loss, plain(*values), rtol=1e-6)
    assert not np.any(gradient[weights == 0])


def test_without_any_target_the_loss_is_0_and_so_are_the_gradients(values):
    hidden, kernel, targets, weights = values
    loss, gradients = jax.value_and_grad(cross_entropy, (0, 1))(hidden, kernel, targets, 0 * weights)
    assert loss == 0 and not any(np.any(x) for x in gradients)


def test_a_frozen_head_costs_no_gradient(values):
    hidden, kernel, targets, weights = values
    one = str(jax.make_jaxpr(jax.grad(cross_entropy, 0))(*values))
    both = str(jax.make_jaxpr(jax.grad(cross_entropy, (0, 1)))(*values))
    none = str(jax.make_jaxpr(cross_entropy)(*values))
    assert [text.count("dot_general") for text in (none, one, both)] == [1, 2, 3]


def test_bfloat16_logits_are_summed_in_float32(values):
    hidden, kernel, targets, weights = values
    small = hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    loss, gradients = jax.value_and_grad(cross_entropy, (0, 1))(*small, targets, weights)
    wanted = plain(*(x.astype(jnp.float32) for x in small), targets, weights)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert [x.dtype for x in gradients] == [jnp.bfloat16] * 2
