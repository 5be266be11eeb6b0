"""The verb `answer`: the questions of a benchmark, a checkpoint or an endpoint, and the file of their answers."""

import argparse
import contextlib
from collections.abc import Sequence

from etils import epath

from llava_jax import distributed, errors
from llava_jax.errors import UsageError
from llava_jax.evaluate import answer, hosts, questions, verbs
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.questions import Question
from llava_jax.generate import placement
from llava_jax.generate.assistant import Assistant
from llava_jax.generate.sampling import Sampling


def run(options: argparse.Namespace) -> int:
    """Answers; the exit code: 65 where a question has none. It is the same on all processes of a job."""
    benchmark, chosen = verbs.chosen(options)
    place = answer.shard(options.out, options.host, options.hosts)  # refuses a wrong --host before anything is read
    with contextlib.ExitStack() as stack:
        stack.push(hosts.end_together)
        if options.checkpoint is not None and options.hosts == 1:  # with --hosts each process is on its own
            distributed.join()
        asked, gone = questions.load(benchmark, options.data, chosen, images=True, allow_missing=options.allow_faults)
        settings = _settings(options, benchmark.tokens)
        folder = epath.Path(options.data) / benchmark.images
        if options.checkpoint is not None:
            found = _of_checkpoint(options, asked, settings, folder, gone)
        else:
            found = _of_endpoint(options, asked, settings, folder, gone)
        code = _summary(found, place) if distributed.index() == 0 else 0
        return distributed.exchange("exit code", code)[0]


def _of_checkpoint(
    options: argparse.Namespace, asked: Sequence[Question], settings: answer.Settings, folder: epath.Path,
    gone: Sequence[questions.Fault],
) -> tuple[Answer, ...]:  # fmt: skip
    assistant = Assistant.open(options.checkpoint, options.slots, options.dtype, options.step, options.template)
    respond = answer.from_checkpoint(assistant, settings, folder)
    facts = {"weights": answer.weights_id(assistant), "template": assistant.format.template.name}
    run_id, name = answer.fingerprint(asked, settings, facts), options.name or str(options.checkpoint)

    def run(respond: answer.Responder, host: int, of: int) -> tuple[Answer, ...]:
        return answer.run(asked, respond, options.out, name, run_id, settings, host, of, gone)

    if distributed.count() == 1:
        return run(respond, options.host, options.hosts)
    return hosts.run_all(run, asked, respond, options.out, run_id, placement.spans_processes(assistant.mesh))


def _of_endpoint(
    options: argparse.Namespace, asked: Sequence[Question], settings: answer.Settings, folder: epath.Path,
    gone: Sequence[questions.Fault],
) -> tuple[Answer, ...]:  # fmt: skip
    with verbs.client(options, f"{answer.shard(options.out, options.host, options.hosts)}.cache") as client:
        respond = answer.from_endpoint(client, settings, folder)
        facts = {"endpoint": client.endpoint.base_url, "model": client.endpoint.model}
        run_id, name = answer.fingerprint(asked, settings, facts), options.name or client.endpoint.model
        found = answer.run(asked, respond, options.out, name, run_id, settings, options.host, options.hosts, gone)
        print(client.spent)
    return found


def _summary(found: Sequence[Answer], place: epath.Path) -> int:
    """Prints what the file holds; the exit code."""
    faults = [one for one in found if "fault" in one.metadata]
    print(f"{len(found) - len(faults):,} answers, {len(faults):,} questions without one, in {place}")
    for one in faults:
        print(f"  id={one.id!r} {one.metadata['fault']}: {one.metadata['detail']}")
    return errors.DATA if any(one.metadata["fault"] != "missing_image" for one in faults) else 0


def _settings(options: argparse.Namespace, tokens: int) -> answer.Settings:
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens}: want at least 1")
    # Raises where a number cannot be.
    Sampling(options.temperature, options.top_p, seed=options.seed, repetition_penalty=options.repetition_penalty)
    return answer.Settings(
        options.max_new_tokens or tokens, options.temperature, options.top_p, options.seed, options.two_pass,
        options.system, options.repeats, options.repetition_penalty,
    )  # fmt: skip
