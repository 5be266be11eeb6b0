"""The training engine: from a config and a workdir to a trained checkpoint, on one process or on many.

Every process runs the same lines. What they must have in common they agree on before anything is compiled, and
whatever ends one of them ends all of them, with the same exit code.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import os
import secrets
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from llava_jax import config as configs
from llava_jax import distributed, errors, files, lifecycle, params, sharding, typed
from llava_jax.checkpoint import best, lock, manager, store
from llava_jax.checkpoint import card as cards
from llava_jax.checkpoint.card import Card, PromptCard
from llava_jax.checkpoint.manager import Checkpoints
from llava_jax.data.feed import Feed
from llava_jax.data.packed import Packed
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.sources import Source, hold_out, open_source
from llava_jax.distributed import Stop
from llava_jax.errors import DataError, UnusableCheckpoint, UsageError
from llava_jax.lifecycle import Sigterm
from llava_jax.models import presets
from llava_jax.models.presets import LlavaConfig
from llava_jax.prompt import ending, templates, tokenizer
from llava_jax.prompt.encode import Format
from llava_jax.train import hooks, init, learning, loop, metrics, settings
from llava_jax.train import program as programs
from llava_jax.train.loop import Hook, Run
from llava_jax.train.metrics import Writer
from llava_jax.train.program import Program
from llava_jax.train.step import State

ALL_BUT_ONE = 1 - 1e-9  # a skip budget


def train(config: configs.Config, workdir: epath.PathLike, sigterm: Sigterm) -> int:
    """Trains, or resumes; the exit code: 0 done, or 75 where SIGTERM stopped it after a save.

    Of several processes the first to fail ends all of them with its exit code, so an exception gets out of a single
    process only.

    Raises:
      the exceptions of `errors`; any other is a fault, whose traceback is in WORKDIR/error-PROCESS.txt.
    """
    workdir = epath.Path(workdir)
    with contextlib.ExitStack() as stack:
        stack.push(functools.partial(_end_together, workdir))
        distributed.join()
        sigterm.react(functools.partial(distributed.leave, errors.PREEMPTED, "SIGTERM before the first step: nothing "
                                        "is lost; the same command begins again"))  # fmt: skip
        stack.callback(sigterm.react, None)
        stack.enter_context(lifecycle.WATCHDOG.watching(config.train.watchdog_secs, distributed.leave))
        return _train(config, workdir, sigterm, stack)


def _end_together(
    workdir: epath.Path, kind: type[BaseException] | None, error: BaseException | None,
    trace: types.TracebackType | None,
) -> bool:  # fmt: skip
    """Ends the other processes where this one fails; writes down what no message of ours explains."""
    if error is None or isinstance(error, KeyboardInterrupt | SystemExit):
        return False
    code = errors.exit_code(error)
    message = f"error: {error}"
    if code is None and not distributed.is_ending():
        code, place = errors.CRASHED, workdir / f"error-{distributed.index()}.txt"
        text = "".join(traceback.format_exception(kind, error, trace))
        with contextlib.suppress(OSError, ValueError, *files.client_errors()):  # the disk may be what is wrong
            place.write_text(text)
            message = f"error: {type(error).__name__}, a fault of the program or a library; traceback: {place}"
        if distributed.count() > 1:
            print(text, file=sys.stderr, flush=True)
    if distributed.count() > 1:
        distributed.leave(errors.CRASHED if code is None else code, message)
    return False


def _train(config: configs.Config, workdir: epath.Path, sigterm: Sigterm, stack: contextlib.ExitStack) -> int:
    if distributed.index():  # process 0 speaks for all
        logging.getLogger("llava_jax").setLevel(logging.WARNING)
    else:
        metrics.check(config.log)  # here alone, as it alone logs
    _keep_compilations()
    model_config = _model_config(config.model)
    format = _format(config, model_config)
    sources, held_out = _sources(config)
    _check_shared(workdir)
    if distributed.index() == 0:
        stack.enter_context(lock.hold(workdir, functools.partial(distributed.leave, errors.USAGE)))
    pipeline = _pipeline(config, format, sources, workdir)
    steps = config.train.steps or pipeline.steps_of(config.train.epochs or 0)
    distributed.agree(_common(config, pipeline, steps))
    program = programs.build(config, model_config, steps)
    _introduce(program, pipeline, workdir)
    warnings = list[str]()
    rates = loop.highest_rates(program, config.train)
    parts = sharding.shards(program.mesh, "batch")
    loop.warn(warnings, learning.before(config, rates, pipeline.samples, pipeline.step_samples, parts))
    settings.check(workdir, config)
    _check_model(workdir, program, format)
    checkpoints = manager.open_checkpoints(workdir, config.checkpoint.keep)
    state, frozen = _restore(program, checkpoints, pipeline) or _begin(program, config, format, workdir)
    writer = _writer(workdir, config, int(state.step))
    run = Run(program, config, frozen, pipeline, checkpoints, writer, Stop(), warnings=warnings)
    sigterm.react(functools.partial(_stop, run.stop))
    with contextlib.ExitStack() as opened:
        opened.push(functools.partial(_close, run))
        hooked = dataclasses.replace(run, hooks=_hooks(run, format, held_out, int(state.step)))
        code, state = loop.train(hooked, state)
        sigterm.react(None)  # what is left takes seconds, and ends with 0
    if code == errors.DONE:
        loop.warn([], [*warnings, *pipeline.tally.lines()])
        _conclude(int(state.step), workdir, config.checkpoint.best)
    return code


def _close(run: Run, kind: Any, error: BaseException | None, trace: Any) -> bool:
    """Waits for the last save. Of several processes one that fails waits for nobody: they may be waiting for it."""
    if error is None or distributed.count() == 1:
        if run.writer is not None:
            metrics.close(run.writer)
        manager.close(run.checkpoints)
    return False


def _stop(stop: Stop) -> None:
    print("SIGTERM: stops after this step and saves", file=sys.stderr, flush=True)
    stop.request()


def _check_shared(workdir: epath.Path) -> None:
    """Refuses a workdir that some process does not see as process 0 does, before any work is done for it."""
    nonce = distributed.exchange("nonce", secrets.token_hex(8) if distributed.index() == 0 else "")[0]
    mark = workdir / f".shared-{nonce}"
    if distributed.index() == 0:
        files.make_directory(workdir)
        files.write_whole(mark, nonce.encode())
    distributed.exchange("the mark is written", True)
    sees = distributed.exchange("the mark is seen", files.exists(mark))
    if distributed.index() == 0:
        files.delete(mark)
    if not all(sees):
        raise UsageError(
            f"--workdir {workdir}: process {sees.index(False)} of {len(sees)} does not see what process 0 writes "
            "there: want a directory that all hosts share, such as gs://BUCKET/RUN"
        )


def _common(config: configs.Config, pipeline: Feed, steps: int) -> dict[str, Any]:
    """What all processes of a run must have in common: settings, code, data and the number of steps."""
    package = Path(__file__).parent.parent
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))).hexdigest()
    data = {f"data state {key}": value for key, value in pipeline.state().items()}
    return {**settings.common(config), "code of llava_jax": code, **data, "number of steps": steps}


def _keep_compilations() -> None:
    """Lets XLA keep what it compiles in the user's cache directory, unless JAX_COMPILATION_CACHE_DIR names another."""
    if jax.config.jax_compilation_cache_dir:
        return
    home = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("HOME") and Path(os.environ["HOME"]) / ".cache")
    if not home:  # a container's user without a home
        return
    folder = Path(home) / "llava_jax" / "compiled"
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


