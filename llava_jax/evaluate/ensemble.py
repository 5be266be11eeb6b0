"""ScienceQA answered by two: LLaVA and a text-only GPT-4, joined as published, from their answer files.

complement: GPT-4's answer wherever one can be read, else LLaVA's.
judge: where the two answers differ a judge is asked anew with both at hand; its answer if it can be read, else LLaVA's.
Source: haotian-liu/LLaVA llava/eval/eval_science_qa_gpt4.py and eval_science_qa_gpt4_requery.py @ c121f04.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.benchmarks.scienceqa import FAILED, letter, sentence_letter
from llava_jax.evaluate.questions import LETTERS, Question
from llava_jax.openai_client import Client, Failure, Request

TEMPERATURE, MAX_TOKENS = 0.0, 1024
# Ours: the published prompt is not known. The last sentence is what the parser wants.
SYSTEM = "You settle disagreements about multiple-choice questions."
DEMAND = ("Weigh both answers, trust neither, and decide for yourself; you cannot see the picture, if there is one, "
          'but assistant B could. End with one sentence of exactly this form: "The answer is X.", where X is the '
          "letter of your choice. Write that sentence only once.")  # fmt: skip


class Joined(NamedTuple):
    """An ensemble's answers, in the questions' order, and how often each side was taken."""

    answers: tuple[Answer, ...]
    taken: dict[str, int]


def complement(questions: Sequence[Question], ours: Mapping[str, Answer], gpt4: Mapping[str, Answer]) -> Joined:
    """GPT-4's letter where its text has exactly one "The answer is X.", else LLaVA's whole text.

    Differs from LLaVA: what neither side answers is wrong, there it is a random choice.
    """
    return _joined(questions, ours, {"gpt4": gpt4})


def judged(questions: Sequence[Question], ours: Mapping[str, Answer], requeried: Mapping[str, Answer]) -> Joined:
    """The judge's letter wherever it was asked and one can be read, else LLaVA's whole text."""
    return _joined(questions, ours, {"judge": requeried})


def disputed(questions: Sequence[Question], ours: Mapping[str, Answer], gpt4: Mapping[str, Answer]) -> list[Question]:
    """Questions on which the two differ; a GPT-4 text without an answer differs from every letter."""
    return [question for question in questions
            if letter(ours[question.id].text) != sentence_letter(gpt4[question.id].text)
            or letter(ours[question.id].text) == FAILED]  # fmt: skip


def requery(
    questions: Sequence[Question], ours: Mapping[str, Answer], gpt4: Mapping[str, Answer], client: Client
) -> list[Answer]:
    """The judge's answers to the disputed questions; the client's cache keeps each call from being billed twice."""
    asked = disputed(questions, ours, gpt4)
    requests = [_request(question, gpt4[question.id].text, ours[question.id].text) for question in asked]
    found: dict[str, Answer] = {}
    for place, outcome in client.ask_many(requests):
        identity = asked[place].id
        failed = isinstance(outcome, Failure)
        metadata = {"fault": "not_answered", "detail": outcome.reason} if failed else {}
        found[identity] = Answer(identity, "" if failed else outcome.text, client.endpoint.model, "", metadata)
    return [found[question.id] for question in asked]


def judge_text(question: Question, first: str, second: str) -> str:
    """What the judge reads: the problem, both answers with their reasons, and how to answer."""
    facts = dict(question.facts or {})
    options = "\n".join(f"({name}) {text}" for name, text in zip(LETTERS, facts["choices"]))
    return (f"Question: {facts['question']}\nContext: {facts['context'].strip() or 'N/A'}\nOptions:\n{options}\n\n"
            f"Assistant A said:\n{first.strip() or '(nothing)'}\n\n"
            f"Assistant B said:\n{second.strip() or '(nothing)'}\n\n{DEMAND}")  # fmt: skip


def _request(question: Question, first: str, second: str) -> Request:
    messages = [{"role": "system", "content": SYSTEM},
                {"role": "user", "content": judge_text(question, first, second)}]  # fmt: skip
    return Request(messages, TEMPERATURE, max_tokens=MAX_TOKENS)


def _joined(
    questions: Sequence[Question], ours: Mapping[str, Answer], preferred: Mapping[str, Mapping[str, Answer]]
) -> Joined:
    ((name, theirs),) = preferred.items()
    made, taken = [], {name: 0, "ours": 0}
    for question in questions:
        found = sentence_letter(theirs[question.id].text) if question.id in theirs else FAILED
        side = "ours" if found == FAILED else name
        text = ours[question.id].text if found == FAILED else f"The answer is {found}."
        model = f"{ours[question.id].model} + {name}"
        taken[side] += 1
        made.append(Answer(question.id, text, model, question.text, {"from": side}))
    return Joined(tuple(made), taken)
