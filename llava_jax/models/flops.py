"""Model FLOPs: what one forward or one training step must compute, whatever a machine spends on it.

Counted are matrix products, two operations for each multiplication with its addition. Left out are padding, blank
pictures, rematerialisation, logits of positions that nothing is learned at, and all that is linear in the
activations (norms, rotations, activations, the optimizer).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from llava_jax.models import mlp
from llava_jax.models.presets import (
    EvaConfig,
    LlamaConfig,
    LlavaConfig,
    PerceiverConfig,
    QFormerConfig,
    VisionConfig,
)  # fmt: skip

NO_ADAPTERS: Mapping[str, int] = MappingProxyType({})


class _Product(NamedTuple):
    """A matrix product. weight: the name of its parameter, "" where both factors are activations."""

    weight: str
    flops: int


PICTURES, TEXT, BOTH = "pictures", "text", "both"


class _Level(NamedTuple):
    """Products that read the same input, and the parameters that act here without a product of their own.

    branch: PICTURES or TEXT, what it reads and goes on; BOTH is where the pictures come into the text.
    """

    products: tuple[_Product, ...] = ()
    others: tuple[str, ...] = ()
    branch: str = TEXT


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
    total, moved = 0, {PICTURES: False, TEXT: False}  # whether something that moves lies under the branch's next level
    for level in _levels(config, ranks, tokens, pairs, supervised, images):
        below = any(moved.values()) if level.branch == BOTH else moved[level.branch]  # then its input needs a gradient
        for weight, flops in level.products:
            needed = (2 if weight == "" else 1) if below else 0  # without a weight both factors need a gradient
            total += flops * (1 + needed + (weight in chosen))
        below = below or not chosen.isdisjoint([*level.others, *(product.weight for product in level.products)])
        moved[PICTURES if level.branch == PICTURES else TEXT] = below
    return total


def ranks_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """{kernel's name: rank} of the adapters among {parameter's name: shape}."""
    end = "/lora_a"
    return {name.removesuffix(end) + "/kernel": shape[-1] for name, shape in shapes.items() if name.endswith(end)}


def _levels(
    config: LlavaConfig, ranks: Mapping[str, int], tokens: int, pairs: int, supervised: int, images: int
) -> Iterator[_Level]:
    """From the pictures up to the logits."""
    tower = _eva if isinstance(config.vision, EvaConfig) else _clip
    for part in (tower(config.vision, ranks, images), _connector(config, ranks, images)):
        yield from (level._replace(branch=PICTURES) for level in part)
    into = TEXT if config.cross else BOTH
    yield _Level(others=("image_newline", "llm/embed/table", "llm/embed/added"), branch=into)
    before = config.cross.every - 1 if config.cross else config.llm.layers
    yield from _decoder(config.llm, ranks, tokens, pairs, before)
    if config.cross:
        yield from _gated(config, ranks, tokens)
    yield from _decoder(config.llm, ranks, tokens, pairs, config.llm.layers - before)
    yield from _head(config.llm, supervised)


def _clip(config: VisionConfig, ranks: Mapping[str, int], images: int) -> Iterator[_Level]:
    yield _Level((_patch(config, images),), ("vision/cls", "vision/pos", *_norm("vision/pre_ln")))
    yield from _blocks(config, ranks, images, "qkv", config.width)


def _eva(config: EvaConfig, ranks: Mapping[str, int], images: int) -> Iterator[_Level]:
    yield _Level((_patch(config, images),), ("vision/cls", "vision/pos", "vision/patch/bias"))
    yield from _blocks(config, ranks, images, ["qkv"], 3 * config.width)


def _patch(config: VisionConfig | EvaConfig, images: int) -> _Product:
    return _Product("vision/patch/kernel", 2 * images * config.patches * config.patch_size**2 * 3 * config.width)


def _blocks(
    config: VisionConfig | EvaConfig, ranks: Mapping[str, int], images: int, inputs: Sequence[str], outer: int
) -> Iterator[_Level]:
    """A tower's blocks; `inputs` are the layers before its attention, each of `outer` columns."""
    width, mlp, tokens = config.width, config.mlp_width, images * (config.patches + 1)
    for layers in _first_and_rest(config.run_layers):
        name, rows = "vision/blocks", layers * tokens
        yield _Level(others=_norm(f"{name}/ln1"))
        yield from _dense([f"{name}/{part}" for part in inputs], width, outer, rows, ranks,
                          (f"{name}/q/bias", f"{name}/v/bias"))  # fmt: skip
        yield _Level((_Product("", 4 * rows * (config.patches + 1) * width),))
        yield from _dense([f"{name}/o"], width, width, rows, ranks, _norm(f"{name}/ln2"))
        yield from _dense([f"{name}/fc1"], width, mlp, rows, ranks)
        yield from _dense([f"{name}/fc2"], mlp, width, rows, ranks)


