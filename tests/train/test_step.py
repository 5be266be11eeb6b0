"""One update: what moves, what it costs, and that neither cutting a batch nor a poisoned one changes the rest."""

import dataclasses
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import config as configs
from llava_jax import params
from llava_jax.batch import Batch
from llava_jax.models import presets
from llava_jax.train import program as programs
from llava_jax.train import step as steps
from llava_jax.train.step import State
from tests.train import tiny

STAGE_1 = (("projector/.*", 1e-2), (".*", None))
STAGE_2 = (("vision/.*", None), (".*", 1e-2))


def build(rates=STAGE_1, model=tiny.MODEL, rows=4, dtype="float32", row_tokens=24, **train):
    config = configs.Config(
        data=configs.Data(sources=(configs.Source("unused"),), batch_samples=rows, row_tokens=row_tokens),
        train=configs.Train(**{"lr": 1e-2, "steps": 10, "warmup_ratio": 0.0} | train), rates=rates,
        init=((".*", "random"),), model=configs.Model(dtype=dtype, remat="none"),
    )  # fmt: skip
    return programs.build(config, model, 10)


def start(program, seed=0):
    """A fresh state (it will be donated) and the frozen leaves; drawn by numpy, as JAX would compile for seconds."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.2, leaf.dtype)

    trainable, frozen = jax.tree.map(draw, (program.state.params, program.frozen))
    return State(jnp.int32(0), trainable, program.optimizer.init(trainable)), frozen


def batch(**fields):
    return Batch(**tiny.batch() | fields)


def dots(jaxpr, times=1):
    """(operations, output shape) of every matrix product, a scan's body as often as it runs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            yield 2 * times * inner * equation.outvars[0].aval.size, equation.outvars[0].aval.shape
        for sub in jax.extend.core.jaxprs_in_params(equation.params):
            yield from dots(sub, times * equation.params["length"] if equation.primitive.name == "scan" else times)


def trace(program):
    return program.step.trace(program.state, program.frozen, program.batch).jaxpr.jaxpr


def flops(program):
    return sum(operations for operations, _ in dots(trace(program)))


@pytest.fixture(scope="module")
def stage_1():
    return build()


@pytest.fixture(scope="module")
def stage_2():
    return build(STAGE_2)


def test_what_has_no_rate_stays_bit_identical_and_everything_else_moves(stage_2):
    state, frozen = start(stage_2)
    before = jax.tree.map(np.array, (state.params, frozen))
    for _ in range(2):
        state, _ = stage_2.step(state, frozen, batch())
    jax.tree.map(np.testing.assert_array_equal, before[1], frozen)
    still = [name for name, leaf in params.flatten(state.params).items()
             if np.array_equal(leaf, params.flatten(before[0])[name])]  # fmt: skip
    assert not still and set(state.params) == {"projector", "llm"} and set(frozen) == {"vision"}


def test_frozen_weights_cost_no_gradient_and_no_optimizer_state(stage_1, stage_2):
    """Stage 2 does more than stage 1 by exactly the products that make the decoder's kernels' gradients."""
    kernels = [leaf for name, leaf in params.flatten(stage_1.frozen["llm"]).items() if name.endswith("kernel")]
    gradients = 2 * stage_1.batch.tokens.size * sum(leaf.size for leaf in kernels)
    assert flops(stage_2) - flops(stage_1) == gradients
    trainable = {leaf.shape for leaf in jax.tree.leaves(stage_1.state.params)}
    assert {leaf.shape for leaf in jax.tree.leaves(stage_1.state)} == {(), *trainable}


def test_a_frozen_tower_is_never_differentiated(stage_2):
    """Of the tower's products only the forward ones are there: as many as one forward pass has."""
    whole = params.merge(stage_2.state.params, stage_2.frozen)
    tower = jax.make_jaxpr(
        lambda leaves, pixels: stage_2.model.apply({"params": leaves}, pixels, method=lambda m, x: m.vision(x))
    )(whole, jax.ShapeDtypeStruct((4, 14, 14, 3), jnp.uint8))
    rows = (4 * (tiny.MODEL.vision.patches + 1), tiny.MODEL.vision.mlp_width)  # a CPU multiplies flat rows
    forward = sum(f for f, shape in dots(tower.jaxpr) if shape == rows)
    assert forward == sum(f for f, shape in dots(trace(stage_2)) if shape == rows) > 0


def test_the_step_donates_its_state_and_not_the_frozen_weights(stage_1):
    text = stage_1.step.lower(stage_1.state, stage_1.frozen, stage_1.batch).as_text()
    donated = text.count("tf.aliasing_output") + text.count("jax.buffer_donor")
    assert donated == len(jax.tree.leaves(stage_1.state))


