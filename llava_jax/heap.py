"""The heap of a command: modules are no garbage, and on a CPU memory that is freed stays with the process."""

import contextlib
import ctypes
import gc
import importlib.util
import os
from collections.abc import Iterator

ACCELERATORS = ("libtpu", "jax_plugins")  # packages: where one is installed and used, arrays are not on the heap
# Of malloc.h: one arena for all threads, no block outside it, none of it returned, and it grows by 64 MB.
SETTINGS = {"ARENA_MAX": (-8, 1), "MMAP_MAX": (-4, 0), "TRIM_THRESHOLD": (-1, 2**31 - 1), "TOP_PAD": (-2, 2**26)}


def keep() -> None:
    """Lets the C library keep the memory of one step for the next; for glibc, and before a thread is started.

    XLA allocates the buffers of each call anew. By default glibc returns large ones to the system, which clears the
    pages that it hands out again: 68 of the 313 ms of CPU time of the demo's step (EPYC, glibc 2.36, 2026-11-30).
    """
    if has_accelerator() or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return
    library = ctypes.CDLL(None)
    for parameter, value in SETTINGS.values():
        library.mallopt(parameter, value)


def has_accelerator() -> bool:
    """Whether jax may find an accelerator, without starting it: only one process may."""
    return os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(importlib.util.find_spec, ACCELERATORS))


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Imports without garbage collection, now and later: what a module makes stays until the process ends.

    Python looks at all of it again and again: 0.3 of the 3.4 s of CPU time before the first step of the tiny config
    (EPYC, Python 3.11, 2026-11-30).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
