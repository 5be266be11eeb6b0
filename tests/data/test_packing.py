"""Rows drawn by hand."""

import numpy as np
import pytest

from llava_jax.batch import Example, Span, spec
from llava_jax.data.packing import cut, packed, padded


def example(tokens, learned, spans=(), images=None, id="x"):
    if images is None:
        images = tuple(np.full((2, 2, 3), 7 + i, np.uint8) for i in range(len(spans)))
    marks = np.array([mark == "x" for mark in learned.split()], bool)
    return Example(np.array(tokens, np.int32), marks, tuple(spans), images, id)


def test_the_example_of_the_docstring():
    first = example([1, 0, 0, 5, 6, 7], ". . . . x x", [Span(1, 2)])
    batch, lost = packed([[[first, example([1, 0, 0, 8], ". . . x", [Span(1, 2)])]]], 10, 2, 2)
    assert lost == 0
    assert batch.tokens.tolist() == [[1, 0, 0, 5, 6, 7, 1, 0, 0, 8]]
    assert batch.targets.tolist() == [[0, 0, 5, 6, 7, 0, 0, 0, 8, 0]]
    assert batch.weights.tolist() == [[0, 0, 0, 1, 1, 0, 0, 0, 1, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 1, 1, 2, 2, 2, 2]]
    assert batch.image_slots.tolist() == [[-1, 0, 1, -1, -1, -1, -1, 2, 3, -1]]


def test_a_padded_row_holds_one_example():
    batch, lost = padded([example([1, 0, 0, 5, 6, 7], ". . . . x x", [Span(1, 2)])], 8, 1, 2)
    assert lost == 0
    assert batch.tokens.tolist() == [[1, 0, 0, 5, 6, 7, 0, 0]]
    assert batch.targets.tolist() == [[0, 0, 5, 6, 7, 0, 0, 0]]
    assert batch.weights.tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]
    assert batch.image_slots.tolist() == [[-1, 0, 1, -1, -1, -1, -1, -1]]
    assert (batch.pixels == 7).all()


def test_shapes_and_dtypes_are_those_of_the_contract():
    one, two = example([1, 2], ". x"), example([1], ".")
    pairs = [(padded([one, two], 5, 3, 2)[0], spec(2, 5, 2, 3, 2)),
             (packed([[[one, two], []], [[], [one]]], 5, 3, 2)[0], spec(4, 5, 2, 3, 2))]  # fmt: skip
    for field, wanted in (pair for batch, fields in pairs for pair in zip(batch, fields, strict=True)):
        assert (field.shape, field.dtype) == (wanted.shape, wanted.dtype)


def test_a_second_image_takes_the_slots_after_the_first():
    batch, _ = padded([example([1, 0, 0, 5, 0, 0, 6], ". . . . . . x", [Span(1, 2), Span(4, 2)])], 7, 2, 2)
    assert batch.image_slots.tolist() == [[-1, 0, 1, -1, 2, 3, -1]]
    assert batch.pixels[0, :, 0, 0, 0].tolist() == [7, 8]


@pytest.mark.parametrize(
    ("row_tokens", "left", "lost", "images"),
    [(10, 10, 0, 1), (8, 8, 2, 1), (6, 6, 3, 1), (5, 5, 3, 1), (4, 1, 3, 0), (2, 1, 3, 0), (1, 1, 3, 0)],
)
def test_a_row_is_cut_on_the_right_but_never_inside_an_image(row_tokens, left, lost, images):
    whole = example([1, 0, 0, 0, 0, 5, 6, 7, 8, 2], ". . . . . . . x x x", [Span(1, 4)])
    kept, lost_here = cut(whole, row_tokens)
    assert (len(kept.tokens), lost_here, len(kept.image_spans), len(kept.images)) == (left, lost, images, images)


def test_what_follows_a_dropped_image_is_dropped_with_it():
    whole = example([1, 5, 0, 0, 6, 0, 0, 7], ". x . . x . . x", [Span(2, 2), Span(5, 2)])
    batch, lost = padded([whole], 6, 2, 2)
    assert batch.tokens.tolist() == [[1, 5, 0, 0, 6, 0]]
    assert (lost, batch.weights.sum()) == (1, 2)


def test_an_example_without_tokens_is_a_row_of_padding():
    batch, _ = padded([example([], ""), example([1, 2], ". x")], 4, 1, 2)
    assert batch.segments.tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]
    assert batch.weights[0].sum() == 0 and (batch.image_slots[0] == -1).all()


def test_rows_of_a_group_share_its_images_and_groups_do_not():
    """Images are numbered through the rows of a group; blanks fill the pool up."""

    def shown(shade):
        return example([1, 0, 6], ". . x", [Span(1, 1)], (np.full((2, 2, 3), shade, np.uint8),))

    groups = [[[shown(1)], [shown(2), shown(3)]], [[example([1, 2], ". x")], [shown(4)]]]
    batch, _ = packed(groups, 6, 4, 2)
    assert batch.image_slots.tolist() == [
        [-1, 0, -1, -1, -1, -1], [-1, 1, -1, -1, 2, -1], [-1, -1, -1, -1, -1, -1], [-1, 0, -1, -1, -1, -1]
    ]  # fmt: skip
    assert batch.pixels[:, :, 0, 0, 0].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0]]


def test_an_example_without_tokens_takes_neither_room_nor_number():
    one, none = example([1, 2], ". x"), example([], "")
    batch, _ = packed([[[none, one, none, one], []]], 5, 1, 2)
    assert batch.segments.tolist() == [[1, 1, 2, 2, 0], [0, 0, 0, 0, 0]] and not batch.weights[1].any()


def test_what_fits_neither_its_row_nor_its_pool_raises():
    pair = example([0, 0, 1], ". . x", [Span(0, 1), Span(1, 1)])
    with pytest.raises(ValueError, match=r"'x' fills its row to 3 of 4 tokens and its group to 2 of 1 images"):
        padded([pair], 4, 1, 2)
    with pytest.raises(ValueError, match=r"'x' fills its row to 5 of 4 tokens"):
        packed([[[example([1, 2], ". x"), pair]]], 4, 9, 2)


def test_a_sample_may_be_shorter_than_its_row():
    one, two = (Example(np.arange(1, 10, dtype=np.int32), np.ones(9, bool), (), (), name) for name in "ab")
    batch, lost = packed([[[one, two]]], 16, 1, 2, sample_tokens=6)
    assert lost == 6 and batch.segments[0].tolist() == [1] * 6 + [2] * 6 + [0] * 4
    assert batch.positions.max() == 5
