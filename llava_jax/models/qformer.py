"""BLIP-2's Q-Former: learned queries that look at an image's features, in BERT's post-norm layers.

Only the branch of the queries is here; the text's is not part of the systems that this project reproduces. Differs
from BLIP-2: nothing is dropped in training, where it drops a tenth; MiniGPT-4 keeps the whole frozen.
Source: LAVIS lavis/models/blip2_models/Qformer.py@506965b.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llava_jax.errors import UnusableCheckpoint
from llava_jax.models.attention import attention
from llava_jax.models.layers import Dense, LayerNorm, Params, parameter, stacked, take_layer
from llava_jax.models.mlp import Projector
from llava_jax.models.mlp import rows as projector_rows
from llava_jax.models.names import ROW, Row, linear, norm
from llava_jax.models.parts import Connector, Content, Sizes, check, check_fixed, check_numbers
from llava_jax.sharding import constrain


@dataclass(frozen=True)
class QFormerConfig(Sizes):
    """BLIP-2's Q-Former, the branch of its queries; defaults are those of BERT-base, as released.

    cross_every: layers 0, cross_every, 2 cross_every ... also look at the image.
    Source: LAVIS lavis/models/blip2_models/Qformer.py@506965b.
    """

    queries: int = 32
    width: int = 768
    mlp_width: int = 3072
    layers: int = 12
    heads: int = 12
    cross_every: int = 2
    eps: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width % self.heads == 0, "resampler.width", self.width, f"a multiple of heads={self.heads}")
        check(self.layers % self.cross_every == 0, "resampler.layers", self.layers,
               f"a multiple of cross_every={self.cross_every}")  # fmt: skip

    @property
    def outputs(self) -> int:
        """Features that it makes of one image."""
        return self.queries


class Attend(nn.Module):
    """Attention of `x` to `source`, which is `x` itself or the image; the norm comes after the sum."""

    config: QFormerConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "Img Q W"], source: Float[Array, "Img P C"]) -> Float[Array, "Img Q W"]:
        q, k, v = (self._heads(name, y) for name, y in (("q", x), ("k", source), ("v", source)))
        y = attention(q, k, v, rows="images").reshape(x.shape)
        y = Dense(self.config.width, True, self.dtype, self.lora_dropout, name="o")(y)
        return LayerNorm(self.config.eps, self.dtype, name="ln")(x + y)

    def _heads(self, name: str, x: Float[Array, "Img P C"]) -> Float[Array, "Img P N H"]:
        x = Dense(self.config.width, True, self.dtype, self.lora_dropout, name=name)(x)
        return x.reshape(*x.shape[:2], self.config.heads, -1)


class Mlp(nn.Module):
    """Two layers with exact GELU between them; the norm comes after the sum."""

    config: QFormerConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "Img Q W"]) -> Float[Array, "Img Q W"]:
        y = Dense(self.config.mlp_width, True, self.dtype, self.lora_dropout, name="fc1")(x)
        y = Dense(self.config.width, True, self.dtype, self.lora_dropout, name="fc2")(nn.gelu(y, approximate=False))
        return LayerNorm(self.config.eps, self.dtype, name="ln")(x + y)


class QFormer(nn.Module):
    """An image's features -> its queries' last hidden state.

    Three stacks: `attention` and `mlp` of all layers, `cross` of those that look at the image.
    """

    config: QFormerConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    def __call__(self, features: Float[Array, "Img P C"]) -> Float[Array, "Img Q W"]:
        return self.hidden_states(features, every=False)[-1]

    @nn.compact
    def hidden_states(self, features: Float[Array, "Img P C"], every: bool = True) -> list[Array]:
        """Hidden states [Img, Q, W]: the normed queries and those after each layer (or the last only)."""
        config, sizes = self.config, (self.config, self.dtype, self.lora_dropout)
        queries = parameter(self, "queries", nn.initializers.normal(0.02), (config.queries, config.width))
        x = LayerNorm(config.eps, self.dtype, name="ln")(queries.astype(self.dtype))
        x = jnp.broadcast_to(x, (features.shape[0], *x.shape))
        attend, mlp = Attend(*sizes, parent=None), Mlp(*sizes, parent=None)
        groups, size = config.layers // config.cross_every, config.cross_every
        first = stacked(self, "cross", attend, groups, x[:1], features[:1])
        rest = (stacked(self, "attention", attend, config.layers, x[:1], x[:1]),
                stacked(self, "mlp", mlp, config.layers, x[:1]))  # fmt: skip
        rest = jax.tree.map(lambda leaf: leaf.reshape(groups, size, *leaf.shape[1:]), rest)
        keys = jax.random.split(self.make_rng("dropout"), (groups, size, 3)) if self.has_rng("dropout") else None

        def body(x: Array, group: tuple[Params, tuple[Params, Params], Array | None]) -> tuple[Array, Any]:
            cross, rest, keys = group
            states = []
            for layer in range(size):
                own, feed = (take_layer(stack, layer) for stack in rest)
                rngs = [{} if keys is None else {"dropout": keys[layer, i]} for i in range(3)]
                x = attend.apply({"params": own}, x, x, rngs=rngs[0])
                if layer == 0:
                    x = attend.apply({"params": cross}, x, features, rngs=rngs[1])
                x = constrain(mlp.apply({"params": feed}, x, rngs=rngs[2]), "images")
                states.append(x)
            return x, jnp.stack(states) if every else None

        last, found = jax.lax.scan(body, x, (first, rest, keys))
        return [x, *found.reshape(-1, *x.shape)] if every else [last]


HEAD_WIDTH = 64  # of BERT; LAVIS's files do not say it
# A buffer of BERT's embeddings, and the projections to the language models of BLIP-2.
LAVIS_IGNORED = (r"Qformer\.bert\.embeddings\.position_ids", r"(?:t5|opt)_proj\..*")
_DEFAULTS = {  # of transformers' Blip2QFormerConfig. Source: transformers 4.57.6 and 5.23.0.
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "cross_attention_frequency": 2, "encoder_hidden_size": 1408,
    "use_qformer_text_input": False,
}  # fmt: skip
_FIXED = {"hidden_act": "gelu", "use_qformer_text_input": False}
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "cross_attention_frequency")


class Names(NamedTuple):
    """How tensors are called; `inner` is what stands between an attention's name and its matrices'."""

    norm: str
    queries_norm: str
    layer: str
    inner: str


LAVIS = Names("ln_vision", "Qformer.bert.embeddings.LayerNorm", "Qformer.bert.encoder.layer.", "self")
HUB = Names("vision_model.post_layernorm", "qformer.layernorm", "qformer.encoder.layer.", "attention")


def rows(names: Names, cross_every: int) -> list[Row]:
    """The table of a Q-Former and of the norm of the tower's features."""
    table: list[Row] = [("resampler/queries", ("query_tokens", ROW))]
    stacks = (("attention", "attention", "{layer}"), ("cross", "crossattention", f"{{layer*{cross_every}}}"))
    words = {"q": "query", "k": "key", "v": "value"}
    for stack, theirs, layer in stacks:
        place = f"{names.layer}{layer}.{theirs}"
        for letter, word in words.items():
            table += linear(f"resampler/{stack}/{letter}", f"{place}.{names.inner}.{word}")
        table += linear(f"resampler/{stack}/o", f"{place}.output.dense")
        table += norm(f"resampler/{stack}/ln", f"{place}.output.LayerNorm")
    place = names.layer + "{layer}."
    table += linear("resampler/mlp/fc1", f"{place}intermediate_query.dense")
    table += linear("resampler/mlp/fc2", f"{place}output_query.dense")
    table += norm("resampler/mlp/ln", f"{place}output_query.LayerNorm")
    table += norm("ln_vision", names.norm)
    table += norm("resampler/ln", names.queries_norm)
    return table


