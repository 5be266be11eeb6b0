"""Runs a program over a pipeline: logs, checkpoints, hooks, and the ways a run ends early.

The host never waits for the step it has just begun. It reads the scalars of the one before, which is done or about
to be, so the device always has work; only a checkpoint or a hook waits for the last step.
"""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from llava_jax import config as configs
from llava_jax import distributed, errors, lifecycle
from llava_jax.batch import AnyBatch
from llava_jax.checkpoint import manager
from llava_jax.checkpoint.manager import Checkpoints, Saved
from llava_jax.distributed import Stop
from llava_jax.errors import NonFinite
from llava_jax.train import learning, measure, metrics, optimizer
from llava_jax.train.measure import Counts, FlopsMeter, RecompileWatch, Tracer, Window
from llava_jax.train.metrics import Writer
from llava_jax.train.program import Program
from llava_jax.train.step import Metrics, State


@runtime_checkable
class Batches(Protocol):
    """What `data.pipeline.Pipeline` is to the loop: this process's rows, step after step, and where they stand."""

    def __iter__(self) -> Iterator[tuple[AnyBatch, Sequence[str]]]: ...

    def state(self) -> dict[str, Any]: ...


def goes_on() -> str:
    """What `Hook.ends` is where a hook never ends a run."""
    return ""


class Hook(NamedTuple):
    """`call(step, state, stop)` after every `every` updates; it writes a row for the step into `log`.

    `ends()` says why the run ends now, the same on all processes; "": it goes on.

    A hook that takes long passes points of `stop` on the way, and comes back at once where it is to stop: its row is
    then missing, so the next start calls it again. log: "" of a hook that writes no rows; it is called no second time.
    """

    every: int
    call: Callable[[int, State, Stop], None]
    log: str = ""
    ends: Callable[[], str] = goes_on


@dataclass(frozen=True)
class Run:
    """All that a run works with. `writer` is None on processes other than the first."""

    program: Program
    config: configs.Config
    frozen: Mapping[str, Any]
    pipeline: Batches
    checkpoints: Checkpoints
    writer: Writer | None
    stop: Stop
    hooks: Sequence[Hook] = ()
    warnings: list[str] = field(default_factory=list)  # each is printed once, and once more at the end


class Progress(NamedTuple):
    """What the reports so far have added up to."""

    report: Window  # since the last update was reported
    line: Window  # since the last line was printed
    bad_in_row: int = 0
    line_step: int | None = None  # after which update it was printed; None: there was no line yet


class Waiting(NamedTuple):
    """An update that the device may still be busy with."""

    step: int
    metrics: Metrics
    counts: Counts
    ids: Sequence[str]


def train(run: Run, state: State) -> tuple[int, State]:
    """Updates from `state` to the program's last step, or to where a hook ends the run; (DONE or PREEMPTED, the state).
    The state given is donated.

    Hooks that were due at the first state, and have not written their row, are called before the first update.

    Raises:
      NonFinite: `train.max_nonfinite` updates in a row were skipped.
      DataError: a bad record, or more of them than the budget allows.
      SaveFailed: a checkpoint could not be written.
    """
    first, last = int(state.step) + 1, run.program.steps
    rates = highest_rates(run.program, run.config.train)
    features, recompiles = run.program.model.config.image_features, RecompileWatch()
    now = time.monotonic()
    progress, waiting = Progress(Window(now), Window(now)), None
    tracer = Tracer(run.checkpoints.directory, run.config.profile, first)
    batches = iter(run.pipeline)
    with measure.compilations() as built, contextlib.closing(tracer):
        report = functools.partial(_report, run, measure.flops_meter(run.program), rates, built)
        if _call_hooks(run, _missed(run, first - 1, last), first - 1, state):
            return errors.PREEMPTED, state
        if _is_over(run, first - 1):
            return errors.DONE, state
        for step in range(first, last + 1):
            batch, ids, progress = _next(batches, progress)
            tracer.before(step, state)
            before = built()
            state, scalars = run.program.step(state, run.frozen, run.program.put(batch))
            recompiles = recompiles.after(step, batch, built() - before)
            if waiting is not None:
                progress = report(progress, waiting)
                lifecycle.beat()
            waiting = Waiting(step, scalars, measure.count(batch, features, run.program.rows), ids)
            stop, due = run.stop.point(), [hook for hook in run.hooks if step % hook.every == 0]
            if stop or due or step == last or step % run.config.checkpoint.every == 0:
                progress, waiting = report(progress, waiting), None
                if stop or step == last or step % run.config.checkpoint.every == 0:
                    save(run, step, state)
                # The time that is left may be short: hooks that are due are called by the next start.
                if stop or _call_hooks(run, due, step, state):
                    return _preempted(run, step, state), state
                if _is_over(run, step):
                    save(run, step, state)
                    break
                progress = _without(progress, time.monotonic() - progress.report.begun)
    return errors.DONE, state


