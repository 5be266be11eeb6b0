"""The paper's two stages and their ablations in miniature, run through the functions behind the commands."""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax import compilations, heap
from llava_jax import config as configs
from llava_jax.convert import exporting, importing
from llava_jax.demo import bases, records, test_set
from llava_jax.demo.records import Sizes, TestSet
from llava_jax.demo.test_set import Result
from llava_jax.errors import UsageError
from llava_jax.generate.assistant import Assistant
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.train import metrics
from llava_jax.train.trainer import Trainer

CONFIGS = Path(__file__).parent
WORLD, BASE, BASE_LAST_LAYER, EXPORT = "world", "base", "base_last_layer", "export_hf"
QUICK_SIZES = Sizes(train=1600, heldout=200, unseen=100, heldout_per_kind=50, unseen_per_kind=25)
MAX_PROCESSES = 3  # each takes about a gigabyte
PROGRESS_PREFIXES = ("step ", "error", "goes on")  # beginnings of the lines of a run that the demo shows


class Run(NamedTuple):
    """One training run: its folder, title, config, start checkpoint and records; its label in tables."""

    name: str
    title: str
    config: str
    start: str
    data: str
    label: str = ""  # none: of no row of the table

    @property
    def blind(self) -> bool:
        return self.data == records.FINETUNE_BLIND


class Family(NamedTuple):
    """A system that the demo trains.

    bases: {folder: the arguments of `importing.assemble`}. summary: one sentence for the report. wide: as in
      `records.write`. sizes: of the world. steps: of the two stages; None: those of their configs.
    """

    bases: dict[str, dict[str, Any]]
    runs: tuple[Run, ...]
    summary: str
    wide: int = 1
    sizes: Sizes = records.SIZES
    steps: tuple[int, int] | None = None

    @property
    def evaluated(self) -> tuple[Run, ...]:
        """The runs with a label, the blind one first."""
        return tuple(sorted((run for run in self.runs if run.label), key=lambda run: not run.blind))


_LLM = {"llm": bases.ASSETS / "llama"}
_CLIP = {"vision": bases.ASSETS / "clip", **_LLM}
FAMILIES = {
    "llava": Family(
        {BASE: {**_CLIP, "select_layer": -2}, BASE_LAST_LAYER: {**_CLIP, "select_layer": -1}},
        (
            Run("stage1", "stage 1: captions, only the projector is trained", "stage1.py", BASE, records.PRETRAIN,
                "after stage 1"),
            Run("stage2", "stage 2: instructions, the tower is frozen", "stage2.py", "stage1", records.FINETUNE,
                "after stage 2"),
            Run("blind", "the same stage 2 with blank pictures", "stage2.py", "stage1", records.FINETUNE_BLIND,
                "blind: stage 2 with blank pictures"),
            Run("stage2_without_stage1", "stage 2 at equal steps from a fresh projector", "stage2.py", BASE,
                records.FINETUNE, "stage 2 without stage 1"),
            Run("stage1_last_layer", "stage 1 on the tower's last layer", "stage1.py", BASE_LAST_LAYER,
                records.PRETRAIN),
            Run("stage2_last_layer", "stage 2 on the tower's last layer", "stage2.py", "stage1_last_layer",
                records.FINETUNE, "last layer instead of penultimate"),
        ),
        "A tiny CLIP and a tiny LLaMA that has only ever read, joined in LLaVA's two stages",
    ),
    "minigpt4": Family(
        {BASE: {"vision": bases.ASSETS / "blip2", "connector": bases.ASSETS / "blip2", **_LLM}},
        (
            Run("stage1", "stage 1: captions, only the linear layer is trained", "minigpt4_stage1.py", BASE,
                records.PRETRAIN, "after stage 1"),
            Run("stage2", "stage 2: instructions, only the linear layer is trained", "minigpt4_stage2.py", "stage1",
                records.FINETUNE, "after stage 2"),
            Run("blind", "the same stage 2 with blank pictures", "minigpt4_stage2.py", "stage1",
                records.FINETUNE_BLIND, "blind: stage 2 with blank pictures"),
        ),
        "A tiny EVA with a Q-Former and a tiny LLaMA, joined by one linear layer in MiniGPT-4's two stages",
    ),
    "anyres": Family(
        {BASE: {**_CLIP, "select_layer": -2, "newline": True}},
        (
            Run("stage1", "stage 1: captions of square pictures, only the projector is trained", "stage1.py", BASE,
                records.PRETRAIN),
            Run("stage2_without_tiles", "stage 2: wide pictures, of each the whole alone", "whole.py", "stage1",
                records.FINETUNE, "without tiles: the whole alone"),
            Run("stage2", "the same stage 2, of each picture the whole and four tiles", "anyres.py", "stage1",
                records.FINETUNE, "with tiles: the whole and four tiles"),
        ),
        "A tiny LLaVA-1.6: pictures four times as wide as high, whose shapes are too small to see without tiles",
        wide=4,
    ),
}  # fmt: skip
FAMILIES["quick"] = FAMILIES["llava"]._replace(
    bases={BASE: FAMILIES["llava"].bases[BASE]}, runs=FAMILIES["llava"].runs[:3], sizes=QUICK_SIZES, steps=(150, 200)
)


