"""A run that is killed, resumed, preempted, resumed again and taken to another mesh, against one that nobody disturbs.

Every loss and every bit of the state must be the same; on another mesh, where sums are taken in another order, the
state that is read is the same and losses agree.
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
EXPECTED = "losses and state bit for bit as undisturbed"
OTHER_MESH = 2e-6  # relative difference of losses
KILLED_STEP = 6  # where no process can be killed: saves are made after 4 and 8
MORE_STEPS = 3  # of each run after it was resumed
CHILD_SECS = 120.0
HEARD_SECS = 5.0
LOG = "doctor.jsonl"  # of hooks that write none
REMEDY = "do not train here: please send us the file of --json"


class Killed(Exception):
    """Ends a run in the middle of its steps."""


class Course(NamedTuple):
    """Steps of a run: {step: loss}, and the fingerprint of each array of the state after the last of them."""

    losses: dict[int, float]
    state: dict[str, Any]

    @property
    def last(self) -> int:
        return max(self.losses)


class Player(NamedTuple):
    """A trial whose step is compiled, so that processes which compile longer do not keep others waiting inside it."""

    trial: Trial
    step: Callable[..., Any]
    frozen: Mapping[str, Any]


def check(found: Machine) -> Iterator[Line]:
    """Lines about saving, killing, preempting and restoring."""
    # On accelerators float32 products are rounded to less by default, which would differ between meshes.
    with jax.default_matmul_precision("highest"), _shared_compilations(found):
        with contextlib.redirect_stdout(io.StringIO()):  # what the loop prints
            yield from _check(found)


def _check(found: Machine) -> Iterator[Line]:
    trial = trials.open_trial(found.sizes, len(found.devices), found.platform, found.local)
    workdir = found.folder / "run"
    has_child = _has_child(found)
    fault = _kill_child(trial, workdir) if has_child else ""
    if fault:
        yield Line(KILLED, FAIL, fault, EXPECTED, REMEDY)
        return
    player = _player(trial)
    killed = _written_losses(workdir) if has_child else _end_in_the_middle(player, workdir)
    saved = reader.latest_step(workdir)
    resumed = _preempt(player, workdir)
    again = _follow(player, workdir)
    undisturbed = _from_begin(player, resumed.last, again.last)
    how = "`train` killed by SIGKILL" if has_child else f"ended in step {KILLED_STEP}, as devices have one process"
    whole = undisturbed[-1].losses
    yield _same(KILLED, f"{how}, resumed after {saved}", [killed, resumed.losses], resumed.state, undisturbed[0].state,
                whole)  # fmt: skip
    yield _same(PREEMPTED, f"SIGTERM, saved and resumed after {resumed.last}", [again.losses], again.state,
                undisturbed[1].state, whole)  # fmt: skip
    yield _elsewhere(found, workdir, resumed, undisturbed[1])


@contextlib.contextmanager
def _shared_compilations(found: Machine) -> Iterator[None]:
    """What the child compiles need not be compiled here once more."""
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


def _player(trial: Trial) -> Player:
    program = trial.program
    sources = init.resolve(program, trial.config.init, trial.config.model.base, trial.config.train.seed)
    frozen = init.frozen(program, sources)
    step = program.step.lower(program.state, program.frozen, program.batch).compile()
    distributed.exchange("doctor compiled", True)
    return Player(trial, step, frozen)


def _kill_child(trial: Trial, workdir: epath.Path) -> str:
    """Starts `train` in a process of its own and ends it by SIGKILL after its first save; what went wrong instead."""
    words = [sys.executable, "-m", "llava_jax.train", *trial.words, "--workdir", str(workdir)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.0", "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + CHILD_SECS
            while child.poll() is None and time.monotonic() < end and reader.latest_step(workdir) is None:
                time.sleep(0.1)
            time.sleep(0.2)  # into the steps after it, or into the next save
        finally:
            child.send_signal(signal.SIGKILL)
            code = child.wait()
        output.seek(0)
        last = "; ".join(output.read().splitlines()[-3:])
    if code != -signal.SIGKILL or reader.latest_step(workdir) is None:
        return f"`train` in a process of its own saves nothing in {CHILD_SECS:.0f} s (exit code {code}): {last}"
    return ""


def _written_losses(workdir: epath.Path) -> dict[int, float]:
    """What a killed run has written down; its last line may be cut short, so that a resume drops it."""
    try:
        return {row["step"]: row["loss"] for row in metrics.read(workdir)}
    except ValueError:
        return {}


def _end_in_the_middle(player: Player, workdir: epath.Path) -> dict[int, float]:
    """The losses of a run that an exception ends between two saves."""
    losses = dict[int, float]()
    with contextlib.suppress(Killed):
        _run(player, workdir, [Hook(KILLED_STEP, _killed, LOG)], losses)
    return losses


def _killed(step: int, state: State, stop: Stop) -> None:
    raise Killed


def _run(player: Player, workdir: epath.Path, hooks: Sequence[Hook], losses: dict[int, float]) -> tuple[int, State]:
    """Trains from the newest save, or from the beginning, until a hook ends it; (exit code, the last state)."""
    config, program = player.trial.config, player.trial.program
    checkpoints = manager.open_checkpoints(workdir, config.checkpoint.keep)
    recorded = list[jax.Array]()
    try:
        pipeline = trials.open_pipeline(player.trial, program.rows)
        saved = _restored(player.trial, checkpoints)
        state = _first_state(player.trial) if saved is None else _state(saved)
        first = int(state.step) + 1
        if saved is not None:
            pipeline.restore(dict(saved.data))
        step = _recording(player, recorded)
        run = Run(dataclasses.replace(program, step=step), config, player.frozen, pipeline, checkpoints, None, Stop(),
                  hooks)  # fmt: skip
        return loop.train(run, state)
    finally:
        manager.close(checkpoints)
        losses |= {first + i: float(loss) for i, loss in enumerate(recorded)}


def _preempt(player: Player, workdir: epath.Path) -> Course:
    """Resumes, and trains on until SIGTERM to the last process stops all of them."""
    calls, losses = list[int](), dict[int, float]()

    def after(step: int, state: State, stop: Stop) -> None:
        calls.append(step)
        if len(calls) == MORE_STEPS and distributed.index() == distributed.count() - 1:
            with lifecycle.sigterm(stop.request) as notice:
                os.kill(os.getpid(), signal.SIGTERM)
                notice.received.wait(HEARD_SECS)
        time.sleep(0.02)  # so that not many steps pass before all processes have heard it

    code, state = _run(player, workdir, [Hook(1, after, LOG)], losses)
    if code != errors.PREEMPTED:
        raise RuntimeError(f"SIGTERM has not stopped a run of {len(losses)} steps")
    return Course(losses, _fingerprint(state))


def _follow(player: Player, workdir: epath.Path) -> Course:
    """Resumes the preempted run, for some steps."""
    saved = _newest(player.trial, workdir)
    losses, state = _steps(player, _state(saved), saved.step, MORE_STEPS)
    return Course(losses, _fingerprint(state))


def _from_begin(player: Player, *ends: int) -> list[Course]:
    """A run that nobody disturbs, up to each of some steps."""
    state, losses, courses = _first_state(player.trial), dict[int, float](), list[Course]()
    for end in ends:
        more, state = _steps(player, state, len(losses), end - len(losses))
        losses |= more
        courses.append(Course(dict(losses), _fingerprint(state)))
    return courses


def _elsewhere(found: Machine, workdir: epath.Path, preempted: Course, undisturbed: Course) -> Line:
    """The preempted run on another mesh."""
    sizes = other_mesh(found.sizes, found.mesh.shape)
    if sizes is None:
        return report.skipped(ELSEWHERE, "one device has one mesh")
    player = _player(trials.open_trial(sizes, len(found.devices), found.platform, found.local))
    saved = _newest(player.trial, workdir)
    state = _state(saved)
    differ = _differences(_fingerprint(state), preempted.state)
    losses, _ = _steps(player, state, saved.step, MORE_STEPS)
    apart = max(abs(loss / undisturbed.losses[step] - 1) for step, loss in losses.items())
    mesh = ", ".join(f"{axis} {size}" for axis, size in player.trial.program.mesh.shape.items() if size > 1)
    expectation = f"the state bit for bit, losses within {OTHER_MESH:g}"
    if differ or apart > OTHER_MESH:
        fault = f"{mesh}: {len(differ)} of {len(preempted.state)} arrays differ, losses by {apart:.1e}"
        return Line(ELSEWHERE, FAIL, fault, expectation, REMEDY, detail=", ".join(differ))
    words = f"{mesh}: {len(preempted.state)} arrays the same, losses within {apart:.1e}"
    return Line(ELSEWHERE, OK, words, expectation)


def other_mesh(given: configs.Mesh, shape: Mapping[str, int]) -> configs.Mesh | None:
    """Sizes that divide the devices of a mesh of this shape in another way; None where there is no other."""
    slices = given.slices
    each = math.prod(shape.values()) // slices
    halves = {"fsdp": each // 2, "tensor": 2} if each % 2 == 0 else {"fsdp": each}
    for sizes in ({"fsdp": each}, halves, {"fsdp": 1, "data": each}):
        other = configs.Mesh(**sizes, slices=slices)
        if [vars(other)[axis] * (slices if axis == "data" else 1) for axis in shape] != list(shape.values()):
            return other
    return None


def _same(
    name: str, figure: str, losses: Sequence[Mapping[int, float]], state: Mapping[str, Any],
    expected_state: Mapping[str, Any], expected_losses: Mapping[int, float],
) -> Line:  # fmt: skip
    """Compares the losses of some starts of a run, and its last state, with those of a run that nobody disturbs."""
    compared = [(step, loss) for start in losses for step, loss in start.items() if step in expected_losses]
    other = [step for step, loss in compared if expected_losses[step] != loss]
    differ = _differences(state, expected_state)
    if not other and not differ:
        return Line(name, OK, f"{figure}: {len(compared)} losses to step {max(compared)[0]} the same", EXPECTED)
    faults = [f"losses differ from step {min(other)} on"] if other else []
    faults += [f"{len(differ)} of {len(expected_state)} arrays differ"] if differ else []
    return Line(name, FAIL, f"{figure}: {', '.join(faults)}", EXPECTED, REMEDY, detail=", ".join(differ))


def _differences(state: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in state.keys() | other.keys() if state.get(name) != other.get(name)]


def _recording(player: Player, losses: list[jax.Array]) -> Callable[..., Any]:
    """The step, which adds each loss to the list."""

    def step(state: State, frozen: Any, batch: Any) -> tuple[State, Any]:
        state, scalars = player.step(state, frozen, batch)
        losses.append(scalars.loss)
        return state, scalars

    return step


def _steps(player: Player, state: State, done: int, count: int) -> tuple[dict[int, float], State]:
    """Trains `count` steps after `done` of them, without the loop around it; {step: loss} and the last state."""
    program, losses = player.trial.program, list[jax.Array]()
    pipeline, step = trials.open_pipeline(player.trial, program.rows), _recording(player, losses)
    pipeline.restore(pipeline.state(done))
    for _, (batch, _) in zip(range(count), pipeline):
        state, _ = step(state, player.frozen, program.put(batch))
    return {done + 1 + i: float(loss) for i, loss in enumerate(losses)}, state


def _first_state(trial: Trial) -> State:
    sources = init.resolve(trial.program, trial.config.init, trial.config.model.base, trial.config.train.seed)
    return init.state(trial.program, sources, trial.config.train.seed)


def _newest(trial: Trial, workdir: epath.Path) -> Saved:
    checkpoints = manager.open_checkpoints(workdir, trial.config.checkpoint.keep)
    try:
        saved = _restored(trial, checkpoints)
    finally:
        manager.close(checkpoints)
    assert saved is not None, "the preempted run has saved nothing"
    return saved


def _restored(trial: Trial, checkpoints: Checkpoints) -> Saved | None:
    state = trial.program.state
    return manager.restore(checkpoints, state.params, {"step": state.step, "opt_state": state.opt_state})


def _state(saved: Saved) -> State:
    return State(saved.state["step"], saved.params, saved.state["opt_state"])


def _fingerprint(state: State) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return sums.of_arrays({jax.tree_util.keystr(path): leaf for path, leaf in leaves})
