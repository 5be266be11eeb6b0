"""The training engine: a `Trainer` takes a config and a directory to a trained checkpoint, on one process or on many.

Every process makes the same calls. What they must have in common they agree on before anything is compiled, and
whatever ends one of them ends all of them, with the same exit code.
"""

import contextlib
import dataclasses
import functools
import hashlib
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from llava_jax import config as configs
from llava_jax import distributed, errors, files, params, sharding, typed
from llava_jax.checkpoint import lock, manager, model_json
from llava_jax.checkpoint.manager import Checkpoints, Saved
from llava_jax.checkpoint.model_json import Metadata, PromptMetadata
from llava_jax.data.datasets import of_dataset
from llava_jax.data.feed import Feed
from llava_jax.data.sources import Source
from llava_jax.distributed import Stop
from llava_jax.errors import UnusableCheckpoint, UsageError
from llava_jax.lifecycle import Sigterm
from llava_jax.models import presets, remat
from llava_jax.models.presets import LlavaConfig
from llava_jax.prompt import anyres, video
from llava_jax.prompt.encode import Format
from llava_jax.train import fitting, init, inputs, learning, loop, metrics, settings
from llava_jax.train import hooks as built_in
from llava_jax.train.loop import Hook, Run
from llava_jax.train.loss import Loss
from llava_jax.train.metrics import Writer
from llava_jax.train.program import Program
from llava_jax.train.step import State


