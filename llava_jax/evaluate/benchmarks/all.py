"""The table of all benchmarks, by the name that the doors know them by."""

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
    """The benchmark of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in BENCHMARKS:
        raise UsageError(f"--benchmark {name}: want one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
