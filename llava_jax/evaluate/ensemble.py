"""The published ensembles for ScienceQA: combines the answer files of LLaVA and of a text-only GPT-4.

complement: GPT-4's answer wherever one can be parsed, else LLaVA's.
judge: where the two answers differ, a judge reads both and answers; its answer if it can be parsed, else LLaVA's.
Source: haotian-liu/LLaVA llava/eval/eval_science_qa_gpt4.py and eval_science_qa_gpt4_requery.py @ c121f04.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.benchmarks.scienceqa import FAILED, letter, sentence_letter
from llava_jax.evaluate.questions import LETTERS, Question
from llava_jax.openai_client import Client, Failure, Request

TEMPERATURE, MAX_TOKENS = 0.0, 1024
# Ours: the published prompt is not known. The parser needs the last sentence.
SYSTEM = "You settle disagreements about multiple-choice questions."
DEMAND = ("Weigh both answers, trust neither, and decide for yourself; you cannot see the picture, if there is one, "
          'but assistant B could. End with one sentence of exactly this form: "The answer is X.", where X is the '
          "letter of your choice. Write that sentence only once.")  # fmt: skip


class Ensemble(NamedTuple):
    """An ensemble's answers, in the questions' order, and how many of them come from each side."""

    answers: tuple[Answer, ...]
    counts: dict[str, int]


def complement(questions: Sequence[Question], ours: Mapping[str, Answer], gpt4: Mapping[str, Answer]) -> Ensemble:
    """GPT-4's letter where its text has exactly one "The answer is X.", else LLaVA's whole text.

    Differs from LLaVA: what neither side answers is wrong, there it is a random choice.
    """
    return _combine(questions, ours, {"gpt4": gpt4})


def prefer_judge(
    questions: Sequence[Question], ours: Mapping[str, Answer], judge_answers: Mapping[str, Answer]
) -> Ensemble:
    """The judge's letter wherever it was asked and one can be parsed, else LLaVA's whole text."""
    return _combine(questions, ours, {"judge": judge_answers})


def disputed_questions(
    questions: Sequence[Question], ours: Mapping[str, Answer], gpt4: Mapping[str, Answer]
) -> list[Question]:
    """Questions on which the two differ; a GPT-4 text without an answer differs from every letter."""
    return [question for question in questions
            if letter(ours[question.id].text) != sentence_letter(gpt4[question.id].text)
            or letter(ours[question.id].text) == FAILED]  # fmt: skip


def requery(
    questions: Sequence[Question], ours: Mapping[str, Answer], gpt4: Mapping[str, Answer], client: Client
) -> list[Answer]:
    """The judge's answers to the disputed questions; the client's cache keeps each call from being billed twice."""
    disputed = disputed_questions(questions, ours, gpt4)
    requests = [_request(question, gpt4[question.id].text, ours[question.id].text) for question in disputed]
    by_id: dict[str, Answer] = {}
    for index, outcome in client.ask_many(requests):
        identity = disputed[index].id
        failed = isinstance(outcome, Failure)
        metadata = {"fault": "not_answered", "detail": outcome.reason} if failed else {}
        by_id[identity] = Answer(identity, "" if failed else outcome.text, client.endpoint.model, "", metadata)
    return [by_id[question.id] for question in disputed]


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


def _combine(
    questions: Sequence[Question], ours: Mapping[str, Answer], preferred: Mapping[str, Mapping[str, Answer]]
) -> Ensemble:
    ((name, other),) = preferred.items()
    answers, counts = [], {name: 0, "ours": 0}
    for question in questions:
        choice = sentence_letter(other[question.id].text) if question.id in other else FAILED
        source = "ours" if choice == FAILED else name
        text = ours[question.id].text if choice == FAILED else f"The answer is {choice}."
        model = f"{ours[question.id].model} + {name}"
        counts[source] += 1
        answers.append(Answer(question.id, text, model, question.text, {"from": source}))
    return Ensemble(tuple(answers), counts)
