"""Continuous batching: an answer is the same bits alone, beside others, whenever it comes, with and without reuse."""

import functools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from llava_jax.errors import UsageError
from llava_jax.generate import batching as programs
from llava_jax.generate.assistant import Assistant
from llava_jax.generate.batching import Batching, row_pages
from llava_jax.generate.engine import shape_to_read
from llava_jax.generate.pages import PAGE, Pages, Prompt, prompt_of
from llava_jax.generate.sampling import Sampling
from llava_jax.generate.scheduler import Job, Scheduler, of_assistant
from llava_jax.models.llava import Llava
from llava_jax.models.presets import CrossConfig, PerceiverConfig, RopeScaling
from llava_jax.prompt import ending
from llava_jax.prompt.anyres import Tiling
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.encode import encode
from tests.generate import tiny

POSITIONS, CHUNK = 512, 64
FIELDS = ("temperature", "top_p", "top_k", "seed")
WORDS = "what is that red thing on the left of the big blue one and how many of them do you see".split()


@functools.cache
def assistant() -> Assistant:
    return tiny.assistant()


@functools.cache
def batching(slots: int = 4) -> Batching:
    one, pages = assistant(), row_pages(POSITIONS, CHUNK)
    ends = ending.of(one.format.template, one.format.tokenizer).ids
    return Batching(one.model, slots, 2, CHUNK, slots * pages + 1, pages, one.format.tokenizer.size, ends)


def scheduler(slots: int = 4, pages: int | None = None) -> Scheduler:
    one, own = assistant(), batching(slots)
    own = replace(own, pages=pages) if pages else own
    return Scheduler(own, one.params, one.format.tokenizer)


def conversation(number: int) -> Conversation:
    """A talk of 1 to 3 turns, with 0 to 2 pictures."""
    rng = np.random.default_rng(number)
    texts = [" ".join(rng.choice(WORDS, rng.integers(2, 40))) for _ in range(2 * rng.integers(1, 3) - 1)]
    turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    pictures = tuple(tiny.picture(int(rng.integers(3))) for _ in range(rng.integers(3)))
    turns[0] = Turn("user", "<image>\n" * len(pictures) + turns[0].text)
    return Conversation(tuple(turns), pictures, images_in_place=len(pictures) > 1)


def job(number: int, **fields) -> Job:
    rng = np.random.default_rng(1000 + number)
    sampling = Sampling(1.0, 0.95, 40, int(rng.integers(99))) if number % 3 == 0 else Sampling()
    example = encode(conversation(number), assistant().format, reply=True)
    stops = assistant().format.template.stops
    return Job(prompt_of(example), **{"limit": int(rng.integers(1, 30)), "sampling": sampling, "stops": stops,
                                      "top": number % 4, **fields})  # fmt: skip


def answers(jobs: list[Job], target: Scheduler, most_at_once: int = 99, rng: np.random.Generator | None = None):
    """(text, ids with log-probabilities, ended_by) of each job; with `rng` they come at random steps."""
    left, numbers = list(enumerate(jobs)), {}
    texts, made, ended = {}, {}, {}
    while left or target.busy:
        while left and len(numbers) - len(ended) < most_at_once and (rng is None or rng.random() < 0.3):
            index, one = left.pop(0)
            numbers[target.submit(one)] = index
        for number, update in target.step():
            index = numbers[number]
            texts[index] = texts.get(index, "") + update.piece
            made.setdefault(index, []).extend(update.tokens)
            if update.ended_by:
                ended[index] = update.ended_by
    return [(texts[i], tuple(made[i]), ended[i]) for i in range(len(jobs))]


def random_arrivals(jobs: list[Job], target: Scheduler, seed: int):
    """Answers in the order of the jobs, which come in another one."""
    order = np.random.default_rng(seed).permutation(len(jobs)).tolist()
    found = answers([jobs[i] for i in order], target, rng=np.random.default_rng(seed))
    return [found[order.index(i)] for i in range(len(jobs))]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 0.95, 40, seed=7)])
