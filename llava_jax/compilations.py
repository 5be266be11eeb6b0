"""Where a command keeps what XLA compiles, so that the same command starts sooner the next time."""

import os
from pathlib import Path

import jax

from llava_jax.errors import UsageError


def keep() -> None:
    """Lets XLA keep what it compiles in the user's cache directory, unless JAX_COMPILATION_CACHE_DIR names another."""
    if jax.config.jax_compilation_cache_dir:
        return
    home = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("HOME") and Path(os.environ["HOME"]) / ".cache")
    if not home:  # a container's user without a home
        return
    folder = Path(home) / "llava_jax" / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to: it is compiled each time
        return
    found = folder.stat()
    # Entries are machine code: who can write here can run code as this user.
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UsageError(f"{folder}: want a directory of your own with mode 700, as compiled code is read from it; "
                         f"`chmod 700 {folder}`, or set JAX_COMPILATION_CACHE_DIR")  # fmt: skip
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
