"""What cannot learn is refused, what looks as if it did not learn is said with its number and a remedy."""

import numpy as np
import pytest

from llava_jax import config as configs
from llava_jax.models import presets
from llava_jax.train import learning

LLM = presets.get("tiny").llm
ROW = {"step": 13, "loss": 1.5, "tokens": 20}


def config(**data):
    return configs.Config(
        data=configs.Data(sources=(configs.Source("unused"),), **data), train=configs.Train(lr=2e-5, epochs=1.0),
        rates=((".*", 1.0),), init=((".*", "random"),),
    )  # fmt: skip


def test_a_run_whose_only_update_has_rate_0_is_refused_with_what_to_set():
    with pytest.raises(ValueError, match=r"of 1 step\(s\) the first 1 warm up from 0. 48 records at data.batch"):
        learning.before(config(), np.zeros(1), 48)


def test_a_few_updates_are_a_warning_and_many_are_none():
    (warning,) = learning.before(config(batch_samples=16), np.array([0, 1e-5, 2e-5]), 48)
    assert "only 2 updates" in warning and "--config.train.epochs=N" in warning
    assert learning.before(config(), np.full(30, 1e-5), 4000) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 0, "loss": 0.0}, "no supervised tokens"),
        ({"loss": 0.0}, "exactly 0"),
        ({"loss": 6.9}, "no better than guessing among 960 words"),
    ],
)
def test_a_loss_that_cannot_be_right_is_a_warning(changes, words):
    assert learning.after(ROW, LLM, warmup=3) == []
    (warning,) = learning.after(ROW | changes, LLM, warmup=3)
    assert words in warning
    assert not learning.after(ROW | {"loss": 6.9, "step": 14}, LLM, warmup=3)
