"""A run that is killed, resumed, preempted, resumed again and moved to another mesh, against an undisturbed one.

Every loss and every bit of the state must be the same; on another mesh, where sums are taken in another order, the
restored state is the same and losses agree.
"""

import contextlib
import dataclasses
import io
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from llava_jax import config as configs
from llava_jax import distributed, errors, lifecycle
from llava_jax.checkpoint import manager, reader, sums
from llava_jax.checkpoint.manager import Checkpoints, Saved
from llava_jax.distributed import Stop
from llava_jax.doctor import report
from llava_jax.doctor import trial as trials
from llava_jax.doctor.machine import Machine
from llava_jax.doctor.report import FAIL, OK, Line
from llava_jax.doctor.trial import Trial
from llava_jax.train import init, loop, metrics
from llava_jax.train.loop import Hook, Run
from llava_jax.train.step import State

KILLED, PREEMPTED, ELSEWHERE = (f"training: {name}" for name in ("killed", "preempted", "another mesh"))
EXPECTATION = "losses and state bit for bit as undisturbed"
MESH_TOLERANCE = 2e-6  # relative difference of losses
KILLED_STEP = 6  # where no process can be killed: saves are made after 4 and 8
MORE_STEPS = 3  # of each run after it was resumed
CHILD_SECS = 120.0
SIGNAL_SECS = 5.0
LOG = "doctor.jsonl"  # of hooks that write none
REMEDY = "do not train here: please send us the file of --json"


class Interruption(Exception):
    """Ends a run in the middle of its steps."""


class Trajectory(NamedTuple):
    """Steps of a run: {step: loss}, and the fingerprint of each array of the state after the last of them."""

    losses: dict[int, float]
    state: dict[str, Any]

    @property
    def last(self) -> int:
        return max(self.losses)


class CompiledTrial(NamedTuple):
    """A trial whose step is compiled, so that no process waits inside the step for one that compiles longer."""

    trial: Trial
    step: Callable[..., Any]
    frozen: Mapping[str, Any]


def check(machine: Machine) -> Iterator[Line]:
    """Lines about saving, killing, preempting and restoring."""
    # On accelerators float32 products are rounded to less by default, which would differ between meshes.
    with jax.default_matmul_precision("highest"), _shared_compilation_cache(machine):
        with contextlib.redirect_stdout(io.StringIO()):  # what the loop prints
            yield from _check(machine)


def _check(machine: Machine) -> Iterator[Line]:
    trial = trials.open_trial(machine.sizes, len(machine.devices), machine.platform, machine.local)
    workdir = machine.folder / "run"
    has_child = _has_child(machine)
    fault = _kill_child(trial, workdir) if has_child else ""
    if fault:
        yield Line(KILLED, FAIL, fault, EXPECTATION, REMEDY)
        return
    compiled = _compile_trial(trial)
    killed_losses = _logged_losses(workdir) if has_child else _interrupt(compiled, workdir)
    saved = reader.latest_step(workdir)
    resumed = _preempt(compiled, workdir)
    continued = _resume(compiled, workdir)
    undisturbed = _undisturbed_run(compiled, resumed.last, continued.last)
    method = "`train` killed by SIGKILL" if has_child else f"ended in step {KILLED_STEP}, as devices have one process"
    expected_losses = undisturbed[-1].losses
    yield _comparison_line(KILLED, f"{method}, resumed after {saved}", [killed_losses, resumed.losses], resumed.state,
                           undisturbed[0].state, expected_losses)  # fmt: skip
    yield _comparison_line(PREEMPTED, f"SIGTERM, saved and resumed after {resumed.last}", [continued.losses],
                           continued.state, undisturbed[1].state, expected_losses)  # fmt: skip
    yield _other_mesh_line(machine, workdir, resumed, undisturbed[1])