def test_ids_and_text_are_those_of_the_assistant(sampling):
    talks = [tiny.question(" ".join(WORDS[n : n + 5]), n) for n in range(6)]
    stops = assistant().format.template.stops
    jobs = [Job(prompt_of(encode(talk, assistant().format, reply=True)), 12, sampling, stops) for talk in talks]
    replies = assistant().replies(talks, 12, *(getattr(sampling, name) for name in FIELDS))
    for one, reply, (text, made, ended_by) in zip(jobs, replies, answers(jobs, scheduler()), strict=True):
        assert (text, tuple(each.id for each in made), ended_by) == (reply.text, reply.ids, reply.ended_by)
        assert len(one.prompt.tokens) == reply.prompt_tokens


def test_an_answer_is_the_same_bits_alone_in_any_company_whenever_it_comes_and_with_a_warm_cache():
    jobs = [job(n) for n in range(16)]
    alone = [answers([one], scheduler())[0] for one in jobs]
    assert answers(jobs, scheduler()) == alone
    warm = scheduler()
    for seed in range(3):
        assert random_arrivals(jobs, warm, seed) == alone
    assert answers(jobs, scheduler(pages=row_pages(POSITIONS, CHUNK) + 1)) == alone  # they wait for pages


def test_log_probabilities_are_those_of_the_forward_pass():
    example = encode(tiny.question(), assistant().format, reply=True)
    _, made, _ = answers([Job(prompt_of(example), 8, top=3)], scheduler())[0]
    request = assistant()._request(example, 8, Sampling())
    ids = np.append(example.tokens, [each.id for each in made]).astype(np.int32)
    slots = np.append(request.image_slots, [-1] * len(made)).astype(np.int32)
    whole = replace(request, tokens=ids, image_slots=slots)
    shape = shape_to_read(len(ids), 1, POSITIONS)
    scored = assistant()._engine().logps(assistant().params, [whole], shape)[0]
    expected = scored[len(example.tokens) - 1 :][: len(made)]
    np.testing.assert_allclose([each.logp for each in made], expected, atol=1e-4)
    assert all(each.likeliest[0] == (each.id, each.logp) for each in made)
    assert all(len(each.likeliest) == 3 for each in made)


