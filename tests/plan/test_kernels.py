"""FLOPs and transfers of what XLA writes for GPUs, in lines as it writes them (jax 0.10.2 and 0.12.0.1)."""

import pytest

from llava_jax.plan import hlo, traffic
from llava_jax.plan.hlo_text import parse

# Queries of 2 rows, 1,024 tokens, 8 heads of 128; keys of 2 heads; and the schedules of tiles of 128 x 64 and 64 x 64.
OPERANDS = {
    "q": "bf16[2,1024,8,128]{3,2,1,0}", "k": "bf16[2,1024,2,128]{3,2,1,0}", "ends": "s32[2,1024]{1,0}",
    "sums": "f32[2,8,1024]{2,1,0}", "wide": "s32[2,8,16]{2,1,0}", "square": "s32[2,16,16]{2,1,0}",
    "count": "s32[2,8]{1,0}", "a": "bf16[64,512]{1,0}", "b": "bf16[512,256]{1,0}", "stack": "bf16[4,512,64]{2,1,0}",
    "shard": "f32[128,1024]{1,0}",
}  # fmt: skip
ROW = 2 * 2 * 8 * 128  # FLOPs of one product for a (query, key) pair, of all rows and heads
TILE_128, TILE_64 = 36 * 128 * 128, 136 * 64 * 64  # pairs in the tiles on or below the diagonal


def text_of(line):
    parameters = "\n".join(f"  %{name} = {shape} parameter({i})" for i, (name, shape) in enumerate(OPERANDS.items()))
    heading = ", ".join(f"{name}: {shape.partition('{')[0]}" for name, shape in OPERANDS.items())
    return f"HloModule one\n\nENTRY %main ({heading}) -> f32[] {{\n{parameters}\n  ROOT %result = {line}\n}}\n"


def triton(name, shape, operands):
    """Of the kernel's own code only its beginning; it holds quotes, brackets and parentheses."""
    return (f'{shape} custom-call({operands}), custom_call_target="__gpu$xla.gpu.triton", '
            f'metadata={{op_name="jit(f)/llm/block.attend/shard_map/{name}/pallas_call" stack_frame_id=2}}, '
            r'backend_config={debug = false, grid_x = 8 : i32, ir = "ML\EFR\0D(\22{#\13[", num_warps = 8 : i32}')


FORWARD = triton("flash_forward", "(f32[2,1024,8,128]{3,2,1,0}, f32[2,8,1024]{2,1,0})",
                 "%wide, %count, %q, %k, %k, /*index=5*/%ends")  # fmt: skip
KEYS = triton("flash_backward_keys", "(bf16[2,1024,2,128]{3,2,1,0}, bf16[2,1024,2,128]{3,2,1,0})",
              "%square, %count, %k, %k, %ends, /*index=5*/%q, %q, %sums, %sums")  # fmt: skip
QUERIES = triton("flash_backward_queries", "bf16[2,1024,8,128]{3,2,1,0}",
                 "%square, %count, %q, %q, %sums, /*index=5*/%sums, %k, %k, %ends")  # fmt: skip


@pytest.mark.parametrize("line, products, pairs, tile", [
    (FORWARD, 2, TILE_128, 128), (KEYS, 4, TILE_64, 64), (QUERIES, 3, TILE_64, 64),
])  # fmt: skip
def test_flash_kernels_count_their_products_of_the_tiles_and_of_these_the_given_share(line, products, pairs, tile):
    cost = hlo.cost(text_of(line))
    assert cost.flops == products * ROW * pairs and not cost.uncounted
    assert all("llm/block.attend" in name for name in cost.products)
    assert hlo.cost(text_of(line), tile_shares={tile: 0.5, 512: 0.1}).flops == cost.flops // 2


def cublas(target, operands, shape, left, right):
    return (f'({shape}, s8[4194304]{{0}}) custom-call({operands}), custom_call_target="{target}", '
            f'backend_config={{"operation_queue_id":"0","gemm_backend_config":{{"alpha_real":1,"dot_dimension_numbers":'
            f'{{"lhs_contracting_dimensions":["{left}"],"rhs_contracting_dimensions":["{right}"],'
            f'"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}},"epilogue":"DEFAULT"}}}}')  # fmt: skip


