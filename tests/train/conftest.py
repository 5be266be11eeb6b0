"""A small run's files, the session's cache of compiled programs, and a process that forks training processes."""

import os

import pytest

from tests.train import tiny
from tests.train.forks import parent

CACHE = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture(scope="session")
def compiled():
    """What tells a process of the session's cache of compiled programs, where its environment is made anew."""
    return {name: os.environ[name] for name in CACHE}


@pytest.fixture
def run(tmp_path, compiled):
    """The config file of a small run; its records and pictures lie beside it."""
    return tiny.write_run(tmp_path / "run")


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """A process that forks training processes."""
    with parent(tmp_path_factory.mktemp("forks")) as server:
        yield server
