"""Rows of one picture: what they hold is what separate rows hold, each sample once, the equal part of them once."""

import collections
import dataclasses
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from llava_jax.batch import TREES, Corners, Example, Layout, Span
from llava_jax.data import planner, trees
from llava_jax.data.packing import packed
from llava_jax.data.trees import Prefixes, together
from llava_jax.prompt import templates
from tests.data.conftest import png

PICTURE = (Span(1, 2),)


def example(tokens, learned, spans=PICTURE, shade=7):
    images = tuple(np.full((2, 2, 3), shade, np.uint8) for _ in spans)
    marks = np.array([mark == "x" for mark in learned.split()], bool)
    return Example(np.array(tokens, np.int32), marks, tuple(spans), images, "x")


FIRST = example([1, 0, 0, 5, 6, 7], ". . . . x x")


def test_the_example_of_the_docstring():
    batch, lost = packed([[[FIRST, example([1, 0, 0, 9, 8], ". . . . x")]]], 10, 1, 2, share_images=True)
    one, two = 1 + TREES, 1 + 2 * TREES
    assert lost == 0
    assert batch.tokens.tolist() == [[1, 0, 0, 5, 6, 7, 9, 8, 0, 0]]
    assert batch.targets.tolist() == [[0, 0, 5, 6, 7, 0, 8, 0, 0, 0]]
    assert batch.weights.tolist() == [[0, 0, 0, 1, 1, 0, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, one, one, one, two, two, 0, 0]]
    assert batch.image_slots.tolist() == [[-1, 0, 1, -1, -1, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize("other", [
    example([1, 0, 0, 9, 8], ". . . . x", shade=8),  # another picture
    example([2, 0, 0, 9, 8], ". . . . x"),  # another system text
    example([1, 0, 0, 9, 8], ". . . x x"),  # the prefix predicts a supervised token
    example([1, 0, 0, 9, 0, 0, 8], ". . . . . . x", (Span(1, 2), Span(4, 2))),  # a second picture
    example([1, 2, 3, 9, 8], ". . . . x", ()),
])  # fmt: skip
def test_what_is_not_equal_is_not_shared(other):
    rows = [[[FIRST, other, FIRST]]]
    shared, apart = (packed(rows, 20, 4, 2, share_images=share)[0] for share in (True, False))
    assert np.array_equal(shared.segments % TREES, apart.segments)
    assert all(np.array_equal(a, b) for name, a, b in zip(apart._fields, shared, apart) if name != "segments")


def test_a_bad_record_costs_its_tree_nothing():
    """The first of them has no tokens: the next one writes the prefix and the picture."""
    bad = Example(np.zeros(0, np.int32), np.zeros(0, bool), (), (), "bad")
    whole, rest = (packed([[[*row]]], 12, 2, 2, share_images=True)[0] for row in
                   ((FIRST, FIRST), (bad, FIRST, bad, FIRST)))  # fmt: skip
    assert all(np.array_equal(a, b) for a, b in zip(whole, rest)) and whole.pixels[0, :, 0, 0, 0].tolist() == [7, 0]


def test_a_picture_of_tiles_takes_its_images_and_its_mixed_features_once():
    layout = Layout(2, 2, np.array([0, 3]), Corners(np.array([[0, 1, 2, 3], [3, 0, 0, 0]]), np.full((2, 4), 0.25)))
    tiles = tuple(np.full((2, 2, 3), shade, np.uint8) for shade in (3, 4))
    one, other = (dataclasses.replace(x, images=tiles, layouts=(layout,)) for x in
                  (FIRST, example([1, 0, 0, 9, 8], ". . . . x")))  # fmt: skip
    rest = dataclasses.replace(other, layouts=(layout._replace(slots=np.array([1, 2])),))
    batch = packed([[[one, other, rest]]], 16, 4, 2, resizes=True, share_images=True)[0]
    assert batch.pixels[0, :, 0, 0, 0].tolist() == [3, 4, 3, 4]
    assert batch.image_slots[0].tolist() == [-1, 0, 3, *[-1] * 6, 5, 6, *[-1] * 5]
    assert batch.corners.slots[0, 1:3].tolist() == layout.corners.slots.tolist()
    assert (batch.corners.slots[0, 3:9, 0] == -1).all()


def test_trees_are_those_of_the_docstring():
    prefixes = Prefixes(np.array([5, 5, 5, 0, 5]), np.array([7, 7, 8, 0, 7]))
    samples, starts = together(np.array([9, 8, 9, 7, 9]), prefixes, np.array([2, 1, 3, 4, 0]), 16)
    assert (samples.tolist(), starts.tolist()) == ([2, 3, 0, 1, 4], [0, 1, 2, 5])
    assert trees.repeated(prefixes.keys[samples], starts).tolist() == [False, False, False, True, True]
    samples, starts = together(np.array([9, 8, 9, 7, 9]), prefixes, np.array([0, 1, 2, 3, 0]), 15)
    assert (samples.tolist(), starts.tolist()) == ([0, 1, 2, 3, 4], [0, 2, 3, 4, 5])  # record 0 comes twice


def test_all_parts_of_a_random_order_hold_as_many_trees():
    count = 30_000
    records = np.random.RandomState(0).permutation(count)  # the first half of 3 records a picture
    keys = np.where(records < count // 2, 1 + records // 3, 0)
    prefixes = Prefixes(5 * (keys > 0), keys)
    samples, _ = together(np.full(count, 9), prefixes, records, 4096)
    shares = (keys[samples] > 0).reshape(10, -1).mean(axis=1)  # of the samples of each tenth
    assert np.abs(shares - 0.5).max() < 0.05, shares


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_comes_once_and_both_budgets_hold(seed):
    rng = np.random.default_rng(seed)
    row_tokens, rows_per_group, images_per_group = ((100, 1, 1), (64, 4, 5), (40, 2, 9))[seed % 3]
    count = rng.integers(1, 300)
    keys = rng.integers(0, 1 + count // 3, count)
    tokens, images = rng.integers(1, row_tokens + 1, count), (keys > 0).astype(int)
    each = 1 + rng.integers(0, 20, keys.max() + 1)  # tokens of a key's prefix
    shared = (keys > 0) & (each[keys] < tokens)
    prefixes = Prefixes(each[keys] * shared, keys * shared)
    samples, starts = planner.plan_trees(tokens, images, prefixes, np.arange(count), row_tokens, rows_per_group,
                                         images_per_group, np.random.RandomState(seed))  # fmt: skip
    assert sorted(samples) == list(range(count)) and starts[0] == 0 and starts[-1] == count
    again = trees.repeated(prefixes.keys[samples], starts)
    own = np.append(0, np.cumsum(tokens[samples] - again * prefixes.tokens[samples]))
    pictures = np.append(0, np.cumsum(images[samples] * ~again))[starts]
    assert np.diff(own[starts]).max() <= row_tokens
    assert (pictures[rows_per_group::rows_per_group] - pictures[:-1:rows_per_group]).max() <= images_per_group
    if seed % 3:  # where a key's samples fill less than a row they are all together
        for key in range(1, keys.max() + 1):
            members = np.flatnonzero(prefixes.keys == key)
            if members.size and tokens[members].sum() <= row_tokens:
                assert np.ptp(np.flatnonzero(np.isin(samples, members))) == len(members) - 1


@pytest.fixture
def records(make):
    """Forty records about five pictures, some of them texts; two of a picture are the same but for their ids."""

    def made(count=40, name="a.json", weight=1.0):
        rng, rows = np.random.default_rng(3), []
        for number in range(count):
            turns = [{"from": "human", "value": "<image>\nWhat is it?" if number % 4 else "Why?"},
                     {"from": "gpt", "value": "A cat." + " It sits." * int(rng.integers(0, 7))}]  # fmt: skip
            picture = {"image": f"{rng.integers(0, 5)}.png"} if number % 4 else {}
            rows.append({"id": f"{name[0]}{number}", "conversations": turns, **picture})
        return make(rows, name, weight)

    return made


@pytest.fixture
def build(build):
    """As the shared one, with trees."""
    return functools.partial(build, share_images=True)


def samples(batch, features=4):
    """Every sample of a batch as if it lay alone, its branch behind its prefix."""
    found = []
    for row, segments in enumerate(batch.segments):
        group = row // (len(batch.tokens) // len(batch.pixels))
        for number in np.unique(segments[segments > 0]).tolist():
            if number < TREES and (segments == number + TREES).any():
                continue  # a prefix
            at = np.flatnonzero((segments == number) | (segments == number % TREES))
            slots, weights = batch.image_slots[row, at], batch.weights[row, at]
            pictures = [batch.pixels[group, slot // features].tobytes() for slot in slots[slots >= 0][::features]]
            fields = (batch.tokens[row, at], batch.targets[row, at] * (weights > 0), weights, batch.positions[row, at])
            found.append((*(x.tobytes() for x in fields), (slots >= 0).tobytes(), *pictures))
    return found


def take(pipeline, steps):
    return list(itertools.islice(pipeline, steps))


def test_trees_hold_exactly_what_separate_rows_hold_in_fewer_positions(records, build):
    feeds = [build(records(), one_pass=True, share_images=share) for share in (True, False)]
    batches = [[batch for batch, _ in feed] for feed in feeds]
    shared, apart = ([sample for batch in each for sample in samples(batch)] for each in batches)
    assert len(shared) == 40 and collections.Counter(shared) == collections.Counter(apart)
    used, others = (sum((batch.segments > 0).sum() for batch in each) for each in batches)
    pictures = [sum(batch.pixels.any(axis=(2, 3, 4)).sum() for batch in each) for each in batches]
    assert used < 0.85 * others and pictures[0] < pictures[1] // 2
    assert f"{used / (len(batches[0]) * 800):.1%} of positions" in feeds[0].contents


def test_an_epoch_shows_every_sample_once_and_repeated_records_in_trees_of_their_own(records, build):
    pipeline = build([records(), records(10, "b.json", 2.0)])
    steps = pipeline.steps_of(1)
    batches = take(pipeline, 2 * steps)
    for part in (batches[:steps], batches[steps:]):
        shown = collections.Counter(itertools.chain(*(ids for _, ids in part)))
        assert shown == {f"a{i}": 1 for i in range(40)} | {f"b{i}": 2 for i in range(10)}
    assert [ids for _, ids in batches[:steps]] != [ids for _, ids in batches[steps:]]


def test_resuming_at_every_step_equals_never_having_stopped(records, build):
    steps = build(records()).steps_of(1) + 1
    whole = take(build(records()), steps + 1)
    for step in range(steps):
        before = build(records())
        take(before, step)
        after = build(records(), threads=0)
        after.restore(json.loads(json.dumps(before.state())))
        ((batch, ids),) = take(after, 1)
        assert ids == whole[step][1] and all(np.array_equal(a, b) for a, b in zip(batch, whole[step][0]))
    with pytest.raises(ValueError, match="plan: saved"):
        build(records(), share_images=False).restore(build(records()).state())


def test_a_bad_record_of_a_tree_is_skipped_alone(records, make, build):
    source = records()
    rows = [record.raw for record in source]
    good = collections.Counter(sample for batch, _ in build(source, one_pass=True) for sample in samples(batch))
    bad = next(row for row in rows if row.get("image") == "1.png")
    bad["conversations"][1]["value"] = " "
    pipeline = build(make(rows), one_pass=True, skip_budget=0.1)
    left = collections.Counter(sample for batch, _ in pipeline for sample in samples(batch))
    assert [finding.id for finding in pipeline.bad] == [bad["id"]]
    assert sum((good - left).values()) == 1 and not left - good


def test_a_key_is_of_the_prompt_s_beginning_and_the_picture_s_path_or_bytes():
    columns = [trees.column(FIRST, images) for images in (["a"], ["b"], [b"a"], [b"a"], [b""], [object()])]
    assert [end for end, *_ in columns] == [3, 3, 3, 3, 0, 0] and columns[2] == columns[3]
    assert len(set(columns)) == 4
    table = np.array([[6, 1, *column] for column in columns], np.int32)
    assert trees.saved(trees.prefixes(table, None, 6)) == 3  # of the third and the fourth
    keys = [trees.prefixes(table, root, 6).keys.tolist() for root in (Path("x"), Path("x"), Path("y"), None)]
    assert keys[0] == keys[1] and keys[0][4:] == [0, 0] and len({*keys[0], *keys[2], *keys[3]}) == 10
    assert not trees.prefixes(table, Path("x"), 3).keys.any()  # what is cut there has nothing behind the picture


def test_captions_share_nothing(make, build, v1, folder):
    (folder / "5.png").write_bytes(png(9))
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}]
    source = make([{"id": str(i), "image": "5.png", "conversations": turns} for i in range(4)])
    plain = dataclasses.replace(v1, template=templates.get("plain"))
    ((batch, _),) = take(build(source, format=plain, rows=2), 1)
    assert batch.segments.max() < TREES and (batch.image_slots >= 0).sum() == 16
