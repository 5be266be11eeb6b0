"""Programs for TPUs are compiled as `plan` compiles them, whatever the suite sets for its own."""

import jax
import pytest

SETTINGS = {
    "jax_disable_most_optimizations": False,
    "jax_persistent_cache_min_compile_time_secs": 1e9,  # none is written: without a TPU it could not be read again
}


@pytest.fixture(autouse=True)
def compiled_as_by_the_command():
    before = {name: jax.config.values[name] for name in SETTINGS}
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
