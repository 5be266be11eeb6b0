"""One cache of compiled programs for all runs of this session, and a small run's files."""

import jax
import pytest

from tests.train import tiny
from tests.train.forks import parent


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """Environment of a process that shares the session's compilations; this process shares them too."""
    folder = tmp_path_factory.mktemp("compiled")
    settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {"jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir,
              "jax_persistent_cache_min_compile_time_secs": jax.config.jax_persistent_cache_min_compile_time_secs}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def run(tmp_path, compiled):
    """The config file of a small run; its records and pictures lie beside it."""
    return tiny.write_run(tmp_path / "run")


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """A process that forks training processes."""
    with parent(tmp_path_factory.mktemp("forks")) as server:
        yield server
