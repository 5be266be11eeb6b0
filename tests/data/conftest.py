"""A tiny world of records: eight-pixel pictures, the 960-piece tokenizer, sentences of different length."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava_jax.data import planner
from llava_jax.data.check import Checks, rules
from llava_jax.data.packed import Packed
from llava_jax.data.problems import Finding
from llava_jax.data.sources import Source, open_source
from llava_jax.data.validate import validate
from llava_jax.prompt import templates, tokenizer
from llava_jax.prompt.encode import Format

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def misc() -> dict:
    return json.loads((GOLDEN / "misc.json").read_text())


@pytest.fixture(scope="session")
def v1() -> Format:
    """Pictures of 8 x 8 pixels that give 4 features."""
    loaded = tokenizer.load(GOLDEN / "tiny_llama.model", legacy=True)
    return Format(templates.get("v1"), loaded, image_size=8, image_features=4, image_mode="pad")


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def record(number: int) -> dict:
    """Every third is text only; the answer's length grows with number % 7."""
    made = {
        "id": f"r{number}",
        "conversations": [
            {"from": "human", "value": "What is it?" if number % 3 == 0 else "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A cat." + " It sits." * (number % 7)},
        ],
    }
    return made if number % 3 == 0 else made | {"image": f"{number % 5}.png"}


def findings(
    source: Source, format: Format, row_tokens: int = 400, images: int = 9, opened: bool = True
) -> list[Finding]:
    """All that `validate` finds, in the order of the records."""
    checks = Checks(rules(format.template, format.tokenizer), format, row_tokens, images)
    return [finding for verdict in validate(source, checks, open_images=opened) for finding in verdict.findings]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Five pictures."""
    path = tmp_path_factory.mktemp("images")
    for shade in range(5):
        (path / f"{shade}.png").write_bytes(png(40 * shade))
    return path


@pytest.fixture
def make(tmp_path: Path, folder: Path) -> Callable[..., Source]:
    """make(records or their number, name="a.json", weight=1.0) -> an open source with the picture folder."""

    def made(records: list | int, name: str = "a.json", weight: float = 1.0) -> Source:
        rows = [record(i) for i in range(records)] if isinstance(records, int) else records
        text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(text)
        return open_source(tmp_path / name, folder, weight=weight)

    return made


@pytest.fixture
def build(v1, monkeypatch):
    """build(source or sources, ...) -> a pipeline of steps of 4 rows of 200, two of them sharing 4 images."""
    monkeypatch.setattr(planner, "WINDOW", 16)

    def built(sources, **changes):
        sources = sources if isinstance(sources, list) else [sources]
        settings = {"format": v1, "rows": 4, "row_tokens": 200, "rows_per_group": 2, "images_per_group": 4,
                    "threads": 2, "seed": 5}  # fmt: skip
        return Packed(sources=sources, **settings | changes)

    return built
