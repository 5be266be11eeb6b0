"""Runs a program over a pipeline: logs, checkpoints, hooks, and the ways a run ends early.

The host never waits for the step it has just begun. It reads the scalars of the one before, which is done or about
to be, so the device always has work; only a checkpoint or a hook waits for the last step.
"""

import contextlib
import faulthandler
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils

from llava_jax import config as configs
from llava_jax.batch import Batch
from llava_jax.checkpoint import manager
from llava_jax.checkpoint.manager import Checkpoints, Saved
from llava_jax.errors import NonFinite
from llava_jax.train import measure, metrics, optimizer
from llava_jax.train.measure import Counts, Since, Surprise, Tracer, Yardstick
from llava_jax.train.metrics import Writer
from llava_jax.train.program import Program
from llava_jax.train.step import Metrics, State

DONE, NONFINITE, PREEMPTED, STUCK = 0, 70, 75, 42

# Longer than any compilation or validation should take; a collective whose peer hangs never comes back at all.
WATCHDOG_SECS = 1800.0


@runtime_checkable
class Batches(Protocol):
    """What `data.pipeline.Pipeline` is to the loop: this process's rows, step after step, and where they stand."""

    def __iter__(self) -> Iterator[tuple[Batch, Sequence[str]]]: ...

    def state(self) -> dict[str, Any]: ...


class Hook(NamedTuple):
    """`call(step, state)` after every `every` updates."""

    every: int
    call: Callable[[int, State], None]


@dataclass(frozen=True)
class Run:
    """All that a run works with. `writer` is None on processes other than the first."""

    program: Program
    config: configs.Config
    frozen: Mapping[str, Any]
    pipeline: Batches
    checkpoints: Checkpoints
    writer: Writer | None
    hooks: Sequence[Hook] = ()


class Progress(NamedTuple):
    """What the reports so far have added up to."""

    report: Since  # since the last update was reported
    line: Since  # since the last line was printed
    bad_in_row: int = 0
    line_step: int | None = None  # after which update it was printed; None: there was no line yet


class Waiting(NamedTuple):
    """An update that the device may still be busy with."""

    step: int
    metrics: Metrics
    counts: Counts
    ids: Sequence[str]


def train(run: Run, state: State, watchdog_secs: float = WATCHDOG_SECS) -> tuple[int, State]:
    """Updates from `state` to the program's last step; (DONE or PREEMPTED, the state). The state given is donated.

    Where no update is left the hooks are called once, so that a finished run can still be evaluated.

    Raises:
      NonFinite: `train.max_nonfinite` updates in a row were skipped.
      DataError: a bad record, or more of them than the budget allows.
      SaveFailed: a checkpoint could not be written.
    """
    first, last = int(state.step) + 1, run.program.steps
    rates = _highest_rate(run.program) * optimizer.schedule(run.config.train, last)
    features, surprise = run.program.model.config.image_features, Surprise()
    now = time.monotonic()
    progress, waiting = Progress(Since(now), Since(now)), None
    tracer = Tracer(run.checkpoints.directory, run.config.profile, first)
    batches = iter(run.pipeline)
    with (
        _preemption() as preempted, _watchdog(watchdog_secs) as beat, measure.compilations() as built,
        contextlib.closing(tracer),
    ):
        report = functools.partial(_report, run, measure.yardstick(run.program), rates, built)
        for step in range(first, last + 1):
            batch, ids, progress = _next(batches, progress)
            tracer.before(step, state)
            before = built()
            state, scalars = run.program.step(state, run.frozen, run.program.put(batch))
            surprise = surprise.after(step, batch, built() - before)
            if waiting is not None:
                progress = report(progress, waiting)
                beat()
            waiting = Waiting(step, scalars, measure.count(batch, features, jax.process_count()), ids)
            stop = preempted(step)
            if stop or step == last or _is_due(run, step):
                progress, waiting = report(progress, waiting), None
                _save(run, step, state, stop or step == last)
                if stop and step < last:  # the time left may be short: no hooks
                    manager.wait(run.checkpoints)
                    _say(f"step {step}: preempted and saved; the same command goes on from here")
                    return PREEMPTED, state
                _call_hooks(run, step, state)
                beat()
                progress = _without(progress, time.monotonic() - progress.report.begun)
    if first > last:
        for hook in run.hooks:
            hook.call(last, state)
    return DONE, state


def validate(
    program: Program, trainable: Mapping[str, Any], frozen: Mapping[str, Any], held_out: Iterable[Any]
) -> float:
    """The mean loss over all supervised tokens of one pass over held-out data."""
    total = tokens = 0.0
    for batch, _ in held_out:
        sums = jax.device_get(program.evaluate(trainable, frozen, program.put(batch)))
        total, tokens = total + float(sums[0]), tokens + float(sums[1])
    return total / max(1.0, tokens)


def _is_due(run: Run, step: int) -> bool:
    """Whether anything wants the state after this update."""
    return step % run.config.checkpoint.every == 0 or any(step % hook.every == 0 for hook in run.hooks)


def _save(run: Run, step: int, state: State, forced: bool) -> None:
    if not forced and step % run.config.checkpoint.every:
        return
    rest = {"step": state.step, "opt_state": state.opt_state}
    manager.save(run.checkpoints, Saved(step, state.params, rest, run.pipeline.state()))
    if run.writer is not None:
        metrics.flush(run.writer)


