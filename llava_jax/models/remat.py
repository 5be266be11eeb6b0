"""What a block's backward pass finds kept, finds on the host, or computes again: policies by name."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from llava_jax.errors import UsageError

Body = Callable[..., Any]
_kept = jax.checkpoint_policies

QKV, INPUT, ATTENTION = "qkv", "input", "attention"  # what a block names, with `named`
named = checkpoint_name


def _offloaded(*names: str) -> Any:
    return _kept.save_and_offload_only_these_names(
        names_which_can_be_saved=(), names_which_can_be_offloaded=names, offload_src="device",
        offload_dst="pinned_host",
    )  # fmt: skip


# Bytes a token and layer that stay on the device between the passes, in units of the width D (bf16, D = 2 bytes * D):
# full 1, save_qkv 4, save_linear about 10, save_dots about 12, offload_inputs 0, offload_qkv 1. A unit of save_qkv and
# save_linear spares a product with a [D, D] matrix, one of attention's results, which are float32, a quarter of that.
POLICIES: dict[str, Any] = {
    "full": _kept.nothing_saveable,
    "save_qkv": _kept.save_only_these_names(QKV),
    "save_linear": _kept.dots_with_no_batch_dims_saveable,
    "save_dots": _kept.save_from_both_policies(
        _kept.dots_with_no_batch_dims_saveable, _kept.save_only_these_names(ATTENTION)
    ),
    "offload_inputs": _offloaded(INPUT),
    "offload_qkv": _offloaded(QKV),
}
NAMES = ("none", *POLICIES)
Remat = str | tuple[str, ...]  # of all layers of a stack, or of each


def of_layers(policies: Remat, layers: int) -> tuple[str, ...]:
    """The policy of each layer.

    Raises:
      ValueError: a tuple of another length, or with "none", which would keep the weights of its layers too.
    """
    if isinstance(policies, str):
        return (policies,) * layers
    if len(policies) != layers:
        raise UsageError(f"model.remat has {len(policies)} policies for {layers} layers: want one for each, or one for "
                         "all")  # fmt: skip
    if "none" in policies:
        raise UsageError("model.remat: none is a policy of all layers only; want save_dots for some of them")
    return policies


def groups(policies: Remat, layers: int) -> list[tuple[str, int, int]]:
    """Neighbouring layers of one policy: [(policy, first, end), ...]."""
    parts, end = list[tuple[str, int, int]](), 0
    for policy, same in itertools.groupby(of_layers(policies, layers)):
        first, end = end, end + len(list(same))
        parts.append((policy, first, end))
    return parts


def only(policies: Remat) -> str:
    """The policy of blocks that are no part of a stack with its own: that of the first layer."""
    return policies if isinstance(policies, str) else policies[0]


def describe(policies: Remat) -> str:
    """"full", or "full 20, save_qkv 12"."""
    if isinstance(policies, str):
        return policies
    return ", ".join(f"{name} {end - first}" for name, first, end in groups(policies, len(policies)))


def remat(name: str) -> Callable[[Body], Body]:
    """The wrapper of a scanned block's body for a policy; "none" keeps all that the backward pass reads.

    Raises:
      ValueError: no such policy.
    """
    if name not in NAMES:
        raise UsageError(f"unknown remat policy {name!r}: there are {', '.join(NAMES)}")
    if name == "none":
        return lambda body: body
    # Inside a scan nothing can be merged with the first pass anyway, so XLA need not be kept from it.
    return lambda body: jax.checkpoint(body, prevent_cse=False, policy=POLICIES[name])
