"""A data set that is an object, as a source: its records are conversations, checked like those of a file."""

import os

import pytest
from PIL import Image

from llava_jax.data import index
from llava_jax.data.datasets import of_dataset
from llava_jax.data.problems import Problem
from llava_jax.data.records import Record, parse
from llava_jax.data.sources import hold_out
from llava_jax.errors import DataError, UsageError
from llava_jax.prompt.conversation import Conversation, Turn

TURNS = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cat."))


class Cats:
    fingerprint = "cats, version 1"

    def __init__(self, number=5):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        turns = (TURNS[0], Turn("assistant", "A cat." + " It sits." * index))
        return Conversation(turns, (Image.new("RGB", (8, 8)),), "" if index % 2 else f"cat-{index}")


def test_its_records_are_its_conversations_named_by_its_class_and_their_number():
    source = of_dataset(Cats())
    assert (len(source), source.name, source.fingerprint) == (5, "Cats", "cats, version 1")
    assert [record.id for record in source] == ["cat-0", "Cats[1]", "cat-2", "Cats[3]", "cat-4"]
    assert source[3].conversation.id == "Cats[3]" and source[2].conversation.turns[1].text == "A cat. It sits. It sits."


def test_its_lengths_are_measured_and_kept_by_its_fingerprint(v1, tmp_path):
    sizes = index.sizes(of_dataset(Cats()), v1, tmp_path)
    assert (sizes[:, 1] == 1).all() and (sizes[1:, 0] > sizes[:-1, 0]).all()
    assert len(list(tmp_path.iterdir())) == 1
    assert (index.sizes(of_dataset(Cats()), v1, tmp_path) == sizes).all() and len(list(tmp_path.iterdir())) == 1
    trained, held_out = hold_out(of_dataset(Cats()), 0.2, 0)
    assert len(trained) == 4 and len(held_out) == 1 and trained.repair == of_dataset(Cats()).repair


def test_a_path_may_lie_anywhere_where_the_program_itself_names_it(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    class One(Cats):
        def __getitem__(self, index):
            return Conversation(TURNS, (str(tmp_path / "a.png"),))

    (image,) = of_dataset(One())[0].conversation.images
    assert not isinstance(image, str) and os.fspath(image) == str(tmp_path / "a.png")


def untyped(**changes):
    """A conversation of what the tests' type checker would refuse."""
    conversation = Conversation(TURNS, (Image.new("RGB", (8, 8)),))
    for name, value in changes.items():
        object.__setattr__(conversation, name, value)
    return conversation


@pytest.mark.parametrize("changes, reason, words", [
    ({"turns": (TURNS[0], "A cat.")}, "bad_shape", "turns[1]='A cat.': want a llava_jax.Turn(role, text)"),
    ({"turns": ()}, "empty_conversations", "turns=(): want a question and an answer"),
    ({"turns": (Turn("system", "Be kind."), *TURNS)}, "unknown_role", "turns[0].role='system': want 'user'"),
    ({"weight": "much"}, "bad_weight", "weight='much': want a number"),
])  # fmt: skip
def test_a_conversation_of_other_types_is_a_problem_with_its_place(changes, reason, words):
    problem = parse(Record("Cats", 0, None, untyped(**changes)))
    assert isinstance(problem, Problem) and problem.reason == reason and words in problem.detail


def test_what_is_no_data_set_is_refused():
    with pytest.raises(UsageError, match=r"dataset of type dict: want `len\(dataset\)`"):
        of_dataset({})
    with pytest.raises(DataError, match="dataset of type Cats: it holds no conversations"):
        of_dataset(Cats(0))
