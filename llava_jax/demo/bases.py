"""Trains the demo's base models: `python -m llava_jax.demo bases`, 32 minutes on two busy cores.

It makes the directories `clip/` and `llama/` as Hugging Face would hold them, in float16; the demo reads them
through `convert assemble`, the way real weights come in. Pictures are of training scenes only; a quarter of LLaMA's
texts also speak of the pairs that no picture shows, as books do.

The `llama/` that ships was made by this code with seed 0 (its tokenizer comes out again byte for byte; its weights
were not made twice). The `clip/` that ships was made when captions still said "top left" for "northwest": the same
scenes and steps, so expect a tower as good but not the same file.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llava_jax import config, params
from llava_jax.batch import Batch
from llava_jax.convert import clip as clip_files
from llava_jax.convert import files, processor, table
from llava_jax.convert import llama as llama_files
from llava_jax.data.packing import padded
from llava_jax.demo import clip, words
from llava_jax.models.llama import Llama
from llava_jax.models.presets import LlamaConfig
from llava_jax.prompt import tokenizer as tokenizers
from llava_jax.prompt.tokenizer import Tokenizer
from llava_jax.train import optimizer

ASSETS = Path(__file__).parent / "assets"
LLM = LlamaConfig(
    vocab=words.VOCABULARY, width=128, mlp_width=320, layers=4, heads=4, kv_heads=4, head_width=32, max_positions=512
)  # fmt: skip
ROW_TOKENS = 128
UNLEARNED_WEIGHT = 0.1  # of tokens that are no answer: enough to make it a language model
LOG_EVERY = 50


class Plan(NamedTuple):
    """How long and how fast a base model is trained."""

    steps: int
    rate: float
    rows: int  # of a batch: families of pictures, or texts


CLIP_PLAN = Plan(steps=1000, rate=1.5e-3, rows=16)
LLM_PLAN = Plan(steps=4000, rate=2e-3, rows=16)
FAMILIES = 1000  # of eight pictures each


def train(directory: Path, seed: int = 0, clip_plan: Plan = CLIP_PLAN, llm_plan: Plan = LLM_PLAN) -> None:
    """Makes `directory`/clip and `directory`/llama; prints how it goes."""
    start = time.monotonic()
    (directory / "llama").mkdir(parents=True, exist_ok=True)
    (directory / "clip").mkdir(exist_ok=True)
    tokenizer = _write_tokenizer(directory / "llama", seed)
    _write_llama(directory / "llama", train_llama(tokenizer, llm_plan, seed), tokenizer)
    _write_clip(directory / "clip", train_clip(tokenizer, clip_plan, seed))
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"{directory}: {size / 1e6:.2f} MB in {time.monotonic() - start:.0f} s")


def train_clip(tokenizer: Tokenizer, plan: Plan, seed: int) -> dict[str, Any]:
    """Parameters of the vision tower."""
    rng = np.random.default_rng([seed, 1])
    album = clip.Album(FAMILIES, rng)
    batches = iter(lambda: album.pairs(plan.rows, rng, tokenizer), None)
    return _fit("clip", clip.init(jax.random.key(seed)), clip.loss, batches, plan)["vision"]


def train_llama(tokenizer: Tokenizer, plan: Plan, seed: int) -> dict[str, Any]:
    """Parameters of the decoder."""
    one = jnp.zeros((1, 1), jnp.int32)
    first = Llama(LLM).init(jax.random.key(seed), jnp.zeros((1, 1, LLM.width)), one, one)["params"]
    return _fit("llama", _spread(first), _text_loss, _texts(tokenizer, plan, seed), plan)


def _spread(tree: Mapping[str, Any]) -> dict[str, Any]:
    """First values of a decoder of this width: embeddings of variance 1, kernels of 1 / inputs.

    LLaMA's deviation of 0.02 suits widths of thousands; from it, looking a word up in the text is learned later:
    after 200 steps of 16 rows 0.37 of the answers were exact, from these values 0.46 (2 CPU cores, jax 0.10.2).
    """
    scales = (("embed/table", lambda leaf: 1 / 0.02), ("blocks/.*/kernel", lambda leaf: leaf.shape[1] ** -0.5 / 0.02),
              (".*", lambda leaf: 1.0))  # fmt: skip
    flat = params.flatten(tree)
    factors = params.lookup(flat, scales, "first values")
    return params.unflatten({name: leaf * factors[name](leaf) for name, leaf in flat.items()})


def _texts(tokenizer: Tokenizer, plan: Plan, seed: int) -> Iterator[Batch]:
    rng, format = np.random.default_rng([seed, 2]), words.text_format(tokenizer)
    while True:
        yield padded([words.training_text(rng, format) for _ in range(plan.rows)], ROW_TOKENS, 1, 1)[0]


def _text_loss(tree: Any, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted mean cross entropy, and the share of answer tokens that are the most likely ones."""
    model, variables = Llama(LLM), {"params": tree}
    x = model.apply(variables, batch.tokens, method="embed")
    hidden = model.apply(variables, x, batch.positions, batch.segments)
    logits = model.apply(variables, hidden, method="head")
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
    weights = jnp.maximum(batch.weights, UNLEARNED_WEIGHT * (batch.targets > 0))
    right = (logits.argmax(axis=-1) == batch.targets) * batch.weights
    return (losses * weights).sum() / weights.sum(), right.sum() / batch.weights.sum()


