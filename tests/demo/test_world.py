"""The drawn world is a function of its seed, its parts never meet, and its questions cannot be guessed."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from llava_jax.demo import world
from llava_jax.demo.world import Thing
from llava_jax.prompt.images import to_pixels, to_tiles


def scenes(split: str, count: int, seed: int = 0) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.random_scene(rng, split) for _ in range(count)]


@pytest.mark.parametrize("split", ["train", "heldout", "unseen"])
def test_scenes_are_of_the_requested_split(split):
    assert {world.split_of(scene) for scene in scenes(split, 100)} == {split}


def test_the_same_seed_draws_and_asks_the_same():
    for first, second in zip(scenes("train", 5, seed=3), scenes("train", 5, seed=3)):
        assert first == second
        one, two = np.random.default_rng(1), np.random.default_rng(1)
        assert world.jpeg(first, one) == world.jpeg(second, two)
        assert world.turns(first, one) == world.turns(second, two)


def test_no_training_scene_holds_an_unseen_pair_and_every_unseen_scene_does():
    assert not any(thing in world.UNSEEN_PAIRS for scene in scenes("train", 300) for thing in scene)
    assert all(any(thing in world.UNSEEN_PAIRS for thing in scene) for scene in scenes("unseen", 300))
    counts = Counter(thing for scene in scenes("heldout", 300) for thing in scene)
    assert set(counts) - {None} == set(world.SEEN_PAIRS)


def test_every_colour_and_every_shape_of_an_unseen_pair_is_seen_in_others():
    assert {pair.colour for pair in world.SEEN_PAIRS} == set(world.COLOURS)
    assert {pair.shape for pair in world.SEEN_PAIRS} == set(world.SHAPES)


def test_counts_of_things_are_equally_frequent():
    counts = Counter(sum(thing is not None for thing in scene) for scene in scenes("train", 3000))
    assert sorted(counts) == [1, 2, 3]
    assert max(counts.values()) < 1.2 * min(counts.values())


def test_a_family_is_of_different_training_scenes():
    family = world.family(np.random.default_rng(0), 8)
    assert len(set(family)) == 8 and {world.split_of(scene) for scene in family} == {"train"}


def test_a_picture_has_the_colours_of_its_scene():
    scene = (Thing("red", "circle"), None, None, Thing("blue", "square"))
    picture = world.draw(scene, np.random.default_rng(0)).astype(int)
    assert picture.shape == (96, 96, 3)
    red, empty, blue = picture[24, 24], picture[24, 72], picture[72, 72]
    assert red[0] > 150 and red[1] < 100 and blue[2] > 150 and blue[0] < 100 and empty.min() > 170


def test_a_wide_picture_has_each_shape_in_its_own_corner_whole_within_one_tile():
    scene = (Thing("red", "circle"), None, None, Thing("blue", "square"))
    for seed in range(8):
        picture = world.draw(scene, np.random.default_rng(seed), wide=4).astype(int)
        assert picture.shape == (96, 384, 3)
        for colour, rows, columns in ((0, slice(0, 48), slice(0, 192)), (2, slice(48, 96), slice(192, 384))):
            others = picture[..., [channel for channel in range(3) if channel != colour]].max(axis=-1)
            painted = picture[..., colour] - others > 60
            assert 600 < painted.sum() == painted[rows, columns].sum()
            assert len(set(np.nonzero(painted)[1] // 96)) == 1


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_shape_of_a_wide_picture_is_as_large_in_its_tile_as_the_tower_knows_it_and_in_the_whole_half_a_patch(shape):
    scene = (None, Thing("blue", shape), None, None)
    square, wide = (Image.fromarray(world.draw(scene, np.random.default_rng(0), wide)) for wide in (1, 4))
    whole, *tiles = to_tiles(wide, 48, (4, 1), (192, 48))
    images = (to_pixels(square, 48, "pad"), max(tiles, key=np.ptp), whole)
    known, tiled, alone = (np.ptp(np.nonzero(x[..., 2].astype(int) - x[..., 0] > 60)[1]) + 1 for x in images)
    assert abs(known - tiled) <= 3 and tiled >= 12 and alone <= 6


def test_the_words_say_what_the_scene_holds():
    scene = (Thing("red", "circle"), None, Thing("black", "cross"), Thing("blue", "square"))
    assert world.caption(scene) == (
        "a red circle in the northwest, a black cross in the southwest and a blue square in the southeast"
    )
    assert world.scan(scene) == (
        "northwest red circle, northeast nothing, southwest black cross, southeast blue square"
    )


@pytest.mark.parametrize("kind", world.KINDS)
def test_answers_are_true(kind):
    rng = np.random.default_rng(0)
    for scene in scenes("train", 50) + scenes("unseen", 50):
        turn = world.ask(kind, scene, rng)
        assert turn.answer in _answers(turn, scene)


def _answers(turn: world.Turn, scene: world.Scene) -> set[str]:
    """What is right for the thing or the place that a question names, worked out from its words."""
    named_cells = [i for i, thing in enumerate(scene) if thing and str(thing) in turn.question]
    named_places = [i for i, place in enumerate(world.PLACES) if place in turn.question]
    match turn.kind:
        case "count":
            return {world.NUMBERS[sum(thing is not None for thing in scene)]}
        case "colour" | "shape":
            return {getattr(scene[named_places[0]], turn.kind)}
        case "place":
            return {f"in the {world.PLACES[named_cells[0]]}"}
        case "exists":
            features = " ".join(f"{thing} shape" for thing in scene if thing).split()
            return {"yes" if set(turn.question[11:-1].split()) <= set(features) else "no"}
        case "beside":
            neighbour = scene[{0: 1, 1: 0, 2: 3, 3: 2}[named_cells[0]]]
            return {f"a {neighbour}" if neighbour else "nothing"}
    return {world.caption(scene)}


def test_guessing_the_most_frequent_answer_of_each_kind_is_idle():
    questions = world.balanced_questions(scenes("heldout", 200), 60, np.random.default_rng(0))
    best = {}
    for kind in world.KINDS:
        answers = Counter(q.turn.answer for q in questions if q.turn.kind == kind)
        best[kind] = max(answers.values()) / sum(answers.values())
    assert best["exists"] == 0.5 and best["count"] == pytest.approx(1 / 3) and best["colour"] == pytest.approx(0.2)
    assert best["shape"] == best["place"] == best["beside"] == 0.25 and best["describe"] < 0.1
    assert np.mean(list(best.values())) < 0.3


def test_the_feature_in_a_question_does_not_reveal_the_answer():
    rng = np.random.default_rng(0)
    turns = [world.ask("exists", scene, rng) for scene in scenes("train", 2000)]
    yes = Counter(turn.question for turn in turns if turn.answer == "yes")
    no = Counter(turn.question for turn in turns if turn.answer == "no")
    # A blind model that knows how often each question is answered with yes gains little.
    gain = sum(max(yes[question], no[question]) for question in yes | no) / len(turns)
    assert gain < 0.56


def test_an_unknown_kind_of_question_is_refused():
    with pytest.raises(ValueError, match="'smell' is unknown"):
        world.ask("smell", scenes("train", 1)[0], np.random.default_rng(0))
