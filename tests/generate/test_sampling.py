"""Sampling: exact truncation against numpy and transformers, right frequencies, noise from seed and position alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.generate.sampling import Sampling, kept_ranks, next_ids, penalized, stack

CUTS = [(0, 1.0), (5, 1.0), (1, 1.0), (0, 0.5), (0, 0.9), (0, 1e-6), (10, 0.8), (1000, 0.95)]


def drawn(logits: np.ndarray, positions: np.ndarray, samplings: list[Sampling]) -> np.ndarray:
    rows = np.broadcast_to(logits, (len(samplings), logits.shape[-1]))
    return np.asarray(jax.jit(next_ids)(jnp.asarray(rows), jnp.asarray(positions), stack(samplings)))


def kept_by_numpy(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> set[int]:
    """Ids that may be drawn: the top k, then the fewest of those whose share of their mass reaches `top_p`."""
    order = np.argsort(-logits.astype(np.float64), kind="stable")
    order = order[:top_k] if top_k else order
    share = np.exp(logits[order].astype(np.float64) / temperature)
    share /= share.sum()
    enough = int(np.searchsorted(np.cumsum(share), top_p)) + 1 if top_p < 1 else len(order)
    return set(order[:enough].tolist())


def logits_of(seed: int, size: int = 40) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def test_greedy_takes_the_largest_and_the_smaller_id_of_two_equals():
    logits = np.array([[0, 2, 2, 1], [5, 2, 2, 1]], np.float32)
    ids = next_ids(jnp.asarray(logits), jnp.array([3, 4]), stack([Sampling(), Sampling()]))
    assert ids.tolist() == [1, 0]


@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
def test_what_may_be_drawn_is_what_numpy_keeps(top_k, top_p):
    for seed in range(20):
        logits = logits_of(seed)
        order = np.argsort(-logits, kind="stable")
        kept = np.asarray(kept_ranks(jnp.asarray(logits[order]) / 0.7, top_k, top_p))
        assert set(order[kept].tolist()) == kept_by_numpy(logits, 0.7, top_k, top_p)


@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
def test_transformers_keeps_the_same_ids(top_k, top_p):
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for seed in range(5):
        logits = logits_of(seed)
        scores = TemperatureLogitsWarper(0.7)(None, torch.tensor(logits)[None])
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        scores = TopPLogitsWarper(top_p)(None, scores)
        theirs = set(torch.nonzero(torch.isfinite(scores[0]))[:, 0].tolist())
        assert theirs == kept_by_numpy(logits, 0.7, top_k, top_p)


@pytest.mark.parametrize("penalty", [1.0, 1.2, 0.8])
def test_transformers_penalizes_the_same_logits_as_much(penalty):
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, ids = np.stack([logits_of(seed) for seed in range(4)]), np.random.default_rng(0).integers(0, 40, (4, 15))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids), torch.tensor(logits)).numpy()
    seen = (ids[:, :, None] == np.arange(40)).any(1)
    ours = penalized(jnp.asarray(logits), jnp.asarray(seen), jnp.full(4, penalty, jnp.float32))
    np.testing.assert_allclose(ours, theirs, rtol=3e-7)
    assert penalty != 1 or np.array_equal(ours, logits)


def test_draws_stay_inside_the_cut_and_reach_all_of_it():
    logits = logits_of(1, 12)
    samplings = [Sampling(1.5, 0.9, 6, seed) for seed in range(2000)]
    ids = drawn(logits, np.full(2000, 9), samplings)
    assert set(ids.tolist()) == kept_by_numpy(logits, 1.5, 6, 0.9)


def test_draws_have_the_frequencies_of_the_softmax():
    logits = logits_of(2, 8)
    ids = drawn(logits, np.full(20_000, 3), [Sampling(1.3, seed=seed) for seed in range(20_000)])
    share = np.exp(logits / 1.3) / np.exp(logits / 1.3).sum()
    found = np.bincount(ids, minlength=8) / 20_000
    assert np.abs(found - share).max() < 4 * 0.5 / np.sqrt(20_000)  # 4 standard deviations of the widest


def test_a_draw_depends_on_seed_and_position_and_not_on_its_neighbours():
    logits = logits_of(3)
    mixed = [Sampling(1.0, seed=5), Sampling(), Sampling(2.0, 0.5, 3, 9), Sampling(1.0, seed=5)]
    together = drawn(logits, np.array([7, 7, 2, 7]), mixed)
    alone = [drawn(logits, np.array([at] * 4), [one] * 4)[2] for at, one in zip([7, 7, 2, 7], mixed)]
    assert together.tolist() == alone
    assert together[0] == together[3]
    flat = [Sampling(9.0, seed=5)] * 30
    assert len(set(drawn(logits, np.arange(30), flat).tolist())) > 10
    assert len(set(drawn(logits, np.full(30, 7), [replace(one, seed=i) for i, one in enumerate(flat)]).tolist())) > 10


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0.0),
     ("top_p", 1.1), ("top_k", -1), ("seed", -1), ("seed", 2**32),
     ("repetition_penalty", 0.0), ("repetition_penalty", -1.2), ("repetition_penalty", float("inf")),
     ("repetition_penalty", float("nan"))],
)  # fmt: skip
def test_a_value_outside_its_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        Sampling(**{field: value})
