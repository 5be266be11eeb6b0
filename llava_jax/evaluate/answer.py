"""Questions in, an answer file out: from a checkpoint or an endpoint, in shards, resumable after a kill.

Each host answers its share of the questions into its own file. A row depends on its question and the settings alone,
not on the batch, the host or the order; so merged shards equal, byte for byte, the file of a single host.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from llava_jax import files
from llava_jax.errors import DataError, UsageError
from llava_jax.evaluate import answers
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.questions import FAULTS, Fault, Question
from llava_jax.generate.assistant import Assistant
from llava_jax.openai_client import Client, Failure, Request
from llava_jax.prompt.conversation import Conversation, Turn, Video
from llava_jax.prompt.images import encode_jpeg, open_image
from llava_jax.streams import GrowingFile

BATCHES = 8  # answered between two writes of the file
DIVIDER = "###"  # between reasons and answer in ScienceQA's LEPA
ANSWER_HEADER = f" {DIVIDER}\nANSWER:"
ANSWER_TOKENS = 64  # of the second pass. Source: haotian-liu/LLaVA llava/eval/model_vqa_science.py @ 8959d5c
LOG_SECS = 10.0
FLUSH_SECS = 60.0  # what a kill may cost where an answer file lies in a bucket
_MEDIA = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"RI": "webp", b"GI": "gif"}


@dataclass(frozen=True)
class Settings:
    """How answers are generated. two_pass: reasons first, then the letter alone, as ScienceQA was first answered.

    system: replaces the template's system text; None keeps it. repeats: answers to each question.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    two_pass: bool = False
    system: str | None = None
    repeats: int = 1
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.repeats < 1 or (self.repeats > 1 and self.temperature == 0):
            raise UsageError(f"repeats={self.repeats}: want at least 1, and a temperature above 0 for more than one")


class Job(NamedTuple):
    """One answer to generate: a question and the number of its repeat."""

    question: Question
    repeat: int


class Response(NamedTuple):
    """The outcome of a job: a text, or why there is none."""

    text: str
    ended_by: str = "stop"
    fault: str = ""
    detail: str = ""


# Jobs in, (index of a job, its response) out, in any order.
Responder = Callable[[Sequence[Job]], Iterator[tuple[int, Response]]]


def conversation(question: Question, system: str | None = None) -> Conversation:
    """The question as LLaVA shows it: pictures first, then the words."""
    markers = "<image>\n" * len(question.images)
    several = len(question.images) > 1
    return Conversation((Turn("user", markers + question.text),), question.images, question.id, system, several)


def from_checkpoint(assistant: Assistant, settings: Settings, folder: epath.PathLike) -> Responder:
    """Answers of a model in this process, `assistant.slots` at a time."""

    def respond(jobs: Sequence[Job]) -> Iterator[tuple[int, Response]]:
        step = assistant.slots * BATCHES
        for start in range(0, len(jobs), step):
            batch = jobs[start : start + step]
            for index, response in enumerate(_replies(assistant, settings, folder, batch)):
                yield start + index, response

    return respond


def from_endpoint(client: Client, settings: Settings, folder: epath.PathLike) -> Responder:
    """Answers of a server; a request that failed is a row with the fault `not_answered`, asked again by the next run.

    A picture that cannot be read, or lies outside of `folder`, is not sent: its question is a row with `bad_image`.

    Raises:
      UsageError: two passes, in which the model continues its own text, or a repetition penalty.
    """
    if settings.two_pass:
        raise UsageError("two passes want --checkpoint: a server cannot continue an answer from a given prefix")
    if settings.repetition_penalty != 1:
        penalty = settings.repetition_penalty
        raise UsageError(f"repetition_penalty={penalty} wants --checkpoint: OpenAI's protocol has none")

    def respond(jobs: Sequence[Job]) -> Iterator[tuple[int, Response]]:
        indices, faults = list[int](), list[tuple[int, Response]]()

        def requests() -> Iterator[Request]:
            for index, job in enumerate(jobs):
                try:
                    request = _request(job, settings, epath.Path(folder))
                except (ValueError, OSError) as error:
                    faults.append((index, Response("", "", "bad_image", str(error))))
                    continue
                indices.append(index)
                yield request

        for number, outcome in client.ask_many(requests()):
            if isinstance(outcome, Failure):
                yield indices[number], Response("", "", "not_answered", outcome.reason)
            else:
                yield indices[number], Response(outcome.text.strip(), outcome.finish_reason)
        yield from faults

    return respond


