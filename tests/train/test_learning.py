"""What cannot learn is refused, what looks as if it did not learn is said with its number and a remedy."""

import numpy as np
import pytest

from llava_jax import config as configs
from llava_jax.models import presets
from llava_jax.train import learning

LLM = presets.get("tiny").llm
ROW = {"step": 13, "loss": 1.5, "tokens": 20, "grad_norm": 0.1}


def config(steps=None, loss="token_mean", accumulate=1, group_samples=16, **data):
    train = configs.Train(lr=2e-5, steps=steps, epochs=None if steps else 1.0, loss=loss, accumulate=accumulate,
                          group_samples=group_samples)  # fmt: skip
    data = configs.Data(sources=(configs.Source("unused"),), **data)
    return configs.Config(data=data, train=train, rates=((".*", 1.0),), init=((".*", "random"),))


def test_a_run_whose_only_update_has_rate_0_is_refused_with_what_to_set():
    message = (r"of 1 step\(s\) the first 1 warm up from 0. 48 samples in steps of 128 make 1 step\(s\): set "
               r"--config.data.batch_samples=8 --config.train.epochs=9$")  # fmt: skip
    with pytest.raises(ValueError, match=message):
        learning.before(config(), np.zeros(1), 48, 128.0, 1)
    with pytest.raises(ValueError, match=r"train.lr=2e-05; want it above 0"):
        learning.before(config(), np.zeros(4000), 512_000, 128.0, 1)


def test_a_few_updates_are_a_warning_and_many_are_none():
    (warning,) = learning.before(config(batch_samples=16), np.array([0, 1e-5, 2e-5]), 48, 16.0, 1)
    assert "only 2 updates" in warning and "--config.train.epochs=9" in warning
    assert learning.before(config(), np.full(30, 1e-5), 4000, 128.0, 1) == []
    (warning,) = learning.before(config(batch_samples=16), np.full(300, 1e-5), 12, 16.0, 1)
    assert warning.startswith("a step shows records more than once. 12 samples in steps of 16 make 300 step(s)")
    (warning,) = learning.before(config(steps=15, batch_samples=8), np.full(15, 1e-5), 40, 8.0, 1)
    assert "40 samples in steps of 8, train.steps=15: set --config.data.batch_samples=8 --config.train" in warning


PACKED = {"layout": "packed", "rows_per_chip": 4, "rows_per_group": 2}
KINDS = [{}, {"steps": 3}, {"loss": "group_mean"}, {"accumulate": 4}, PACKED, PACKED | {"steps": 3},
         PACKED | {"share_images": True}]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("samples", [1, 3, 50, 128, 1000, 50_000])
@pytest.mark.parametrize("parts", [1, 8])
def test_the_remedy_is_a_config_whose_run_says_nothing_more(kind, samples, parts):
    """But for sets that are smaller than the smallest step of the mesh."""
    with pytest.raises(ValueError) as error:
        learning.before(config(**kind), np.zeros(1), samples, 128.0, parts)
    words = str(error.value).partition("set --config.")[2].split(" --config.")
    settings = {key.partition(".")[2]: text for key, text in (word.split("=") for word in words)}
    settings = {key: int(text) if text.isdigit() else text for key, text in settings.items()}
    assert settings.pop("share_images", "False") == "False"
    kind = {key: value for key, value in kind.items() if key != "share_images"}
    epochs = settings.pop("epochs", None)
    followed = config(**kind | settings)
    batch = followed.data.batch_samples
    assert batch % (parts * followed.train.accumulate) == 0
    steps = followed.train.steps or epochs * -(-samples // batch)
    found = learning.before(followed, np.r_[0.0, np.full(steps - 1, 1e-5)], samples, float(batch), parts)
    assert found == [] or samples < batch == parts * followed.train.accumulate


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 0, "loss": 0.0}, "no supervised tokens"),
        ({"loss": 0.0}, "exactly 0"),
        ({"grad_norm": 0.0}, "the gradient of a step is exactly 0"),
        ({"loss": 6.9}, "no better than guessing among 960 words"),
    ],
)
def test_a_loss_that_cannot_be_right_is_a_warning(changes, words):
    assert learning.after(ROW, LLM, warmup=3) == []
    (warning,) = learning.after(ROW | changes, LLM, warmup=3)
    assert words in warning
    assert not learning.after(ROW | {"loss": 6.9, "step": 14}, LLM, warmup=3)