class Outcome(NamedTuple):
    """A demo's results: {run: {test_set: Result}}; losses: {run: loss at every step}; chat: (picture, (role, text))."""

    family: Family
    test_sets: dict[str, TestSet]
    results: dict[str, dict[str, Result]]
    losses: dict[str, list[float]]
    chat: tuple[str, list[tuple[str, str]]]
    secs: float


def run_family(workdir: Path, seed: int, family: Family) -> Outcome:
    """Trains and evaluates all runs of a family in `workdir`, which is new."""
    start = time.monotonic()
    workdir.mkdir(parents=True, exist_ok=True)
    _log(start, "draws the world")
    test_sets = records.write(workdir / WORLD, seed, family.sizes, family.wide)
    _log(start, f"assembles {', '.join(family.bases)}: pretrained parts, and a fresh projector between them")
    for name, parts in family.bases.items():
        importing.assemble(workdir / name, **parts, seed=seed)
    results = _all_results(Job(workdir, seed, family.steps, test_sets, start), family)
    _log(start, "exports stage 2 for transformers")
    exporting.export("hf", workdir / "stage2", workdir / EXPORT)
    chat = _chat(workdir, test_sets["heldout"])
    losses = {run.name: _losses(workdir / run.name) for run in family.runs}
    return Outcome(family, test_sets, results, losses, chat, time.monotonic() - start)


class Job(NamedTuple):
    """What each run of a demo is given. start: on the monotonic clock."""

    workdir: Path
    seed: int
    steps: tuple[int, int] | None
    test_sets: dict[str, TestSet]
    start: float