def fingerprint(questions: Sequence[Question], settings: Settings, model: Mapping[str, Any]) -> str:
    """A hash of all that the answers depend on: the questions' text, the settings and the model's identity."""
    settings_json = dataclasses.asdict(settings)
    if settings.repetition_penalty == 1:  # so that files of a version without it are resumed
        del settings_json["repetition_penalty"]
    facts = {"questions": [(q.id, q.text) for q in questions], "settings": settings_json, **model}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def weights_id(assistant: Assistant) -> str:
    """A hash of the first row of every parameter: little to read, and any training changes some of them."""
    digest = hashlib.sha256()
    for param in jax.tree.leaves(assistant.params):
        row = param[(0,) * (param.ndim - 1)]
        if not row.is_fully_addressable:
            row = multihost_utils.process_allgather(row, tiled=True)
        digest.update(np.asarray(row, np.float32).tobytes())
    return digest.hexdigest()[:16]


def shard(path: epath.PathLike, host: int, hosts: int) -> epath.Path:
    """The file of one host: answers.jsonl is answers-00000-of-00002.jsonl for the first of two."""
    if not 0 <= host < hosts:
        raise UsageError(f"--host {host}: want 0 to {hosts - 1}, as there are --hosts {hosts}")
    out = epath.Path(path)
    return out if hosts == 1 else out.with_name(f"{out.stem}-{host:05}-of-{hosts:05}{out.suffix}")


def run(
    questions: Sequence[Question], respond: Responder, path: epath.PathLike, model: str, run_id: str,
    settings: Settings,
    host: int = 0, hosts: int = 1, faults: Sequence[Fault] = (),
) -> tuple[Answer, ...]:  # fmt: skip
    """Answers this host's share of the questions into its file, and returns all that the file then holds.

    Answers already in the file are kept; a last line that a kill truncated is generated again. Rows are appended as
    they come, in a bucket every `FLUSH_SECS`; at the end the file is rewritten in the questions' order.

    Args:
      faults: questions that cannot be asked; each becomes a row with the fault.

    Raises:
      DataError: the file holds answers of another run.
    """
    out = shard(path, host, hosts)
    share = list(questions)[host::hosts]
    answered = resume(out, run_id)
    fault_by_id = {fault.id: fault for fault in faults}
    jobs = [Job(question, repeat) for question in share for repeat in range(settings.repeats)]
    pending = [job for job in jobs if (job.question.id, job.repeat) not in answered]
    ready = [job for job in pending if job.question.id not in fault_by_id]
    if len(answered):
        print(f"resumes after {len(answered):,} of {len(jobs):,} answers in {out}", flush=True)
    last_flush = time.monotonic()
    with contextlib.closing(GrowingFile(out, "".join(map(answers.line, answered.values())).encode())) as file:
        fault_rows = _fault_answers(pending, fault_by_id, model, run_id)
        for answer in _chain(fault_rows, _answers(ready, respond, model, run_id)):
            answered[answer.id, answer.repeat] = answer
            file.add(answers.line(answer).encode())
            if time.monotonic() - last_flush > FLUSH_SECS:
                file.flush()
                last_flush = time.monotonic()
    ordered = tuple(answers.in_order(questions, answered.values()))
    answers.write(out, ordered)
    return ordered


