"""A run that is killed, resumed, preempted, resumed again and taken to another mesh, against one that nobody disturbs.

Every loss and every bit of the state must be the same; on another mesh, where sums are taken in another order, the
state that is read is the same and losses agree.
"""

import contextlib
import dataclasses
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from llava_jax import config as configs
from llava_jax import distributed, errors, lifecycle
from llava_jax.checkpoint import manager, store
from llava_jax.checkpoint.manager import Saved
from llava_jax.distributed import Stop
from llava_jax.doctor import report
from llava_jax.doctor import trial as trials
from llava_jax.doctor.machine import Machine
from llava_jax.doctor.report import FAIL, OK, Line
from llava_jax.doctor.trial import Trial
from llava_jax.train import init, loop
from llava_jax.train.loop import Hook, Run
from llava_jax.train.step import State

EXPECTED = "losses and state bit for bit as undisturbed"
OTHER_MESH = 2e-6  # relative difference of losses
KILLED_STEP = 6  # in-process: saves are made after 4 and 8
MORE_STEPS = 3  # of each run after it was resumed
CHILD_SECS = 120.0
REMEDY = "do not train here: please send us the file of --json"


class Killed(Exception):
    """Ends a run in the middle of its steps."""


class Course(NamedTuple):
    """Steps of a run. state_sums: fingerprints of the state after the last of them."""

    first: int
    losses: list[float]
    state_sums: dict[str, Any]

    @property
    def last(self) -> int:
        return self.first + len(self.losses) - 1


def check(found: Machine) -> Iterator[Line]:
    """Lines about saving, killing, preempting and restoring."""
    # On accelerators float32 products are rounded to less by default, which would differ between meshes.
    with jax.default_matmul_precision("highest"), _shared_compilations(found), io.StringIO() as said:
        with contextlib.redirect_stdout(said):
            yield from _check(found)


def _check(found: Machine) -> Iterator[Line]:
    trial = trials.open_trial(found.sizes, len(found.devices), found.platform, found.local)
    workdir = found.folder / "run"
    how, fault = _kill(found, trial, workdir)
    if fault:
        yield Line("training: killed and resumed", FAIL, fault, EXPECTED, REMEDY)
        return
    resumed = _preempt(trial, workdir)
    if not resumed.losses:
        yield Line("training: killed and resumed", FAIL, "no step is left after the kill", EXPECTED, REMEDY)
        return
    again = _follow(trial, workdir)
    undisturbed = _from_begin(trial, resumed.last, again.last)
    figure = f"{how}, resumed after step {resumed.first - 1}"
    yield _same("training: killed and resumed", figure, resumed, undisturbed[0])
    figure = f"SIGTERM, saved and resumed after step {resumed.last}"
    yield _same("training: preempted and resumed", figure, again, undisturbed[1])
    yield _elsewhere(found, workdir, resumed, undisturbed[1])


