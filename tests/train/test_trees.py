"""Records of one picture in a tree learn what they learn in rows of their own: the same losses, the same gradients."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import config as configs
from llava_jax.batch import TREES, Example, Span
from llava_jax.data.packing import packed
from llava_jax.errors import UsageError
from llava_jax.models import attention as attentions
from llava_jax.models import flash
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.models.mistral import MistralConfig
from llava_jax.models.qwen import Qwen2Config, Qwen3Config
from llava_jax.train import loss, metrics, program, step
from llava_jax.train.__main__ import main
from tests.train import tiny
from tests.train.test_connectors import FLAMINGO

SIZES = dict(vocab=64, width=24, mlp_width=32, layers=2, heads=4, kv_heads=2, head_width=8, max_positions=64)
WINDOW = 50  # no record is longer, so that Mistral's window hides nothing, in a tree either
DECODERS = {"llama": LlamaConfig(**SIZES), "mistral": MistralConfig(**SIZES, window=WINDOW),
            "qwen2": Qwen2Config(**SIZES), "qwen3": Qwen3Config(**SIZES)}  # fmt: skip
FEATURES, SIDE = tiny.MODEL.vision.features, tiny.MODEL.vision.image_size
ROW_TOKENS, ROWS, IMAGES = 256, 3, 6


def records(seed):
    """Three rows of trees of a picture's records, of 17 to 50 tokens; the first has five, the last is a text alone."""
    rng, rows, number = np.random.default_rng(seed), [[], [], []], 0
    for row, count in zip((0, 1, 1, 2, 2), (5, *rng.integers(1, 3, 3).tolist(), 0)):
        picture, before = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8), int(rng.integers(1, 12))
        front = np.concatenate([rng.integers(1, 64, before), np.zeros(FEATURES)])
        spans, images = ((Span(before, FEATURES),), (picture,)) if count else ((), ())
        for _ in range(max(1, count)):
            tokens = np.append(front, rng.integers(1, 64, rng.integers(12, WINDOW + 1 - len(front)))).astype(np.int32)
            learned = (np.arange(len(tokens)) > len(front) + 1) & (rng.random(len(tokens)) < 0.5)
            rows[row].append(Example(tokens, learned, spans, images, str(number), float(rng.uniform(0.5, 2))))
            number += 1
    return rows


def batches(rows):
    """([one batch of trees], batches of rows of one record each), all of a shape, so that one program serves all."""
    trees = packed([rows], ROW_TOKENS, IMAGES, SIDE, share_images=True)[0]
    each = [[example] for row in rows for example in row]
    each += [[]] * (-len(each) % ROWS)
    alone = [packed([each[i : i + ROWS]], ROW_TOKENS, IMAGES, SIDE)[0] for i in range(0, len(each), ROWS)]
    return jax.tree.map(jnp.asarray, ([trees], alone))


@functools.cache
def weights(name):
    rng = np.random.default_rng(1)
    shapes = abstract_params(dataclasses.replace(tiny.MODEL, llm=DECODERS[name]))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32), shapes)


@pytest.mark.parametrize("name, backend", [
    ("llama", "flash"), ("qwen3", "xla"),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in itertools.product(DECODERS, ("flash", "xla"))
      if pair not in (("llama", "flash"), ("qwen3", "xla"))),
])  # fmt: skip
def test_a_tree_gives_each_record_the_loss_and_all_the_gradient_of_rows_of_their_own(monkeypatch, name, backend):
    serves = attentions.BACKENDS[backend].serves
    monkeypatch.setattr(attentions, "choose", lambda _, *row: backend if serves(*row) else "xla")
    monkeypatch.setattr(flash, "TILES", (128,))
    model = Llava(dataclasses.replace(tiny.MODEL, llm=DECODERS[name]))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def both(parameters, batch):
        of_tokens = []

        def read(hidden, kernel, batch):
            of_tokens.append(loss.logps(hidden, kernel, batch.targets, batch.weights).target * batch.weights)
            return loss.cross_entropy(hidden, kernel, batch)

        return step.weighted_loss(model, parameters, batch, batch.weights, loss_fn=read), of_tokens[0]

    for seed in range(2):
        rows = records(seed)
        trees, alone = batches(rows)
        results = []
        for each in (trees, alone):
            outcomes = [both(weights(name), batch) for batch in each]
            (_, losses), gradients = jax.tree.map(lambda *x: sum(x), *outcomes)
            losses = [np.asarray(own) for (_, own), _ in outcomes]
            of_samples = [own[row, np.asarray(batch.segments)[row] == number].sum() for own, batch in zip(losses, each)
                          for row in range(ROWS) for number in numbers(batch.segments[row])]  # fmt: skip
            results.append((of_samples, gradients))
        (own, gradients), (expected, others) = results
        assert len(own) == sum(map(len, rows)) and int((trees[0].segments > 2 * TREES).sum()) > 100
        np.testing.assert_allclose(own, expected, rtol=1e-6)
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(others))
        for (path, leaf), other in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(others), strict=True):
            place = jax.tree_util.keystr(path)
            np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-6 * largest, err_msg=place)
            assert jnp.any(leaf) or "tail" in place, place


def numbers(segments):
    """Of the samples of a row in order, the numbers of their own tokens."""
    found = list(dict.fromkeys(np.asarray(segments).tolist()))
    return [number for number in found if number and not (number < TREES and number + TREES in found)]


def test_a_run_of_trees_is_the_run_of_separate_rows(run, capsys):
    """Ten records of four pictures, all in each step: four steps with the same losses, and the same validation."""
    place = run.parent / "records.json"
    rows = json.loads(place.read_text())
    place.write_text(json.dumps([row | {"image": f"{number // 3}.jpg"} for number, row in enumerate(rows)]))
    found = {}
    for share in (False, True):
        changes = {"data.layout": "packed", "data.rows_per_chip": 6, "data.row_tokens": 200, "data.rows_per_group": 6,
                   "data.images_per_group": 10, "train.steps": 4, "train.eval_every": 4, "data.share_images": share}
        settings = [f"--config.{key}={value}" for key, value in changes.items()]
        assert main(["--config", str(run), "--workdir", str(run.parent / str(share)), *settings]) == 0
        rows = [*metrics.read(run.parent / str(share)), *metrics.read(run.parent / str(share), metrics.VALIDATION)]
        found[share] = [row["loss"] for row in rows]
    assert len(found[True]) == 5
    np.testing.assert_allclose(found[True], found[False], rtol=1e-5)
    assert "1.67 samples a row in 0.67 trees" in capsys.readouterr().out


@pytest.mark.parametrize("data, model, message", [
    ({}, tiny.MODEL, "data.share_images=True: these are of packed rows; set data.layout=packed"),
    ({"layout": "packed", "rows_per_chip": 1}, FLAMINGO,
     "data.share_images=True: the records of a tree share the positions of their picture, and this model's "
     "flamingo_xattn puts no feature in one; want False"),
])  # fmt: skip
def test_where_records_cannot_share_the_config_is_refused(data, model, message):
    with pytest.raises(UsageError, match=message):
        data = configs.Data(share_images=True, row_tokens=64, **data)
        train = configs.Train(lr=1e-3, steps=1)
        program.check(configs.Config(data, train, rates=((".*", 1e-3),), init=((".*", "random"),)), model)
