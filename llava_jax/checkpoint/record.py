"""The `data` item of a training step: where the pipeline stood, and the fingerprints of every array of the step."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from llava_jax.checkpoint.model_json import read_json
from llava_jax.errors import UnusableCheckpoint

ITEM = "data"
_FILE = "metadata"  # Orbax's JsonSave writes it


def make(data: Mapping[str, Any], sums: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved: `sums` are those of `params/NAME` and `state/NAME`, as `sums.of_arrays` gives them."""
    return {"data": data, "sums": sums, "crc32": _crc32(data, sums)}


def read(step: epath.Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(data, sums) of a step; None where no training run wrote it.

    Raises:
      UnusableCheckpoint: it is damaged.
      Unreachable, UsageError: as `files.retried`.
    """
    path = step / ITEM / _FILE
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not isinstance(content, dict) or set(content) != {"data", "sums", "crc32"}:
        raise UnusableCheckpoint(f"{path}: no item of a training step; copy the step again, or use another")
    if content["crc32"] != _crc32(content["data"], content["sums"]):
        raise UnusableCheckpoint(f"{path}: differs from its checksum; copy the step again, or use another")
    return content["data"], content["sums"]


def _crc32(data: Any, sums: Any) -> int:
    return zlib.crc32(json.dumps([data, sums], sort_keys=True).encode())