def read_hub_config(content: Content, where: str, queries: Any) -> QFormerConfig:
    """A Q-Former's config from transformers' `qformer_config`, and `num_query_tokens` beside it.

    Raises:
      UnusableCheckpoint: not a Q-Former as `models` has it.
    """
    values = {**_DEFAULTS, **content}
    check_fixed(values, _FIXED, where, "BLIP-2")
    values["num_query_tokens"] = queries
    check_numbers(values, (*_SIZES, "num_query_tokens"), "layer_norm_eps", where)
    return QFormerConfig(
        queries=queries, width=values["hidden_size"], mlp_width=values["intermediate_size"],
        layers=values["num_hidden_layers"], heads=values["num_attention_heads"],
        cross_every=values["cross_attention_frequency"], eps=values["layer_norm_eps"],
    )  # fmt: skip


def hub_config_json(config: QFormerConfig, encoder_width: int) -> dict[str, Any]:
    """The `qformer_config` of transformers, every field that decides a number written out."""
    return {
        "model_type": "blip_2_qformer",
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": "gelu",
        "layer_norm_eps": config.eps,
        "cross_attention_frequency": config.cross_every,
        "encoder_hidden_size": encoder_width,
        "use_qformer_text_input": False,
        "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "max_position_embeddings": 512,
        "vocab_size": 30522,
        "pad_token_id": 0,
    }


def read_lavis_config(shapes: Mapping[str, tuple[int, ...]], where: str) -> QFormerConfig:
    """The sizes of a Q-Former with LAVIS's names, from its tensors; heads are 64 wide, as BERT's.

    Raises:
      UnusableCheckpoint: no Q-Former is in it.
    """
    pattern = re.compile(re.escape(LAVIS.layer) + r"(\d+)\.(\w+)\..*")
    found = [match for match in map(pattern.fullmatch, shapes) if match]
    numbers = {int(match[1]) for match in found}
    looking = sorted({int(match[1]) for match in found if match[2] == "crossattention"})
    every = looking[1] if len(looking) > 1 else len(numbers)
    try:
        _, queries, _ = shapes["query_tokens"]
        mlp_width, width = shapes[f"{LAVIS.layer}0.intermediate_query.dense.weight"]
    except (KeyError, ValueError):
        shown = ", ".join(list(shapes)[:3])
        text = f"{where}: no Q-Former of BLIP-2 here; its tensors are such as {shown}"
        raise UnusableCheckpoint(text) from None
    if width % HEAD_WIDTH or len(numbers) % every or looking != list(range(0, len(numbers), every)):
        raise UnusableCheckpoint(
            f"{where}: a Q-Former of width {width} whose layers {looking} of {len(numbers)} look at the image; "
            f"wanted a multiple of {HEAD_WIDTH}, and layer 0 and every n-th after it"
        )
    return QFormerConfig(
        queries=queries, width=width, mlp_width=mlp_width, layers=len(numbers), heads=width // HEAD_WIDTH,
        cross_every=every,
    )  # fmt: skip


PART = Connector(
    name="qformer", shown="qformer", module=Projector, rows=projector_rows,
    features=lambda config: config.resampler.outputs, resampler=QFormerConfig, resampler_module=QFormer,
)  # fmt: skip