def validate(
    program: Program, trainable: Mapping[str, Any], frozen: Mapping[str, Any], held_out: Iterable[Any], stop: Stop
) -> float | None:
    """The mean loss over all supervised tokens of one pass over held-out data; None: `stop` says to stop."""
    total = tokens = 0.0
    for batch, _ in held_out:
        sums = jax.device_get(program.evaluate(trainable, frozen, program.put(batch)))
        total, tokens = total + float(sums[0]), tokens + float(sums[1])
        lifecycle.beat()
        if stop.point():
            return None
    return total / max(1.0, tokens)


def _preempted(run: Run, step: int, state: State) -> int:
    """Brings the state to disk."""
    save(run, step, state)
    manager.wait(run.checkpoints)
    _say(f"step {step}: preempted and saved; the same command goes on from here")
    return errors.PREEMPTED


def _missed(run: Run, step: int, last: int) -> list[Hook]:
    """The hooks that are due after `step` and have written no row for it: it was saved before a kill or a stop.

    A run that is finished calls each hook once, so that it can be evaluated by the command that trained it.
    """
    due = [hook for hook in run.hooks if hook.log and step and (step == last or step % hook.every == 0)]

    def is_missing(log: str) -> bool:
        return not any(row["step"] == step for row in metrics.read(run.checkpoints.directory, log))

    # Process 0 writes the logs.
    mine = [hook.log for hook in due if is_missing(hook.log)] if distributed.index() == 0 else []
    logs = distributed.exchange("missed hooks", mine)[0]
    return [hook for hook in due if hook.log in logs]


def save(run: Run, step: int, state: State) -> None:
    """Begins to save a step, where it is not there already; all processes call it."""
    rest = {"step": state.step, "opt_state": state.opt_state}
    manager.save(run.checkpoints, Saved(step, state.params, rest, run.pipeline.state()))
    if run.writer is not None:
        metrics.flush(run.writer)
    lifecycle.beat()


def _call_hooks(run: Run, hooks: Sequence[Hook], step: int, state: State) -> bool:
    """Calls hooks; whether one of them was told to stop."""
    for hook in hooks:
        hook.call(step, state, run.stop)
        lifecycle.beat()
        if run.stop.point():
            return True
    return False


def _is_over(run: Run, step: int) -> bool:
    """Whether a hook ends the run."""
    why = next(filter(None, (hook.ends() for hook in run.hooks)), "")
    if why:
        _say(f"step {step}: {why}: the run ends here")
    return bool(why)


def _next(
    batches: Iterator[tuple[AnyBatch, Sequence[str]]], progress: Progress
) -> tuple[AnyBatch, Sequence[str], Progress]:
    """The next batch, and progress with the time that the host waited for it."""
    begun = time.monotonic()
    batch, ids = next(batches)
    secs = time.monotonic() - begun
    report, line = (since._replace(waited=since.waited + secs) for since in (progress.report, progress.line))
    return batch, ids, progress._replace(report=report, line=line)


