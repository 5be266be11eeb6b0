"""`python -m llava_jax.plan` on programs small enough to compile in seconds: what it says, and what it refuses."""

import json
import re
from pathlib import Path

import pytest

from llava_jax import config as configs
from llava_jax.chips import GIB
from llava_jax.models import remat
from llava_jax.plan import search
from llava_jax.plan.__main__ import main
from llava_jax.plan.compile import find_target

ROOT = Path(__file__).parents[2]
TINY = ["--config", str(ROOT / "configs" / "tiny_pretrain.py"), "--config.model.preset=tiny", "--topology", "v5e:2x2"]
SETTINGS = dict(zip(("--config", "--config.model.preset", "--topology"), (TINY[0:2], TINY[2:3], TINY[3:5])))
PACKED = [f"--config.{setting}" for setting in (
    "data.layout=packed", "data.order=shuffle", "train.loss=token_mean", "data.rows_per_chip=2",
    "data.row_tokens=128", "data.images_per_group=4",
)]  # fmt: skip
BYTES = ("peak_hbm_bytes", "argument_bytes", "temp_bytes")


@pytest.fixture(autouse=True)
def compiler():
    pytest.importorskip("libtpu")


def tiny(args):
    """The words, and those of TINY that they do not set themselves: an option may be given once."""
    own_options = {arg.partition("=")[0] for arg in args}
    return [*(arg for name, option_args in SETTINGS.items() if name not in own_options for arg in option_args), *args]


def run_plan(tmp_path, *args):
    assert main([*TINY, *args, "--json", str(tmp_path / "plan.json")]) == 0
    return json.loads((tmp_path / "plan.json").read_text())


def test_a_plan_says_memory_work_links_time_and_money(tmp_path, capsys):
    plan = run_plan(tmp_path, *PACKED, "--price", "1.2", "--samples", "558128")
    output = capsys.readouterr().out
    for text in ("4 chips (TPU v5 lite) on 1 host(s); mesh fsdp 4", "memory of a chip", "fits:", "work of a step",
                 "padding and masked", "links to other chips", "558,128 samples", "at 1.2 a chip and hour", "roofline"):
        assert text in output
    assert plan["fits"] is True and plan["compile_secs"] > 0
    assert all(type(plan[key]) is int for key in (*BYTES, "model_flops", "executed_flops"))
    assert plan["collective_bytes"] and all(type(count) is int for count in plan["collective_bytes"].values())
    assert 0 < plan["model_flops"] < plan["executed_flops"]
    parts = sum(plan[f"{name}_bytes"] for name in ("parameter", "frozen", "optimizer", "batch"))
    assert parts <= plan["argument_bytes"] <= plan["peak_hbm_bytes"] < plan["limit_hbm_bytes"] == int(15.75 * GIB)
    assert plan["peak_hbm_bytes"] >= plan["argument_bytes"] + plan["temp_bytes"]  # the outputs are the arguments
    compute_secs = plan["executed_flops"] / (4 * 197e12)
    assert plan["step_secs_roofline"] >= compute_secs
    assert plan["mfu_roofline"] == pytest.approx(plan["model_flops"] / (plan["step_secs_roofline"] * 4 * 197e12))
    assert plan["money_roofline"] == pytest.approx(plan["hours_roofline"] * 4 * 1.2)


def test_the_parts_of_the_work_add_up_and_only_the_decoder_works_again(tmp_path):
    plan = run_plan(tmp_path, *PACKED, "--config.model.remat=full")
    parts = plan["flops_by_part"]
    assert sum(part["executed"] for part in parts.values()) == plan["executed_flops"]
    assert sum(part["useful"] for part in parts.values()) == plan["model_flops"]
    assert all(part["executed"] >= part["useful"] > 0 for part in parts.values())
    assert parts["decoder"]["again"] > 0 and parts["tower and projector"]["again"] == 0
    baseline = run_plan(tmp_path, *PACKED, "--config.model.remat=none")
    assert not any(part["again"] for part in baseline["flops_by_part"].values())
    assert baseline["model_flops"] == plan["model_flops"] and baseline["executed_flops"] < plan["executed_flops"]


def test_two_slices_sum_their_gradients_over_the_network_between_them(tmp_path, capsys):
    plan = run_plan(tmp_path, *PACKED, "--slices", "2")
    assert (plan["slices"], plan["chips"], plan["mesh"]["data"]) == (2, 8, 2)
    assert plan["collective_bytes_between_slices"]["all-reduce"] > 0
    output = capsys.readouterr().out
    assert "2 slices of v5e:2x2" in output and "network between slices" in output


def test_a_step_that_does_not_fit_reports_the_memory_it_needs(tmp_path, capsys):
    args = ("--config.data.batch_samples=262144", "--config.model.remat=none", "--config.data.row_tokens=1024")
    plan = run_plan(tmp_path, *args)
    assert plan["fits"] is False and plan["peak_hbm_bytes"] > plan["limit_hbm_bytes"]
    assert plan["executed_flops"] is None and plan["collective_bytes"] is None
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_without_samples_to_count_hours_are_those_of_a_million(tmp_path, capsys):
    nowhere = "--config.data.sources.0.path=nowhere.json"
    run_plan(tmp_path, "--config.train.steps=none", "--config.train.epochs=1", nowhere)
    assert "a million samples:" in capsys.readouterr().out


@pytest.fixture
def refusing(monkeypatch):
    """The compiler, which refuses every step with more than one row a chip."""
    import jax

    compile_ = jax.stages.Lowered.compile

    def refuse(lowered, *args, **kwargs):
        if any(x.shape == (8, 128) for x in jax.tree.leaves(lowered.in_avals)):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: bad\nlayout in memory\n  at 0x1234")
        return compile_(lowered, *args, **kwargs)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)


