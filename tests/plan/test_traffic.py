"""Memory traffic of programs whose bytes are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llava_jax import config as configs
from llava_jax.plan import hlo, traffic
from llava_jax.plan.compile import find_target
from llava_jax.plan.hlo_text import parse

MIB = 2**20


def of_text(body):
    entry, computations = parse(f"""HloModule one

%fused (a: f32[8,1024,1024], i: s32[]) -> f32[1024,1024] {{
  %a = f32[8,1024,1024]{{2,1,0}} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,1024,1024]{{2,1,0}} dynamic-slice(%a, %i, %zero, %zero), dynamic_slice_sizes={{1,1024,1024}}
  ROOT %flat = f32[1024,1024]{{1,0}} bitcast(%cut)
}}

%replacing (a: f32[8,1024,1024], x: f32[1,1024,1024], i: s32[]) -> f32[8,1024,1024] {{
  %a = f32[8,1024,1024]{{2,1,0}} parameter(0)
  %x = f32[1,1024,1024]{{2,1,0}} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[8,1024,1024]{{2,1,0}} dynamic-update-slice(%a, %x, %i, %zero, %zero)
}}

ENTRY %main (stack: f32[8,1024,1024], i: s32[]) -> f32[1024,1024] {{
  %stack = f32[8,1024,1024]{{2,1,0}} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[1024,1024]{{1,0}} parameter(2)
  %near = f32[1024,1024]{{1,0:T(8,128)S(1)}} parameter(3)
  %layer = f32[1,1024,1024]{{2,1,0}} parameter(4)
  {body}
}}
""")
    computation = computations[entry]
    *_, op = computation.instructions.values()
    return traffic.memory_bytes(computations, computation, op) / MIB


@pytest.mark.parametrize("body, mib", [
    ("ROOT %y = f32[1024,1024]{1,0} add(%x, %x)", 12),
    ("ROOT %y = f32[1024,1024]{1,0} add(%x, %near)", 8),
    ("ROOT %y = f32[1024,1024]{1,0:S(1)} add(%near, %near)", 0),
    ("ROOT %y = f32[1024,1024]{1,0} fusion(%stack, %i), kind=kLoop, calls=%fused", 8),
    ("ROOT %y = f32[8,1024,1024]{2,1,0} fusion(%stack, %layer, %i), kind=kLoop, calls=%replacing", 8),
    ("ROOT %y = ((f32[8,1024,1024]{2,1,0}, s32[]), f32[1024,1024]{1,0}, u32[]) fusion-start(%stack, %i), kind=kLoop, "
     "calls=%fused", 8),
    ("ROOT %y = ((f32[8,1024,1024]{2,1,0}, f32[1,1024,1024]{2,1,0}, s32[]), f32[8,1024,1024]{2,1,0}, u32[]) "
     "fusion-start(%stack, %layer, %i), kind=kLoop, calls=%replacing", 8),
    ("ROOT %y = (f32[1024,1024]{1,0:S(1)}, f32[1024,1024]{1,0}, u32[]{:S(2)}) copy-start(%x)", 4),
    ("ROOT %y = ((f32[1024,1024]{1,0}), f32[256,1024]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:256]}", 1),
    ("ROOT %y = f32[1024,1024]{1,0} bitcast(%x)", 0),
])  # fmt: skip
def test_what_an_instruction_moves(body, mib):
    assert of_text(body) == pytest.approx(mib, rel=1e-3)


def test_a_scan_reads_each_layer_once():
    pytest.importorskip("libtpu")
    mesh = find_target(configs.Mesh(), "v5e:2x4").mesh
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((128, 4096), jnp.bfloat16, sharding=whole)
    stack = jax.ShapeDtypeStruct((16, 4096, 4096), jnp.bfloat16, sharding=whole)

    def layers(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    cost = hlo.cost(jax.jit(layers).lower(x, stack).compile().as_text())
    weights = 16 * 4096 * 4096 * 2
    assert weights <= cost.memory_bytes <= 1.2 * weights
