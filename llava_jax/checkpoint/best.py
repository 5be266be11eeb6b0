"""`DIR/best.json`: the validation losses of a run that keeps its best step, and so which step that is."""

import json
import math
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from etils import epath

from llava_jax import files
from llava_jax.checkpoint.model_json import read_json
from llava_jax.errors import UnusableCheckpoint

FILE = "best.json"
Row = tuple[int, float | None]  # a step and its validation loss; None: it was not finite


class Losses(NamedTuple):
    """data: names the records that the losses are of; rows: in the order of their steps."""

    data: str = ""
    rows: tuple[Row, ...] = ()


def read(directory: epath.PathLike) -> Losses:
    """The losses of a run; none where there is no file.

    Raises:
      UnusableCheckpoint: the file is damaged.
      Unreachable, UsageError: as `files.retried`.
    """
    path = epath.Path(directory) / FILE
    try:
        content = read_json(path)
    except FileNotFoundError:
        return Losses()
    except IsADirectoryError:
        raise UnusableCheckpoint(f"{path}: want a file, it is a directory") from None
    if not isinstance(content, dict) or set(content) != {"data", "losses", "crc32"}:
        raise UnusableCheckpoint(f"{path}: no validation losses of a run; copy it again")
    if content["crc32"] != _crc32(content["data"], content["losses"]):
        raise UnusableCheckpoint(f"{path}: differs from its checksum; copy it again")
    return Losses(content["data"], tuple((step, loss) for step, loss in content["losses"]))


def write(directory: epath.PathLike, losses: Losses) -> None:
    """Writes the file, whole or not at all."""
    rows = [[step, loss if loss is not None and math.isfinite(loss) else None] for step, loss in losses.rows]
    content = {"data": losses.data, "losses": rows, "crc32": _crc32(losses.data, rows)}
    files.write_whole(epath.Path(directory) / FILE, json.dumps(content).encode())


def lowest(rows: Iterable[Row]) -> tuple[int, float] | None:
    """The step with the lowest loss, and the loss; of equals the first. None where no loss is finite."""
    finite = [(step, loss) for step, loss in rows if loss is not None and math.isfinite(loss)]
    return min(finite, key=lambda row: row[1], default=None)


def _crc32(data: Any, rows: Any) -> int:
    return zlib.crc32(json.dumps([data, rows]).encode())
