"""Memory that is freed leaves its pages to what comes next."""

import os
import subprocess
import sys

import pytest

COUNT = """
import resource
from llava_jax import heap
heap.ACCELERATORS = ("jax",)
heap.keep()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"1" * 2**26
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
@pytest.mark.parametrize("platforms, least, most", [("cpu", 0, 100), ("", 16_384, 20_000)])
def test_freed_memory_leaves_its_pages_to_what_comes_next(platforms, least, most):
    """64 MB are 16,384 pages; where an accelerator's package is installed and used nothing is changed."""
    environment = {**os.environ, "JAX_PLATFORMS": platforms}
    run = subprocess.run([sys.executable, "-c", COUNT], check=True, capture_output=True, text=True, env=environment)
    faults = int(run.stdout)
    assert least <= faults <= most