def _fit(name: str, first: Any, loss: Callable[..., Any], batches: Iterator[Any], plan: Plan) -> dict[str, Any]:
    """AdamW over all parameters for `plan.steps` batches; `loss(params, batch)` returns (loss, share right)."""
    settings = config.Train(
        lr=plan.rate, steps=plan.steps, warmup_ratio=0.05, b2=0.98, weight_decay=0.01, clip_norm=1.0
    )  # fmt: skip
    adam = optimizer.build(settings, {leaf: plan.rate for leaf in params.flatten(first)}, plan.steps)

    def update(tree: Any, state: Any, step: Array, batch: Any) -> tuple[Any, Any, Array]:
        (value, right), gradient = jax.value_and_grad(loss, has_aux=True)(tree, batch)
        change, state = adam.update(gradient, state, tree, step=step)
        return jax.tree.map(jnp.add, tree, change), state, jnp.stack([value, right])

    jitted = jax.jit(update, donate_argnums=(0, 1))
    tree, state, start, seen = first, adam.init(first), time.monotonic(), []
    for step in range(plan.steps):
        tree, state, numbers = jitted(tree, state, jnp.int32(step), next(batches))
        seen.append(numbers)
        if (step + 1) % LOG_EVERY == 0 or step + 1 == plan.steps:
            mean = np.mean(jax.device_get(seen), axis=0)
            print(f"{name}: step {step + 1}/{plan.steps}  loss {mean[0]:.4f}  right {mean[1]:.3f}  "
                  f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip
            seen = []
    return jax.device_get(tree)


def _write_tokenizer(directory: Path, seed: int) -> Tokenizer:
    path = directory / "tokenizer.model"
    path.write_bytes(words.train_tokenizer(seed))
    tokenizer = tokenizers.load(path, legacy=False)
    tokenizers.save(tokenizer, directory)
    return tokenizer


def _write_llama(directory: Path, tree: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    names = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    head = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **names}
    files.write_json(directory / "config.json", {**head, **llama_files.config_json(LLM, LLM.vocab, "float16")})
    rows = llama_files.rows("model.", "lm_head.weight")
    _write_weights(directory, params.flatten({"llm": tree}), rows, {})


def _write_clip(directory: Path, tree: Mapping[str, Any]) -> None:
    vision = dataclasses.replace(clip.VISION, select_layer=-1, select_feature="patch")
    config_json = {"architectures": ["CLIPVisionModel"], **clip_files.config_json(vision), "torch_dtype": "float16"}
    files.write_json(directory / "config.json", config_json)
    files.write_json(directory / "preprocessor_config.json", processor.preprocessor_json(vision, "square"))
    leaves = params.flatten({"vision": tree})
    _write_weights(directory, leaves, clip_files.rows("vision_model."), clip_files.first_layers(vision))


def _write_weights(
    directory: Path, leaves: Mapping[str, np.ndarray], rows: list[table.Row], first_layers: Mapping[str, int]
) -> None:
    """model.safetensors in float16, by the same table that reads it back."""
    leaves = {name: np.asarray(leaf, np.float16) for name, leaf in leaves.items()}
    found = table.entries(leaves, rows, first_layers, "conversion")
    specs = {name: files.Spec(entry.their_shape, np.dtype(np.float16)) for entry in found for name in entry.theirs}
    tensors = (pair for entry in found for pair in table.their_tensors(entry, leaves[entry.ours]))
    files.write_safetensors(directory / "model.safetensors", specs, tensors)
