"""Compiled code is machine code: it is read from a directory of one's own, or compiled again."""

import jax
import pytest

from llava_jax import compilations


@pytest.fixture(autouse=True)
def cache_of_this_process(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_code_is_kept_in_a_private_directory_only(tmp_path):
    folder = tmp_path / "cache" / "llava_jax" / "compiled"
    compilations.keep()
    assert jax.config.jax_compilation_cache_dir == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    jax.config.update("jax_compilation_cache_dir", None)
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="chmod 700"):
        compilations.keep()


def test_a_home_that_cannot_be_written_to_keeps_nothing(tmp_path):
    (tmp_path / "cache").write_text("no directory")
    compilations.keep()
    assert jax.config.jax_compilation_cache_dir is None
