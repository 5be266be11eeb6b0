"""Rates, schedule and decay, compared with the reference's numbers and with AdamW written out."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import config as configs
from llava_jax import params
from llava_jax.train import optimizer

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "misc.json").read_text())
SCHEDULES = [name for name in GOLDEN if name.startswith("lr_")]


def settings(**changes):
    return configs.Train(**{"lr": 1e-3, "steps": 10} | changes)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_of_every_recorded_update_is_the_references(name):
    golden = GOLDEN[name]
    shares = optimizer.schedule(settings(warmup_ratio=0.03), golden["steps"])
    assert np.count_nonzero(shares[: golden["warmup"]] < 1) == golden["warmup"] and shares[golden["warmup"]] == 1
    for update, rate in golden["lr_used_at_step"].items():
        assert golden["base"] * shares[int(update) - 1] == pytest.approx(rate, rel=1e-12, abs=0)


def test_the_first_update_is_at_rate_0_and_moves_nothing():
    tx = optimizer.build(settings(), {"a": 1e-3}, 10)
    tree = {"a": jnp.ones(3)}
    updates, _ = tx.update({"a": jnp.ones(3)}, tx.init(tree), tree, step=jnp.int32(0))
    assert not np.any(updates["a"])


def test_a_constant_schedule_stays_at_its_peak_after_the_warm_up():
    shares = optimizer.schedule(settings(schedule="constant", warmup_ratio=0.2), 10)
    np.testing.assert_array_equal(shares, [0, 0.5] + [1.0] * 8)


def test_updates_are_adamw_written_out_and_biases_and_scales_do_not_decay():
    train = settings(weight_decay=0.1, warmup_ratio=0.0)
    names = ("llm/blocks/q/kernel", "projector/0/bias", "llm/norm/scale", "llm/embed/table")
    tx = optimizer.build(train, dict.fromkeys(names, 1e-3), 10)
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(2, 3)) for name in names}
    tree = params.unflatten({name: jnp.asarray(x, jnp.float32) for name, x in values.items()})
    state = tx.init(tree)
    first, second = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for step in range(3):
        gradient = {name: rng.normal(size=(2, 3)) for name in names}
        flat = params.unflatten({name: jnp.asarray(x, jnp.float32) for name, x in gradient.items()})
        updates, state = tx.update(flat, state, tree, step=jnp.int32(step))
        rate = 1e-3 * optimizer.schedule(train, 10)[step]
        for name, update in params.flatten(updates).items():
            g, n = gradient[name], step + 1
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            wanted = first[name] / (1 - 0.9**n) / (np.sqrt(second[name] / (1 - 0.999**n)) + 1e-8)
            decay = 0.1 * np.asarray(values[name]) if name.endswith(("kernel", "table")) else 0
            np.testing.assert_allclose(update, -rate * (wanted + decay), rtol=2e-4, atol=1e-9)


def test_patterns_have_their_own_peak_rates_and_a_tuple_has_one_for_each_layer():
    rates = {"llm/blocks/q/kernel": (1e-3, None, 2e-3), "projector/0/kernel": 5e-4}
    tx = optimizer.build(settings(warmup_ratio=0.0), rates, 10)
    tree = params.unflatten({"llm/blocks/q/kernel": jnp.ones((3, 2, 2)), "projector/0/kernel": jnp.ones((2, 2))})
    updates = params.flatten(tx.update(tree, tx.init(tree), tree, step=jnp.int32(0))[0])
    np.testing.assert_allclose(updates["projector/0/kernel"], -5e-4, rtol=1e-5)
    for layer, rate in enumerate((1e-3, 0, 2e-3)):
        np.testing.assert_allclose(updates["llm/blocks/q/kernel"][layer], -rate, rtol=1e-5)


def test_clipping_happens_only_when_it_is_asked_for():
    tree, gradient = {"a": jnp.zeros(4)}, {"a": jnp.full(4, 100.0)}
    for clip_norm, wanted in ((None, 100.0), (1.0, 0.5)):
        tx = optimizer.build(settings(clip_norm=clip_norm), {"a": 1e-3}, 10)
        _, state = tx.update(gradient, tx.init(tree), tree, step=jnp.int32(1))
        (moment,) = [part.mu["a"] for part in state if "mu" in str(part)]
        np.testing.assert_allclose(moment, 0.1 * wanted, rtol=1e-6)