def format_of(config: configs.Config) -> Format:
    """How a run of this config encodes its records, for who does not train. Raises what `train` would before that."""
    return _format(config, _model_config(config.model))


def _format(config: configs.Config, model_config: LlavaConfig) -> Format:
    programs.check(config, model_config)  # before rows are planned, which an absurd length makes endless
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


def _sources(config: configs.Config) -> tuple[list[Source], list[Source]]:
    """(what is trained on, what only validates). What the hooks want is checked before anything large is read."""
    data = config.data
    if config.train.eval_every and not data.validation and not data.hold_out:
        raise UsageError(f"train.eval_every={config.train.eval_every} wants records, by --config.data.hold_out=0.02 "
                         "or --config.data.validation.0.path=FILE")  # fmt: skip
    held_out, sources = _open(data.validation), _open(data.sources)
    if not data.hold_out:
        return sources, held_out
    pairs = [hold_out(source, data.hold_out, config.train.seed) for source in sources]
    return [trained for trained, _ in pairs], [*held_out, *(rest for _, rest in pairs)]


def _pipeline(
    config: configs.Config, format: Format, sources: Sequence[Source], workdir: epath.Path, one_pass: bool = False
) -> Feed:
    data, mesh = config.data, sharding.make_mesh(dataclasses.asdict(config.mesh))
    part = programs.rows_here(data, mesh)
    shared = {
        "sources": sources, "format": format, "row_tokens": data.row_tokens, "images_per_group": data.images_per_group,
        "order": data.order, "seed": config.train.seed, "part": part,
        "skip_budget": data.skip_budget, "threads": data.threads, "cache_dir": str(workdir / "lengths"),
        "one_pass": one_pass,
    }  # fmt: skip
    if data.layout == "packed":
        return Packed(rows=programs.rows_of(data, mesh), rows_per_group=data.rows_per_group, **shared)
    return Pipeline(
        batch_samples=data.batch_samples, lengths=data.lengths,
        group_samples=math.gcd(data.batch_samples, config.train.group_samples),
        group_mean=config.train.loss == "group_mean" and not one_pass, **shared,
    )  # fmt: skip


