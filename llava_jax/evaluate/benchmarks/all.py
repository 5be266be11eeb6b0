"""The table of all benchmarks, by name."""

import difflib

from llava_jax.errors import UsageError
from llava_jax.evaluate.benchmarks import custom, gqa, llava_bench, mmbench, mme, mmvet, pope, scienceqa, seed, vqa
from llava_jax.evaluate.questions import Benchmark

_ALL = (
    scienceqa.BENCHMARK, vqa.VQAV2, gqa.BENCHMARK, vqa.VIZWIZ, vqa.TEXTVQA, pope.BENCHMARK, mme.BENCHMARK,
    mmbench.MMBENCH, mmbench.MMBENCH_CN, seed.BENCHMARK, llava_bench.COCO, llava_bench.WILD, mmvet.BENCHMARK,
    custom.BENCHMARK,
)  # fmt: skip
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def get(name: str) -> Benchmark:
    """The benchmark of that name; case, dashes and blanks make no difference: "MM-Vet" is mmvet.

    Raises:
      UsageError: there is none; names the nearest.
    """
    by_key = {_fold(one): one for one in BENCHMARKS}
    if _fold(name) not in by_key:
        matches = difflib.get_close_matches(_fold(name), by_key, n=1, cutoff=0.5)
        hint = f"; did you mean {by_key[matches[0]]}?" if matches else ""
        raise UsageError(f"--benchmark {name}: want one of {', '.join(BENCHMARKS)}{hint}")
    return BENCHMARKS[by_key[_fold(name)]]


def _fold(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