def _all_results(job: Job, family: Family) -> dict[str, dict[str, Result]]:
    """Trains and evaluates all runs; on CPUs each as soon as the run that it starts from has ended.

    So small a model keeps no two cores busy: two runs at once on a core each are faster than both cores on one.

    Raises:
      UsageError: a process was ended from outside.
    """
    results, finished, running, pending = {}, {*family.bases}, dict[Future, Run](), list(family.runs)
    with contextlib.ExitStack() as stack:
        submit = _at_once if heap.has_accelerator() else stack.enter_context(_processes())
        while pending or running:
            for run in [run for run in pending if run.start in finished]:
                pending.remove(run)
                running[submit(_result, job, run)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                finished.add(run.name)
                results[run.name] = future.result()
    return {run.name: results[run.name] for run in family.evaluated}


@contextlib.contextmanager
def _processes() -> Iterator[Callable[..., Future]]:
    """What submits a call to a few processes, which share the cores, and which end with the block."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    count = min(MAX_PROCESSES, cores)
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin, (cores // count,)) as pool:
        try:
            yield pool.submit
        except BrokenProcessPool as error:
            raise UsageError(f"one of {count} processes was ended from outside, perhaps as memory ran out: want 1 GB "
                             "for each; `taskset -c 0 python -m llava_jax.demo` has one") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
                process.join()


def _begin(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one ends the others
    os.environ["PJRT_NPROC"] = str(threads)  # of XLA's pool, which is made with the first computation
    threading.Thread(target=_end_with_parent, daemon=True).start()
    heap.keep()
    compilations.keep()


def _end_with_parent() -> None:
    """Nobody waits for a process whose parent was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _at_once(function: Callable[..., Any], *arguments: Any) -> Future:
    future = Future()
    future.set_result(function(*arguments))
    return future


def _result(job: Job, run: Run) -> dict[str, Result]:
    """Trains a run, and evaluates it on all test sets if it has a label."""
    workdir = job.workdir
    _log(job.start, f"trains {run.name}, {run.title}")
    settings = {
        "model.base": workdir / run.start, "data.sources.0.path": workdir / WORLD / run.data,
        "data.sources.0.images": workdir / WORLD, "train.seed": job.seed,
    }  # fmt: skip
    if job.steps is not None:
        settings["train.steps"] = job.steps[run.data != records.PRETRAIN]
    with _log_to(workdir / f"{run.name}.log", run.name):
        Trainer(configs.load(CONFIGS / run.config, settings), workdir=workdir / run.name).fit()
    if not run.label:
        return {}
    assistant = test_set.open_assistant(workdir / run.name)
    results = {name: test_set.evaluate(assistant, questions, workdir / WORLD, run.blind)
               for name, questions in job.test_sets.items()}  # fmt: skip
    _log(job.start, f"{run.name}: " + ", ".join(f"{name} {result.score:.3f}" for name, result in results.items()))
    return results


def _chat(workdir: Path, held_out: TestSet) -> tuple[str, list[tuple[str, str]]]:
    """Three turns about the first held-out picture with three shapes, each answer part of the next prompt."""
    picture = next(i for i, scene in enumerate(held_out.scenes) if sum(thing is not None for thing in scene) == 3)
    shape = next(thing for thing in held_out.scenes[picture] if thing)
    assistant = Assistant.open(workdir / "stage2")
    questions = ("<image>\nDescribe the picture.", f"Where is the {shape}?", "How many shapes are there?")
    turns: tuple[Turn, ...] = ()
    for question in questions:
        turns += (Turn("user", question),)
        conversation = Conversation(turns, (held_out.pictures[picture],))
        reply = assistant.reply(conversation, test_set.ANSWER_TOKENS, image_root=workdir / WORLD)
        turns += (Turn("assistant", reply.text),)
    return held_out.pictures[picture], [(turn.role, turn.text.removeprefix("<image>\n")) for turn in turns]


def _losses(run: Path) -> list[float]:
    lines = (run / metrics.STEPS).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@contextlib.contextmanager
def _log_to(log: Path, name: str) -> Iterator[None]:
    """Redirects stdout to a file; only progress lines reach the terminal too, behind the run's name."""
    with log.open("w") as file, contextlib.redirect_stdout(_ProgressTee(file, sys.stdout, name)):
        yield


class _ProgressTee(io.TextIOBase):
    """Writes all to `log`, and whole lines that begin with PROGRESS_PREFIXES to `terminal` behind a name."""

    def __init__(self, log: io.TextIOBase, terminal: io.TextIOBase, name: str):
        self._log, self._terminal, self._name, self._line = log, terminal, name, ""

    def write(self, text: str) -> int:
        self._log.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if line.startswith(PROGRESS_PREFIXES):
                self._terminal.write(f"       {self._name:<21}  {line}\n")
                self._terminal.flush()
        return len(text)

    def flush(self) -> None:
        self._log.flush()
        self._terminal.flush()


def _log(start: float, text: str) -> None:
    print(f"{time.monotonic() - start:4.0f} s {text}", flush=True)
