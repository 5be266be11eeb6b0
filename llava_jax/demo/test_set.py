"""Asks a checkpoint every question of a test set and counts the answers that are exactly right."""

from pathlib import Path
from typing import NamedTuple

from llava_jax.demo import world
from llava_jax.demo.records import BLANK, TestSet
from llava_jax.generate.assistant import Assistant
from llava_jax.prompt.conversation import Conversation, Turn

SLOTS = 64
ANSWER_TOKENS = 32  # the longest right answer, a description of three things, has 26


class Result(NamedTuple):
    """Share of exact answers: in all (every kind counts alike) and by kind; and the answers themselves."""

    score: float
    by_kind: dict[str, float]
    answers: tuple[str, ...]


def open_assistant(checkpoint: Path) -> Assistant:
    """The assistant of a checkpoint, with the template of stage 2 whatever it was trained on last."""
    return Assistant.open(checkpoint, slots=SLOTS, template="v1")


def evaluate(assistant: Assistant, test_set: TestSet, root: Path, blind: bool = False) -> Result:
    """Greedy answers to all questions, one conversation each; a blind model is given the blank picture."""
    conversations = [
        Conversation((Turn("user", f"<image>\n{turn.question}"),), (BLANK if blind else test_set.pictures[picture],))
        for picture, turn in test_set.questions
    ]
    replies = assistant.replies(conversations, ANSWER_TOKENS, image_root=root)
    answers = tuple(reply.text for reply in replies)
    right: dict[str, list[bool]] = {kind: [] for kind in world.KINDS}
    for question, answer in zip(test_set.questions, answers):
        right[question.turn.kind].append(answer == question.turn.answer)
    by_kind = {kind: sum(marks) / len(marks) for kind, marks in right.items()}
    return Result(sum(by_kind.values()) / len(by_kind), by_kind, answers)
