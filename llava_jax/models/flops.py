"""Model FLOPs: what one forward or one training step must compute, whatever a machine spends on it.

Counted are matrix products, two operations for each multiplication with its addition. Left out are padding, blank
pictures, rematerialisation, logits of positions that nothing is learned at, and all that is linear in the
activations (norms, rotations, activations, the optimizer).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from llava_jax.models.presets import LlamaConfig, LlavaConfig, VisionConfig
from llava_jax.models.projectors import depth

NO_ADAPTERS: Mapping[str, int] = MappingProxyType({})


class _Product(NamedTuple):
    """A matrix product. weight: the name of its parameter, "" where both factors are activations."""

    weight: str
    flops: int


class _Level(NamedTuple):
    """Products that read the same input, and the parameters that act here without a product of their own."""

    products: tuple[_Product, ...] = ()
    others: tuple[str, ...] = ()


def step_flops(
    config: LlavaConfig,
    moving: Iterable[str],
    *,
    tokens: int,
    pairs: int,
    supervised: int,
    images: int,
    ranks: Mapping[str, int] = NO_ADAPTERS,
) -> int:
    """FLOPs of one update: forward, gradients of activations down to the lowest parameter that moves, and gradients
    of the kernels that move. A stack of layers moves as one. With nothing moving, those of a forward.

    Args:
      moving: names of the trainable parameters.
      tokens: positions of the decoder that are no padding, image features included.
      pairs: (query, key) pairs that attention looks at: n (n + 1) / 2 for a sample of n tokens.
      supervised: positions whose logits are made.
      images: pictures that the tower runs on.
      ranks: rank of the adapter beside a kernel, by the kernel's name (see `ranks_of`).

        LLaVA-1.5-7B, a sample of 850 tokens, logits everywhere, decoder moving, no picture: 34.3e12
    """
    chosen = frozenset(moving)
    total, below = 0, False  # below: something that moves lies under this level, so its input needs a gradient
    for level in _levels(config, ranks, tokens, pairs, supervised, images):
        for weight, flops in level.products:
            needed = (2 if weight == "" else 1) if below else 0  # without a weight both factors need a gradient
            total += flops * (1 + needed + (weight in chosen))
        below = below or not chosen.isdisjoint([*level.others, *(product.weight for product in level.products)])
    return total


def ranks_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """{kernel's name: rank} of the adapters among {parameter's name: shape}."""
    end = "/lora_a"
    return {name.removesuffix(end) + "/kernel": shape[-1] for name, shape in shapes.items() if name.endswith(end)}


def _levels(
    config: LlavaConfig, ranks: Mapping[str, int], tokens: int, pairs: int, supervised: int, images: int
) -> Iterator[_Level]:
    """From the pictures up to the logits."""
    yield from _tower(config.vision, ranks, images)
    yield from _projector(config, ranks, images * config.vision.features)
    yield from _decoder(config.llm, ranks, tokens, pairs)
    yield from _head(config.llm, supervised)


def _tower(config: VisionConfig, ranks: Mapping[str, int], images: int) -> Iterator[_Level]:
    width, mlp, patches = config.width, config.mlp_width, config.patches
    patch = _Product("vision/patch/kernel", 2 * images * patches * config.patch_size**2 * 3 * width)
    yield _Level((patch,), ("vision/cls", "vision/pos", *_norm("vision/pre_ln")))
    tokens, pairs = images * (patches + 1), images * (patches + 1) ** 2
    for layers in _first_and_rest(config.run_layers):
        name, rows = "vision/blocks", layers * tokens
        yield _Level(others=_norm(f"{name}/ln1"))
        yield from _dense([f"{name}/{part}" for part in "qkv"], width, width, rows, ranks)
        yield _Level((_Product("", 4 * layers * pairs * width),))
        yield from _dense([f"{name}/o"], width, width, rows, ranks, _norm(f"{name}/ln2"))
        yield from _dense([f"{name}/fc1"], width, mlp, rows, ranks)
        yield from _dense([f"{name}/fc2"], mlp, width, rows, ranks)


def _projector(config: LlavaConfig, ranks: Mapping[str, int], features: int) -> Iterator[_Level]:
    width = config.vision.width
    for layer in range(depth(config.projector)):
        yield from _dense([f"projector/{2 * layer}"], width, config.llm.width, features, ranks)
        width = config.llm.width
    yield _Level(others=("image_newline", "llm/embed/table", "llm/embed/added"))


def _decoder(config: LlamaConfig, ranks: Mapping[str, int], tokens: int, pairs: int) -> Iterator[_Level]:
    width, mlp = config.width, config.mlp_width
    queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
    for layers in _first_and_rest(config.layers):
        name, rows = "llm/blocks", layers * tokens
        yield _Level(others=_norm(f"{name}/ln1"))
        for first, second in zip(
            _dense([f"{name}/q"], width, queries, rows, ranks),
            _dense([f"{name}/k", f"{name}/v"], width, keys, rows, ranks),
        ):
            yield _Level(first.products + second.products, first.others + second.others)
        yield _Level((_Product("", 4 * layers * pairs * queries),))
        yield from _dense([f"{name}/o"], queries, width, rows, ranks, _norm(f"{name}/ln2"))
        yield from _dense([f"{name}/gate", f"{name}/up"], width, mlp, rows, ranks)
        yield from _dense([f"{name}/down"], mlp, width, rows, ranks)


def _head(config: LlamaConfig, supervised: int) -> Iterator[_Level]:
    yield _Level(others=_norm("llm/norm"))
    names = ("llm/embed/table", "llm/embed/added") if config.tie_embeddings else ("llm/head/kernel", "llm/head/added")
    sizes = (config.vocab, config.added_tokens)
    yield _Level(tuple(_Product(name, 2 * supervised * config.width * size) for name, size in zip(names, sizes)))


def _dense(
    names: Sequence[str], inner: int, outer: int, rows: int, ranks: Mapping[str, int], after: Sequence[str] = ()
) -> list[_Level]:
    """`Dense` layers side by side: kernels with the first half of their adapters, then the second halves."""
    kernels = [_Product(f"{name}/kernel", 2 * rows * inner * outer) for name in names]
    adapted = [(name, ranks[f"{name}/kernel"]) for name in names if f"{name}/kernel" in ranks]
    first = [_Product(f"{name}/lora_a", 2 * rows * inner * rank) for name, rank in adapted]
    second = [_Product(f"{name}/lora_b", 2 * rows * rank * outer) for name, rank in adapted]
    biases = [f"{name}/bias" for name in names]
    return [_Level((*kernels, *first)), _Level(tuple(second), (*biases, *after))]


def _norm(name: str) -> tuple[str, str]:
    return f"{name}/scale", f"{name}/bias"


def _first_and_rest(layers: int) -> Iterator[int]:
    """A stack in two parts: only under its first layer may there be nothing that moves."""
    return (count for count in (1, layers - 1) if layers and count)
