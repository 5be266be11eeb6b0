"""Every sample once, within both budgets, in a random order, and with little room left."""

import subprocess
import sys

import numpy as np
import pytest

from llava_jax.data import planner
from llava_jax.data.orders import Schedule
from llava_jax.data.planner import WINDOW, Plans, plan
from llava_jax.plan import mixture
from llava_jax.prompt import anyres

FEATURES = 576  # of an image
PARTS = mixture.LLAVA
# The same mean from one broad distribution: 29 % of the records with an image have at most 64 tokens of turns, not 18.
BROAD = (mixture.Part(624_610, 120, 1.1), PARTS[-1])


def drawn(parts, samples=mixture.SAMPLES, seed=0):
    """(tokens, images) of samples in random order; 94 % with an image, about 850 tokens on average."""
    return mixture.records(parts, FEATURES, mixture.FRAME, samples, seed)[:2]


def captions(samples=2048, seed=0):
    """Tokens of stage 1's samples: an image and a caption of 29 on average."""
    rng = np.random.default_rng(seed)
    return FEATURES + np.maximum(4, rng.gamma((29 / 12) ** 2, 12**2 / 29, samples).round()).astype(int)


def planned(tokens, images, row_tokens, rows_per_group, images_per_group, seed=0):
    tokens, images = np.minimum(tokens, row_tokens), np.minimum(images, images_per_group)
    return plan(tokens, images, row_tokens, rows_per_group, images_per_group, np.random.RandomState(seed))


def filled(tokens, images, row_tokens, rows_per_group, images_per_group):
    """(share of positions, share of image slots) that the plan uses."""
    rows = len(planned(tokens, images, row_tokens, rows_per_group, images_per_group).starts) - 1
    slots = rows // rows_per_group * images_per_group
    return np.minimum(tokens, row_tokens).sum() / (rows * row_tokens), images.sum() / slots


def test_the_example_of_the_docstring():
    samples, starts = planned(np.array([6, 4, 9, 3, 7]), np.array([1, 0, 1, 1, 1]), 10, 2, 3)
    rows = [sorted(samples[a:b].tolist()) for a, b in zip(starts, starts[1:])]
    assert sorted(sorted(rows[i : i + 2]) for i in (0, 2)) == [[[], [3, 4]], [[0, 1], [2]]]


@pytest.mark.parametrize("row_tokens, rows_per_group, images_per_group",
                         [(100, 1, 1), (100, 1, 3), (64, 4, 5), (9, 2, 9)])  # fmt: skip
def test_every_sample_comes_once_and_both_budgets_hold(row_tokens, rows_per_group, images_per_group):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, row_tokens + 1, rng.integers(1, 300))
        images = rng.integers(0, images_per_group + 1, len(tokens)) * (rng.random(len(tokens)) < 0.7)
        samples, starts = planned(tokens, images, row_tokens, rows_per_group, images_per_group, seed)
        assert sorted(samples) == list(range(len(tokens)))
        rows = [samples[a:b] for a, b in zip(starts, starts[1:])]
        assert starts[0] == 0 and starts[-1] == len(tokens) and len(rows) % rows_per_group == 0
        assert max(tokens[row].sum() for row in rows) <= row_tokens
        groups = np.array([images[row].sum() for row in rows]).reshape(-1, rows_per_group)
        assert groups.sum(1).max() <= images_per_group


