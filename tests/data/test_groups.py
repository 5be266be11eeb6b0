"""The loss "group_mean" is one number, whatever the mesh, the order of its devices and who loads which rows."""

import importlib.util
import itertools

import numpy as np
import pytest

from llava_jax import config, distributed, sharding
from llava_jax.batch import Batch
from llava_jax.data.pipeline import Pipeline
from tests.test_distributed import TOPOLOGIES, held

SAMPLES, GROUP, STEPS = 64, 16, 2


def feed(v1, source, part, group_mean=True):
    return itertools.islice(
        Pipeline(sources=[source], format=v1, batch_samples=SAMPLES, group_samples=GROUP, row_tokens=96, threads=0,
                 order="modality_length", group_mean=group_mean, part=part), STEPS,
    )  # fmt: skip


def assembled(v1, source, placed):
    """The global batches that the processes of these devices make together."""
    batches = []
    owners = {device.process_index for device in placed}
    parts = {process: distributed.rows(placed, SAMPLES, process) for process in owners}
    for local in zip(*(feed(v1, source, part) for part in parts.values())):
        fields = {}
        for name in ("targets", "positions", "weights"):
            whole = None
            for (batch, _), part in zip(local, parts.values()):
                rows = batch._asdict()[name]
                size = len(rows) // len(part.shards)
                whole = np.full((size * part.of, *rows.shape[1:]), -1, rows.dtype) if whole is None else whole
                for i, shard in enumerate(part.shards):
                    whole[shard * size : (shard + 1) * size] = rows[i * size : (i + 1) * size]
            fields[name] = whole
        batches.append(fields)
    return batches


def costs(fields):
    """What could be each target's cross-entropy: any function of what the target is and where it stands."""
    return np.sin(fields["targets"] * 0.7 + fields["positions"] * 1.3).astype(np.float64) + 2


def loss(fields):
    """The device's one rule."""
    return (fields["weights"] * costs(fields)).sum() / fields["weights"].sum(dtype=np.float64)


def reference(batch: Batch):
    """The mean over the reference's devices, of 16 neighbouring samples each, of the mean over their tokens."""
    learned, cost = batch.weights > 0, costs(batch._asdict())
    groups = zip(np.split(learned, SAMPLES // GROUP), np.split(cost, SAMPLES // GROUP))
    return np.mean([cost[some].mean() for some, cost in groups])


@pytest.fixture(scope="module")
def expected(v1, tmp_path_factory):
    """(source, the reference's loss of each step)"""
    import json

    from llava_jax.data.sources import open_source
    from tests.data.conftest import png, record

    folder = tmp_path_factory.mktemp("groups")
    for shade in range(5):
        (folder / f"{shade}.png").write_bytes(png(40 * shade))
    (folder / "a.json").write_text(json.dumps([record(i) for i in range(150)]))
    source = open_source(folder / "a.json", folder)
    return source, [reference(batch) for batch, _ in feed(v1, source, distributed.WHOLE, group_mean=False)]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_on_the_device_orders_of_real_machines(v1, expected, topology):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which knows the order of devices, is not installed")
    from llava_jax.plan.compile import find_target

    source, losses = expected
    mesh = find_target(config.Mesh(), topology).mesh
    if mesh.size > SAMPLES:  # the rest of the machine holds copies of the rows
        mesh = find_target(config.Mesh(tensor=mesh.size // SAMPLES), topology).mesh
    placed = sharding.of_array(mesh, (SAMPLES, 96), "batch", "tokens").devices_indices_map((SAMPLES, 96))
    assert [loss(fields) for fields in assembled(v1, source, placed)] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_on_permuted_meshes_and_where_the_mesh_spans_processes(v1, expected, seed):
    source, losses = expected
    owners = np.random.default_rng(seed).permutation(np.repeat(range(4), 4)).tolist()
    for copies in (1, 2):
        found = [loss(fields) for fields in assembled(v1, source, held(owners, SAMPLES, copies))]
        assert found == pytest.approx(losses, rel=1e-6)
