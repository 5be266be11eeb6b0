"""The same program on another mesh: eight forced CPU devices in a process of their own."""

import os
import subprocess
import sys

from tests.train import tiny

STEPS = """
import jax, numpy as np
from llava_jax import config as configs, params, sharding
from llava_jax.batch import Batch
from llava_jax.train import program as programs
from llava_jax.train.step import State
from tests.train import tiny

assert jax.device_count() == 8
config = configs.Config(
    data=configs.Data(sources=(configs.Source("unused"),), batch_samples=8, row_tokens=24),
    train=configs.Train(lr=1e-2, steps=4, warmup_ratio=0.0, accumulate=2),
    rates=(("vision/.*", None), (".*", 1e-2)), init=((".*", "random"),),
    model=configs.Model(dtype="float32", remat="full"))
rng = np.random.default_rng(0)
values, found = {}, []
for sizes, devices in (((1, 1, 1, 1), 1), ((1, 4, 2, 1), 8)):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), jax.devices()[:devices])
    program = programs.build(config, tiny.MODEL, 4, mesh)
    def place(tree):
        flat = {}
        for name, x in params.flatten(tree).items():
            value = values.setdefault(name, rng.normal(size=x.shape).astype(np.float32) * 0.2)
            flat[name] = jax.device_put(value, x.sharding)
        return params.unflatten(flat)
    trainable, frozen = place(program.state.params), place(program.frozen)
    whole = sharding.replicated(mesh)
    moments = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), program.state.opt_state)
    state = State(jax.device_put(np.int32(0), whole), trainable, moments)
    batch = program.put(Batch(**tiny.batch(rows=8)))
    state, metrics = program.step(state, frozen, batch)
    gradient = jax.device_get(state.opt_state[0].mu)
    state, second = program.step(state, frozen, batch)
    jax.tree.map(lambda x, s: x.sharding == s.sharding or print("MOVED", x.shape, x.sharding), state, program.state)
    found.append((gradient, *jax.device_get((metrics.loss, metrics.grad_norm, second.loss))))
    parts = state.params["llm"]["blocks"]["q"]["kernel"].addressable_shards
    print("parts of a kernel:", len({str(part.index) for part in parts}))
    print("rows of a batch on a device:", batch.tokens.addressable_shards[0].data.shape[0])
worst = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(a).max(), *found)))
print("worst", worst)
assert worst < 2e-5, worst
"""


def test_a_step_on_eight_devices_is_the_step_on_one():
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", STEPS], cwd=tiny.HOUSE, env=os.environ | flags, text=True,
                          capture_output=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "parts of a kernel: 8" in done.stdout and "rows of a batch on a device: 2" in done.stdout
    assert "MOVED" not in done.stdout, done.stdout
