"""The numbers that the real programs must reach, by the real compiler: memory, work, links and compile time.

Each of these compiles a model of 7 or 13 billion parameters, a minute or two and more each on two quiet cores.
"""

import dataclasses
import json
import re
import time
from pathlib import Path

import pytest

from llava_jax import config as configs
from llava_jax.chips import GIB
from llava_jax.models import presets
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.plan.__main__ import main
from llava_jax.plan.compile import compile_step, find_target
from llava_jax.train import flops
from llava_jax.train import program as programs

CONFIGS = Path(__file__).parents[2] / "configs"
T = 2048
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def compiler():
    pytest.importorskip("libtpu")


def packed(rows):
    """So many rows of 2,048 tokens a chip, with the pools that fill them best (tests/data/test_planner.py)."""
    group = min(rows, 4)
    return {"data.row_tokens": T, "data.rows_per_chip": rows, "data.rows_per_group": group,
            "data.images_per_group": {1: 3, 2: 5, 4: 9}[group]}  # fmt: skip


def run_plan(tmp_path, config, topology, rows, *args):
    settings = [f"--config.{key}={value}" for key, value in packed(rows).items()]
    options = ["--config", str(CONFIGS / f"{config}_packed.py"), "--topology", topology]
    assert main([*options, *settings, *args, "--json", str(tmp_path / "plan.json")]) == 0
    return json.loads((tmp_path / "plan.json").read_text())


@pytest.mark.parametrize("rows, most", [(4, 14.4), (1, 10.0)])
def test_stage_2_of_the_7b_leaves_room_on_sixteen_v5e(tmp_path, rows, most):
    plan = run_plan(tmp_path, "llava15_7b_finetune", "v5e:4x4", rows)
    assert plan["fits"] and plan["peak_hbm_bytes"] <= most * GIB, plan["peak_hbm_bytes"] / GIB


def test_stage_1_of_the_7b_spends_nothing_on_what_is_frozen(tmp_path):
    plan = run_plan(tmp_path, "llava15_7b_pretrain", "v5e:2x4", 8)
    assert plan["fits"] and 8 * plan["optimizer_bytes"] < 0.3 * GIB
    model = presets.get("llava15_7b")
    forward = flops.trace(Llava(model), abstract_params(model))
    projector = [name for name in forward.names if name.startswith("projector/")]
    # All positions, all pictures, every pair under the causal mask; logits where the plan takes them to be.
    rows, logits_flops = 8 * 8, plan["flops_by_part"]["logits"]["executed"]
    counts = {"tokens": rows * T, "pairs": rows * T * (T + 1) // 2, "supervised": 0, "images": 9 * rows // 4}
    # Forward, the gradient of activations, and the projector's own; then a forward pass again.
    once = flops.count(forward, projector).total(**counts)
    recompute = flops.count(forward, ()).total(**(counts | {"images": 0}))
    assert plan["executed_flops"] <= 1.03 * (once + recompute + logits_flops)


def test_adapters_on_the_7b_fit_on_four_v5e(tmp_path):
    assert run_plan(tmp_path, "llava15_7b_lora", "v5e:2x2", 2)["fits"]


def test_stage_1_of_minigpt4_13b_fits_on_eight_v5e(tmp_path):
    args = ["--config", str(CONFIGS / "minigpt4_13b_stage1.py"), "--config.model.base=", "--topology", "v5e:2x4"]
    assert main([*args, "--json", str(tmp_path / "plan.json")]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["peak_hbm_bytes"] <= 6 * GIB, plan["peak_hbm_bytes"] / GIB


@pytest.mark.parametrize("topology", ["v5e:4x8", "v5p:2x2x2"])
def test_stage_2_of_the_13b_fits(tmp_path, topology):
    assert run_plan(tmp_path, "llava15_13b_finetune", topology, 2)["fits"]


@pytest.mark.parametrize("topology, slices", [("v5p:8x8x8", 1), ("v6e:16x16", 1), ("v5e:8x8", 2)])
def test_stage_2_of_the_7b_compiles_for_hundreds_of_chips_and_says_what_they_send(tmp_path, topology, slices):
    plan = run_plan(tmp_path, "llava15_7b_finetune", topology, 1, "--slices", str(slices))
    assert plan["fits"] and sum(plan["collective_bytes"].values()) > 0
    assert bool(plan["collective_bytes_between_slices"]) == (slices > 1)


def small(mesh, layers=2):
    """Stage 2 with the 7B's widths and only some of its layers, on sixteen v5e: (place, program)."""
    settings = {key: str(value) for key, value in packed(1).items()}
    config = configs.load(CONFIGS / "llava15_7b_finetune_packed.py", settings)
    model = presets.get("llava15_7b")
    model = dataclasses.replace(model, llm=dataclasses.replace(model.llm, layers=layers))
    target = find_target(mesh, "v5e:4x4")
    return target, programs.build(config, model, 100, target.mesh)


@pytest.mark.parametrize("mesh, gathers", [
    (configs.Mesh(data=2, fsdp=8), 0), (configs.Mesh(fsdp=8, tensor=2), 1), (configs.Mesh(fsdp=8, context=2), 1),
])  # fmt: skip
def test_splicing_pictures_into_text_sends_nothing_but_features_over_tensor_or_context(mesh, gathers):
    transfers = compile_step(*small(mesh), 1, {}).cost.transfers.values()
    splices = [transfer for transfer in transfers if re.search(r"Llava\.embed/(?!llm\.embed)", transfer.op_name)]
    forward = [transfer for transfer in splices if "transpose(" not in transfer.op_name]
    assert len(forward) <= gathers, forward
    assert gathers or not splices, splices


def test_forty_layers_compile_in_less_than_1_3_times_the_time_of_thirty_two():
    def secs(layers):
        target, program = small(configs.Mesh(), layers)
        start = time.process_time()
        compile_step(target, program, 1, {})
        return time.process_time() - start

    secs(2)  # the first loads the compiler
    assert any(secs(40) < 1.3 * secs(32) for _ in range(3))  # other work on the machine takes time off both