def test_frozen_weights_are_bf16_and_trainable_ones_float32_in_a_bf16_run():
    program = build(STAGE_1, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(program.frozen)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(program.state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    state, metrics = jax.eval_shape(program.step, program.state, program.frozen, program.batch)
    assert metrics.loss.dtype == jnp.float32 and jax.tree.leaves(state.params)[0].dtype == jnp.float32


def test_the_loss_is_the_cross_entropy_of_all_logits_at_once():
    program = build()
    row = program.put(Batch(**tiny.batch(rows=2, tokens=70)))
    state, frozen = start(program)
    whole = {"params": params.merge(state.params, frozen)}
    hidden = program.model.apply(whole, row.tokens, row.positions, row.segments, row.image_slots, row.pixels)
    logits = np.asarray(program.model.apply(whole, hidden, method="head"), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, row.targets[..., None], -1)[..., 0]
    total, tokens = program.evaluate(state.params, frozen, row)
    assert tokens == row.weights.sum()
    np.testing.assert_allclose(total, (losses * row.weights).sum(), rtol=1e-6)


def test_micro_batches_change_neither_loss_nor_update(stage_1):
    uneven = tiny.batch()["weights"] * np.array([[1], [0], [1], [1]], np.float32)
    uneven[0, -5:] = 0
    found = []
    for accumulate in (1, 4):
        program = stage_1 if accumulate == 1 else build(accumulate=accumulate)
        state, frozen = start(program)
        state, metrics = program.step(state, frozen, batch(weights=uneven))
        found.append((metrics.loss, metrics.grad_norm, state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), *found)


def test_micro_batches_keep_groups_of_rows_together():
    x = jnp.arange(8)[:, None] * jnp.ones((1, 3), int)
    parts = steps._micro_batches(x, groups=4, parts=2)[..., 0]
    np.testing.assert_array_equal(parts, [[0, 1, 4, 5], [2, 3, 6, 7]])


def test_a_batch_without_targets_has_loss_0_and_a_finite_gradient(stage_1):
    state, frozen = start(stage_1)
    _, metrics = stage_1.step(state, frozen, batch(weights=np.zeros((4, 24), np.float32)))
    assert metrics.loss == 0 and metrics.finite and metrics.grad_norm == 0


def test_a_poisoned_batch_costs_exactly_its_own_update(stage_1):
    """Bit-equal to a run in which that update was left out; the optimizer's moments and count too."""
    poison = tiny.batch()["weights"] * np.float32(np.nan)
    poisoned, frozen = start(stage_1)
    clean, _ = start(stage_1)
    for number in range(4):
        fields = tiny.batch(seed=number)
        if number == 2:
            clean = clean._replace(step=clean.step + 1)
        else:
            clean, _ = stage_1.step(clean, frozen, Batch(**fields))
        fields = fields | ({"weights": poison} if number == 2 else {})
        poisoned, metrics = stage_1.step(poisoned, frozen, Batch(**fields))
        assert bool(metrics.finite) == (number != 2)
    jax.tree.map(np.testing.assert_array_equal, poisoned, clean)


def test_a_rate_beyond_float32_never_makes_weights_infinite():
    program = build((("projector/.*", 1e30), (".*", None)))
    (state, frozen), (untouched, _) = start(program), start(program)
    state, metrics = program.step(state, frozen, batch())
    assert np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm) and not metrics.finite
    jax.tree.map(np.testing.assert_array_equal, state.params, untouched.params)


def test_a_7b_program_is_built_without_an_array():
    model = presets.get("llava15_7b")
    program = build(STAGE_2, model, rows=8, dtype="bfloat16", row_tokens=640)
    assert params.count(program.state.params) == params.count(program.state.opt_state[0].mu) == 6_759_395_328
    assert program.batch.pixels.shape == (8, 1, 336, 336, 3)
    assert not [leaf for leaf in jax.tree.leaves(program.state) if not isinstance(leaf, jax.ShapeDtypeStruct)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rates": ((".*", None),)}, "nothing would be trained"),
        ({"rates": (("projector/.*", 1e-3), ("llm/nothing", 1e-3), (".*", None))}, "llm/nothing"),
        ({"rates": (("projector/.*", 1e-3),)}, "covers no row"),
        ({"rates": (("llm/blocks/q/kernel", (1e-3,) * 5), (".*", None))}, "5 rates"),
        ({"rows": 6, "accumulate": 4}, "batch_samples=6 is not divisible"),
    ],
)
def test_a_table_or_batch_that_does_not_fit_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        if "accumulate" in change:  # the config itself refuses this; the mesh's share is the program's to check
            config = configs.Config(
                data=configs.Data(sources=(configs.Source("unused"),), batch_samples=8, row_tokens=24),
                train=configs.Train(lr=1.0, steps=1, accumulate=4), rates=STAGE_1, init=((".*", "random"),),
            )  # fmt: skip
            data = dataclasses.replace(config.data, batch_samples=6)
            object.__setattr__(config, "data", data)
            programs.build(config, tiny.MODEL, 1)
        build(**change)