@contextlib.contextmanager
def _shared_compilation_cache(machine: Machine) -> Iterator[None]:
    """Shares the compilation cache with the child, so that nothing is compiled twice."""
    if jax.config.jax_compilation_cache_dir or not _has_child(machine):
        yield
        return
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(machine.local / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def _has_child(machine: Machine) -> bool:
    """An accelerator's device belongs to one process, and so does a place in a job of several."""
    return machine.platform == "cpu" and distributed.count() == 1


def _compile_trial(trial: Trial) -> CompiledTrial:
    program = trial.program
    sources = init.resolve(program, trial.config.init, trial.config.model.base, trial.config.train.seed)
    frozen = init.frozen(program, sources)
    step = program.step.lower(program.state, program.frozen, program.batch).compile()
    distributed.exchange("doctor compiled", True)
    return CompiledTrial(trial, step, frozen)


def _kill_child(trial: Trial, workdir: epath.Path) -> str:
    """Starts `train` in a child process and ends it by SIGKILL after its first save; the fault, or ""."""
    command = [sys.executable, "-m", "llava_jax.train", *trial.args, "--workdir", str(workdir)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.0", "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + CHILD_SECS
            while child.poll() is None and time.monotonic() < end and reader.latest_step(workdir) is None:
                time.sleep(0.1)
            time.sleep(0.2)  # into the steps after it, or into the next save
        finally:
            child.send_signal(signal.SIGKILL)
            code = child.wait()
        output.seek(0)
        output_end = "; ".join(output.read().splitlines()[-3:])
    if code != -signal.SIGKILL or reader.latest_step(workdir) is None:
        return f"`train` in a child process saves nothing in {CHILD_SECS:.0f} s (exit code {code}): {output_end}"
    return ""


def _logged_losses(workdir: epath.Path) -> dict[int, float]:
    """The logged losses of a killed run; its last line may be truncated, so that a resume drops it."""
    try:
        return {row["step"]: row["loss"] for row in metrics.read(workdir)}
    except ValueError:
        return {}


def _interrupt(compiled: CompiledTrial, workdir: epath.Path) -> dict[int, float]:
    """The losses of a run that an exception ends between two saves."""
    losses = dict[int, float]()
    with contextlib.suppress(Interruption):
        _run(compiled, workdir, [Hook(KILLED_STEP, _raise_interruption, LOG)], losses)
    return losses


def _raise_interruption(step: int, state: State, stop: Stop) -> None:
    raise Interruption


def _run(
    compiled: CompiledTrial, workdir: epath.Path, hooks: Sequence[Hook], losses: dict[int, float]
) -> tuple[int, State]:
    """Trains from the newest save, or from the beginning, until a hook ends it; (exit code, the last state)."""
    config, program = compiled.trial.config, compiled.trial.program
    checkpoints = manager.open_checkpoints(workdir, config.checkpoint.keep)
    step_losses = list[jax.Array]()
    try:
        pipeline = trials.open_pipeline(compiled.trial, program.rows)
        saved = _restore(compiled.trial, checkpoints)
        state = _initial_state(compiled.trial) if saved is None else _state(saved)
        first = int(state.step) + 1
        if saved is not None:
            pipeline.restore(dict(saved.data))
        step = _with_recording(compiled, step_losses)
        run = Run(dataclasses.replace(program, step=step), config, compiled.frozen, pipeline, checkpoints, None, Stop(),
                  hooks)  # fmt: skip
        return loop.train(run, state)
    finally:
        manager.close(checkpoints)
        losses |= {first + i: float(loss) for i, loss in enumerate(step_losses)}


def _preempt(compiled: CompiledTrial, workdir: epath.Path) -> Trajectory:
    """Resumes, and trains on until SIGTERM to the last process stops all of them."""
    calls, losses = list[int](), dict[int, float]()

    def after(step: int, state: State, stop: Stop) -> None:
        calls.append(step)
        if len(calls) == MORE_STEPS and distributed.index() == distributed.count() - 1:
            with lifecycle.sigterm(stop.request) as notice:
                os.kill(os.getpid(), signal.SIGTERM)
                notice.received.wait(SIGNAL_SECS)
        time.sleep(0.02)  # so that not many steps pass before all processes have heard it

    code, state = _run(compiled, workdir, [Hook(1, after, LOG)], losses)
    if code != errors.PREEMPTED:
        raise RuntimeError(f"SIGTERM has not stopped a run of {len(losses)} steps")
    return Trajectory(losses, _fingerprint(state))


def _resume(compiled: CompiledTrial, workdir: epath.Path) -> Trajectory:
    """Resumes the preempted run, for some steps."""
    saved = _newest(compiled.trial, workdir)
    losses, state = _steps(compiled, _state(saved), saved.step, MORE_STEPS)
    return Trajectory(losses, _fingerprint(state))


def _undisturbed_run(compiled: CompiledTrial, *ends: int) -> list[Trajectory]:
    """An undisturbed run, up to each of some steps."""
    state, losses, trajectories = _initial_state(compiled.trial), dict[int, float](), list[Trajectory]()
    for end in ends:
        new_losses, state = _steps(compiled, state, len(losses), end - len(losses))
        losses |= new_losses
        trajectories.append(Trajectory(dict(losses), _fingerprint(state)))
    return trajectories


def _other_mesh_line(machine: Machine, workdir: epath.Path, preempted: Trajectory, undisturbed: Trajectory) -> Line:
    """The preempted run on another mesh."""
    sizes = other_mesh(machine.sizes, machine.mesh.shape)
    if sizes is None:
        return report.skipped_line(ELSEWHERE, "one device has one mesh")
    compiled = _compile_trial(trials.open_trial(sizes, len(machine.devices), machine.platform, machine.local))
    saved = _newest(compiled.trial, workdir)
    state = _state(saved)
    differing = _differences(_fingerprint(state), preempted.state)
    losses, _ = _steps(compiled, state, saved.step, MORE_STEPS)
    difference = max(abs(loss / undisturbed.losses[step] - 1) for step, loss in losses.items())
    mesh = ", ".join(f"{axis} {size}" for axis, size in compiled.trial.program.mesh.shape.items() if size > 1)
    expectation = f"the state bit for bit, losses within {MESH_TOLERANCE:g}"
    if differing or difference > MESH_TOLERANCE:
        fault = f"{mesh}: {len(differing)} of {len(preempted.state)} arrays differ, losses by {difference:.1e}"
        return Line(ELSEWHERE, FAIL, fault, expectation, REMEDY, detail=", ".join(differing))
    figure = f"{mesh}: {len(preempted.state)} arrays the same, losses within {difference:.1e}"
    return Line(ELSEWHERE, OK, figure, expectation)


def other_mesh(mesh: configs.Mesh, shape: Mapping[str, int]) -> configs.Mesh | None:
    """Sizes that divide the devices of a mesh of this shape in another way; None where there is no other."""
    slices = mesh.slices
    each = math.prod(shape.values()) // slices
    halves = {"fsdp": each // 2, "tensor": 2} if each % 2 == 0 else {"fsdp": each}
    for sizes in ({"fsdp": each}, halves, {"fsdp": 1, "data": each}):
        candidate = configs.Mesh(**sizes, slices=slices)
        if [vars(candidate)[axis] * (slices if axis == "data" else 1) for axis in shape] != list(shape.values()):
            return candidate
    return None


def _comparison_line(
    name: str, figure: str, losses: Sequence[Mapping[int, float]], state: Mapping[str, Any],
    expected_state: Mapping[str, Any], expected_losses: Mapping[int, float],
) -> Line:  # fmt: skip
    """Compares the losses of some starts of a run, and its last state, with those of an undisturbed run."""
    common = [(step, loss) for start in losses for step, loss in start.items() if step in expected_losses]
    differing_steps = [step for step, loss in common if expected_losses[step] != loss]
    differing_arrays = _differences(state, expected_state)
    if not differing_steps and not differing_arrays:
        return Line(name, OK, f"{figure}: {len(common)} losses to step {max(common)[0]} the same", EXPECTATION)
    faults = [f"losses differ from step {min(differing_steps)} on"] if differing_steps else []
    faults += [f"{len(differing_arrays)} of {len(expected_state)} arrays differ"] if differing_arrays else []
    return Line(name, FAIL, f"{figure}: {', '.join(faults)}", EXPECTATION, REMEDY, detail=", ".join(differing_arrays))


def _differences(state: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in state.keys() | other.keys() if state.get(name) != other.get(name)]


def _with_recording(compiled: CompiledTrial, losses: list[jax.Array]) -> Callable[..., Any]:
    """The step, which adds each loss to the list."""

    def step(state: State, frozen: Any, batch: Any) -> tuple[State, Any]:
        state, scalars = compiled.step(state, frozen, batch)
        losses.append(scalars.loss)
        return state, scalars

    return step


def _steps(compiled: CompiledTrial, state: State, done: int, count: int) -> tuple[dict[int, float], State]:
    """Trains `count` steps after `done` of them, without the loop around it; {step: loss} and the last state."""
    program, losses = compiled.trial.program, list[jax.Array]()
    pipeline, step = trials.open_pipeline(compiled.trial, program.rows), _with_recording(compiled, losses)
    pipeline.restore(pipeline.state(done))
    for _, (batch, _) in zip(range(count), pipeline):
        state, _ = step(state, compiled.frozen, program.put(batch))
    return {done + 1 + i: float(loss) for i, loss in enumerate(losses)}, state


def _initial_state(trial: Trial) -> State:
    sources = init.resolve(trial.program, trial.config.init, trial.config.model.base, trial.config.train.seed)
    return init.state(trial.program, sources, trial.config.train.seed)


def _newest(trial: Trial, workdir: epath.Path) -> Saved:
    checkpoints = manager.open_checkpoints(workdir, trial.config.checkpoint.keep)
    try:
        saved = _restore(trial, checkpoints)
    finally:
        manager.close(checkpoints)
    assert saved is not None, "the preempted run has saved nothing"
    return saved


def _restore(trial: Trial, checkpoints: Checkpoints) -> Saved | None:
    state = trial.program.state
    return manager.restore(checkpoints, state.params, {"step": state.step, "opt_state": state.opt_state})


def _state(saved: Saved) -> State:
    return State(saved.state["step"], saved.params, saved.state["opt_state"])


def _fingerprint(state: State) -> dict[str, Any]:
    arrays = jax.tree_util.tree_leaves_with_path(state)
    return sums.of_arrays({jax.tree_util.keystr(path): array for path, array in arrays})
