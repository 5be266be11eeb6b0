"""What a run writes down: one JSON line an update, TensorBoard, optionally Weights & Biases."""

import json
import math
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from llava_jax import config, files
from llava_jax.errors import UsageError
from llava_jax.streams import GrowingFile
from llava_jax.train.events import EventFile

# One line an update; counts are of the global batch:
#   step, loss, lr      which update, its loss, the highest learning rate
#   grad_norm           of the trainable parameters, before clipping
#   tokens              supervised tokens: those that the loss looks at
#   positions           tokens and image features that are no padding
#   fill, image_fill    the share of positions, and of image slots, that are in use
#   secs                since the line before, without checkpoints and hooks; in a start's first it holds compiling
#   flops               model FLOPs (train/flops.py)
#   hbm_peak_bytes      the most memory in use so far on any device of this process; null where the backend is silent
#   compiles            programs compiled, or fetched from the cache, since the start
#   skipped, ids        where the update was not finite: true, and its records
# and in all but the first of a start:
#   positions_per_sec, tokens_per_sec
#   mfu                 flops / secs / the devices' bfloat16 peak; null on a device that chips.py does not know
#   data_wait           the share of `secs` in which the host waited for the pipeline
STEPS = "metrics.jsonl"
VALIDATION = "validation.jsonl"  # {"step", "loss"}
SAMPLES = "samples.jsonl"  # {"step", "id", "prompt", "answer"}
WANDB = "wandb_id"  # names the run at Weights & Biases, so that every start of it goes on there

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Writer:
    """Open logs of one run.

    In a bucket they are written anew by `flush`, which the loop calls with each save: a row is about 450 bytes, so that
    100,000 updates are 45 MB a save, little beside the checkpoint itself.
    """

    files: Mapping[str, GrowingFile]
    board: EventFile | None
    wandb: Any  # a wandb run, or None


def check(log: config.Log) -> None:
    """Refuses what `open_writer` could not open, before any work is done.

    Raises:
      UsageError: `log.wandb` names a project and wandb is not installed.
    """
    if log.wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UsageError(
                f"log.wandb={log.wandb!r} wants the package wandb, which is missing: `pip install wandb`, "
                'or log.wandb=""'
            ) from None


def open_writer(workdir: epath.PathLike, log: config.Log, step: int, settings: Mapping[str, Any]) -> Writer:
    """Logs that go on after `step` updates: rows beyond it, which a kill left and a resume repeats, are dropped.

    A damaged log is set aside, said, and its whole rows go on in the new one.

    Args:
      settings: the run's config, for Weights & Biases.
    """
    workdir = epath.Path(workdir)
    logs = {name: _go_on(workdir / name, step) for name in (STEPS, VALIDATION, SAMPLES)}
    board = EventFile(workdir / "tensorboard", step) if log.tensorboard else None
    return Writer(logs, board, _open_wandb(log.wandb, workdir, settings) if log.wandb else None)


def write(writer: Writer, name: str, row: Row) -> None:
    """Adds a row to a file and its numbers to the boards. Floats keep every bit; one that is not finite is null."""
    finite = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
    writer.files[name].add((json.dumps(finite, ensure_ascii=False) + "\n").encode())
    numbers = {f"{name.removesuffix('.jsonl')}/{k}": x for k, x in finite.items() if isinstance(x, int | float)}
    numbers.pop(f"{name.removesuffix('.jsonl')}/step")
    if writer.board is not None:
        writer.board.add(row["step"], numbers)
    if writer.wandb is not None:
        writer.wandb.log(numbers, step=row["step"])


def flush(writer: Writer) -> None:
    """Brings everything to disk or bucket, as far as it is not there already."""
    for file in _open_files(writer):
        file.flush()


def close(writer: Writer) -> None:
    """Flushes and closes."""
    for file in _open_files(writer):
        file.close()
    if writer.wandb is not None:
        writer.wandb.finish()


def read(workdir: epath.PathLike, name: str = STEPS) -> list[dict[str, Any]]:
    """The whole rows of a log; none where there is no log."""
    try:
        return [row for row, _ in _parsed(files.read(epath.Path(workdir) / name))[0]]
    except FileNotFoundError:
        return []


def _open_files(writer: Writer) -> list[GrowingFile | EventFile]:
    return [*writer.files.values(), *([] if writer.board is None else [writer.board])]


def _go_on(path: epath.Path, step: int) -> GrowingFile:
    try:
        rows, fault = _parsed(files.read(path))
    except FileNotFoundError:
        rows, fault = [], ""
    except IsADirectoryError:
        rows, fault = [], "it is a directory"
    if fault:
        print(f"{path} is damaged ({fault}): it is now called {files.set_aside(path).name}, and its whole rows go on "
              "in a new one", file=sys.stderr, flush=True)  # fmt: skip
    return GrowingFile(path, b"".join(line for row, line in rows if row["step"] <= step))


def _parsed(content: bytes) -> tuple[list[tuple[dict[str, Any], bytes]], str]:
    """(each whole row with its line, what is wrong with the first other line). A kill may cut the last line short."""
    rows, fault = [], ""
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append((row, line + b"\n"))
        else:
            fault = fault or f"line {number} is no row of a log"
    return rows, fault


def _open_wandb(project: str, workdir: epath.Path, settings: Mapping[str, Any]) -> Any:
    import wandb

    run = _wandb_id(workdir / WANDB)
    return wandb.init(project=project, name=workdir.name, config=dict(settings), id=run, resume="allow")


def _wandb_id(path: epath.Path) -> str:
    """The run's id there, drawn by its first start; wandb resumes no run without one."""
    try:
        if re.fullmatch(rb"[0-9a-f]{16}", content := files.read(path)):
            return content.decode()
        print(f"{path} is damaged: the run begins anew at Weights & Biases", file=sys.stderr, flush=True)
    except FileNotFoundError:
        pass
    drawn = secrets.token_hex(8)
    files.write_whole(path, drawn.encode())
    return drawn
