"""A step, a save and a resume on forced CPU devices, in a process of its own: `python -m tests.train.meshes COMMAND`.

    step 1,8,1,1 2,2,2,1       one step on each mesh and on one device: losses, gradients, what moved
    losses 2,2,2,1 1,1,4,2     label smoothing, z-loss and a loss of whole rows, chunk by chunk, and their gradients
    trees 1,8,1,1 1,2,1,4      records of one picture in a tree and in rows of their own: the loss and the gradients
    resume 1,8,1,1 1,4,1,1 ... saves on the first mesh; every other restores that, bit for bit, and goes on
"""

import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax import config as configs
from llava_jax import params, sharding
from llava_jax.batch import TREES, Batch, Example, Span
from llava_jax.checkpoint import manager
from llava_jax.checkpoint.manager import Saved
from llava_jax.data.packing import packed
from llava_jax.models.presets import LlamaConfig, LlavaConfig, VisionConfig
from llava_jax.train import loss
from llava_jax.train import program as programs
from llava_jax.train import step as steps
from llava_jax.train.program import Program
from llava_jax.train.step import State
from tests.golden.make_models import inputs

# Every width can be cut into 8, and the key heads into 2 only: beyond that they are repeated.
MODEL = LlavaConfig(
    VisionConfig(image_size=14, patch_size=7, width=16, mlp_width=32, layers=2, heads=2), "mlp2x_gelu",
    LlamaConfig(vocab=64, width=32, mlp_width=64, layers=2, heads=8, kv_heads=2, head_width=4, max_positions=256),
)  # fmt: skip
ROWS, TOKENS = 8, 32

Sizes = tuple[int, ...]


def mesh_of(sizes: Sizes) -> jax.sharding.Mesh:
    return sharding.make_mesh(dict(zip(sharding.AXES, sizes)), jax.devices()[: int(np.prod(sizes))])


def build(sizes: Sizes) -> Program:
    batch_parts = sizes[0] * sizes[1]
    config = configs.Config(
        data=configs.Data(
            sources=(configs.Source("unused"),), layout="packed", rows_per_chip=ROWS // batch_parts, row_tokens=TOKENS
        ),
        train=configs.Train(lr=1e-2, steps=4, warmup_ratio=0.0),
        rates=(("vision/.*", None), (".*", 1e-2)), init=((".*", "random"),),
        model=configs.Model(dtype="float32", remat="full"),
    )  # fmt: skip
    return programs.build(config, MODEL, 4, mesh_of(sizes))


def batch() -> Batch:
    """Two samples in each row; learned are the ends of both, more in the first rows than in the last."""
    fields = inputs(MODEL, rows=ROWS, tokens=TOKENS)
    half = TOKENS // 2
    fields["tokens"] %= 60
    fields["targets"] %= 60
    fields["segments"][:, half:] = 2
    fields["positions"] %= half
    fields["weights"][:, half - 3 : half - 1] = 1
    fields["weights"][5:, half:] = 0
    return Batch(**fields)


def begin(program: Program) -> tuple[State, dict]:
    """The same values on any mesh."""
    rng = np.random.default_rng(0)
    names = params.flatten(program.state.params) | params.flatten(program.frozen)
    values = {name: rng.normal(size=names[name].shape).astype(np.float32) * 0.2 for name in sorted(names)}
    trainable, frozen = (
        params.unflatten({n: jax.device_put(values[n], x.sharding) for n, x in params.flatten(tree).items()})
        for tree in (program.state.params, program.frozen)
    )
    rest = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), program.state)
    return rest._replace(params=trainable), frozen


def one_step(sizes: Sizes) -> dict:
    program = build(sizes)
    state, frozen = begin(program)
    placed = program.put(batch())
    state, metrics = program.step(state, frozen, placed)
    gradient = jax.device_get(state.opt_state[0].mu)
    moved = jax.tree.map(lambda x, s: x.sharding != s.sharding, state, program.state)
    assert not any(jax.tree.leaves(moved)), moved
    state, second = program.step(state, frozen, placed)
    scalars = {"loss": metrics.loss, "norm": metrics.grad_norm, "second": second.loss}
    return {"gradient": gradient, **jax.device_get(scalars)}


def step(meshes: list[Sizes]) -> None:
    wanted = one_step((1, 1, 1, 1))
    for sizes in meshes:
        found = one_step(sizes)
        apart = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(b))), found, wanted)
        worst = {key: max(jax.tree.leaves(value)) for key, value in apart.items()}
        print(sizes, {key: f"{value:.1e}" for key, value in worst.items()}, flush=True)
        assert max(worst["loss"], worst["second"]) < 5e-6 and worst["gradient"] < 2e-5, (sizes, worst)


