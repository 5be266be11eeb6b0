"""FLOPs of custom calls in optimized HLO, whose products lie in code of their own."""

import json
import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from llava_jax.plan.hlo_text import Computation, Instruction, arrays, attribute

# Products of [T, H] x [H, S] size that each of flash attention's kernels (`models.flash`, `models.flash_gpu`, and
# cuDNN's) makes of a tile.
FLASH = {"forward": 2, "backward": 5, "backward_keys": 4, "backward_queries": 3}


def flops(computation: Computation, op: Instruction, tile_shares: Mapping[int, float]) -> int | None:
    """FLOPs of a custom call: 0 for one without products, None for one that may have some and is not known here."""
    target = attribute(op, r'custom_call_target="([^"]+)"')
    if target not in KERNELS:
        # XLA's own names for GPU libraries begin so: cuBLAS, cuDNN, cuSOLVER; CUB sorts.
        return None if target.startswith("__") and not target.startswith("__cub$") else 0
    return KERNELS[target](computation, op, tile_shares)


def _tpu_flops(computation: Computation, op: Instruction, tile_shares: Mapping[int, float]) -> int | None:
    """FLOPs of a flash attention kernel; None for another kernel.

    Its operands give the shapes and its metadata the tile. Which of the tiles on or below the diagonal hold a sample's
    queries and keys, and are computed, is in the data: `tile_shares` says how many.
    """
    kind = re.search(r"flash_(forward|backward)", op.attributes + op.name)
    metadata = re.search(r'"xprof_metadata":"(\{.*?\})"', op.attributes)
    shapes = [dims for name in op.operands for type_, dims in arrays(computation.instructions[name].shape)
              if type_ in ("bf16", "f32") and len(dims) >= 3]  # fmt: skip
    if kind is None or metadata is None or len(shapes) < 2:
        return None
    tile = json.loads(metadata[1].replace('\\"', '"'))["tile"]
    queries, keys = shapes[0], shapes[1]
    pairs = tile_shares.get(tile, 1.0) * _tile_pairs(queries[-2], keys[-2], tile)
    return round(2 * FLASH[kind[1]] * math.prod(queries[:-2]) * queries[-1] * pairs)


def _triton_flops(computation: Computation, op: Instruction, tile_shares: Mapping[int, float]) -> int | None:
    """As `_tpu_flops`, of [B, T, N, H]; the first operand is the schedule, [B, tiles, tiles of the others].

    A tile that is not square counts as a square of its longer side.
    """
    kind = re.search(r"flash_(forward|backward_keys|backward_queries)", attribute(op, r'op_name="([^"]*)"'))
    if kind is None:
        return None
    (_, schedule), *shapes = (arrays(computation.instructions[name].shape)[0] for name in op.operands)
    rows, tokens, heads, width = max(dims for _, dims in shapes if len(dims) == 4)  # heads of queries, not of keys
    tile = tokens // min(schedule[1:])
    pairs = tile_shares.get(tile, 1.0) * _tile_pairs(tokens, tokens, tile)
    return round(2 * FLASH[kind[1]] * rows * heads * width * pairs)


def _cublas_flops(computation: Computation, op: Instruction, tile_shares: Mapping[int, float]) -> int:
    (_, left), (_, out) = arrays(computation.instructions[op.operands[0]].shape)[0], arrays(op.shape)[0]
    return 2 * math.prod(out) * math.prod(left[d] for d in _numbers(op, '"lhs_contracting_dimensions"'))


def _cudnn_flops(computation: Computation, op: Instruction, tile_shares: Mapping[int, float]) -> int:
    """Of causal rows every pair below the diagonal, though cuDNN computes tiles of some size."""
    *batch, queries, keys = _numbers(op, r'"intermediate_tensor_shape".*?"dimensions"')
    (_, (*_, width)), *_ = arrays(computation.instructions[op.operands[0]].shape)
    pairs = queries * (keys + 1) // 2 if "CAUSAL" in attribute(op, r'"mask_type":\s*"(\w+)"') else queries * keys
    products = FLASH["backward" if "Backward" in op.attributes else "forward"]
    return 2 * products * math.prod(batch) * pairs * width


KERNELS: Mapping[str, Callable[[Computation, Instruction, Mapping[int, float]], int | None]] = {
    "tpu_custom_call": _tpu_flops, "__gpu$xla.gpu.triton": _triton_flops,
    "__cublas$gemm": _cublas_flops, "__cublas$lt$matmul": _cublas_flops,
    "__cudnn$fmhaSoftmax": _cudnn_flops, "__cudnn$fmhaSoftmaxBackward": _cudnn_flops,
}  # fmt: skip


def _numbers(op: Instruction, key: str) -> list[int]:
    """A list of numbers in an instruction's backend_config."""
    return [int(number) for number in re.findall(r"\d+", attribute(op, key + r":\s*\[([\d\", ]*)\]"))]


def _tile_pairs(queries: int, keys: int, tile: int) -> int:
    """(query, key) pairs in the tiles that a causal mask touches; there may be more queries than keys."""
    return int(np.sum(np.minimum(keys, np.arange(tile, queries + 1, tile))) * tile)