def test_the_second_turn_of_a_talk_takes_over_what_the_first_has_read():
    first = Conversation((Turn("user", "<image>\n" + " ".join(WORDS * 4)),), (tiny.picture(),))
    turns = (*first.turns, Turn("assistant", "A cat."), Turn("user", "Why?"))
    prompts = [prompt_of(encode(Conversation(t, first.images), assistant().format, reply=True))
               for t in (first.turns, turns)]  # fmt: skip
    target = scheduler()
    reused = []
    for prompt in prompts:
        target.submit(Job(prompt, 4))
        while target.busy:
            reused += [update.reused for _, update in target.step() if update.ended_by]
    assert reused == [0, len(prompts[0].tokens) // PAGE * PAGE]
    assert reused[1] > 0
    other = encode(replace(first, images=(tiny.picture(1),)), assistant().format, reply=True)
    target.submit(Job(prompt_of(other), 4))
    last = [update.reused for _ in range(9) for _, update in target.step() if update.ended_by]
    assert last[0] <= prompts[0].images[0].start  # another picture shares at most what stands before it


def test_a_cancelled_request_frees_its_slot_and_pages_and_changes_no_other():
    jobs = [job(n, limit=20) for n in range(6)]
    alone = [answers([one], scheduler())[0] for one in jobs]
    target = scheduler(slots=4)
    numbers = [target.submit(one) for one in jobs]
    free = target.pages.available
    made = {number: [] for number in numbers}
    for step in range(200):
        if step == 2:
            target.cancel(numbers[1])
            target.cancel(numbers[5])
            assert target.active == 3
        for number, update in target.step():
            made[number] += update.tokens
        if not target.busy:
            break
    assert target.pages.available == free
    for index in (0, 2, 3, 4):
        assert tuple(made[numbers[index]]) == alone[index][1]


def test_the_tower_sees_no_picture_of_a_cancelled_request():
    pictures = tuple(tiny.picture(seed) for seed in range(6))
    shown = Conversation((Turn("user", "<image>\n" * 6 + "Why?"),), pictures, images_in_place=True)
    target = scheduler()
    one = Job(prompt_of(encode(shown, assistant().format, reply=True)), 4)
    number = target.submit(one)
    target.step()
    pending = lambda: sum(len(target._features.pending(image)) for image in one.prompt.images)  # noqa: E731
    assert pending() == 4  # two are seen at once
    target.cancel(number)
    assert not pending() and not target.busy


def steps_to_first_id(target: Scheduler, one: Job) -> int:
    number = target.submit(one)
    return next(count for count in range(1, 99) if any(of == number for of, _ in target.step()))


def test_a_first_word_comes_as_soon_beside_long_prompts_and_many_pictures_of_others():
    pictures = tuple(map(tiny.picture, range(8)))
    talks = [Conversation((Turn("user", "<image>\n" * 8 + "Why?"),), pictures, images_in_place=True),
             Conversation((Turn("user", " ".join(WORDS * 8)),), ()), tiny.question(seed=9)]  # fmt: skip
    jobs = [Job(prompt_of(encode(talk, assistant().format, reply=True)), 4) for talk in talks]
    alone = steps_to_first_id(scheduler(), jobs[2])
    for others in ([0], [1], [0, 1], [1, 0]):
        target = scheduler()
        numbers = [target.submit(jobs[index]) for index in others]
        target.step()
        assert steps_to_first_id(target, jobs[2]) <= alone + 1
        left = {number for number, update in [one for _ in range(99) for one in target.step()] if update.ended_by}
        assert set(numbers) <= left


def test_prompts_that_end_come_before_answers_and_long_ones_beside_them():
    words = [" ".join(WORDS[:n]) for n in range(1, 4)]
    jobs = [Job(prompt_of(encode(tiny.question(one), assistant().format, reply=True)), 9) for one in words]
    target = scheduler()
    warm = target.submit(jobs[0])
    while target.busy:
        target.step()
    numbers = [target.submit(one) for one in jobs]
    steps = [sorted(number - warm for number, _ in target.step()) for _ in range(3)]
    assert steps == [[1, 2], [1, 2, 3], [1, 2, 3]]
    long = Conversation((Turn("user", " ".join(WORDS * 8)),), ())
    target.submit(Job(prompt_of(encode(long, assistant().format, reply=True)), 2))
    found = [{number for number, _ in target.step()} for _ in range(2)]
    assert all(set(numbers) <= one for one in found)


def test_a_raw_prompt_goes_on_with_its_white_space():
    words = assistant().format.tokenizer
    prompt = Prompt(np.array([words.bos_id, *words.encode("The cat", False)], np.int32))
    text, made, _ = answers([Job(prompt, 12, continues=True)], scheduler())[0]
    whole = words.decode([*prompt.tokens.tolist(), *(each.id for each in made)])
    assert whole == words.decode(prompt.tokens.tolist()) + text


@pytest.mark.parametrize("pages", [4, 9])
def test_pages_are_shared_by_prompts_that_begin_alike_and_evicted_when_room_is_needed(pages):
    rng = np.random.default_rng(0)
    start = rng.integers(0, 99, 2 * PAGE).astype(np.int32)
    prompts = [Prompt(np.append(start, np.int32(i))) for i in range(3)]
    pool = Pages(pages)
    held, known = pool.reserve(prompts[0], 3)
    assert known == 0 and 0 not in held
    for page, digest in zip(held, prompts[0].digests):
        pool.publish(page, digest)
    if pages == 9:
        other, known = pool.reserve(prompts[1], 3)
        assert known == 2 and other[:2] == held[:2] and other[2] != held[2]
        pool.release(other)
    else:
        assert pool.reserve(prompts[1], 3) == (held[:2] + [held[2]], 2) if pool.available else True
    pool.release(held)
    assert pool.available == pages - 1
    fresh, known = pool.reserve(Prompt(rng.integers(0, 99, 3 * PAGE).astype(np.int32)), 3)
    assert known == 0
    again = pool.reserve(prompts[2], 3)
    assert again is None if pages == 4 else again[1] == 2


def test_bfloat16_answers_are_the_same_bits_too():
    one = assistant()
    own = replace(batching(), model=Llava(tiny.CONFIG, jnp.bfloat16))
    fresh = lambda: Scheduler(own, one.params, one.format.tokenizer)  # noqa: E731
    jobs = [job(n) for n in range(6)]
    alone = [answers([one], fresh())[0] for one in jobs]
    assert random_arrivals(jobs, fresh(), 0) == alone


@functools.cache
def tiled() -> Assistant:
    """A model that sees pictures in 2 to 5 tiles, the larger ones resized."""
    config = replace(tiny.CONFIG, image_newline=True)
    tiling = Tiling(((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)), max_tiles=2)
    words = replace(assistant().format, image_features=config.image_features, image_mode="anyres", tiling=tiling)
    return Assistant(Llava(config), tiny.weights(config), words)


def test_tiled_pictures_are_answered_as_by_the_assistant_alone_and_beside_others():
    one, jobs, replies = tiled(), [], []
    rng = np.random.default_rng(5)
    for size in ((60, 20), (20, 90), (28, 28), (200, 150), (300, 310)):
        picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        talk = Conversation((Turn("user", "<image>\nWhat is it?"),), (picture,))
        replies.append(one.reply(talk, 12))
        jobs.append(Job(prompt_of(encode(talk, one.format, reply=True)), 12, stops=one.format.template.stops))
    assert len({len(each.prompt.images[0].tiles) for each in jobs}) > 2
    fresh = of_assistant(one, 4, POSITIONS)
    alone = [answers([each], fresh())[0] for each in jobs]
    assert [tuple(made.id for made in row) for _, row, _ in alone] == [reply.ids for reply in replies]
    assert random_arrivals(jobs, fresh(), 1) == alone


@pytest.mark.slow
def test_s2_200_prompts_are_the_same_bits_alone_batched_at_random_and_with_reuse():
    jobs = [job(n) for n in range(200)]
    alone = [answers([one], scheduler(16))[0] for one in jobs]
    assert answers(jobs, scheduler(16)) == alone
    warm = scheduler(16)
    for seed in range(3):
        assert random_arrivals(jobs, warm, seed) == alone


def test_a_model_that_pages_cannot_serve_is_refused():
    cross = CrossConfig(tiny.CONFIG.vision.width, every=1, heads=2, head_width=8)
    latents = PerceiverConfig(latents=4, layers=1, heads=2, head_width=8)
    config = replace(tiny.CONFIG, projector="flamingo_xattn", resampler=latents, cross=cross)
    with pytest.raises(UsageError, match="flamingo_xattn.*use chat or evaluate"):
        programs.positions(Llava(config), 512, CHUNK)


def test_a_row_has_the_positions_that_the_model_can_tell_apart():
    def positions(scaling: RopeScaling | None, most: int, chunk: int = PAGE) -> int:
        llm = replace(tiny.CONFIG.llm, rope_scaling=scaling)
        return programs.positions(Llava(replace(tiny.CONFIG, llm=llm)), most, chunk)

    whole, dynamic = tiny.CONFIG.llm.max_positions, RopeScaling("dynamic", 4.0)
    assert [positions(None, most) for most in (512, 10**6)] == [512, whole]
    assert positions(RopeScaling("linear", 4.0), 10**6) == 4 * whole
    assert positions(dynamic, 10**6) == whole  # beyond, the rotation is that of the whole row
    for chunk in (64, 128):  # the last chunk of the longest prompt, begun after pages that were known
        last = (positions(dynamic, 10**6, chunk) - 2) // PAGE * PAGE
        assert last + chunk == whole
    assert [row_pages(n, chunk) for n, chunk in ((1, 32), (128, 32), (128, 64), (129, 32))] == [4, 4, 8, 8]