class Trainer:
    """One training run: a config, a directory, and what is trained on.

        trainer = Trainer(config.load("configs/llava15_7b_task.py"), workdir="runs/task")
        trainer.fit()
        print(trainer.evaluate())

    A run is what its directory holds. The same config on the same directory goes on after its newest checkpoint, in
    this process or another, and every later loss is what it would have been. While a run is at work no other may write
    to its directory.

    It changes nothing of its process: no signal handler, no watchdog, no setting of JAX or of logging. What fails is
    raised, as an exception of `llava_jax.errors`. It may be called in any thread, and in a notebook. Of several
    processes (LLAVA_JAX_MULTIHOST=1) all make the same calls, and the first to fail ends all of them.

    Attributes:
      config: what the run is told.
    """

    def __init__(
        self, config: configs.Config, dataset: Any = None, loss: Loss | None = None, hooks: Sequence[Hook] = (),
        workdir: epath.PathLike | None = None,
    ):  # fmt: skip
        """
        Args:
          config: of `llava_jax.config.load`, or made in Python.
          dataset: a `data.datasets.Dataset`, which is trained on in place of the config's `data.sources`.
          loss: what is minimised, in place of the cross-entropy; see `train.loss`.
          hooks: called after every so many updates, beside those that the config asks for.
          workdir: of checkpoints and logs, on a disk or in a bucket; None: a new temporary directory.

        Raises:
          UsageError: `log.wandb` wants a package that is missing, or processes share devices and nobody said so.
        """
        distributed.join()
        if dataset is not None:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=()))
        self.config = config
        self._dataset, self._loss, self._user_hooks, self._workdir = dataset, loss, tuple(hooks), workdir
        self._stop = Stop()
        self._held: tuple[State, Any] | None = None  # the state and the frozen parameters, but for while `fit` has them
        self._checkpoints: Checkpoints | None = None  # of a `fit` that is under way
        self._warnings = list[str]()
        with self._together():
            if distributed.index() == 0:  # it alone logs
                metrics.check(config.log)

    @functools.cached_property
    def workdir(self) -> epath.Path:
        """The run's directory."""
        return epath.Path(tempfile.mkdtemp(prefix="llava_jax_") if self._workdir is None else self._workdir)

    @functools.cached_property
    def program(self) -> Program:
        """The model, the optimizer, the abstract state and the jitted steps, for this machine's devices.

        No array is made; `model.remat=auto` compiles the step, for which all processes wait for each other. Where the
        config says epochs, the records are opened, whose number decides the steps.
        """
        return fitting.resolve(self.config, self._sizes, self._steps, self._loss)

    @property
    def step(self) -> int:
        """Updates that the weights have had which `evaluate` takes."""
        return int(self._current()[0].step)

    @functools.cached_property
    def _sizes(self) -> LlavaConfig:
        return inputs.model_config(self.config.model)

    @functools.cached_property
    def _format(self) -> Format:
        return inputs.format_of(self.config, self._sizes)

    @functools.cached_property
    def _sources(self) -> tuple[list[Source], list[Source]]:
        return inputs.open_sources(self.config, self._dataset)

    @functools.cached_property
    def _feed(self) -> Feed:
        return inputs.feed(self.config, self._format, self._sources[0], self.workdir)

    @property
    def _steps(self) -> int:
        train = self.config.train
        return train.steps or self._feed.steps_of(train.epochs or 0)

    def fit(self, sigterm: Sigterm | None = None) -> bool:
        """Trains to the last step, from the newest checkpoint of `workdir` or from the beginning.

        Args:
          sigterm: of a process whose only work this is; see `process.run`.

        Returns:
          True at the last step; False where `stop` was called: all is saved, and `fit` goes on from there.

        Raises:
          the exceptions of `llava_jax.errors`, each of which says what to do about it.
        """
        sigterm = Sigterm() if sigterm is None else sigterm
        try:
            with self._opened() as checkpoints, contextlib.ExitStack() as stack:
                (state, frozen), self._held, self._checkpoints = self._held, None, checkpoints
                writer = _writer(self.workdir, self.config, int(state.step))
                if writer is not None:
                    stack.push(_closing(functools.partial(metrics.close, writer)))
                run = Run(self.program, self.config, frozen, self._feed, checkpoints, writer, self._stop,
                          warnings=self._warnings)  # fmt: skip
                sigterm.react(functools.partial(_stop_by_signal, run.stop))
                hooked = dataclasses.replace(run, hooks=self._hooks(run, int(state.step)))
                code, state = loop.train(hooked, state)
                sigterm.react(None)  # what is left takes seconds
                self._held = state, frozen
        finally:
            self._checkpoints, self._stop = None, Stop()
        if code == errors.DONE:
            loop.warn([], [*self._warnings, *self._feed.tally.lines()])
        return code == errors.DONE

    def stop(self) -> None:
        """Asks a `fit` that is under way in another thread, or called next, to stop after a step and to save."""
        self._stop.request()

    def evaluate(self, dataset: Any = None) -> float | None:
        """The mean loss over all supervised tokens of records that are not trained on.

        The weights are those that `fit` ended with or, where it was not called, those that it would begin with. In a
        hook they are those of its step.

        Args:
          dataset: a `data.datasets.Dataset`; None: the config's `data.validation` and what `data.hold_out` keeps.

        Returns:
          the loss; None where `stop` was called meanwhile.

        Raises:
          UsageError: there are no such records. And as `fit`.
        """
        with self._together():
            sources = self._sources[1] if dataset is None else [of_dataset(dataset)]
            if not sources:
                raise UsageError("no records are held out: give `evaluate` a dataset, or the config data.hold_out or "
                                 "data.validation")  # fmt: skip
            state, frozen = self._current()
            held_out = inputs.held_out_feed(self.config, self._format, sources, self.workdir)
            return loop.validate(self.program, state.params, frozen, held_out, self._stop)

    def save(self) -> epath.Path:
        """Writes a checkpoint of the weights that `evaluate` would take, unless it is there; returns when it is whole.

        `fit` saves by itself, every `checkpoint.every` steps and at its end: this is for a hook.

        Returns:
          `workdir`, which `llava_jax.load` opens.

        Raises:
          SaveFailed, Unreachable: it could not be written. And as `fit`.
        """
        with self._together() as stack:
            checkpoints = self._checkpoints or stack.enter_context(self._opened())
            state, _ = self._held
            step, rest = int(state.step), {"step": state.step, "opt_state": state.opt_state}
            manager.save(checkpoints, Saved(step, state.params, rest, self._feed.state(step)))
            manager.wait(checkpoints)
        return self.workdir

    def _current(self) -> tuple[State, Any]:
        if self._held is None:
            with self._opened():
                pass
        return self._held

    @contextlib.contextmanager
    def _together(self) -> Iterator[contextlib.ExitStack]:
        """Of several processes one that fails in the block ends the others, which would wait for it."""
        with contextlib.ExitStack() as stack:
            if distributed.count() > 1:
                stack.push(functools.partial(distributed.end_together, self.workdir))
            yield stack

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Checkpoints]:
        """The directory, which no other run has meanwhile. `_held` is then what it holds, or the first values."""
        self._held = None  # the devices may not hold it twice
        with self._together() as stack:
            format, _ = self._format, self._sources  # what can be wrong with them is said before a directory is made
            _check_shared(self.workdir)
            if distributed.index() == 0:
                stack.enter_context(lock.hold(self.workdir, self._lost))
            distributed.agree(_common(self.config, self._feed, self._steps))
            program = self.program
            _introduce(program, self._feed, self.workdir)
            self._warn_before()
            settings.check(self.workdir, self.config)
            settings.check_model(self.workdir, self._sizes, format.tokenizer.files())
            checkpoints = manager.open_checkpoints(self.workdir, self.config.checkpoint.keep)
            stack.push(_closing(functools.partial(manager.close, checkpoints)))
            self._held = _restore(program, checkpoints, self._feed)
            if self._held is None:
                self._feed.rewind()
                self._held = _begin(program, self.config, format, self.workdir)
            yield checkpoints

    def _lost(self, message: str) -> None:
        """Another run has taken over the directory: nothing more may be written there."""
        if distributed.count() > 1:
            distributed.leave(errors.USAGE, message)
        self._stop.fail(UsageError(message))

    def _warn_before(self) -> None:
        rates, parts = loop.highest_rates(self.program, self.config.train), sharding.shards(self.program.mesh, "batch")
        feed, self._warnings = self._feed, []
        loop.warn(self._warnings, learning.before(self.config, rates, feed.samples, feed.step_samples, parts))

    def _hooks(self, run: Run, step: int) -> list[Hook]:
        (trained, held_out), train = self._sources, self.config.train
        made = list[Hook]()
        if train.eval_every:
            feed = inputs.held_out_feed(self.config, self._format, held_out, self.workdir)
            made.append(built_in.validation(run, feed, step))
        if train.sample_every:
            made.append(built_in.samples(run, self._format, (held_out or trained)[0]))
        return [*made, *(self._with_state(hook, run.frozen) for hook in self._user_hooks)]

    def _with_state(self, hook: Hook, frozen: Any) -> Hook:
        """The hook, with `evaluate` and `save` of the state of its step."""

        def call(step: int, state: State, stop: Stop) -> None:
            self._held = state, frozen
            try:
                hook.call(step, state, stop)
            finally:
                self._held = None  # the next step donates it

        return hook._replace(call=call)