def _connector(config: LlavaConfig, ranks: Mapping[str, int], images: int) -> Iterator[_Level]:
    yield _Level(others=_norm("ln_vision"))
    width, features = config.vision.width, images * config.image_features
    if isinstance(config.resampler, QFormerConfig):
        yield from _qformer(config.resampler, ranks, images, config.vision.features, width)
    if isinstance(config.resampler, PerceiverConfig):
        yield from _perceiver(config.resampler, ranks, images, config.vision.features, width)
    inner = config.resampler.width if isinstance(config.resampler, QFormerConfig) else config.vision.width
    inner *= 4 if config.projector == "concat4_linear" else 1
    for layer in range(mlp.layers(config.projector)):
        yield from _dense([f"projector/{2 * layer}"], inner, config.llm.width, features, ranks)
        inner = config.llm.width
    if config.cross:  # they read the images, whatever the text is
        blocks, inner = config.llm.layers // config.cross.every, config.cross.heads * config.cross.head_width
        rows = blocks * images * config.resampler.outputs
        yield from _dense(["llm/cross/k", "llm/cross/v"], width, inner, rows, ranks)


def _qformer(
    config: QFormerConfig, ranks: Mapping[str, int], images: int, features: int, inner: int
) -> Iterator[_Level]:
    width, rows, name = config.width, images * config.queries, "resampler"
    looks = config.layers // config.cross_every
    yield from _dense([f"{name}/cross/k", f"{name}/cross/v"], inner, width, looks * images * features, ranks)
    yield _Level(others=(f"{name}/queries", *_norm(f"{name}/ln")))
    for layers, looking in zip(_first_and_rest(config.layers), (1, looks - 1)):
        yield from _dense([f"{name}/attention/{part}" for part in "qkv"], width, width, layers * rows, ranks)
        yield _Level((_Product("", 4 * layers * rows * config.queries * width),))
        yield from _dense([f"{name}/attention/o"], width, width, layers * rows, ranks, _norm(f"{name}/attention/ln"))
        yield from _dense([f"{name}/cross/q"], width, width, looking * rows, ranks)
        yield _Level((_Product("", 4 * looking * rows * features * width),))
        yield from _dense([f"{name}/cross/o"], width, width, looking * rows, ranks, _norm(f"{name}/cross/ln"))
        yield from _dense([f"{name}/mlp/fc1"], width, config.mlp_width, layers * rows, ranks)
        yield from _dense([f"{name}/mlp/fc2"], config.mlp_width, width, layers * rows, ranks, _norm(f"{name}/mlp/ln"))


def _perceiver(
    config: PerceiverConfig, ranks: Mapping[str, int], images: int, features: int, width: int
) -> Iterator[_Level]:
    inner, mlp, name = config.heads * config.head_width, config.mlp_ratio * width, "resampler/blocks"
    latents, seen = images * config.latents, features + config.latents
    yield _Level(others=("resampler/latents",))
    for layers in _first_and_rest(config.layers):
        yield _Level(others=(*_norm(f"{name}/ln_media"), *_norm(f"{name}/ln1")))
        yield from _side_by_side(
            _dense([f"{name}/q"], width, inner, layers * latents, ranks),
            _dense([f"{name}/k", f"{name}/v"], width, inner, layers * images * seen, ranks),
        )
        yield _Level((_Product("", 4 * layers * latents * seen * inner),))
        yield from _dense([f"{name}/o"], inner, width, layers * latents, ranks, _norm(f"{name}/ln2"))
        yield from _dense([f"{name}/fc1"], width, mlp, layers * latents, ranks)
        yield from _dense([f"{name}/fc2"], mlp, width, layers * latents, ranks)
    yield _Level(others=_norm("resampler/norm"))


def _decoder(config: LlamaConfig, ranks: Mapping[str, int], tokens: int, pairs: int, count: int) -> Iterator[_Level]:
    """`count` of the decoder's layers."""
    width, mlp = config.width, config.mlp_width
    queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
    for layers in _first_and_rest(count):
        name, rows = "llm/blocks", layers * tokens
        yield _Level(others=_norm(f"{name}/ln1"))
        yield from _side_by_side(
            _dense([f"{name}/q"], width, queries, rows, ranks),
            _dense([f"{name}/k", f"{name}/v"], width, keys, rows, ranks),
        )
        yield _Level((_Product("", 4 * layers * pairs * queries),))
        yield from _dense([f"{name}/o"], queries, width, rows, ranks, _norm(f"{name}/ln2"))
        yield from _dense([f"{name}/gate", f"{name}/up"], width, mlp, rows, ranks)
        yield from _dense([f"{name}/down"], mlp, width, rows, ranks)


def _gated(config: LlavaConfig, ranks: Mapping[str, int], tokens: int) -> Iterator[_Level]:
    """Flamingo's blocks but for their keys and values; every token looks at one image."""
    cross, width, name = config.cross, config.llm.width, "llm/cross"
    inner, mlp = cross.heads * cross.head_width, cross.mlp_ratio * width
    for blocks in _first_and_rest(config.llm.layers // cross.every):
        rows = blocks * tokens
        yield _Level(others=_norm(f"{name}/ln1"))
        yield from _dense([f"{name}/q"], width, inner, rows, ranks)
        yield _Level((_Product("", 4 * rows * config.resampler.outputs * inner),), branch=BOTH)
        yield from _dense([f"{name}/o"], inner, width, rows, ranks, (f"{name}/attn_gate", *_norm(f"{name}/ln2")))
        yield from _dense([f"{name}/fc1"], width, mlp, rows, ranks)
        yield from _dense([f"{name}/fc2"], mlp, width, rows, ranks, (f"{name}/ff_gate",))


def _side_by_side(first: Iterable[_Level], second: Iterable[_Level]) -> Iterator[_Level]:
    """Layers that read the same input."""
    for one, two in zip(first, second):
        yield _Level(one.products + two.products, one.others + two.others)


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
