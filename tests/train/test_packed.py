"""Packed rows train as padded ones do: the same loss, the same gradients, through the same command."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.batch import Example, Span
from llava_jax.data.packing import packed
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.train import metrics, step
from llava_jax.train.__main__ import main
from tests.train import tiny

FEATURES, SIDE = tiny.MODEL.vision.features, tiny.MODEL.vision.image_size


def examples(count=9, seed=0):
    """Conversations of 6 to 30 tokens, every third without an image, one with two; all targets of the last third."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        spans = [Span(1, FEATURES)] * (number % 3 > 0) + [Span(FEATURES + 3, FEATURES)] * (number == 4)
        words = int(rng.integers(6, 20))
        size = words + 1 + (FEATURES + 2) * len(spans)
        tokens = rng.integers(1, tiny.MODEL.llm.vocab, size).astype(np.int32)
        for start, length in spans:
            tokens[start : start + length] = 0
        learned = np.arange(len(tokens)) >= len(tokens) - words // 3
        images = tuple(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in spans)
        found.append(Example(tokens, learned, tuple(spans), images, str(number)))
    return found


def in_rows(rows):
    """Four rows of examples as a batch of two groups, all of one shape so that one program serves all."""
    return jax.tree.map(jnp.asarray, packed([rows[:2], rows[2:]], 96, 6, SIDE)[0])


@pytest.fixture(scope="module")
def parameters():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32), abstract_params(tiny.MODEL))


def test_packed_and_unpacked_rows_give_the_same_loss_and_the_same_gradients(parameters):
    """Nine examples in three rows, and one a row in three batches that are summed. Every leaf, those of the tower and
    the projector through the shared pools too; float32, 1e-6 of the largest gradient."""
    one, model = examples(), Llava(tiny.MODEL)
    together = in_rows([one[:3], one[3:5], one[5:], []])
    apart = [in_rows([[example] for example in one[i : i + 4]] + [[]] * (i + 4 - len(one))) for i in (0, 4, 8)]
    supervised = together.weights.sum()
    assert supervised == sum(batch.weights.sum() for batch in apart) > 20 and together.segments.max() == 4

    @jax.jit
    @jax.value_and_grad
    def loss_of(leaves, batch):
        return step.weighted_loss(model, leaves, batch, batch.weights / supervised)

    loss, gradients = jax.tree.map(lambda *parts: sum(parts), *(loss_of(parameters, batch) for batch in apart))
    packed_loss, packed_gradients = loss_of(parameters, together)
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    others = jax.tree.leaves(packed_gradients)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(gradients), others, strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6 * largest, err_msg=name)
        assert jnp.any(leaf) or "tail" in name, name


def test_a_neighbour_in_the_row_changes_nothing(parameters):
    """Another text and another picture in the first sample leave the hidden states of the second as they are."""
    one, two, other = examples()[1], examples()[2], examples(seed=5)[1]
    other = Example(np.resize(other.tokens, len(one.tokens)), one.learned, one.image_spans, other.images, "other")
    model, hidden = Llava(tiny.MODEL), []
    for first in (one, other):
        batch = in_rows([[first, two], [], [], []])
        fields = (batch.tokens, batch.positions, batch.segments, batch.image_slots, batch.pixels)
        hidden.append(np.asarray(model.apply({"params": parameters}, *fields))[batch.segments == 2])
    np.testing.assert_array_equal(*hidden)


def test_the_door_trains_packed_rows_and_goes_on_where_it_stopped(run, tmp_path, capsys):
    """Ten records in rows of two or three; from the checkpoint of step 3 the later losses come out once more."""
    changes = {
        "data.layout": "packed", "data.rows_per_chip": 2, "data.rows_per_group": 2, "data.row_tokens": 200,
        "data.images_per_group": 6, "train.epochs": 2, "train.steps": "none", "train.eval_every": 6,
    }  # fmt: skip

    def train():
        told = [f"--config.{key}={value}" for key, value in changes.items()]
        assert main(["--config", str(run), "--workdir", str(tmp_path), *told]) == 0
        return {row["step"]: row["loss"] for row in metrics.read(tmp_path)}, capsys.readouterr().out

    whole, said = train()
    assert sorted(whole) == [1, 2, 3, 4, 5, 6] and all(np.isfinite(list(whole.values())))
    assert "6 steps of 2 rows of 200 tokens (1.67 samples a row" in said and "validation loss" in said
    shutil.rmtree(tmp_path / "6")
    again, said = train()
    assert "goes on after step 3" in said and again == whole
