"""`python -m llava_jax.plan` for GPUs that are absent, by XLA's compiler for them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llava_jax import config as configs
from llava_jax.chips import GIB
from llava_jax.models import attention as attentions
from llava_jax.plan import compilers, hlo
from llava_jax.plan.__main__ import main
from llava_jax.plan.compile import find_target

TINY = ["--config", str(Path(__file__).parents[2] / "configs" / "tiny_pretrain.py"), "--config.model.preset=tiny"]
PACKED = [f"--config.{setting}" for setting in (
    "data.layout=packed", "data.order=shuffle", "train.loss=token_mean", "data.rows_per_chip=2", "model.dtype=bfloat16",
    "data.row_tokens=128", "data.images_per_group=4",
)]  # fmt: skip


@pytest.fixture
def compiler():
    if compilers.missing_packages():
        pytest.skip(f"XLA's compiler for GPUs, which needs none: pip install --no-deps {compilers.missing_packages()}")


def run_plan(tmp_path, *args):
    assert main([*TINY, *args, "--json", str(tmp_path / "plan.json")]) == 0
    return json.loads((tmp_path / "plan.json").read_text())


def test_a_plan_for_gpus_says_memory_work_links_and_time(compiler, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attentions, "has_cudnn", lambda: False)
    plan = run_plan(tmp_path, *PACKED, "--topology", "H100:4", "--config.mesh.data=2", "--config.model.remat=full")
    output = capsys.readouterr().out
    assert "4 chips (NVIDIA H100 80GB HBM3) on 1 host(s); mesh data 2 x fsdp 2" in output
    assert "not counted" not in output and "cuDNN is not installed" in output
    assert plan["fits"] and plan["limit_hbm_bytes"] == int(0.92 * 84_942_979_072)
    assert 0 < plan["model_flops"] < plan["executed_flops"] < 3 * plan["model_flops"]
    assert all(part["executed"] > 0 for part in plan["flops_by_part"].values())
    assert plan["flops_by_part"]["decoder"]["again"] > 0
    assert plan["collective_bytes"]["all-gather"] > 0 and not plan["collective_bytes_between_slices"]
    sent_secs = sum(plan["collective_bytes"].values()) / 450e9  # a switch: two GPUs have the bandwidth of eight
    assert plan["step_secs_roofline"] >= sent_secs and plan["memory_bytes"] > plan["argument_bytes"]


def test_a_step_that_does_not_fit_gpus_says_what_it_would_take(compiler, tmp_path, capsys):
    args = ("--topology", "A100-40:1", "--config.data.batch_samples=32768", "--config.model.remat=none")
    plan = run_plan(tmp_path, *args)
    assert plan["fits"] is False and plan["peak_hbm_bytes"] > plan["limit_hbm_bytes"] > 36 * GIB
    assert plan["executed_flops"] > 0 and "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize("width, query, key", [(128, 8, 8), (64, 8, 2)])
def test_flash_kernels_for_gpus_count_the_tiles_that_their_schedule_visits(compiler, width, query, key):
    mesh = find_target(configs.Mesh(), "A100:2").mesh
    cut = NamedSharding(mesh, PartitionSpec("fsdp"))
    shapes = [jax.ShapeDtypeStruct((4, 1024, n, width), jnp.bfloat16, sharding=cut) for n in (query, key, key)]

    def loss(q, k, v, segments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attentions.attention(q, k, v, causal=True, segments=segments).astype(jnp.float32).sum()

    segments = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=cut)
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, segments).compile().as_text()
    pairs = {128: 36 * 128 * 128, 64: 136 * 64 * 64}
    assert not hlo.cost(text).uncounted
    assert hlo.cost(text).flops == 2 * width * query * 2 * (2 * pairs[128] + 7 * pairs[64])
    assert hlo.cost(text, tile_shares={128: 0.0, 64: 0.5}).flops == 7 * width * query * 2 * pairs[64]


@pytest.mark.parametrize("args, message", [
    (["--topology", "H100:3"], "H100 comes as 1, 2, 4, 8"),
    (["--topology", "H1000:8"], "want CHIP:SHAPE with a chip of v4, v5e"),
    (["--topology", "H100:8", "--config.mesh.fsdp=3"], "the product of the sizes must be 8"),
    (["--topology", "H100:8", "--slices", "2"], "these 8 devices are of 1 slice(s)"),
    (["--topology", "A100:8", "--config.data.batch_samples=12"], "want a multiple of 8"),
])  # fmt: skip
def test_what_cannot_be_planned_for_gpus_is_refused(compiler, args, message, capsys, monkeypatch):
    monkeypatch.setattr("llava_jax.plan.compile.compile_step", None)
    assert main([*TINY, *args]) == 64
    assert message in capsys.readouterr().err


def test_what_the_compiler_for_gpus_refuses_is_one_line_with_its_name(compiler, capsys, monkeypatch):
    def refuse(program):
        raise jax.errors.JaxRuntimeError("INTERNAL: bad\nlayout")

    monkeypatch.setattr("llava_jax.train.memory.compile_step", refuse)
    assert main([*TINY, "--topology", "H100:2"]) == 64
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert f"XLA's compiler for GPUs (jax {jax.__version__}) refuses a step of" in line and "a newer jax" in line


def test_without_the_compiler_for_gpus_the_packages_are_named_in_jax_s_version(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(compilers, "TOOLKIT", "/nowhere")
    monkeypatch.setattr(compilers, "ASSEMBLERS", set())
    assert main([*TINY, "--topology", "H100:8"]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    plugin = f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
    assert f"pip install --no-deps {plugin} nvidia-cuda-nvcc-cu12`" in line


def test_machines_of_gpus_are_listed(capsys):
    assert main(["--topologies"]) == 0
    assert ["H100:8", "8", "1", "72.78", "989"] in [line.split() for line in capsys.readouterr().out.splitlines()]