def test_what_the_compiler_refuses_is_one_line_with_what_was_asked_and_a_remedy(capsys, refusing):
    assert main([*TINY, *PACKED]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    refusal = (r"error: the TPU's compiler \(libtpu [\d.]+\) refuses a step of 8 rows of 128 tokens, "
               r"remat \w+, on v5e:2x2 ")
    assert re.match(refusal + "with mesh fsdp 4: INTERNAL: RET_CHECK failure: bad. ", line)
    assert "fewer rows" in line and "another --topology" in line and "a newer libtpu" in line


def test_a_search_goes_on_after_a_choice_that_the_compiler_refuses(tmp_path, capsys, monkeypatch, refusing):
    monkeypatch.setattr("llava_jax.plan.search.ROWS", (1, 2))
    monkeypatch.setattr("llava_jax.plan.search.REMATERIALISED", {"none": 0.0})
    monkeypatch.setattr("llava_jax.plan.search._meshes", lambda place, model: [configs.Mesh(fsdp=place.devices)])
    found = run_plan(tmp_path, *PACKED, "--search")
    assert "2 rows, none, data 1 fsdp 4 tensor 1: the TPU's compiler" in capsys.readouterr().err
    assert found["overrides"]["data.rows_per_chip"] == "1"


def test_a_search_prints_the_fastest_that_fits_as_a_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llava_jax.plan.search.ROWS", (1, 2))
    monkeypatch.setattr("llava_jax.plan.search.REMATERIALISED", {"none": 0.0, "full": 0.7})
    plan = run_plan(tmp_path, *PACKED, "--search")
    printed = capsys.readouterr()
    assert re.search(r"\d+ choices may fit", printed.err) and "tokens/s a device" in printed.err
    assert plan["fits"] and plan["overrides"]["model.remat"] == "none"
    command = printed.out.splitlines()[-1]
    assert command.startswith("python -m llava_jax.train --config ") and "--config.data.rows_per_chip=2" in command


def test_the_search_knows_every_policy():
    assert set(search.REMATERIALISED) == set(search.SAVED_BYTES) == set(remat.NAMES)


def test_without_the_compiler_the_remedy_is_named(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(TINY) == 64
    assert "pip install libtpu" in capsys.readouterr().err


@pytest.mark.parametrize("topology, mesh", [
    ("v6e:4x4", configs.Mesh(data=2)), ("v6e:16x16", configs.Mesh(tensor=2)), ("v5p:2x2x4", configs.Mesh(tensor=4)),
    ("v5e:8x8", configs.Mesh(data=2, slices=2)), ("tpu7x:2x2x1", configs.Mesh(data=2)), ("v5e:1x1", configs.Mesh()),
])  # fmt: skip
def test_an_axis_of_the_mesh_may_take_part_of_a_dimension_of_the_slice(topology, mesh):
    assert find_target(mesh, topology).devices % (max(1, mesh.data) * mesh.tensor * mesh.slices) == 0


def test_all_topologies_are_listed_with_chips_and_hosts(capsys):
    assert main(["--topologies"]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["v5e:4x4", "16", "4"] in rows and ["v5p:8x8x8", "512", "128"] in rows


@pytest.mark.parametrize("args, message", [
    (["--topology", "v5e:3x3"], "v5e comes as 1x1, 2x2, 2x4"),
    (["--topology", "v9:2x2"], "want CHIP:SHAPE with a chip of v4, v5e"),
    (["--config.mesh.fsdp=3"], "the product of the sizes must be 4"),
    (["--config.data.batch_samples=6"], "want a multiple of 4"),
    (["--topology", "v5e:4x4", "--config.mesh.tensor=16", "--config.mesh.fsdp=1", "--config.data.batch_samples=2"],
     "2 rows a step do not divide over 4 hosts"),
    (["--config.data.row_tokens=4"], "an image takes 4 positions"),
    (["--config.model.remat=some"], "want one of none, full, save_qkv"),
    (["--config.model.preset="], "add --config.model.preset=NAME with one of"),
    (["--config.train.learning=1"], "unknown key 'train.learning'"),
    (["--slices", "0"], "mesh.slices=0: want at least 1"),
    (["--config", "configs/nowhere.py"], "no such file"),
    (["--config.train.lr"], "wants a value"),
    (["--config.train.lr=1e-3", "--config.train.lr=1e-4"], "--config.train.lr is given more than once"),
])  # fmt: skip
def test_what_cannot_be_planned_is_refused_before_anything_is_compiled(args, message, capsys, monkeypatch):
    monkeypatch.setattr("llava_jax.plan.compile.compile_step", None)
    assert main(tiny(args)) == 64
    assert message in capsys.readouterr().err


def test_an_unknown_compiler_option_is_refused_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llava_jax.plan.compile.compile_step", None)
    text = (ROOT / "configs" / "tiny_pretrain.py").read_text()
    text = text.replace("return config", 'config.compiler_options = (("xla_tpu_fast", True),)\n    return config')
    (tmp_path / "fast.py").write_text(text)
    assert main(tiny(["--config", str(tmp_path / "fast.py")])) == 64
    assert "XLA refuses xla_tpu_fast=True" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--topology", "v5e:2x2"], ["--config", "configs/tiny_pretrain.py"]])
def test_a_missing_option_is_named(args, capsys):
    assert main(args) == 64
    assert "is missing" in capsys.readouterr().err


def test_a_word_that_means_nothing_exits_64(capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*TINY, "--fast"])
    assert exit_.value.code == 64 and "--fast" in capsys.readouterr().err