def _report(
    run: Run, flops_meter: FlopsMeter, rates: np.ndarray, built: Callable[[], int], progress: Progress, done: Waiting
) -> Progress:
    """Writes down one update, waiting for it if need be. Raises NonFinite."""
    scalars = Metrics(*(x.item() for x in jax.device_get(done.metrics)))
    now = time.monotonic()
    flops = flops_meter.flops(done.counts)
    report, line = (since.plus(done.counts, flops) for since in (progress.report, progress.line))
    row = {"step": done.step, "loss": scalars.loss, "grad_norm": scalars.grad_norm, "tokens": scalars.tokens,
           "lr": float(rates[done.step - 1]), "secs": round(now - report.begun, 4), "positions": done.counts.tokens,
           "fill": done.counts.fill, "image_fill": done.counts.image_fill, "flops": flops,
           "hbm_peak_bytes": measure.hbm_peak_bytes(), "compiles": built()}  # fmt: skip
    if progress.line_step is not None:  # compiling is in the first one's time
        row |= measure.speeds(flops_meter, report, now)
    if not scalars.finite:
        row |= {"skipped": True, "ids": list(done.ids)}
        records = ", ".join(map(repr, done.ids))
        print(f"step {done.step}: loss {scalars.loss}, grad_norm {scalars.grad_norm}: one of them or the update is not "
              f"finite, so it is skipped; records: {records}", file=sys.stderr, flush=True)  # fmt: skip
    if run.writer is not None:
        metrics.write(run.writer, metrics.STEPS, row)
    if scalars.finite:
        warmup = math.ceil(run.config.train.warmup_ratio * run.program.steps)
        warn(run.warnings, learning.after(row, run.program.model.config.llm, warmup))
    bad_in_row = 0 if scalars.finite else progress.bad_in_row + 1
    if bad_in_row >= run.config.train.max_nonfinite:
        raise NonFinite(
            f"step {done.step}: {bad_in_row} updates in a row were not finite (train.max_nonfinite); "
            f"{run.checkpoints.directory} holds none of them. Look at the records named above, or lower train.lr"
        )
    progress = Progress(Window(now), line, bad_in_row, progress.line_step)
    if done.step % run.config.log.every == 0 or done.step == run.program.steps or progress.line_step is None:
        return _show(run, flops_meter, progress, row)
    return progress


def _without(progress: Progress, secs: float) -> Progress:
    """Progress with the seconds that a checkpoint and hooks took left out of the speed."""
    report, line = (since._replace(begun=since.begun + secs) for since in (progress.report, progress.line))
    return progress._replace(report=report, line=line)


def _show(run: Run, flops_meter: FlopsMeter, progress: Progress, row: Mapping[str, Any]) -> Progress:
    """Prints the line of progress; the first has no speed, as compiling is in its time."""
    now = progress.report.begun
    passed = max(1e-9, now - progress.line.begun)
    if progress.line_step is None:
        speed = f"after {passed:.1f} s of compiling and computing"
    else:
        rate, speeds = (row["step"] - progress.line_step) / passed, measure.speeds(flops_meter, progress.line, now)
        mfu = "" if speeds["mfu"] is None else f"MFU {speeds['mfu']:.1%}  "
        left = int((run.program.steps - row["step"]) / rate)
        eta = f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        speed = (f"{rate:.3g} steps/s  {speeds['positions_per_sec']:,.0f} tokens/s  {mfu}"
                 f"data_wait {speeds['data_wait']:.0%}  {eta}")  # fmt: skip
    _say(f"step {row['step']}/{run.program.steps}  loss {row['loss']:.4f}  grad_norm {row['grad_norm']:.3g}  "
         f"lr {row['lr']:.3g}  {speed}")  # fmt: skip
    return progress._replace(line=Window(now), line_step=row["step"])


def highest_rates(program: Program, train: configs.Train) -> np.ndarray:
    """float64 [steps]: the highest learning rate of any parameter at each update."""
    rows = [rate if isinstance(rate, tuple) else (rate,) for rate in program.rates.values()]
    return max(rate or 0.0 for row in rows for rate in row) * optimizer.schedule(train, program.steps)


def warn(warnings: list[str], new: Sequence[str]) -> None:
    """Prints the warnings that are new."""
    for warning in (one for one in new if one not in warnings):
        warnings.append(warning)
        _say(f"warning: {warning}")


def _say(line: str) -> None:
    if distributed.index() == 0:
        print(line, flush=True)
