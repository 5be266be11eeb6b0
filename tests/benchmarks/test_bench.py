"""The benchmark works, both sides compute the same, and its arithmetic and table are right; nothing is timed here."""

import math

import pytest

from tests.benchmarks import bench, same, turns
from tests.benchmarks.bench import Pair, Result
from tests.benchmarks.turns import Job, Timing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark")
    same.write(path, same.SMALL)
    return path


@pytest.mark.parametrize("what", bench.PAIRS)
def test_both_sides_compute_the_same(folder, what):
    pytest.importorskip("torch")
    from tests.benchmarks import ours, theirs

    pair = bench.PAIRS[what](folder, same.SMALL)[-1]  # samples of any length, of shared pictures; a batch of 4
    arguments = pair.arguments
    if what in ("input", "tiles"):  # no worker processes, which take seconds to start
        arguments = (*arguments[:-1], 0)
    turns = [getattr(side, pair.function)(*arguments) for side in (ours, theirs)]
    for _ in range(2 if what == "mixture" else 1):  # whose turn is one step: the second loss tells what that changed
        mine, other = (turn() for turn in turns)
        assert pair.same(mine[1], other[1]), (mine, other)
        assert mine[1] and all(map(math.isfinite, mine[1])) and mine[0] > 0


def test_a_difference_between_the_sides_is_no_result():
    assert not bench._close(1e-3)([1.0, 2.0], [1.0, 2.1]) and not bench._close(1e-3)([1.0], [1.0, 1.0])


def test_turns_alternate_and_the_first_is_not_measured(tmp_path):
    log = tmp_path / "log"
    jobs = {name: Job(__name__, "logged", (log, name)) for name in ("a", "b")}
    found = turns.alternate(jobs, 2)
    assert log.read_text() == "ababab"
    assert found == {"a": Timing([1, 2], ["a", "a"]), "b": Timing([1, 2], ["b", "b"])}


def logged(path, name):
    """A turn that takes as many seconds as there were turns before."""
    count = -1

    def turn():
        nonlocal count
        count += 1
        with path.open("a") as file:
            file.write(name)
        return count, name

    return turn


def test_a_job_of_another_checkout_runs_the_code_of_that_checkout(tmp_path):
    (tmp_path / "llava_jax").mkdir()
    (tmp_path / "llava_jax" / "__init__.py").write_text("def made():\n    return lambda: (1.0, __file__)\n")
    found = turns.alternate({"a": Job("llava_jax", "made", (), tmp_path)}, 1)["a"].checks
    assert found == [str(tmp_path / "llava_jax" / "__init__.py")]


def test_a_worker_that_dies_ends_the_benchmark(tmp_path):
    with pytest.raises(EOFError):
        turns.alternate({"a": Job(__name__, "logged", (tmp_path / "no" / "log", "a"))}, 1)


def test_speeds_are_of_the_median_turn_and_the_spread_is_of_neighbouring_turns():
    pytest.importorskip("torch")  # the table names its version
    pair = Pair("greedy", "tokens/s", 100.0, "generate", (), 4.0, lambda a, b: True)
    timings = [Timing([1.0, 2.0, 4.0], ()), Timing([6.0, 5.0, 8.0], ()), Timing([1.0, 1.0, 1.0], ())]
    result = bench._result(pair, (100.0, 100.0, 40.0), timings)
    spreads = ((2.0, 6.0), (0.625, 2.5))
    assert result == Result("greedy", "tokens/s", (50.0, 100 / 6, 40.0), spreads, 4.0)
    assert result.ratio == pytest.approx(3.0)
    line = "| greedy | tokens/s | 50 | 17 | **3.00** (2.00 to 6.00) | 4 |"
    assert bench.table([result]).splitlines()[2] == line
    lacking = result._replace(speeds=result.speeds[:2], spreads=spreads[:1])
    assert bench.table([result, lacking], "abc").splitlines()[2:4] == [
        f"{line} 40 | **1.25** (0.62 to 2.50) |", f"{line} - | - |",
    ]  # fmt: skip


@pytest.mark.skipif(not (turns.ROOT / ".git").exists(), reason="the commit is taken from the repository")
def test_another_commit_computes_the_same_with_its_own_code_on_its_own_input(folder):
    from tests.benchmarks import ours

    (pair,) = bench.PAIRS["input"](folder, same.SMALL)
    with bench.checkout("HEAD", "SMALL", ["input"], folder) as base:
        job = Job("base", "side", (base.folder, pair.what), base.root)
        (found,) = turns.alternate({"base": job}, 1)["base"].checks
    assert base.work[pair.what] == pair.work
    assert pair.same(found, ours.read(*pair.arguments)()[1])
    assert not base.root.exists() and not base.folder.exists()


@pytest.mark.slow
def test_the_benchmark_of_an_accelerator_runs_at_the_smallest_size():
    from tests.benchmarks import device

    lines = device.table("tiny").splitlines()
    assert [line.split(":")[0].split(",")[0] for line in lines[2:5]] == ["| stage 1", "| stage 2", "| greedy"]
    assert all("unknown chip" in line for line in lines[2:5]) and "1 x cpu" in lines[-1]