def cudnn(target, mask):
    return (f'(bf16[2,8,1024,128]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %q, %q), custom_call_target="{target}", '
            f'backend_config={{"cudnn_fmha_backend_config": {{"fmha_scale": 0.1, "intermediate_tensor_shape": '
            f'{{"element_type": "BF16", "dimensions": ["2", "8", "1024", "1024"], "tuple_shapes": []}}, '
            f'"mask_type": "{mask}"}}}}')  # fmt: skip


@pytest.mark.parametrize("line, flops", [
    (cublas("__cublas$gemm", "%a, %b", "bf16[64,256]{1,0}", 1, 0), 2 * 64 * 512 * 256),
    (cublas("__cublas$lt$matmul", "%a, %b", "bf16[64,256]{1,0}", 1, 0), 2 * 64 * 512 * 256),
    (cublas("__cublas$gemm", "%stack, %a", "bf16[4,64,64]{2,1,0}", 1, 1), 2 * 4 * 64 * 512 * 64),
    (cudnn("__cudnn$fmhaSoftmax", "NO_MASK"), 2 * ROW * 1024 * 1024),
    (cudnn("__cudnn$fmhaSoftmax", "CAUSAL"), 2 * ROW * 512 * 1025),
    (cudnn("__cudnn$fmhaSoftmaxBackward", "CAUSAL"), 5 * ROW * 512 * 1025),
])  # fmt: skip
def test_products_of_nvidia_s_libraries_count_by_their_shapes(line, flops):
    cost = hlo.cost(text_of(line))
    assert cost.flops == flops and not cost.uncounted


@pytest.mark.parametrize("line, uncounted", [
    (triton("other", "bf16[64,256]{1,0}", "%a, %b"), 1),
    ('f32[64]{0} custom-call(%a), custom_call_target="__cudnn$convForward"', 1),
    ('f32[64]{0} custom-call(%a), custom_call_target="__cub$DeviceRadixSort"', 0),
    ('f32[64]{0} custom-call(%a), custom_call_target="AllocateBuffer"', 0),
])  # fmt: skip
def test_a_library_s_call_that_nobody_described_is_named_as_uncounted(line, uncounted):
    cost = hlo.cost(text_of(line))
    assert len(cost.uncounted) == uncounted and cost.flops == 0


GROUPS = "replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}"
PART = 4 * 128 * 1024


@pytest.mark.parametrize("kind, shape, operands, sent, moved", [
    ("all-gather", "(f32[128,1024]{1,0}, f32[1024,1024]{1,0})", "%shard", 7 * PART, 9 * PART),
    ("reduce-scatter", "((f32[128,1024]{1,0}), f32[16,1024]{1,0})", "%shard", 7 * PART // 8, 9 * PART // 8),
    ("all-to-all", "((f32[128,1024]{1,0}), f32[128,1024]{1,0})", "%shard", 7 * PART // 8, 2 * PART),
    ("reduce-scatter", "((f32[128,1024]{1,0}, f32[128,1024]{1,0}), (f32[16,1024]{1,0}, f32[16,1024]{1,0}))",
     "%shard, %shard", 7 * PART // 4, 9 * PART // 4),
])  # fmt: skip
def test_a_collective_that_starts_counts_its_operands_once(kind, shape, operands, sent, moved):
    text = text_of(f"{shape} {kind}-start({operands}), channel_id=1, {GROUPS}")
    ((transfer),) = hlo.cost(text).transfers.values()
    assert (transfer.kind, transfer.bytes) == (kind, sent)
    entry, computations = parse(text)
    assert traffic.memory_bytes(computations, computations[entry], computations[entry].instructions["result"]) == moved


def test_a_fusion_that_starts_counts_the_products_in_it():
    shape = "((bf16[64,512]{1,0}, bf16[512,256]{1,0}), bf16[64,256]{1,0}, u32[])"
    text = text_of(f"{shape} fusion-start(%a, %b), calls=%one")
    body = """
%one (x: bf16[64,512], y: bf16[512,256]) -> bf16[64,256] {
  %x = bf16[64,512]{1,0} parameter(0)
  %y = bf16[512,256]{1,0} parameter(1)
  ROOT %z = bf16[64,256]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    assert hlo.cost(text.replace("ENTRY", f"{body}\nENTRY")).flops == 2 * 64 * 512 * 256
