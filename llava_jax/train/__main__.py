"""Trains, or goes on: `python -m llava_jax.train --config configs/X.py --workdir DIR [--config.train.lr=1e-4]`.

The same command after a kill or a preemption goes on from the last whole checkpoint and repeats nothing.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from llava_jax import cli, params, sharding, typed
from llava_jax import config as configs
from llava_jax.checkpoint import card as cards
from llava_jax.checkpoint import manager
from llava_jax.checkpoint.card import Card, PromptCard
from llava_jax.checkpoint.manager import Checkpoints
from llava_jax.data.feed import Feed
from llava_jax.data.packed import Packed
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.sources import Source, open_source
from llava_jax.errors import DataError, UsageError
from llava_jax.generate.assistant import Assistant
from llava_jax.models import presets
from llava_jax.models.presets import LlavaConfig
from llava_jax.prompt import ending, templates, tokenizer
from llava_jax.prompt.encode import Format
from llava_jax.train import init, loop, metrics
from llava_jax.train import program as programs
from llava_jax.train.loop import Hook, Run
from llava_jax.train.metrics import Writer
from llava_jax.train.program import Program
from llava_jax.train.step import State

SETTINGS = "config.json"  # in the workdir: the config that its checkpoints were trained with
# Keys that may change between two starts of one run: they move no parameter. On another mesh sums are taken in
# another order: the state goes over bit for bit, later losses agree to about 2e-6. A step's rows stay as they were, so
# on half the chips each takes twice the rows_per_chip; the data's own state says so where it does not.
HARMLESS = (
    "log.", "checkpoint.", "mesh.", "compiler_options", "profile", "data.rows_per_chip", "data.threads",
    "data.skip_budget", "data.validation", "train.eval_every", "train.sample_every", "train.max_nonfinite",
)  # fmt: skip
SAMPLES = 4  # conversations that `train.sample_every` answers
SAMPLE_TOKENS = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; the exit code. What a user can mend is one line, without a traceback."""
    return cli.run("error", lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    told = configs.command(argv, "python -m llava_jax.train", __doc__ or "")
    return _train(configs.load(told.config, told.overrides), epath.Path(told.workdir))


def _train(config: configs.Config, workdir: epath.Path) -> int:
    _join_processes()
    if jax.process_index() == 0:  # lines of progress of what takes minutes: measuring records, planning rows
        logging.basicConfig(format="%(message)s")
        logging.getLogger("llava_jax").setLevel(logging.INFO)
    _keep_compilations()
    model_config = _model_config(config.model)
    format = _format(config, model_config)
    held_out = _held_out(config)
    pipeline = _pipeline(config, format, _open(config.data.sources), workdir)
    steps = config.train.steps or pipeline.steps_of(config.train.epochs or 0)
    program = programs.build(config, model_config, steps)
    _introduce(program, pipeline, workdir)
    _check_settings(workdir, config)
    checkpoints = manager.open_checkpoints(workdir, config.checkpoint.keep)
    state, frozen = _restore(program, checkpoints, pipeline) or _begin(program, config, format, workdir)
    writer = _writer(workdir, config, int(state.step))
    run = Run(program, config, frozen, pipeline, checkpoints, writer)
    try:
        code, state = loop.train(dataclasses.replace(run, hooks=_hooks(run, format, held_out)), state)
        if code == loop.DONE:
            manager.seal(checkpoints)
    finally:
        if writer is not None:
            metrics.close(writer)
        manager.close(checkpoints)
    if code == loop.DONE:
        _conclude(program, workdir)
    return code


def _join_processes() -> None:
    """Joins the other processes of this job; on a TPU pod or under Slurm JAX finds them by itself."""
    if os.environ.get("LLAVA_JAX_MULTIHOST") == "1" and not jax.distributed.is_initialized():
        count, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(num_processes=count and int(count), process_id=index and int(index))
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UsageError(f"{jax.process_count()} processes share these devices: set LLAVA_JAX_MULTIHOST=1 on each, "
                         "so that they agree where to stop")  # fmt: skip


def _keep_compilations() -> None:
    """Lets XLA keep what it compiles in the user's cache directory, unless JAX_COMPILATION_CACHE_DIR names another."""
    if jax.config.jax_compilation_cache_dir:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_jax" / "compiled"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    # Entries are machine code: who can write here can run code as this user.
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UsageError(f"{folder}: want a directory of your own with mode 700, as compiled code is read from it; "
                         f"`chmod 700 {folder}`, or set JAX_COMPILATION_CACHE_DIR")  # fmt: skip
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _model_config(model: configs.Model) -> LlavaConfig:
    """The sizes that `model.base` says, which a named preset must agree with; without a base, the preset's."""
    if not model.base:
        if not model.preset:
            raise UsageError("model.preset and model.base are both empty: name one of them")
        return presets.get(model.preset)
    held = presets.config_from_json(dict(cards.read_card(model.base).model))
    if model.preset and presets.get(model.preset) != held:
        wanted, found = (params.flatten(presets.config_to_json(c)) for c in (presets.get(model.preset), held))
        raise UsageError(
            f"model.base={model.base} is no {model.preset}: {'; '.join(typed.difference(wanted, found))}. "
            'Set model.preset="" to take the sizes of the base, or name another base'
        )
    return held


def _format(config: configs.Config, model_config: LlavaConfig) -> Format:
    if not config.prompt.tokenizer and not config.model.base:
        raise UsageError("prompt.tokenizer and model.base are both empty: name a tokenizer, or a checkpoint with one")
    place = config.prompt.tokenizer or epath.Path(config.model.base) / cards.TOKENIZER
    words = tokenizer.load(place, config.prompt.legacy)
    rows = model_config.llm.vocab + model_config.llm.added_tokens
    if words.size > rows:
        raise UsageError(f"tokenizer {place} has {words.size} tokens, the model only {rows}: want one that fits it")
    template = templates.get(config.prompt.template)
    ending.check(template, words, str(place), config.prompt.image_start_end)
    return Format(
        template, words, model_config.vision.image_size, model_config.image_features,
        config.prompt.image_mode, config.prompt.image_start_end,
    )  # fmt: skip


def _open(sources: Sequence[configs.Source]) -> list[Source]:
    try:
        return [open_source(s.path, s.images or None, s.name, s.weight) for s in sources]
    except FileNotFoundError as error:
        raise DataError(str(error)) from None


def _held_out(config: configs.Config) -> list[Source]:
    """The validation sources; what the hooks want is checked here, before anything large is read."""
    if config.train.eval_every and not config.data.validation:
        raise UsageError(f"train.eval_every={config.train.eval_every} wants data.validation, which is empty")
    if config.train.sample_every and jax.process_count() > 1:
        raise UsageError("train.sample_every wants a single process: set it to 0 and chat with a checkpoint")
    return _open(config.data.validation)


def _pipeline(
    config: configs.Config, format: Format, sources: Sequence[Source], workdir: epath.Path, one_pass: bool = False
) -> Feed:
    data = config.data
    shared = {
        "sources": sources, "format": format, "row_tokens": data.row_tokens, "images_per_group": data.images_per_group,
        "order": data.order, "seed": config.train.seed, "host": jax.process_index(), "hosts": jax.process_count(),
        "skip_budget": data.skip_budget, "threads": data.threads, "cache_dir": str(workdir / "lengths"),
        "one_pass": one_pass,
    }  # fmt: skip
    if data.layout == "packed":
        rows = programs.rows_of(data, sharding.make_mesh(dataclasses.asdict(config.mesh)))
        return Packed(rows=rows, rows_per_group=data.rows_per_group, **shared)
    return Pipeline(
        batch_samples=data.batch_samples, lengths=data.lengths,
        group_samples=math.gcd(data.batch_samples, config.train.group_samples), **shared,
    )  # fmt: skip


def _introduce(program: Program, pipeline: Feed, workdir: epath.Path) -> None:
    if jax.process_index():
        return
    print(f"{_counted(program.state.params)} parameters move, {_counted(program.frozen)} are frozen in "
          f"{program.model.dtype}")  # fmt: skip
    sizes = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    print(f"mesh: {sizes}; {pipeline.records:,} records, {program.steps:,} steps of {pipeline.contents}; "
          f"workdir {workdir}", flush=True)  # fmt: skip


def _counted(tree: Mapping[str, Any]) -> str:
    """"21,000,000 (projector 20,979,712, ...)"."""
    parts = ", ".join(f"{name} {params.count(part):,}" for name, part in tree.items())
    return f"{params.count(tree):,} ({parts})" if parts else "0"


def _check_settings(workdir: epath.Path, config: configs.Config) -> None:
    """Refuses a workdir whose checkpoints were trained with other settings, or not by this door."""
    if not workdir.is_dir() or not any(path.name.isdigit() for path in workdir.iterdir()):
        return
    path = workdir / SETTINGS
    if not path.exists():
        raise UsageError(f"--workdir {workdir} holds a checkpoint that no training run wrote: name another directory")
    changed = typed.difference(*(
        {key: value for key, value in settings.items() if not key.startswith(HARMLESS)}
        for settings in (json.loads(path.read_text()), typed.describe(config))
    ))  # fmt: skip
    if changed:
        raise UsageError(
            f"--workdir {workdir} holds a run with other settings: {'; '.join(changed)}. Go on with the old ones, or "
            "begin anew in another --workdir (a checkpoint to start from is `model.start` or a row of `init`)"
        )


def _restore(program: Program, checkpoints: Checkpoints, pipeline: Feed) -> tuple[State, Any] | None:
    rest = {"step": program.state.step, "opt_state": program.state.opt_state}
    saved = manager.restore(checkpoints, program.state.params, rest)
    if saved is None:
        return None
    pipeline.restore(dict(saved.data))
    frozen = init.read(checkpoints.directory, params.flatten(program.frozen), saved.step)
    if jax.process_index() == 0:
        print(f"goes on after step {saved.step} of {checkpoints.directory}", flush=True)
    return State(saved.state["step"], saved.params, saved.state["opt_state"]), frozen


def _begin(program: Program, config: configs.Config, format: Format, workdir: epath.Path) -> tuple[State, Any]:
    """First values, and the files that make the directory describe itself."""
    sources = init.resolve(program, config.init, workdir, config.train.seed)
    if jax.process_index() == 0:
        prompt = PromptCard(config.prompt.template, format.tokenizer.legacy, config.prompt.image_mode,
                            config.prompt.image_start_end)  # fmt: skip
        card = Card(presets.config_to_json(program.model.config), prompt, init.bases(program, sources))
        cards.write_card(workdir, card, format.tokenizer.files())
        settings = json.dumps(typed.describe(config), indent=1)
        cards.write_whole(workdir / SETTINGS, settings.encode())
    return init.state(program, sources, config.train.seed), init.frozen(program, sources)


def _writer(workdir: epath.Path, config: configs.Config, step: int) -> Writer | None:
    if jax.process_index():
        return None
    return metrics.open_writer(workdir, config.log, step, typed.describe(config))


def _hooks(run: Run, format: Format, held_out: Sequence[Source]) -> list[Hook]:
    train = run.config.train
    validate = functools.partial(_validate, run, format, held_out)
    answer = functools.partial(_answer, run, format, held_out)
    return [Hook(every, call) for every, call in ((train.eval_every, validate), (train.sample_every, answer)) if every]


def _validate(run: Run, format: Format, held_out: Sequence[Source], step: int, state: State) -> None:
    pipeline = _pipeline(run.config, format, held_out, run.checkpoints.directory, one_pass=True)
    loss = loop.validate(run.program, state.params, run.frozen, pipeline)
    if run.writer is not None:
        metrics.write(run.writer, metrics.VALIDATION, {"step": step, "loss": loss})
        print(f"step {step}: validation loss {loss:.4f}", flush=True)


def _answer(run: Run, format: Format, held_out: Sequence[Source], step: int, state: State) -> None:
    """Answers the first question of the first records."""
    source = (held_out or _open(run.config.data.sources))[0]
    asked = [source[i].conversation for i in range(min(SAMPLES, len(source)))]
    asked = [dataclasses.replace(one, turns=one.turns[:1]) for one in asked]
    assistant = Assistant(run.program.model, params.merge(state.params, run.frozen), format, slots=SAMPLES)
    replies = assistant.replies(asked, SAMPLE_TOKENS, image_root=source.images)
    assert run.writer is not None
    for conversation, reply in zip(asked, replies):
        question = conversation.turns[0].text
        print(f"step {step}: {question!r} -> {reply.text!r}", flush=True)
        row = {"step": step, "id": conversation.id, "prompt": question, "answer": reply.text}
        metrics.write(run.writer, metrics.SAMPLES, row)


def _conclude(program: Program, workdir: epath.Path) -> None:
    if jax.process_index() == 0:
        print(f"done after {program.steps} steps. Chat: python -m llava_jax.chat --checkpoint {workdir} --image FILE | "
              f"benchmarks: python -m llava_jax.evaluate answer --checkpoint {workdir} --help | "
              f"export: python -m llava_jax.convert export --format hf {workdir} DST", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
