"""Losses in chunks and their own gradients, against logits of all positions and JAX's gradient, and torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import config as configs
from llava_jax.batch import Batch
from llava_jax.train import loss as losses
from llava_jax.train.loss import Logps, logps

ROWS, TOKENS, WIDTH, VOCAB = 3, 14, 8, 30


@pytest.fixture(scope="module")
def values():
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(ROWS, TOKENS, WIDTH)), rng.normal(size=(WIDTH, VOCAB))
    weights = rng.random((ROWS, TOKENS)) * (rng.random((ROWS, TOKENS)) < 0.4)
    targets = rng.integers(0, VOCAB, (ROWS, TOKENS))
    return tuple(jnp.asarray(x.astype(kind)) for x, kind in
                 ((hidden, np.float32), (kernel, np.float32), (targets, np.int32), (weights, np.float32)))  # fmt: skip


def of_arrays(loss):
    """A loss of a batch as a function of the four arrays that it reads."""
    return lambda hidden, kernel, *fields: loss(hidden, kernel, Batch(None, *fields, *[None] * 4))


cross_entropy = of_arrays(losses.cross_entropy)


def of_config(**terms):
    return of_arrays(losses.of_config(configs.Train(lr=1.0, steps=1, **terms)))


def plain_logps(hidden, kernel, targets, weights):
    logits = hidden @ kernel
    every = jax.nn.log_softmax(logits)
    target = jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0]
    found = Logps(target, jax.nn.logsumexp(logits, -1), every.mean(-1))
    return jax.tree.map(lambda x: jnp.where(weights != 0, x, 0), found)


def plain(hidden, kernel, targets, weights):
    return -jnp.sum(weights * plain_logps(hidden, kernel, targets, weights).target)


def assert_alike(function, other, values):
    found, wanted = (jax.jit(jax.value_and_grad(f, (0, 1)))(*values) for f in (function, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, wanted)


@pytest.mark.parametrize("chunk", [4, 16, 512])
def test_loss_and_gradients_are_those_of_whole_logits(values, monkeypatch, chunk):
    monkeypatch.setattr(losses, "CHUNK", chunk)
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


@pytest.mark.parametrize("terms", [{"z_loss": 1e-2}, {"label_smoothing": 0.3, "z_loss": 0.1}], ids=str)
def test_the_terms_of_a_config_are_their_formulas(values, terms, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 8)
    *arrays, weights = values
    share, factor = (terms.get(name, 0.0) for name in ("label_smoothing", "z_loss"))

    def formula(hidden, kernel, targets, weights):
        logits = hidden @ kernel
        smooth = (1 - share) * jax.nn.one_hot(targets, VOCAB) + share / VOCAB
        each = -jnp.sum(smooth * jax.nn.log_softmax(logits), -1) + factor * jax.nn.logsumexp(logits, -1) ** 2
        return jnp.sum(weights * each)

    assert_alike(of_config(**terms), formula, (*arrays, weights / weights.sum()))


def test_label_smoothing_is_torchs(values):
    torch = pytest.importorskip("torch")
    hidden, kernel, targets, weights = values
    weights = (weights > 0) / jnp.sum(weights > 0)
    found = jax.jit(jax.value_and_grad(of_config(label_smoothing=0.1), (0, 1)))(hidden, kernel, targets, weights)
    theirs = [torch.tensor(np.asarray(x), requires_grad=True) for x in (hidden, kernel)]
    labels = torch.tensor(np.where(weights > 0, targets, -100), dtype=torch.long).flatten()
    loss = torch.nn.functional.cross_entropy((theirs[0] @ theirs[1]).flatten(0, 1), labels, label_smoothing=0.1)
    loss.backward()
    wanted = loss.detach().numpy(), tuple(x.grad.numpy() for x in theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, wanted)


@pytest.mark.parametrize("chunk", [4, 512])
def test_any_function_of_log_probabilities_has_its_gradient(values, monkeypatch, chunk):
    """Of all three, coupled over positions; those without a weight are 0, which a function may read."""
    monkeypatch.setattr(losses, "CHUNK", chunk)

    def function(x):
        return jnp.tanh(x.target.mean()) * jnp.log(2 + x.lse.max() + x.mean.var()) + jnp.cos(x.target).mean()

    assert_alike(lambda *x: function(logps(*x)), lambda *x: function(plain_logps(*x)), values)
    for found, wanted in zip(logps(*values), plain_logps(*values)):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_loss_of_whole_answers_sums_their_log_probabilities(values):
    """As of direct preference optimisation: pairs of answers, packed two a row, and the better of each comes first."""
    segments = jnp.broadcast_to(1 + (jnp.arange(TOKENS) >= 6), (ROWS, TOKENS))

    def preference(of):
        def loss(*arrays):
            first, second = (jnp.sum(of(*arrays).target * (segments == number), -1) for number in (1, 2))
            return -jnp.mean(jax.nn.log_sigmoid(0.1 * (first - second)))

        return loss

    assert_alike(preference(logps), preference(plain_logps), values)


def test_what_a_loss_does_not_read_is_not_computed(values):
    """The mean over the vocabulary, which label smoothing reads, takes one addition a logit."""

    def flops(function):
        return jax.jit(function).lower(*values).compile().cost_analysis()["flops"]

    logits = ROWS * TOKENS * (VOCAB - 1)
    without, z_loss, smooth = flops(cross_entropy), flops(of_config(z_loss=0.1)), flops(of_config(label_smoothing=0.1))
    assert z_loss - without < logits <= smooth - without
    one, two = flops(lambda *x: logps(*x).target.sum()), flops(lambda *x: sum(logps(*x)[::2]).sum())
    assert abs(one - without) < logits <= two - one < 1.2 * logits


def test_a_gradient_of_log_probabilities_makes_logits_a_second_time_and_no_gradient_of_a_frozen_head(values):
    def products(*argnums):
        return str(jax.make_jaxpr(jax.grad(lambda *x: logps(*x).target.sum(), argnums))(*values)).count("dot_general")

    assert (products(0), products(1), products(0, 1)) == (3, 3, 4)
