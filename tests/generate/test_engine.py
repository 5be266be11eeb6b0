"""The engine: a cache that changes nothing, transformers' ids, slots that never feel each other, one compilation."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import params as names
from llava_jax.generate import engine as engines
from llava_jax.generate.engine import NOTHING, Engine, Request, bucket, shape_of
from llava_jax.generate.sampling import Sampling
from llava_jax.models.llava import Llava
from llava_jax.models.presets import RopeScaling
from tests.golden import make_generate, make_models
from tests.golden.make_generate import END, NEW, PENALTY

CONFIG = make_models.CONFIG
LIMIT = CONFIG.llm.max_positions
MODEL = Llava(CONFIG)
ENGINE = Engine(MODEL, slots=4, vocabulary=CONFIG.llm.vocab, ends=(END,))
RUN = jax.jit(MODEL.apply, static_argnames=("method", "cache_tokens"))
DRAWN = Sampling(temperature=1.0, top_p=0.95, seed=11)


@functools.cache
def weights() -> dict:
    """The parameters of models.npz."""
    with np.load(make_models.PATH) as arrays:
        return names.unflatten({n.removeprefix("params/"): arrays[n] for n in arrays if n.startswith("params/")})


def requests(count: int = make_generate.PROMPTS, **fields) -> list[Request]:
    return [Request(**prompt, max_new_tokens=NEW, **fields) for prompt in make_generate.prompts()[:count]]


def answers(batch: list[Request], engine: Engine = ENGINE, steps: int = engines.STEPS, shape=None) -> list[list[int]]:
    """Ids of one batch, made `steps` at a time."""
    shape = shape or shape_of(40, 1, NEW, LIMIT)
    state, made = engine.start(weights(), batch, shape)
    rows = [made]
    while not np.all(state.done):
        state, made = engine.advance(weights(), state, [False] * len(batch), steps)
        rows.append(made)
    return [[int(i) for i in row if i != NOTHING] for row in np.concatenate(rows, axis=1)]


def in_batches(batch: list[Request], slots: int) -> list[list[int]]:
    engine = replace(ENGINE, slots=slots)
    return [row for at in range(0, len(batch), slots) for row in answers(batch[at : at + slots], engine)]


def full_logits(tokens: np.ndarray, request: Request) -> np.ndarray:
    """Logits at every position of a row, by the training forward, without any cache."""
    length = len(tokens)
    slots = np.full(length, -1, np.int32)
    slots[: len(request.image_slots)] = request.image_slots
    row = [jnp.asarray(x)[None] for x in (tokens, np.arange(length), np.ones(length, np.int32), slots)]
    hidden = RUN({"params": weights()}, *row, request.pixels[None])
    return np.asarray(RUN({"params": weights()}, hidden, method="head"))[0]


def test_every_step_with_the_cache_gives_the_logits_without_it():
    request = requests(2)[1]
    made = answers([request])[0]
    row = np.concatenate([request.tokens, made]).astype(np.int32)
    wanted = full_logits(row, request)
    prompt = len(request.tokens)
    tokens, slots = np.zeros((1, 48), np.int32), np.full((1, 48), -1, np.int32)  # its padding must not be seen
    tokens[0, :prompt], slots[0, :prompt] = request.tokens, request.image_slots
    variables, places = {"params": weights()}, np.arange(128)[None]
    pixels = request.pixels[None]
    hidden, cache = RUN(variables, tokens, places[:, :48], slots, pixels, cache_tokens=96, method="prefill")
    found = [RUN(variables, hidden[:, prompt - 1], method="head")]
    for at in range(prompt, len(row) - 1):
        hidden, cache = RUN(variables, row[None, at : at + 1], places[:, at : at + 1], cache, method="decode")
        found.append(RUN(variables, hidden[:, 0], method="head"))
    found = np.concatenate(found)
    assert np.abs(found - wanted[prompt - 1 : -1]).max() < 1e-5 * np.abs(wanted).max()
    assert found.argmax(-1).tolist() == made


def test_greedy_ids_are_those_that_transformers_made_for_20_pictures():
    with np.load(make_generate.PATH) as recorded:
        wanted = [recorded[str(i)].tolist() for i in range(make_generate.PROMPTS)]
    assert in_batches(requests(), slots=4) == wanted
    assert len({tuple(answer) for answer in wanted}) == len(wanted)


def test_penalized_ids_are_those_that_transformers_made_also_beside_rows_without_a_penalty():
    with np.load(make_generate.PATH) as recorded:
        plain, wanted = ([recorded[name + str(i)].tolist() for i in range(make_generate.PROMPTS)]
                         for name in ("", "penalized "))  # fmt: skip
    penalty = Sampling(repetition_penalty=PENALTY)
    mixed = [replace(request, sampling=penalty) if i % 4 else request for i, request in enumerate(requests())]
    assert in_batches(mixed, slots=4) == [wanted[i] if i % 4 else plain[i] for i in range(len(mixed))]
    assert sum(one != other for one, other in zip(plain, wanted)) == 18


@pytest.mark.parametrize("penalty", [1.0, PENALTY])
def test_greedy_ids_are_those_of_transformers_now(penalty):
    pytest.importorskip("torch")
    model = make_models.hf_model(seed=5)
    params = names.unflatten(make_models.to_names(dict(model.named_parameters())))
    for prompt in make_generate.prompts(seed=6)[:5]:
        request = Request(**prompt, max_new_tokens=NEW, sampling=Sampling(repetition_penalty=penalty))
        state, first = ENGINE.start(params, [request], shape_of(40, 1, NEW, LIMIT))
        _, more = ENGINE.advance(params, state, [False])
        found = [i for i in [*first[0].tolist(), *more[0].tolist()] if i != NOTHING]
        assert found == make_generate.expected(model, prompt, penalty)[: len(found)].tolist()


def test_the_picture_changes_the_answer():
    one, other = requests(2)
    assert answers([one]) != answers([replace(one, pixels=other.pixels)])


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_is_the_same_bits_in_any_slot_and_company(sampling, dtype):
    engine = replace(ENGINE, model=Llava(CONFIG, dtype))
    batch = requests(6, sampling=sampling)
    shape = shape_of(40, 1, NEW, LIMIT)

    def row(company: list[Request], slot: int) -> list[np.ndarray]:
        state, first = engine.start(weights(), company, shape)
        state, made = engine.advance(weights(), state, [False] * len(company))
        return [first[slot], made[slot], *(np.asarray(leaf)[slot, :, :8] for leaf in jax.tree.leaves(state.cache))]

    alone = row([batch[0]], 0)
    for company, slot in (([*batch[1:4], batch[0]], 3), ([batch[5], batch[0], batch[4]], 1)):
        for found, wanted in zip(row(company, slot), alone, strict=True):
            assert np.array_equal(found, wanted)


def test_the_number_of_steps_in_a_dispatch_changes_nothing():
    batch = requests(4, sampling=DRAWN)
    assert answers(batch, steps=1) == answers(batch, steps=5) == answers(batch, steps=engines.STEPS)


def test_an_answer_ends_at_its_end_token_its_limit_or_when_it_is_stopped():
    batch = requests(4)
    batch[3] = replace(batch[3], max_new_tokens=5)
    whole = answers(requests(4))
    found = answers(batch)
    assert found[:3] == whole[:3]
    assert found[3] == whole[3][:5]
    assert [row[-1] == END for row in whole] == [len(row) < NEW for row in whole]
    state, _ = ENGINE.start(weights(), batch, shape_of(40, 1, NEW, LIMIT))
    state, made = ENGINE.advance(weights(), state, [False, True, True, True])
    assert (made[1:] == NOTHING).all()


def test_text_alone_runs_no_tower():
    batch = [replace(r, image_slots=np.full_like(r.image_slots, -1), pixels=r.pixels[:0]) for r in requests(3)]
    shape = shape_of(40, 0, NEW, LIMIT)
    blind = {"llm": weights()["llm"]}  # would fail if the tower were as much as looked up
    _, made = ENGINE.start(blind, batch, shape)
    wanted = full_logits(batch[1].tokens, replace(batch[1], pixels=requests(1)[0].pixels))[-1].argmax()
    assert made[1, 0] == wanted


def test_nothing_compiles_after_the_first_batch_of_a_shape():
    answers(requests(4))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    answers(requests(3)[1:], steps=3)
    answers([replace(r, max_new_tokens=9) for r in requests(4, sampling=DRAWN)])
    answers([replace(requests(1)[0], pixels=requests(2)[1].pixels)])
    fresh = jax.tree.map(lambda x: x + 0.0, weights())
    ENGINE.start(fresh, requests(2), shape_of(40, 1, NEW, LIMIT))
    assert compiled == []
    answers(requests(1), replace(ENGINE, slots=1))
    assert compiled  # the listener does hear


def test_buckets_hold_what_they_are_for_and_grow_by_half():
    sizes = sorted({bucket(n, 4096) for n in range(1, 4097)})
    assert sizes[:6] == [32, 48, 64, 96, 128, 192]
    assert sizes[-1] == 4096
    assert all(n <= bucket(n, 4096) <= max(32, n * 3 // 2) for n in range(1, 4097))
    assert bucket(1000, 1000) == 1000


def test_more_tokens_than_the_model_has_positions_are_refused():
    assert shape_of(200, 3, 56, 256) == (256, 256, 4)
    with pytest.raises(ValueError, match="the prompt's 200 tokens and max_new_tokens=57 need 257 positions.* 256"):
        shape_of(200, 1, 57, 256)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        shape_of(20, 1, 0, 256)
    stretched = replace(CONFIG.llm, rope_scaling=RopeScaling("linear", 4.0))
    assert stretched.usable_positions == 4 * CONFIG.llm.usable_positions == 1024