@contextlib.contextmanager
def _shared_compilations(found: Machine) -> Iterator[None]:
    """What the child compiles need not be compiled here once more; the folder is deleted with the machine's own."""
    if jax.config.jax_compilation_cache_dir or not _has_child(found):
        yield
        return
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(found.local / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def _has_child(found: Machine) -> bool:
    """An accelerator's device belongs to one process, and so does a place in a job of several."""
    return found.platform == "cpu" and distributed.count() == 1


def _kill(found: Machine, trial: Trial, workdir: epath.Path) -> tuple[str, str]:
    """(how a run was ended in the middle, what went wrong instead); its saves are in `workdir`."""
    if _has_child(found):
        return _kill_child(trial, workdir)
    with contextlib.suppress(Killed):
        _run(trial, workdir, [Hook(KILLED_STEP, _killed, "doctor.jsonl")])
    return f"ended in step {KILLED_STEP} (no second process may use the devices)", ""


def _killed(step: int, state: State, stop: Stop) -> None:
    raise Killed


def _kill_child(trial: Trial, workdir: epath.Path) -> tuple[str, str]:
    """`train` in a process of its own, which SIGKILL ends some time after its first save."""
    words = [sys.executable, "-m", "llava_jax.train", *trial.words, "--workdir", str(workdir)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.0", "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + CHILD_SECS
            while child.poll() is None and time.monotonic() < end and store.latest_step(workdir) is None:
                time.sleep(0.1)
            time.sleep(0.2)  # into the steps after it, or into the next save
        finally:
            child.send_signal(signal.SIGKILL)
            code = child.wait()
        output.seek(0)
        last = "; ".join(output.read().splitlines()[-3:])
    if code != -signal.SIGKILL or store.latest_step(workdir) is None:
        return "", f"`train` in a process of its own saves nothing in {CHILD_SECS:.0f} s (exit code {code}): {last}"
    return "train killed by SIGKILL", ""


def _run(trial: Trial, workdir: epath.Path, hooks: Sequence[Hook]) -> tuple[int, Course]:
    """Trains from the newest save, or from the beginning, until a hook ends it; (exit code, the steps)."""
    program, losses = _recorded(trial)
    checkpoints = manager.open_checkpoints(workdir, trial.config.checkpoint.keep)
    try:
        pipeline = trials.open_pipeline(trial, program.rows)
        saved = _restored(trial, checkpoints)
        state = _first_state(trial) if saved is None else _state(saved)
        first = 1 if saved is None else saved.step + 1
        if saved is not None:
            pipeline.restore(dict(saved.data))
        run = Run(program, trial.config, _frozen(trial), pipeline, checkpoints, None, Stop(), hooks)
        code, state = loop.train(run, state)
    finally:
        manager.close(checkpoints)
    return code, Course(first, [float(loss) for loss in losses], _sums(state))


def _preempt(trial: Trial, workdir: epath.Path) -> Course:
    """Resumes, and trains on until SIGTERM to the last process stops all of them."""
    stop_at: list[int] = []

    def after(step: int, state: State, stop: Stop) -> None:
        stop_at.append(step)
        if len(stop_at) == MORE_STEPS and distributed.index() == distributed.count() - 1:
            with lifecycle.sigterm(stop.request) as notice:
                os.kill(os.getpid(), signal.SIGTERM)
                notice.received.wait(5.0)
        time.sleep(0.02)  # so that not many steps pass before all processes have heard it

    code, course = _run(trial, workdir, [Hook(1, after, "doctor.jsonl")])
    if code != errors.PREEMPTED:
        raise RuntimeError(f"SIGTERM did not stop the run in {len(course.losses)} steps")
    return course


def _follow(trial: Trial, workdir: epath.Path) -> Course:
    """Resumes after the preemption, for some steps."""
    checkpoints = manager.open_checkpoints(workdir, trial.config.checkpoint.keep)
    try:
        saved = _restored(trial, checkpoints)
    finally:
        manager.close(checkpoints)
    assert saved is not None, "the preempted run has saved nothing"
    losses, state = _steps(trial, _state(saved), saved.step, MORE_STEPS)
    return Course(saved.step + 1, losses, _sums(state))


def _from_begin(trial: Trial, *ends: int) -> list[Course]:
    """A run that nobody disturbs, up to each of some steps."""
    state, courses, losses = _first_state(trial), list[Course](), list[float]()
    for end in ends:
        more, state = _steps(trial, state, len(losses), end - len(losses))
        losses += more
        courses.append(Course(1, list(losses), _sums(state)))
    return courses


def _elsewhere(found: Machine, workdir: epath.Path, preempted: Course, undisturbed: Course) -> Line:
    """The preempted run on another mesh."""
    name = "training: on another mesh"
    sizes = other_mesh(found)
    if sizes is None:
        return report.skipped(name, "one device has one mesh")
    trial = trials.open_trial(sizes, len(found.devices), found.platform, found.local)
    checkpoints = manager.open_checkpoints(workdir, trial.config.checkpoint.keep)
    try:
        saved = _restored(trial, checkpoints)
    finally:
        manager.close(checkpoints)
    assert saved is not None, "the preempted run has saved nothing"
    sums = _sums(_state(saved))
    differ = [leaf for leaf, value in sums.items() if preempted.state_sums[leaf] != value]
    losses, _ = _steps(trial, _state(saved), saved.step, MORE_STEPS)
    expected = undisturbed.losses[saved.step : saved.step + MORE_STEPS]
    apart = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    mesh = ", ".join(f"{axis} {size}" for axis, size in trial.program.mesh.shape.items() if size > 1)
    expectation = f"the state bit for bit, losses within {OTHER_MESH:g}"
    if differ or apart > OTHER_MESH:
        fault = f"{mesh}: {len(differ)} of {len(sums)} arrays differ, losses by {apart:.1e}"
        return Line(name, FAIL, fault, expectation, REMEDY, detail=", ".join(differ))
    return Line(name, OK, f"{mesh}: {len(sums)} arrays the same, losses within {apart:.1e}", expectation)


def other_mesh(found: Machine) -> configs.Mesh | None:
    """Sizes that divide the same devices in another way; None where there is no other."""
    shape, slices = found.mesh.shape, found.sizes.slices
    each = len(found.devices) // slices
    halves = {"fsdp": each // 2, "tensor": 2} if each % 2 == 0 else {"fsdp": each}
    for sizes in ({"fsdp": each}, halves, {"fsdp": 1, "data": each}):
        other = configs.Mesh(**sizes, slices=slices)
        if [max(1, vars(other)[axis]) * (slices if axis == "data" else 1) for axis in shape] != list(shape.values()):
            return other
    return None


def _same(name: str, figure: str, course: Course, undisturbed: Course) -> Line:
    """Compares the last steps of two runs that end with the same step."""
    expected = undisturbed.losses[course.first - 1 :]
    other = [course.first + i for i, (a, b) in enumerate(zip(course.losses, expected, strict=True)) if a != b]
    differ = [leaf for leaf, sums in undisturbed.state_sums.items() if course.state_sums[leaf] != sums]
    if other or differ:
        parts = [f"losses differ from step {other[0]} on" if other else "",
                 f"{len(differ)} of {len(undisturbed.state_sums)} arrays differ" if differ else ""]  # fmt: skip
        return Line(name, FAIL, f"{figure}: {', '.join(filter(None, parts))}", EXPECTED, REMEDY,
                    detail=", ".join(differ))  # fmt: skip
    return Line(name, OK, f"{figure}: the same to step {course.last}", EXPECTED)


def _recorded(trial: Trial) -> tuple[Any, list[jax.Array]]:
    """The program, and a list that gets the loss of each step that it computes."""
    losses = list[jax.Array]()

    def step(state: State, frozen: Any, batch: Any) -> tuple[State, Any]:
        state, metrics = trial.program.step(state, frozen, batch)
        losses.append(metrics.loss)
        return state, metrics

    return dataclasses.replace(trial.program, step=step), losses


def _steps(trial: Trial, state: State, done: int, count: int) -> tuple[list[float], State]:
    """Trains `count` steps after `done` of them, without the loop around it."""
    pipeline = trials.open_pipeline(trial, trial.program.rows)
    pipeline.restore(pipeline.state(done))
    (program, losses), frozen = _recorded(trial), _frozen(trial)
    for (batch, _), _ in zip(pipeline, range(count)):
        state, _ = program.step(state, frozen, program.put(batch))
    return [float(loss) for loss in losses], state


def _first_state(trial: Trial) -> State:
    return init.state(trial.program, _sources(trial), trial.config.train.seed)


def _frozen(trial: Trial) -> Mapping[str, Any]:
    return init.frozen(trial.program, _sources(trial))


def _sources(trial: Trial) -> dict[str, str]:
    return init.resolve(trial.program, trial.config.init, trial.config.model.base, trial.config.train.seed)


def _restored(trial: Trial, checkpoints: manager.Checkpoints) -> Saved | None:
    abstract = trial.program.state
    return manager.restore(checkpoints, abstract.params, {"step": abstract.step, "opt_state": abstract.opt_state})


def _state(saved: Saved) -> State:
    return State(saved.state["step"], saved.params, saved.state["opt_state"])


def _sums(state: State) -> dict[str, Any]:
    return manager.fingerprint({"params": state.params, "opt_state": state.opt_state, "step": state.step})
