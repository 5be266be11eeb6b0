"""Answers through the connectors that no LLaVA has, against full forwards of the same rows."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.generate import engine
from llava_jax.generate.engine import Engine, Request
from llava_jax.models.llava import Llava
from tests.models.test_connectors import CONNECTORS, drawn

NEW = 3
SMALL = {name: replace(config, llm=replace(config.llm, layers=2)) for name, config in CONNECTORS.items()}


def request(config, seed: int, pictures: int) -> Request:
    """A prompt with that many pictures, text before and after each."""
    rng, features, side = np.random.default_rng(seed), config.image_features, config.vision.image_size
    slots = np.full(4 + pictures * (features + 2), -1, np.int32)
    for i in range(pictures):
        start = 2 + i * (features + 2)
        slots[start : start + features] = i * features + np.arange(features)
    tokens = np.where(slots < 0, rng.integers(3, config.llm.vocab, len(slots)), 0).astype(np.int32)
    pixels = rng.integers(0, 256, (pictures, side, side, 3)).astype(np.uint8)
    return Request(tokens, slots, pixels, NEW)


def full(config, tree, asked: Request, ids: list[int]) -> int:
    """The next id by a forward of the whole row, without a cache."""
    count, total = len(asked.tokens) + len(ids), 32
    tokens, slots = np.zeros((1, total), np.int32), np.full((1, total), -1, np.int32)
    tokens[0, :count], slots[0, : len(asked.image_slots)] = [*asked.tokens, *ids], asked.image_slots

    return int(np.asarray(logits(config, tree, tokens, slots, asked.pixels[None]))[0, count - 1].argmax())


@functools.partial(jax.jit, static_argnums=0)
def logits(config, tree, tokens, slots, pixels):
    places = jnp.arange(tokens.shape[1])[None]
    hidden = Llava(config).apply({"params": tree}, tokens, places, None, slots, pixels)
    return Llava(config).apply({"params": tree}, hidden, method="head")


@pytest.mark.parametrize("connector", ["eva qformer", "clip flamingo_xattn"])
def test_greedy_ids_are_those_of_full_forwards_in_any_company(connector):
    config = SMALL[connector]
    tree, made = drawn(config), Engine(Llava(config), 2, config.llm.vocab, ends=())
    asked = [request(config, seed, 2) for seed in (1, 2)]
    state, first = made.start(tree, asked, engine.shape_of(len(asked[0].tokens), 2, NEW, 64))
    _, more = made.advance(tree, state, [False, False])
    for row, one in enumerate(asked):
        ids = [int(first[row, 0]), *(int(i) for i in more[row] if i != engine.NOTHING)]
        assert len(ids) == NEW
        assert ids == [full(config, tree, one, ids[:n]) for n in range(NEW)]


def test_text_alone_runs_no_tower_and_passes_the_gated_blocks():
    config = SMALL["clip flamingo_xattn"]
    tree, made = drawn(config), Engine(Llava(config), 1, config.llm.vocab, ends=())
    asked = request(config, 3, 0)
    state, first = made.start(tree, [asked], engine.shape_of(len(asked.tokens), 0, NEW, 64))
    _, more = made.advance(tree, state, [False])
    ids = [int(first[0, 0]), *(int(i) for i in more[0] if i != engine.NOTHING)]
    side = config.vision.image_size
    blank = replace(asked, pixels=np.zeros((1, side, side, 3), np.uint8))
    assert ids == [full(config, tree, blank, ids[:n]) for n in range(NEW)]
