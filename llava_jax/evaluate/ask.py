"""The verb `answer`: reads a benchmark's questions, asks a checkpoint or an endpoint, writes the answer file."""

import argparse
import contextlib
from collections.abc import Sequence

from etils import epath

from llava_jax import compilations, distributed, errors
from llava_jax.errors import UsageError
from llava_jax.evaluate import answer, hosts, verbs
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.questions import Fault, Question, load_questions
from llava_jax.generate import placement
from llava_jax.generate.assistant import Assistant
from llava_jax.generate.sampling import Sampling


def run(options: argparse.Namespace) -> int:
    """Answers; the exit code: 65 where a question has none. It is the same on all processes of a job."""
    benchmark, benchmark_options = verbs.selection(options)
    out = answer.shard(options.out, options.host, options.hosts)  # refuses a wrong --host before anything is read
    with contextlib.ExitStack() as stack:
        stack.push(hosts.end_together)
        if options.checkpoint is not None and options.hosts == 1:  # with --hosts each process runs alone
            distributed.join()
        questions, missing = load_questions(benchmark, options.data, benchmark_options, images=True,
                                            allow_missing=options.allow_faults)  # fmt: skip
        settings = _settings(options, benchmark.tokens)
        folder = epath.Path(options.data) / benchmark.images
        if options.checkpoint is not None:
            results = _of_checkpoint(options, questions, settings, folder, missing)
        else:
            results = _of_endpoint(options, questions, settings, folder, missing)
        code = _summary(results, out) if distributed.index() == 0 else 0
        return distributed.exchange("exit code", code)[0]


def _of_checkpoint(
    options: argparse.Namespace, questions: Sequence[Question], settings: answer.Settings, folder: epath.Path,
    missing: Sequence[Fault],
) -> tuple[Answer, ...]:  # fmt: skip
    compilations.keep()
    assistant = Assistant.open(options.checkpoint, options.slots, options.dtype, options.step, options.template,
                               weights=options.weights)  # fmt: skip
    respond = answer.from_checkpoint(assistant, settings, folder)
    facts = {"weights": answer.weights_id(assistant), "template": assistant.format.template.name}
    run_id, name = answer.fingerprint(questions, settings, facts), options.name or str(options.checkpoint)

    def run(respond: answer.Responder, host: int, of: int) -> tuple[Answer, ...]:
        return answer.run(questions, respond, options.out, name, run_id, settings, host, of, missing)

    if distributed.count() == 1:
        return run(respond, options.host, options.hosts)
    return hosts.run_all(run, questions, respond, options.out, run_id, placement.spans_processes(assistant.mesh))


def _of_endpoint(
    options: argparse.Namespace, questions: Sequence[Question], settings: answer.Settings, folder: epath.Path,
    missing: Sequence[Fault],
) -> tuple[Answer, ...]:  # fmt: skip
    with verbs.client(options, f"{answer.shard(options.out, options.host, options.hosts)}.cache") as client:
        respond = answer.from_endpoint(client, settings, folder)
        facts = {"endpoint": client.endpoint.base_url, "model": client.endpoint.model}
        run_id, name = answer.fingerprint(questions, settings, facts), options.name or client.endpoint.model
        results = answer.run(
            questions, respond, options.out, name, run_id, settings, options.host, options.hosts, missing
        )
        print(client.usage)
    return results


def _summary(results: Sequence[Answer], out: epath.Path) -> int:
    """Prints what the file holds; the exit code."""
    faults = [row for row in results if "fault" in row.metadata]
    print(f"{len(results) - len(faults):,} answers, {len(faults):,} questions without one, in {out}")
    for row in faults:
        print(f"  id={row.id!r} {row.metadata['fault']}: {row.metadata['detail']}")
    return errors.DATA if any(row.metadata["fault"] != "missing_image" for row in faults) else 0


def _settings(options: argparse.Namespace, tokens: int) -> answer.Settings:
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens}: want at least 1")
    # Raises where a number cannot be.
    Sampling(options.temperature, options.top_p, seed=options.seed, repetition_penalty=options.repetition_penalty)
    return answer.Settings(
        options.max_new_tokens or tokens, options.temperature, options.top_p, options.seed, options.two_pass,
        options.system, options.repeats, options.repetition_penalty,
    )  # fmt: skip
