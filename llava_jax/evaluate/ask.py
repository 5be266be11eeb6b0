"""The verb `answer`: the questions of a benchmark, a checkpoint or an endpoint, and the file of their answers."""

import argparse
from collections.abc import Sequence

from etils import epath

from llava_jax import errors
from llava_jax.errors import UsageError
from llava_jax.evaluate import answer, questions, verbs
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.questions import Question
from llava_jax.generate.assistant import Assistant
from llava_jax.generate.sampling import Sampling


def run(options: argparse.Namespace) -> int:
    """Answers; the exit code: 65 where a question has none."""
    benchmark, chosen = verbs.chosen(options)
    shard = answer.shard(options.out, options.host, options.hosts)  # a wrong --host is said before anything is read
    asked, gone = questions.load(benchmark, options.data, chosen, images=True, allow_missing=options.allow_faults)
    settings = _settings(options, benchmark.tokens)
    folder = epath.Path(options.data) / benchmark.images
    if options.checkpoint is not None:
        assistant = Assistant.open(options.checkpoint, options.slots, options.dtype, options.step, options.template)
        speak = answer.from_checkpoint(assistant, settings, folder)
        facts = {"weights": answer.weights_id(assistant), "template": assistant.format.template.name}
        answers = _answers(options, asked, speak, facts, settings, gone, str(options.checkpoint))
    else:
        with verbs.client(options, f"{shard}.cache") as client:
            speak = answer.from_endpoint(client, settings, folder)
            facts = {"endpoint": client.endpoint.base_url, "model": client.endpoint.model}
            answers = _answers(options, asked, speak, facts, settings, gone, client.endpoint.model)
            print(client.spent)
    faults = [one for one in answers if "fault" in one.metadata]
    print(f"{len(answers) - len(faults):,} answers, {len(faults):,} questions without one, in {shard}")
    for one in faults:
        print(f"  id={one.id!r} {one.metadata['fault']}: {one.metadata['detail']}")
    return errors.DATA if any(one.metadata["fault"] != "missing_image" for one in faults) else 0


def _settings(options: argparse.Namespace, tokens: int) -> answer.Settings:
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens}: want at least 1")
    Sampling(options.temperature, options.top_p, seed=options.seed)  # raises where a number cannot be
    return answer.Settings(
        options.max_new_tokens or tokens, options.temperature, options.top_p, options.seed, options.two_pass,
        options.system, options.repeats,
    )  # fmt: skip


def _answers(
    options: argparse.Namespace, asked: Sequence[Question], speak: answer.Speaker, facts: dict[str, str],
    settings: answer.Settings, gone: Sequence[questions.Fault], model: str,
) -> tuple[Answer, ...]:  # fmt: skip
    run_id = answer.fingerprint(asked, settings, facts)
    name = options.name or model
    return answer.run(asked, speak, options.out, name, run_id, settings, options.host, options.hosts, gone)
