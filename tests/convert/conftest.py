"""Every import and export asks the model for its names; tracing the same tiny models over and over takes a minute."""

import functools

import pytest

from llava_jax.convert import importing, source
from llava_jax.models.llava import abstract_params


@pytest.fixture(scope="session", autouse=True)
def _names_are_traced_once():
    with pytest.MonkeyPatch.context() as patch:
        cached = functools.cache(abstract_params)
        patch.setattr(importing, "abstract_params", cached)
        patch.setattr(source, "abstract_params", cached)
        yield
