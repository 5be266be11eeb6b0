"""Pages on which a person accepts, edits or rejects each description: self-contained HTML, opened from disk."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_jax.datagen import files
from llava_jax.errors import UsageError

PAGE = Path(__file__).parent / "review.html"


def write(folder: Path, rows: Sequence[dict[str, Any]], picture: Callable[[str], str], per_page: int) -> list[Path]:
    """Writes 000.html, 001.html, ... with the rows that no rule dropped; their paths.

    rows: of `curate.apply_rules`. picture: a path's data URL.

    Raises:
      ValueError: per_page is below 1.
    """
    if per_page < 1:
        raise UsageError(f"per_page={per_page}: want at least 1")
    candidates = [row for row in rows if row["dropped"] is None]
    pages = []
    for start in range(0, len(candidates), per_page):
        shown = [{name: row[name] for name in ("image_id", "text", "corrected")} | {"picture": picture(row["image"])}
                 for row in candidates[start : start + per_page]]  # fmt: skip
        # The browser stores decisions under this name: other texts have other decisions.
        digest = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:8]
        path = folder / f"{start // per_page:03}.html"
        # "</script" and "<!--" mean something even inside of the script in which the texts lie.
        page = PAGE.read_text(encoding="utf-8").replace("PAGE", f"decisions_{path.stem}_{digest}")
        files.write_text(path, page.replace("ROWS", json.dumps(shown).replace("<", "\\u003c")))
        pages.append(path)
    return pages