def _closing(close: Callable[[], None]) -> Callable[..., bool]:
    """An exit callback. Of several processes one that fails waits for nobody: they may be waiting for it."""

    def leave(kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None or distributed.count() == 1:
            close()
        return False

    return leave


def _stop_by_signal(stop: Stop) -> None:
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


def _introduce(program: Program, pipeline: Feed, workdir: epath.Path) -> None:
    if distributed.index():
        return
    print(f"{_counted(program.state.params)} parameters are trainable, {_counted(program.frozen)} are frozen in "
          f"{program.model.dtype}")  # fmt: skip
    if not isinstance(program.model.remat, str):
        print(f"rematerialisation of layers: {remat.describe(program.model.remat)}")
    sizes = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    print(f"mesh: {sizes}; {pipeline.records:,} records, {program.steps:,} steps of {pipeline.contents}; "
          f"workdir {workdir}", flush=True)  # fmt: skip


def _counted(tree: Mapping[str, Any]) -> str:
    """"21,000,000 (projector 20,979,712, ...)"."""
    parts = ", ".join(f"{name} {params.count(part):,}" for name, part in tree.items())
    return f"{params.count(tree):,} ({parts})" if parts else "0"


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
        prompt = PromptMetadata(config.prompt.template, format.tokenizer.legacy, config.prompt.image_mode,
                                config.prompt.image_start_end, anyres.to_json(format.tiling),
                                video.to_json(format.video))  # fmt: skip
        metadata = Metadata(presets.config_to_json(program.model.config), prompt, init.bases(program, sources))
        model_json.write(workdir, metadata, format.tokenizer.files())
        settings.write(workdir, config)
    return init.state(program, sources, config.train.seed), init.frozen(program, sources)


def _writer(workdir: epath.Path, config: configs.Config, step: int) -> Writer | None:
    if distributed.index():
        return None
    return metrics.open_writer(workdir, config.log, step, typed.describe(config))
