"""placeholder until the matrix of attention's backends is there"""
from llava_jax.doctor import report


def check(found):
    yield report.skipped("kernels", "they are not merged yet")
