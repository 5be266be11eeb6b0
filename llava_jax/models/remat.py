"""What a block's backward pass finds kept, finds on the host, or computes again: policies by name."""

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
# full 1, save_qkv 4, save_dots about 12, offload_inputs 0, offload_qkv 1.
POLICIES: dict[str, Any] = {
    "full": _kept.nothing_saveable,
    "save_qkv": _kept.save_only_these_names(QKV),
    "save_dots": _kept.save_from_both_policies(
        _kept.dots_with_no_batch_dims_saveable, _kept.save_only_these_names(ATTENTION)
    ),
    "offload_inputs": _offloaded(INPUT),
    "offload_qkv": _offloaded(QKV),
}
NAMES = ("none", *POLICIES)


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
