"""Runs a config file, the user's own Python: whatever it raises is one line that names the line of the file."""

import traceback
from pathlib import Path
from typing import Any

from llava_jax.errors import Foreign, UsageError


def run(path: Path) -> Any:
    """What `get_config()` of the file returns.

    Raises:
      ValueError: the file raises something, be it SystemExit, or has no such function.
    """
    names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    with Foreign(lambda error: UsageError(_fault(error, path))):
        exec(compile(path.read_text(encoding="utf-8"), path, "exec"), names)
        if "get_config" not in names:
            raise UsageError("it has no function get_config()")
        return names["get_config"]()


def _fault(error: BaseException, path: Path) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    what = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
    return (f"line {lines[-1]}: " if lines and lines[-1] else "") + " ".join(what.split())
