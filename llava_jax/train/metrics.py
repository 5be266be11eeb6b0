"""What a run writes down: one JSON line an update, TensorBoard, optionally Weights & Biases."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import tensorboardX
from etils import epath

from llava_jax import config
from llava_jax.errors import UsageError

# One line an update; counts are of the global batch:
#   step, loss, rate    which update, its loss, the highest learning rate
#   grad_norm           of the trainable parameters, before clipping
#   tokens              supervised tokens: those that the loss looks at
#   positions           tokens and image features that are no padding
#   fill, image_fill    the share of positions, and of image slots, that are in use
#   secs                since the line before, without checkpoints and hooks; in a start's first it holds compiling
#   flops               model FLOPs (models/flops.py)
#   hbm_peak_bytes      the most memory in use so far on any device of this process; null where the backend is silent
#   compiles            programs compiled, or fetched from the cache, since the start
#   skipped, ids        where the update was not finite: true, and its records
# and in all but the first of a start:
#   positions_per_sec, tokens_per_sec
#   mfu                 flops / secs / the devices' bfloat16 peak; null on a device that chips.py does not know
#   wait                the share of `secs` in which the host waited for the pipeline
STEPS = "metrics.jsonl"
VALIDATION = "validation.jsonl"  # {"step", "loss"}
SAMPLES = "samples.jsonl"  # {"step", "id", "prompt", "answer"}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Writer:
    """Open logs of one run."""

    files: Mapping[str, "Lines"]
    board: tensorboardX.SummaryWriter | None
    wandb: Any  # a wandb run, or None


@dataclass(frozen=True)
class Lines:
    """A JSON lines file. A local one grows line by line; a remote one cannot, so it is written anew by `flush`."""

    path: epath.Path
    local: IO[str] | None
    kept: list[str]


def open_writer(workdir: epath.PathLike, log: config.Log, step: int, settings: Mapping[str, Any]) -> Writer:
    """Logs that go on after `step` updates: rows beyond it, which a kill left and a resume repeats, are dropped.

    Args:
      settings: the run's config, for Weights & Biases.

    Raises:
      ValueError: `log.wandb` names a project and wandb is not installed.
    """
    workdir = epath.Path(workdir)
    files = {name: _open_lines(workdir / name, step) for name in (STEPS, VALIDATION, SAMPLES)}
    board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1) if log.tensorboard else None
    return Writer(files, board, _open_wandb(log.wandb, workdir.name, settings) if log.wandb else None)


def write(writer: Writer, name: str, row: Row) -> None:
    """Adds a row to a file and its numbers to the boards. Floats keep every bit; one that is not finite is null."""
    finite = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
    line = json.dumps(finite, ensure_ascii=False) + "\n"
    lines = writer.files[name]
    if lines.local is None:
        lines.kept.append(line)
    else:
        lines.local.write(line)
        lines.local.flush()
    numbers = {f"{name.removesuffix('.jsonl')}/{k}": x for k, x in finite.items() if isinstance(x, int | float)}
    numbers.pop(f"{name.removesuffix('.jsonl')}/step")
    if writer.board is not None:
        for tag, value in numbers.items():
            writer.board.add_scalar(tag, value, row["step"])
    if writer.wandb is not None:
        writer.wandb.log(numbers, step=row["step"])


def flush(writer: Writer) -> None:
    """Brings everything to disk, as far as it is not there already."""
    for lines in writer.files.values():
        if lines.local is None and lines.kept:
            lines.path.write_text("".join(lines.kept))
    if writer.board is not None:
        writer.board.flush()


def close(writer: Writer) -> None:
    """Flushes and closes."""
    flush(writer)
    for lines in writer.files.values():
        if lines.local is not None:
            lines.local.close()
    if writer.board is not None:
        writer.board.close()
    if writer.wandb is not None:
        writer.wandb.finish()


def read(workdir: epath.PathLike, name: str = STEPS) -> list[dict[str, Any]]:
    """The rows of a log."""
    path = epath.Path(workdir) / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _open_lines(path: epath.Path, step: int) -> Lines:
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        # A kill may cut the last line short.
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    partial = path.parent / f".{path.name}.partial"
    partial.write_text("".join(kept))
    partial.replace(path)
    if "://" in str(path):
        return Lines(path, None, kept)
    return Lines(path, path.open("a"), [])


def _open_wandb(project: str, name: str, settings: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UsageError(
            f'log.wandb={project!r} wants the package wandb, which is missing: `pip install wandb`, or log.wandb=""'
        ) from None
    return wandb.init(project=project, name=name, config=dict(settings), resume="allow")