def _replies(
    assistant: Assistant, settings: Settings, folder: epath.PathLike, batch: Sequence[Job]
) -> Iterator[Response]:
    """The response of each job, in order. Repeats differ by seed: each is the same whatever their number."""
    texts: dict[int, Response] = {}
    for repeat in sorted({job.repeat for job in batch}):
        indices = [index for index, job in enumerate(batch) if job.repeat == repeat]
        conversations = [conversation(batch[index].question, settings.system) for index in indices]
        limits = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed + repeat,
                  "image_root": folder, "repetition_penalty": settings.repetition_penalty}  # fmt: skip
        first = assistant.replies(conversations, settings.max_new_tokens, **limits)
        if settings.two_pass:
            reasons = [reply.text.split(DIVIDER)[0].rstrip() for reply in first]
            prefixed = [dataclasses.replace(prompt, begun=text + ANSWER_HEADER)
                        for prompt, text in zip(conversations, reasons)]  # fmt: skip
            second = assistant.replies(prefixed, ANSWER_TOKENS, **limits)
            for index, text, reply in zip(indices, reasons, second):
                texts[index] = Response(f"{text}\n The answer is {reply.text}", reply.ended_by)
        else:
            texts.update({index: Response(reply.text, reply.ended_by) for index, reply in zip(indices, first)})
    yield from (texts[index] for index in range(len(batch)))


def _request(job: Job, settings: Settings, folder: epath.Path) -> Request:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_url(image, folder)}}
                                   for image in job.question.images]  # fmt: skip
    text = job.question.text
    user = {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
    system = [{"role": "system", "content": settings.system}] if settings.system else []
    return Request([*system, user], settings.temperature, settings.top_p if settings.temperature else None,
                   settings.max_new_tokens, choice=job.repeat)  # fmt: skip


def _data_url(image: str | bytes | Video, folder: epath.Path) -> str:
    """The picture unchanged where servers can read its format, otherwise as JPEG.

    Raises:
      ValueError: it is a video or no picture, or its path or a link leads out of the folder; nothing else leaves the
        machine.
    """
    if isinstance(image, Video):
        raise UsageError("a video, and OpenAI's protocol has none: ask a checkpoint (--checkpoint)")
    picture = open_image(image, folder)
    data = image if isinstance(image, bytes) else files.read(folder / image)
    if data[:2] not in _MEDIA:
        data = encode_jpeg(np.asarray(picture))
    return f"data:image/{_MEDIA[data[:2]]};base64,{base64.b64encode(data).decode()}"


def resume(path: epath.Path, run_id: str) -> dict[tuple[str, int], Answer]:
    """The answers of an earlier run; rows with a fault are asked again.

    Raises:
      DataError: the file holds answers of another run, or is broken.
    """
    if not files.exists(path):
        return {}
    contents = answers.read([path])
    faults = [fault for fault in contents.faults if fault.kind != "truncated_line"]
    if faults:
        raise DataError(f"{path}: {faults[0]}: correct or delete the file")
    other_runs = {answer.metadata.get("run") for answer in contents.answers} - {run_id}
    if other_runs:
        raise DataError(
            f"{path} holds answers of another run (model, settings or questions differ): name another --out, or "
            "delete the file to start again"
        )
    return {(answer.id, answer.repeat): answer for answer in contents.answers if "fault" not in answer.metadata}


def _answers(jobs: Sequence[Job], respond: Responder, model: str, run_id: str) -> Iterator[Answer]:
    start, last_log = time.monotonic(), time.monotonic()
    for number, (index, response) in enumerate(respond(jobs), 1):
        job = jobs[index]
        metadata: dict[str, Any] = {"run": run_id, "ended_by": response.ended_by}
        metadata |= {"repeat": job.repeat} if job.repeat else {}
        metadata |= {"fault": response.fault, "detail": response.detail} if response.fault else {}
        yield Answer(job.question.id, response.text, model, job.question.text, metadata)
        if (now := time.monotonic()) - last_log > LOG_SECS:
            last_log, rate = now, number / (now - start)
            remaining_secs = (len(jobs) - number) / rate
            print(f"answer {number:,}/{len(jobs):,}  {rate:.1f}/s  ETA {remaining_secs:,.0f} s", flush=True)


def _fault_answers(jobs: Sequence[Job], fault_by_id: Mapping[str, Fault], model: str, run_id: str) -> Iterator[Answer]:
    for job in jobs:
        if job.question.id in fault_by_id:
            fault = fault_by_id[job.question.id]
            assert fault.kind in FAULTS, fault
            metadata = {"run": run_id, "fault": fault.kind, "detail": fault.detail}
            metadata |= {"repeat": job.repeat} if job.repeat else {}
            yield Answer(job.question.id, "", model, job.question.text, metadata)


def _chain(*parts: Iterable[Answer]) -> Iterator[Answer]:
    for part in parts:
        yield from part