def _introduce(program: Program, pipeline: Feed, workdir: epath.Path) -> None:
    if distributed.index():
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


def _check_model(workdir: epath.Path, program: Program, format: Format) -> None:
    """Refuses to resume with another model or tokenizer: `model.base` may have moved, but it must be what it was."""
    fault = _model_fault(workdir, program, format) if distributed.index() == 0 else ""
    if fault := distributed.exchange("model", fault)[0]:
        raise UsageError(fault)


def _model_fault(workdir: epath.Path, program: Program, format: Format) -> str:
    if not store.numbered(workdir):
        return ""
    before = params.flatten(presets.config_to_json(presets.config_from_json(dict(cards.read_card(workdir).model))))
    changed = typed.difference(before, params.flatten(presets.config_to_json(program.model.config)))
    if cards.read_tokenizer_files(workdir) != dict(format.tokenizer.files()):
        changed.append(f"the files of {workdir / cards.TOKENIZER}")
    return "" if not changed else (
        f"--workdir {workdir} holds a run of another model ({'; '.join(changed)}): model.base, model.preset and "
        "prompt.tokenizer may lie elsewhere than before, but must be what they were"
    )


def _restore(program: Program, checkpoints: Checkpoints, pipeline: Feed) -> tuple[State, Any] | None:
    rest = {"step": program.state.step, "opt_state": program.state.opt_state}
    saved = manager.restore(checkpoints, program.state.params, rest)
    if saved is None:
        return None
    if (step := int(saved.state["step"])) != saved.step:
        place = checkpoints.directory / str(saved.step)
        raise UnusableCheckpoint(f"{place} holds the state after step {step}: call it {step} again, or move it away")
    pipeline.restore(dict(saved.data))
    frozen = init.read(checkpoints.directory, params.flatten(program.frozen), saved.step)
    if distributed.index() == 0:
        print(f"goes on after step {saved.step} of {checkpoints.directory}", flush=True)
    return State(saved.state["step"], saved.params, saved.state["opt_state"]), frozen


def _begin(program: Program, config: configs.Config, format: Format, workdir: epath.Path) -> tuple[State, Any]:
    """First values, and the files that make the directory describe itself."""
    sources = init.resolve(program, config.init, workdir, config.train.seed)
    if distributed.index() == 0:
        prompt = PromptCard(config.prompt.template, format.tokenizer.legacy, config.prompt.image_mode,
                            config.prompt.image_start_end)  # fmt: skip
        card = Card(presets.config_to_json(program.model.config), prompt, init.bases(program, sources))
        cards.write_card(workdir, card, format.tokenizer.files())
        settings.write(workdir, config)
    return init.state(program, sources, config.train.seed), init.frozen(program, sources)


def _writer(workdir: epath.Path, config: configs.Config, step: int) -> Writer | None:
    if distributed.index():
        return None
    return metrics.open_writer(workdir, config.log, step, typed.describe(config))


def _hooks(run: Run, format: Format, held_out: Sequence[Source], step: int) -> list[Hook]:
    made, config = list[Hook](), run.config
    if config.train.eval_every:
        # A bad record is left out of the loss: it must not end a run that trains well.
        lenient = dataclasses.replace(config, data=dataclasses.replace(config.data, skip_budget=ALL_BUT_ONE))
        feed = _pipeline(lenient, format, held_out, run.checkpoints.directory, True)
        made.append(hooks.validation(run, feed, step))
    if config.train.sample_every:
        made.append(hooks.samples(run, format, (held_out or _open(config.data.sources))[0]))
    return made


def _conclude(step: int, workdir: epath.Path, keeps_best: bool) -> None:
    if distributed.index() == 0:
        found = best.lowest(best.read(workdir).rows) if keeps_best else None
        lowest = f", of which {found[0]} is the best (validation loss {found[1]:.4f}): --step best" if found else ""
        print(f"done after {step} steps{lowest}. Chat: python -m llava_jax.chat --checkpoint {workdir} --image FILE | "
              f"benchmarks: python -m llava_jax.evaluate answer --checkpoint {workdir} --help | "
              f"export: python -m llava_jax.convert export --format hf {workdir} DST", flush=True)  # fmt: skip
