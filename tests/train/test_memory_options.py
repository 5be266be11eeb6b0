"""Smaller optimizer states: each still learns, lies where it should, and survives a save."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.checkpoint import manager
from llava_jax.checkpoint.manager import Saved
from llava_jax.train.step import State
from tests.train.test_step import STAGE_1, batch, build, start


def losses(program, updates=6):
    state, frozen = start(program)
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, program.state))
    placed, found = program.put(batch()), []
    for _ in range(updates):
        state, scalars = program.step(state, frozen, placed)
        found.append(float(scalars.loss))
    return found, state


@pytest.fixture(scope="module")
def plain():
    return losses(build(STAGE_1))[0]


def state_bytes(program):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state.opt_state))


def test_a_first_moment_in_bfloat16_is_a_quarter_less_state_and_learns_alike(plain):
    small, usual = build(STAGE_1, moment_dtype="bfloat16"), build(STAGE_1)
    assert state_bytes(small) < 0.76 * state_bytes(usual)
    np.testing.assert_allclose(losses(small)[0], plain, rtol=2e-2)


def test_adafactor_keeps_rows_and_columns_of_large_matrices_only_and_learns(plain):
    program = build(STAGE_1, optimizer="adafactor")
    found, _ = losses(program)
    assert found[-1] < found[0] == pytest.approx(plain[0])
    wide = jax.eval_shape(program.optimizer.init, {"a": {"kernel": jax.ShapeDtypeStruct((3, 256, 512), jnp.float32)}})
    assert sum(x.size for x in jax.tree.leaves(wide)) < 0.01 * 3 * 256 * 512


def test_an_offloaded_optimizer_lives_in_the_host_s_memory_learns_the_same_and_is_saved(plain, tmp_path):
    program = build(STAGE_1, offload_optimizer=True)
    found, state = losses(program)
    assert found == plain
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim}
    assert kinds == {"pinned_host"} and {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}
    checkpoints = manager.open_checkpoints(tmp_path, 1)
    manager.save(checkpoints, Saved(6, state.params, {"step": state.step, "opt_state": state.opt_state}, {}))
    manager.wait(checkpoints)
    wanted = program.state
    saved = manager.restore(checkpoints, wanted.params, {"step": wanted.step, "opt_state": wanted.opt_state})
    manager.close(checkpoints)
    again = State(saved.state["step"], saved.params, saved.state["opt_state"])
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert one.sharding.memory_kind == other.sharding.memory_kind
        np.testing.assert_array_equal(one, other)


def test_a_compiler_option_that_xla_does_not_know_is_refused_by_its_name():
    from llava_jax import sharding
    from llava_jax.train.program import compiler_options

    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])
    assert compiler_options((("xla_cpu_enable_fast_math", False),), mesh) == {"xla_cpu_enable_fast_math": False}
    with pytest.raises(ValueError, match="compiler_options: XLA refuses xla_go_faster=True"):
        compiler_options((("xla_go_faster", True),), mesh)


