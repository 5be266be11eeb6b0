"""A language model reviews pairs of answers: the reference's first, the candidate's second, each with a score.

The reviews are an answer file, which `score` reads; requests are cached, so a second run bills nothing again, and a
review without two scores is requested again a few times before it is kept as it is.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epath

from llava_jax import files
from llava_jax.data.files import read_json
from llava_jax.errors import DataError, UsageError
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.benchmarks import llava_bench
from llava_jax.evaluate.questions import Question
from llava_jax.openai_client import Client, Failure, Request

# Of a review. Source: haotian-liu/LLaVA llava/eval/eval_gpt_review_bench.py @ c121f04 (there with gpt-4-0314).
TEMPERATURE, MAX_TOKENS = 0.2, 1024
# Ours: the original's own line can be given with --system.
SYSTEM = "You judge answers of assistants with care, and your judgement is exact and useful."
_ATTEMPT_STRIDE = 1000  # numbers of choices in the cache: repeat * this + attempt


class Task(NamedTuple):
    """One review to request."""

    question: Question
    candidate: str
    repeat: int
    attempt: int = 0


def rules(path: epath.PathLike, questions: Sequence[Question]) -> dict[str, dict[str, str]]:
    """{name: {"role", "prompt"}} of a file of the original rule.json's shape.

    Raises:
      DataError: it has another shape, or lacks the rule of a question's kind.
    """
    rules_path = epath.Path(path)
    if not files.exists(rules_path):
        raise DataError(f"rules {path} do not exist: the original is llava/eval/table/rule.json of haotian-liu/LLaVA")
    contents = read_json(rules_path)
    names = {llava_bench.rule_name(question) for question in questions}
    for name in sorted(names):
        rule = contents.get(name) if isinstance(contents, dict) else None
        if not isinstance(rule, dict) or not all(isinstance(rule.get(key), str) for key in ("role", "prompt")):
            raise DataError(f'{path}: rule {name!r}: want {{"role": ..., "prompt": ...}}')
    return {name: contents[name] for name in names}


def review(
    questions: Sequence[Question], candidates: Mapping[str, Answer], rules: Mapping[str, Mapping[str, str]],
    client: Client, repeats: int = 1, attempts: int = 3, system: str = SYSTEM, temperature: float = TEMPERATURE,
) -> list[Answer]:  # fmt: skip
    """`repeats` reviews of each candidate's answer, in the questions' order.

    A review of which `tolerant_scores` reads nothing is asked for up to `attempts` times; the last one stays. One that
    the server never gave is a row with the fault `not_answered`.
    """
    if repeats < 1 or attempts < 1:
        raise UsageError(f"repeats={repeats}, attempts={attempts}: want at least 1 of each")
    pending = [Task(question, candidates[question.id].text, repeat)
               for repeat in range(repeats) for question in questions]  # fmt: skip
    reviews: dict[tuple[str, int], Answer] = {}
    while pending:
        retries = []
        requests = (_request(task, rules, system, temperature) for task in pending)
        for index, outcome in client.ask_many(requests):
            task = pending[index]
            failed = isinstance(outcome, Failure)
            if not failed and llava_bench.tolerant_scores(outcome.text) is None and task.attempt + 1 < attempts:
                retries.append(task._replace(attempt=task.attempt + 1))
                continue
            metadata = {"repeat": task.repeat, "attempts": task.attempt + 1,
                        "candidate": candidates[task.question.id].model}  # fmt: skip
            metadata |= {"fault": "not_answered", "detail": outcome.reason} if failed else {}
            text = "" if failed else outcome.text
            reviews[task.question.id, task.repeat] = Answer(task.question.id, text, client.endpoint.model, "", metadata)
        pending = retries
    return [reviews[question.id, repeat] for question in questions for repeat in range(repeats)]


def _request(task: Task, rules: Mapping[str, Mapping[str, str]], system: str, temperature: float) -> Request:
    rule = rules[llava_bench.rule_name(task.question)]
    text = llava_bench.request_text(task.question, task.candidate, rule)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return Request(messages, temperature, max_tokens=MAX_TOKENS, choice=task.repeat * _ATTEMPT_STRIDE + task.attempt)


def requests_text(questions: Sequence[Question], candidates: Mapping[str, Answer],
                  rules: Mapping[str, Mapping[str, str]], system: str = SYSTEM) -> str:  # fmt: skip
    """The requests as JSON lines, for inspection before they are paid for (`judge --dry-run`)."""
    rows = []
    for question in questions:
        request = _request(Task(question, candidates[question.id].text, 0), rules, system, TEMPERATURE)
        rows.append(json.dumps({"question_id": question.id, "messages": request.messages}, ensure_ascii=False) + "\n")
    return "".join(rows)
