"""`model.remat=auto`: what fits, by a compiler whose answers are known."""

import dataclasses
import types

import pytest

from llava_jax import config as configs
from llava_jax import sharding
from llava_jax.chips import GIB
from llava_jax.errors import UsageError
from llava_jax.models import presets
from llava_jax.models.remat import of_layers
from llava_jax.train import fitting
from llava_jax.train import program as programs

LAYERS = 8
MODEL = dataclasses.replace(presets.get("tiny"), llm=dataclasses.replace(presets.get("tiny").llm, layers=LAYERS))
CONFIG = configs.Config(
    data=configs.Data(layout="packed", rows_per_chip=2, row_tokens=128), train=configs.Train(lr=1e-3, steps=2),
    rates=(("vision/.*", None), (".*", 1e-3)), init=((".*", "random"),), model=configs.Model(remat="auto"),
)  # fmt: skip


@pytest.fixture(scope="module")
def fitted():
    """fitted(limit) -> (policies, their peak, what was compiled), where a peak is 1,000,000 bytes and what is kept."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1})

    def build(policies):
        return programs.build(fitting.with_remat(CONFIG, policies), MODEL, 2, mesh)

    sizes = fitting._step_bytes(build("full"))

    def peak(policies):
        return 1_000_000 + sum(sum(sizes[: fitting.LADDER.index(policy)]) for policy in of_layers(policies, LAYERS))

    def find(limit, error=1.0, first=0):
        asked = []

        def compiled(program):
            asked.append(program.model.remat)
            return int(1_000_000 + (peak(program.model.remat) - 1_000_000) * error)

        found = fitting.fit(build, compiled, int(limit / fitting.SHARE) + 2, first).model.remat
        return found, compiled(build(found)), asked

    return find, sizes


def test_as_many_layers_keep_more_as_fit_and_these_are_the_last(fitted):
    find, sizes = fitted
    found, peak, asked = find(1_000_000 + 3 * sizes[0])
    assert found == ("full",) * 5 + ("save_qkv",) * 3 and peak == 1_000_000 + 3 * sizes[0]
    assert asked[:-1] == ["full", found]  # counted right, so that nothing else is tried
    assert find(1_000_000 + LAYERS * sizes[0] + 2 * sizes[1])[0] == ("save_qkv",) * 6 + ("save_linear",) * 2
    assert find(10_000_000_000)[0] == "save_dots" and find(1_000_000)[0] == "full"


def test_a_platform_may_have_a_share_of_its_own(fitted, monkeypatch):
    find, sizes = fitted
    monkeypatch.setattr(fitting, "SHARES", {"cpu": fitting.SHARE / 2})
    assert find(2 * (1_000_000 + 3 * sizes[0]))[0] == ("full",) * 5 + ("save_qkv",) * 3


@pytest.mark.parametrize("error", [0.5, 1.5, 2.0])
def test_the_compiler_corrects_what_was_counted(fitted, error):
    find, sizes = fitted
    limit = 1_000_000 + 6 * sizes[0]
    found, peak, asked = find(limit, error)
    assert peak <= limit and len(asked) - 1 <= fitting.COMPILATIONS
    assert limit - peak < error * max(sizes) and found != "full"


def test_the_search_begins_where_it_is_told(fitted):
    find, sizes = fitted
    found, _, asked = find(1_000_000 + LAYERS * sizes[0] + sizes[1], first=1)
    assert asked[0] == "save_qkv" and found == ("save_qkv",) * 7 + ("save_linear",)


def test_where_nothing_fits_the_message_says_how_many_layers_would_and_what_else_to_cut(fitted):
    with pytest.raises(UsageError, match=r"about \d of the 8 layers would fit. Fewer rows \(data.rows_per") as error:
        fitted[0](999_000)
    assert f"takes {1_000_000 / GIB:.2f} GiB of a device" in str(error.value)


def test_a_machine_without_a_limit_keeps_all_products():
    assert fitting.resolve(CONFIG, MODEL, 2).model.remat == "save_dots"


def test_all_processes_fit_into_the_smallest_memory_and_by_the_largest_peak(fitted, monkeypatch):
    others, beats = {"remat limit": 2 * GIB, "remat peak": 3 * GIB}, []
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 4 * GIB})
    compiled = types.SimpleNamespace(peak=GIB)
    monkeypatch.setattr(fitting.jax, "local_devices", lambda: [device])
    monkeypatch.setattr(fitting.memory, "compile_step", lambda program: (None, compiled))
    monkeypatch.setattr(fitting.lifecycle, "beat", lambda: beats.append(1))
    monkeypatch.setattr(fitting.distributed, "exchange", lambda name, value: [value, others[name]])
    with pytest.raises(UsageError, match="a step takes 3.00 GiB of a device where nothing is kept, and may take 1.93"):
        fitting.resolve(CONFIG, MODEL, 2)
    assert beats == [1]


def test_gated_blocks_between_the_layers_want_one_policy():
    cross = types.SimpleNamespace(model=types.SimpleNamespace(config=types.SimpleNamespace(cross=object())))
    with pytest.raises(UsageError, match="want one of full, save_qkv, save_linear, save_dots"):
        fitting.fit(lambda policies: cross, lambda program: 0, 1)
