"""Fixtures that several rooms' tests use."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` next to the checkout: recordings too large to commit."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"{path} is not there: it holds recordings of the reference that are too large to commit")
    return path