def losses(meshes: list[Sizes]) -> None:
    loss.CHUNK = 8  # a device of one of eight rows has one chunk, of two of them four
    rng, rows = np.random.default_rng(0), batch()
    hidden, kernel = rng.normal(size=(ROWS, TOKENS, 16)), rng.normal(size=(16, 64))
    rows = rows._replace(weights=(rng.random((ROWS, TOKENS)) < np.linspace(0, 1, ROWS)[:, None]).astype(np.float32))
    smoothed = loss.of_config(configs.Train(lr=1.0, steps=1, label_smoothing=0.2, z_loss=1e-2))

    def both(hidden: jax.Array, kernel: jax.Array, batch: Batch) -> jax.Array:
        read = loss.logps(hidden, kernel, batch.targets, batch.weights)
        of_rows = jnp.tanh(read.target.sum(1) / 9) + read.mean.min(1) * read.lse.var(1)
        return smoothed(hidden, kernel, batch) + jnp.sum(of_rows)

    wanted = None
    for sizes in ((1, 1, 1, 1), *meshes):
        mesh = mesh_of(sizes)
        cut = [sharding.of_array(mesh, x.shape, *names) for x, names in
               ((hidden, ("batch", "tokens")), (kernel, ("width", "vocab")))]  # fmt: skip
        placed = [jax.device_put(x.astype(np.float32), s) for x, s in zip((hidden, kernel), cut)]
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            found = jax.device_get(jax.jit(jax.value_and_grad(both, (0, 1)))(*placed, rows))
        wanted = found if wanted is None else wanted
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
            np.testing.assert_allclose(one, other, rtol=5e-6, atol=5e-6 * np.abs(other).max())
        print(sizes, found[0], flush=True)


def trees(meshes: list[Sizes]) -> None:
    """Each row a tree of a picture's three records, against two of them, or one, a row."""
    rng, rows = np.random.default_rng(0), []
    for number in range(ROWS):
        picture, front = rng.integers(0, 256, (14, 14, 3), dtype=np.uint8), np.append(rng.integers(1, 60, 2), [0] * 4)
        texts = [np.append(front, rng.integers(1, 60, size)).astype(np.int32) for size in (8, 10, 7)]
        rows.append([Example(text, np.arange(len(text)) > 8, (Span(2, 4),), (picture,), str(number)) for text in texts])
    together = packed([[row] for row in rows], TOKENS, 2, 14, share_images=True)[0]
    apart = [packed([[row] for row in part], TOKENS, 2, 14)[0] for part in
             ([row[:2] for row in rows], [row[2:] for row in rows])]  # fmt: skip
    assert together.segments.max() == 1 + 3 * TREES and sum(x.weights.sum() for x in apart) == together.weights.sum()
    for sizes in meshes:
        program = build(sizes)
        state, frozen = begin(program)

        def total(trainable: dict, frozen: dict, batch: Batch, program: Program = program) -> jax.Array:
            return steps.weighted_loss(program.model, params.merge(trainable, frozen), batch, batch.weights)

        with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
            both = jax.jit(jax.value_and_grad(total))
            found, *parts = (jax.device_get(both(state.params, frozen, program.put(x))) for x in (together, *apart))
        wanted = jax.tree.map(np.add, *parts)
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted[1]))
        worst = max(np.abs(a - b).max() / largest for a, b in zip(*map(jax.tree.leaves, (found[1], wanted[1]))))
        print(sizes, found[0] / wanted[0] - 1, worst, flush=True)
        assert abs(found[0] / wanted[0] - 1) < 1e-6 and worst < 1e-6, (sizes, found[0], wanted[0], worst)


def resume(meshes: list[Sizes]) -> None:
    first, *others = [build(sizes) for sizes in meshes]
    state, frozen = begin(first)
    state, _ = first.step(state, frozen, first.put(batch()))
    kept = jax.device_get(state)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = manager.open_checkpoints(folder, 1)
        manager.save(checkpoints, Saved(1, state.params, {"step": state.step, "opt_state": state.opt_state}, {}))
        manager.wait(checkpoints)
        losses = [float(first.step(state, frozen, first.put(batch()))[1].loss)]
        for sizes, program in zip(meshes[1:], others):
            abstract = program.state
            rest = {"step": abstract.step, "opt_state": abstract.opt_state}
            saved = manager.restore(checkpoints, abstract.params, rest)
            assert saved is not None
            state = State(saved.state["step"], saved.params, saved.state["opt_state"])
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), kept)
            losses.append(float(program.step(state, begin(program)[1], program.put(batch()))[1].loss))
            print(sizes, "after", meshes[0], losses[-1], flush=True)
        manager.close(checkpoints)
    assert max(abs(loss / losses[0] - 1) for loss in losses) < 5e-6, losses


if __name__ == "__main__":
    given = [tuple(map(int, word.split(","))) for word in sys.argv[2:]]
    {"step": step, "losses": losses, "trees": trees, "resume": resume}[sys.argv[1]](given)
