"""What a run does beside its updates: the loss of held-out records, and answers to a few questions.

A bad record never ends a healthy run here: it is named once, when the run starts or when it is first met.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence

from llava_jax import distributed, params
from llava_jax.data.feed import Feed
from llava_jax.data.sources import Source
from llava_jax.distributed import Stop
from llava_jax.errors import Unreachable
from llava_jax.generate.assistant import Assistant
from llava_jax.prompt.conversation import Conversation
from llava_jax.prompt.encode import Format, encode, opened
from llava_jax.train import loop, metrics
from llava_jax.train.loop import Hook, Run
from llava_jax.train.step import State
from llava_jax.train.validations import Validations

SAMPLES = 4  # conversations that `train.sample_every` answers
SAMPLE_TOKENS = 64
LOOKED_AT = 40  # records among which they are


def validation(run: Run, held_out: Feed, step: int) -> Hook:
    """The mean loss over all supervised tokens of one pass over `held_out`, into validation.jsonl.

    Args:
      step: that the run goes on from.
    """
    config = run.config
    past = Validations(run, held_out.state()["fingerprint"], step) if config.checkpoint.best else None
    call = functools.partial(_validate, run, held_out, past)
    ends = functools.partial(past.why_over, config.train.patience) if past and config.train.patience else loop.goes_on
    return Hook(config.train.eval_every, call, metrics.VALIDATION, ends)


def samples(run: Run, format: Format, source: Source) -> Hook:
    """Answers to the first question of a source's first records, into samples.jsonl."""
    call = functools.partial(_answer, run, format, _questions(source, format))
    return Hook(run.config.train.sample_every, call, metrics.SAMPLES)


def _validate(run: Run, held_out: Feed, past: Validations | None, step: int, state: State, stop: Stop) -> None:
    held_out.rewind()
    loss = loop.validate(run.program, state.params, run.frozen, held_out, stop)
    if loss is None:
        return
    is_lowest = past is not None and past.add(step, state, loss)
    if run.writer is None:
        return
    bad = held_out.bad_records()
    metrics.write(run.writer, metrics.VALIDATION, {"step": step, "loss": loss, "bad": bad})
    skipped = f" (without {bad} bad records)" if bad else ""
    kept = ", the lowest so far: it is kept" if is_lowest else ""
    print(f"step {step}: validation loss {loss:.4f}{skipped}{kept}", flush=True)


def _questions(source: Source, format: Format) -> list[Conversation]:
    """The first turn of the first records that every process can ask, with their pictures opened."""
    questions = dict[int, Conversation]()
    for index in range(min(LOOKED_AT, len(source))):
        try:
            conversation = source[index].conversation_in(source.images)
            pictures = tuple(opened(image, format, source.images) for image in conversation.images)
            question = dataclasses.replace(conversation, turns=conversation.turns[:1], images=pictures)
            encode(question, format, reply=True)
            questions[index] = question
        except Unreachable:
            raise
        except (ValueError, OSError) as error:
            if distributed.index() == 0:
                print(f"train.sample_every leaves out {source.path}[{index}]: {error}", file=sys.stderr, flush=True)
        if len(questions) == SAMPLES:
            break
    common = set(questions).intersection(*distributed.exchange("questions", list(questions)))
    return [question for index, question in questions.items() if index in common]


def _answer(
    run: Run, format: Format, questions: Sequence[Conversation], step: int, state: State, stop: Stop
) -> None:
    """All processes compute the answers; process 0 writes them."""
    parameters = params.merge(state.params, run.frozen)
    assistant = Assistant(run.program.model, parameters, format, SAMPLES, run.program.mesh)
    replies = assistant.replies(questions, SAMPLE_TOKENS)
    if run.writer is None:
        return
    for conversation, reply in zip(questions, replies):
        question = conversation.turns[0].text
        print(f"step {step}: {question!r} -> {reply.text!r}", flush=True)
        row = {"step": step, "id": conversation.id, "prompt": question, "answer": reply.text}
        metrics.write(run.writer, metrics.SAMPLES, row)