def test_a_plan_is_a_function_of_its_seed():
    tokens, images = drawn(PARTS, 500)
    one, two, other = (planned(tokens, images, 2048, 4, 9, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.samples, two.samples) and np.array_equal(one.starts, two.starts)
    assert not np.array_equal(one.samples, other.samples)


@pytest.mark.parametrize("parts, row_tokens, rows_per_group, images_per_group, positions, slots", [
    (BROAD, 2048, 4, 9, 0.93, 0.92),
    (BROAD, 3072, 4, 14, 0.975, 0.92),
    (BROAD, 4096, 4, 19, 0.99, 0.90),
    (BROAD, 4096, 2, 10, 0.99, 0.86),
    (PARTS, 2048, 4, 9, 0.885, 0.89),
    (PARTS, 3072, 4, 14, 0.985, 0.94),
    (PARTS, 4096, 4, 19, 0.985, 0.92),
    (PARTS, 4096, 2, 10, 0.985, 0.88),
])  # fmt: skip
def test_rows_and_pools_of_a_mixture_like_llava_s_are_full(
    parts, row_tokens, rows_per_group, images_per_group, positions, slots
):
    """At 2,048 three pictures fit only where all three have few words. A linear program over all ways to fill a row
    bounds any packer there: 0.953 for BROAD, 0.904 for PARTS (lengths rounded down to multiples of 8)."""
    tokens, images = drawn(parts)
    assert abs(np.minimum(tokens, 2048).mean() - 850) < 15 and abs(images.mean() - 0.94) < 0.01
    found = filled(tokens, images, row_tokens, rows_per_group, images_per_group)
    assert found[0] >= positions and found[1] >= slots, found


def test_the_best_rows_of_stage_1_hold_five_captions_or_four():
    """A row just longer than so many samples of the mean is full. Splash attention takes blocks of 512 tokens."""
    tokens = captions()
    ones, found = np.ones_like(tokens), {}
    assert abs(tokens.mean() - 605) < 1
    for row_tokens in (2432, *range(1024, 8193, 512)):
        found[row_tokens] = filled(tokens, ones, row_tokens, 1, row_tokens // int(tokens.min()))[0]
    best = sorted(found, key=found.get)[::-1]
    assert best[0] == 2432 and set(best[1:3]) == {3072, 6144}
    assert found[2432] > 0.99 and filled(tokens, ones, 2432, 1, 4)[1] > 0.99
    assert found[3072] > 0.98 and filled(tokens, ones, 3072, 1, 5)[1] > 0.99
    assert found[1024] < 0.6 and found[2048] < 0.89 and found[4096] < 0.89 and found[8192] < 0.97


def test_a_sample_stays_within_its_window():
    tokens, images = drawn(PARTS, 3 * WINDOW)
    samples = planned(tokens, images, 4096, 2, 10).samples
    assert np.abs(samples - np.arange(len(samples))).max() < WINDOW
    assert np.abs(samples - np.arange(len(samples))).mean() > WINDOW / 4


def test_what_a_step_holds_says_nothing_about_when_it_comes():
    """Means of steps of 64 rows scatter less than those of as many samples at random, and follow no trend."""
    tokens, images = drawn(PARTS, 4 * WINDOW, seed=1)
    samples, starts = planned(tokens, images, 2048, 4, 9)
    steps = [samples[starts[row] : starts[row + 64]] for row in range(0, len(starts) - 65, 64)]
    for values in (np.minimum(tokens, 2048), images):
        means = np.array([values[step].mean() for step in steps])
        assert means.std() < values.std() / np.sqrt(np.mean([len(step) for step in steps]))
        place = np.array([step.mean() for step in steps])
        assert abs(np.corrcoef(means, place)[0, 1]) < 0.15 > abs(np.corrcoef(means, place % WINDOW)[0, 1])


@pytest.mark.slow
def test_665298_samples_are_planned_in_seconds():
    """In a process of its own: here every call is type-checked, and a plan makes millions."""
    code = (
        "import time; import numpy as np; from llava_jax.data.planner import plan\n"
        "rng = np.random.default_rng(0)\n"
        "tokens = np.minimum(618 + rng.lognormal(5, 0.8, 665_298).astype(int), 2048)\n"
        "start = time.process_time()\n"
        "plan(tokens, np.ones_like(tokens), 2048, 4, 9, np.random.RandomState(0))\n"
        "print(time.process_time() - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 30  # 4 on this project's machines


@pytest.fixture
def plans(monkeypatch):
    """plans(records) -> of steps of 4 groups of 2 rows, in windows of 64 samples."""
    monkeypatch.setattr(planner, "WINDOW", 64)

    def made(records=300, weight=1.0, **changes):
        tokens, images = drawn(PARTS, records)
        schedule = Schedule((len(tokens),), (weight,), "shuffle", 7, 1, 1, None)
        settings = {"row_tokens": 2048, "rows_per_group": 2, "images_per_group": 5, "groups": 4}
        return Plans(schedule, np.minimum(tokens, 2048), images, **settings | changes)

    return made


def test_every_epoch_shows_each_record_once_in_another_order(plans):
    made = plans()
    records, first = made.schedule.samples, 0
    shown = []
    for epoch in range(3):
        last = made.steps_until(epoch + 1)
        rows = [row for group in range(4 * first, 4 * last) for row in made.rows(group)]
        shown.append(sum(rows, []))
        assert sorted(shown[-1]) == list(range(records)) and len(rows) == 8 * (last - first)
        first = last
    assert shown[0] != shown[1] != shown[2]


def test_groups_may_be_asked_for_in_any_order_and_after_their_plan_was_forgotten(plans):
    made, groups = plans(), range(4 * plans().steps_until(4))
    forward = [made.rows(group) for group in groups]
    backward = plans()
    assert [backward.rows(group) for group in reversed(groups)] == forward[::-1]


def test_what_is_in_a_step_depends_on_its_size_only_by_where_it_is_cut(plans):
    small, large = plans(groups=1), plans(groups=6)
    count = small.steps_until(1)
    rows = [large.rows(group) for group in range(6 * large.steps_until(1))]
    assert rows[:count] == [small.rows(group) for group in range(count)]
    assert not any(sum(group, []) for group in rows[count:])


def test_steps_of_epochs_are_counted_by_their_plans(plans):
    made = plans()
    one, two = made.steps_until(1), made.steps_until(2)
    assert (made.steps_of(1), made.steps_of(2.0), made.steps_of(0.5)) == (one, two, -(-one // 2))
    assert made.steps_of(1.001) == one + 1
    fill = made.fill()
    assert fill.samples_a_row == made.schedule.samples / (8 * one) and 0.7 < fill.positions < 1 > fill.slots > 0.5


# Pictures of those parts: (width, height) and their share. COCO's and Visual Genome's commonest sizes; book covers and
# TextCaps' pictures are guessed.
COCO = (((640, 480), 0.6), ((480, 640), 0.22), ((640, 427), 0.18))
GENOME = (((500, 375), 0.6), ((375, 500), 0.25), ((500, 333), 0.15))
PICTURES = (COCO, COCO, COCO, COCO, GENOME, COCO, (((333, 500), 1.0),), COCO,
            (((1024, 768), 0.7), ((768, 1024), 0.3)), COCO, GENOME)  # fmt: skip


def test_rows_of_tiles_are_as_full_as_the_recipe_says():
    """LLaVA-1.6's grids, rows of 10,240 positions with 20 tiles, samples of at most 4,096."""
    tiling, rng = anyres.Tiling(((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))), np.random.default_rng(0)
    found = []
    for part, pictures in zip(PARTS, (*PICTURES, None)):
        text = rng.lognormal(np.log(part.median), part.sigma, round(part.records * 2 * WINDOW / 665_298)).astype(int)
        text += mixture.FRAME
        if pictures is None:
            found.append([text, np.zeros(len(text), int)])
            continue
        layouts = [anyres.layout(size, tiling, 336, FEATURES) for size, _ in pictures]
        drawn = rng.choice(len(pictures), len(text), p=[share for _, share in pictures])
        found.append([text + np.array([len(one.slots) for one in layouts])[drawn],
                      np.array([one.tiles for one in layouts])[drawn]])  # fmt: skip
    tokens, images = np.concatenate(found, axis=1)[:, rng.permutation(sum(len(part[0]) for part in found))]
    positions, slots = filled(np.minimum(tokens, 4096), images, 10_240, 1, 20)
    assert positions > 0.98 and slots > 0.93