def _call_hooks(run: Run, step: int, state: State) -> None:
    for hook in run.hooks:
        if step % hook.every == 0:
            hook.call(step, state)


def _next(batches: Iterator[tuple[Batch, Sequence[str]]], progress: Progress) -> tuple[Batch, Sequence[str], Progress]:
    """The next batch, and progress with the time that the host waited for it."""
    begun = time.monotonic()
    batch, ids = next(batches)
    secs = time.monotonic() - begun
    report, line = (since._replace(waited=since.waited + secs) for since in (progress.report, progress.line))
    return batch, ids, progress._replace(report=report, line=line)


def _report(
    run: Run, yardstick: Yardstick, rates: np.ndarray, built: Callable[[], int], progress: Progress, done: Waiting
) -> Progress:
    """Writes down one update, waiting for it if need be. Raises NonFinite."""
    scalars = Metrics(*(x.item() for x in jax.device_get(done.metrics)))
    now = time.monotonic()
    flops = yardstick.flops(done.counts)
    report, line = (since.plus(done.counts, flops) for since in (progress.report, progress.line))
    row = {"step": done.step, "loss": scalars.loss, "grad_norm": scalars.grad_norm, "tokens": scalars.tokens,
           "rate": float(rates[done.step - 1]), "secs": round(now - report.begun, 4), "positions": done.counts.tokens,
           "fill": done.counts.fill, "image_fill": done.counts.image_fill, "flops": flops,
           "hbm_peak_bytes": measure.hbm_peak_bytes(), "compiles": built()}  # fmt: skip
    if progress.line_step is not None:  # compiling is in the first one's time
        row |= measure.speeds(yardstick, report, now)
    if not scalars.finite:
        row |= {"skipped": True, "ids": list(done.ids)}
        records = ", ".join(map(repr, done.ids))
        print(f"step {done.step}: loss {scalars.loss}, gradient {scalars.grad_norm}: one of them or the update is not "
              f"finite, so it is skipped; records: {records}", file=sys.stderr, flush=True)  # fmt: skip
    if run.writer is not None:
        metrics.write(run.writer, metrics.STEPS, row)
    bad_in_row = 0 if scalars.finite else progress.bad_in_row + 1
    if bad_in_row >= run.config.train.max_nonfinite:
        raise NonFinite(
            f"step {done.step}: {bad_in_row} updates in a row were not finite (train.max_nonfinite); "
            f"{run.checkpoints.directory} holds none of them. Look at the records named above, or lower train.lr"
        )
    progress = Progress(Since(now), line, bad_in_row, progress.line_step)
    if done.step % run.config.log.every == 0 or done.step == run.program.steps or progress.line_step is None:
        return _show(run, yardstick, progress, row)
    return progress


def _without(progress: Progress, secs: float) -> Progress:
    """Progress with the seconds that a checkpoint and hooks took left out of the speed."""
    report, line = (since._replace(begun=since.begun + secs) for since in (progress.report, progress.line))
    return progress._replace(report=report, line=line)


def _show(run: Run, yardstick: Yardstick, progress: Progress, row: Mapping[str, Any]) -> Progress:
    """Prints the line of progress; the first has no speed, as compiling is in its time."""
    now = progress.report.begun
    passed = max(1e-9, now - progress.line.begun)
    if progress.line_step is None:
        speed = f"after {passed:.1f} s of compiling and computing"
    else:
        rate, speeds = (row["step"] - progress.line_step) / passed, measure.speeds(yardstick, progress.line, now)
        mfu = "" if speeds["mfu"] is None else f"MFU {speeds['mfu']:.1%}  "
        left = int((run.program.steps - row["step"]) / rate)
        speed = (f"{rate:.3g} steps/s  {speeds['positions_per_sec']:,.0f} tokens/s  {mfu}waits {speeds['wait']:.0%}  "
                 f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")  # fmt: skip
    _say(f"step {row['step']}/{run.program.steps}  loss {row['loss']:.4f}  gradient {row['grad_norm']:.3g}  "
         f"rate {row['rate']:.3g}  {speed}")  # fmt: skip
    return progress._replace(line=Since(now), line_step=row["step"])


def _highest_rate(program: Program) -> float:
    rows = [rate if isinstance(rate, tuple) else (rate,) for rate in program.rates.values()]
    return max(rate or 0.0 for row in rows for rate in row)


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


@contextlib.contextmanager
def _preemption() -> Iterator[Callable[[int], bool]]:
    """`preempted(step)`, to be asked after every step: whether this is the step to stop at after a SIGTERM.

    Many processes must stop at the same step, wherever the signal came: JAX agrees on one (its notifier lives in
    `jax.distributed`, and a handler of ours would disable it). A single process has no such notifier and its own.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield lambda step: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _watchdog(limit_secs: float) -> Iterator[Callable[[], None]]:
    """`beat()`, to be called as updates finish. After `limit_secs` without one all stacks are dumped, and that is it.

    A process that hangs while its heartbeat thread lives is noticed by nobody else, JAX included (issue 38503).
    """
    last = [time.monotonic()]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(min(1.0, limit_secs / 4)):
            if time.monotonic() - last[0] > limit_secs:
                print(f"no update has finished for {limit_secs:.0f} s: all threads' stacks follow", file=sys.stderr)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(STUCK)

    def beat() -> None:
        last[0] = time.monotonic()

    threading.Thread(target=watch, daemon=True, name="watchdog").start()
    try:
        yield beat
    finally:
        over.set()
