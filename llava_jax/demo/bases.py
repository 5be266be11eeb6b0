"""Trains the demo's base models: `python -m llava_jax.demo bases`, about an hour on two busy cores.

It writes the directories `clip/`, `llama/` and `blip2/` (a tower and its Q-Former) in Hugging Face's format, in
float16; the demo reads them through `convert assemble`, as real weights are read. Pictures are of training scenes
only; a quarter of LLaMA's texts also name the pairs that no picture shows, as books do.

The shipped `llama/` and `blip2/` come from this code with seed 0 (the tokenizer is reproduced byte for byte; the
weights were trained once). The shipped `clip/` was trained when captions still said "top left" for "northwest": the
same scenes and steps, so expect a tower as good but not the same file.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llava_jax import config, params
from llava_jax.batch import Batch
from llava_jax.checkpoint import reader
from llava_jax.convert import files, importing, minigpt4, processor, table, views
from llava_jax.data.packing import padded
from llava_jax.demo import clip, records, words
from llava_jax.demo.records import Sizes
from llava_jax.models import clip as clip_part
from llava_jax.models import eva, llama, qformer, vit
from llava_jax.models.llama import Llama
from llava_jax.models.llava import init_params
from llava_jax.models.names import Row
from llava_jax.models.presets import LlamaConfig, LlavaConfig, QFormerConfig, TowerConfig
from llava_jax.prompt import tokenizer as tokenizers
from llava_jax.prompt.tokenizer import Tokenizer
from llava_jax.train import optimizer
from llava_jax.train.trainer import Trainer

ASSETS = Path(__file__).parent / "assets"
LLM = LlamaConfig(
    vocab=words.VOCABULARY, width=128, mlp_width=320, layers=4, heads=4, kv_heads=4, head_width=32, max_positions=512
)  # fmt: skip
BLIP2 = LlavaConfig(
    dataclasses.replace(clip.EVA, layers=clip.EVA.layers - 1), "qformer", LLM, ln_vision_eps=minigpt4.LN_EPS,
    resampler=QFormerConfig(queries=16, width=96, mlp_width=192, layers=4, heads=4),
)  # fmt: skip
BLIP2_CONFIG = Path(__file__).parent / "blip2.py"
BLIP2_SIZES = Sizes(train=8000, heldout=40, unseen=40, heldout_per_kind=4, unseen_per_kind=2)
ROW_TOKENS = 128
UNSUPERVISED_WEIGHT = 0.1  # of tokens that are no answer: enough to make it a language model
LOG_EVERY = 50


class Plan(NamedTuple):
    """How long and how fast a base model is trained."""

    steps: int
    lr: float
    rows: int  # of a batch: families of pictures, or texts


CLIP_PLAN = Plan(steps=1000, lr=1.5e-3, rows=16)
LLM_PLAN = Plan(steps=4000, lr=2e-3, rows=16)
FAMILIES = 1000  # of eight pictures each


def train(
    directory: Path, seed: int = 0, clip_plan: Plan = CLIP_PLAN, llm_plan: Plan = LLM_PLAN,
    qformer_steps: int | None = None, sizes: Sizes = BLIP2_SIZES,
) -> None:  # fmt: skip
    """Trains and writes `directory`/clip, `directory`/llama and `directory`/blip2; prints the progress.

    qformer_steps: in place of those of the config `blip2.py`.
    """
    start = time.monotonic()
    for name in ("llama", "clip", "blip2"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    tokenizer = _write_tokenizer(directory / "llama", seed)
    _write_llama(directory / "llama", train_llama(tokenizer, llm_plan, seed), tokenizer)
    _write_clip(directory / "clip", train_tower("clip", clip.VISION, tokenizer, clip_plan, seed))
    eva = train_tower("eva", clip.EVA, tokenizer, clip_plan, seed)
    train_blip2(directory, eva, seed, qformer_steps, sizes)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"{directory}: {size / 1e6:.2f} MB in {time.monotonic() - start:.0f} s")


def train_tower(name: str, vision: TowerConfig, tokenizer: Tokenizer, plan: Plan, seed: int) -> dict[str, Any]:
    """Parameters of a vision tower."""
    rng = np.random.default_rng([seed, 1])
    album = clip.Album(FAMILIES, rng)
    batches = iter(lambda: album.pairs(plan.rows, rng, tokenizer), None)
    initial, loss = clip.init(jax.random.key(seed), vision), partial(clip.loss, vision=vision)
    return _fit(name, initial, loss, batches, plan)["vision"]


def train_blip2(directory: Path, eva: Mapping[str, Any], seed: int, steps: int | None, sizes: Sizes) -> None:
    """Writes `directory`/blip2 from a tower and `directory`/llama: all blocks but the last, and a Q-Former for it.

    The `Trainer` trains it, from a checkpoint to a checkpoint.
    """
    initial = params.flatten(jax.device_get(init_params(BLIP2, jax.random.key(seed))))
    shortened = {**eva, "blocks": jax.tree.map(lambda tensor: tensor[: BLIP2.vision.layers], eva["blocks"])}
    _write_blip2(directory / "blip2", initial | params.flatten({"vision": shortened}))
    with tempfile.TemporaryDirectory() as folder:
        work, blip2_dir = Path(folder), directory / "blip2"
        records.write(work / "world", seed + 1, sizes)
        importing.assemble(work / "base", blip2_dir, directory / "llama", seed=seed, connector=blip2_dir)
        settings = {"model.base": work / "base", "data.sources.0.path": work / "world" / records.FINETUNE,
                    "data.sources.0.images": work / "world", "train.seed": seed}  # fmt: skip
        settings |= {} if steps is None else {"train.steps": steps}
        Trainer(config.load(BLIP2_CONFIG, settings), workdir=work / "run").fit()
        _write_blip2(blip2_dir, params.flatten(reader.load_params(work / "run", _blip2_names(initial))))


def _blip2_names(names: Iterable[str]) -> list[str]:
    """The shipped parameters: without the decoder, and without the linear layer that was trained with the Q-Former."""
    return [name for name in names if name.startswith(("vision/", "ln_vision/", "resampler/"))]


def train_llama(tokenizer: Tokenizer, plan: Plan, seed: int) -> dict[str, Any]:
    """Parameters of the decoder."""
    token_ids = jnp.zeros((1, 1), jnp.int32)
    initial = Llama(LLM).init(jax.random.key(seed), jnp.zeros((1, 1, LLM.width)), token_ids, token_ids)["params"]
    return _fit("llama", _rescale(initial), _text_loss, _texts(tokenizer, plan, seed), plan)


def _rescale(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Initial values of a decoder of this width: embeddings of variance 1, kernels of 1 / inputs.

    LLaMA's deviation of 0.02 suits widths of thousands; from it, the model learns later to look up a word in the text:
    after 200 steps of 16 rows 0.37 of the answers were exact, from these values 0.46 (2 CPU cores, jax 0.10.2).
    """
    scales = (
        ("embed/table", lambda tensor: 1 / 0.02), ("blocks/.*/kernel", lambda tensor: tensor.shape[1] ** -0.5 / 0.02),
        (".*", lambda tensor: 1.0),
    )  # fmt: skip
    flat = params.flatten(tree)
    factors = params.lookup(flat, scales, "first values")
    return params.unflatten({name: tensor * factors[name](tensor) for name, tensor in flat.items()})


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
    weights = jnp.maximum(batch.weights, UNSUPERVISED_WEIGHT * (batch.targets > 0))
    right = (logits.argmax(axis=-1) == batch.targets) * batch.weights
    return (losses * weights).sum() / weights.sum(), right.sum() / batch.weights.sum()


def _fit(name: str, initial: Any, loss: Callable[..., Any], batches: Iterator[Any], plan: Plan) -> dict[str, Any]:
    """AdamW over all parameters for `plan.steps` batches; `loss(params, batch)` returns (loss, share right)."""
    settings = config.Train(
        lr=plan.lr, steps=plan.steps, warmup_ratio=0.05, b2=0.98, weight_decay=0.01, clip_norm=1.0
    )  # fmt: skip
    adam = optimizer.build(settings, {param_name: plan.lr for param_name in params.flatten(initial)}, plan.steps)

    def update(tree: Any, state: Any, step: Array, batch: Any) -> tuple[Any, Any, Array]:
        (value, right), gradient = jax.value_and_grad(loss, has_aux=True)(tree, batch)
        change, state = adam.update(gradient, state, tree, step=step)
        return jax.tree.map(jnp.add, tree, change), state, jnp.stack([value, right])

    jitted_update = jax.jit(update, donate_argnums=(0, 1))
    tree, state, start, pending = initial, adam.init(initial), time.monotonic(), []
    for step in range(plan.steps):
        tree, state, numbers = jitted_update(tree, state, jnp.int32(step), next(batches))
        pending.append(numbers)
        if (step + 1) % LOG_EVERY == 0 or step + 1 == plan.steps:
            mean = np.mean(jax.device_get(pending), axis=0)
            print(f"{name}: step {step + 1}/{plan.steps}  loss {mean[0]:.4f}  right {mean[1]:.3f}  "
                  f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip
            pending = []
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
    files.write_json(directory / "config.json", {**head, **llama.config_json(LLM, LLM.vocab, "float16")})
    rows = llama.rows("model.", "lm_head.weight")
    _write_weights(directory, params.flatten({"llm": tree}), rows, {})


def _write_clip(directory: Path, tree: Mapping[str, Any]) -> None:
    vision = dataclasses.replace(clip.VISION, select_layer=-1, select_feature="patch")
    config_json = {"architectures": ["CLIPVisionModel"], **clip_part.config_json(vision), "torch_dtype": "float16"}
    files.write_json(directory / "config.json", config_json)
    files.write_json(directory / "preprocessor_config.json", processor.preprocessor_json(vision, "square"))
    tensors = params.flatten({"vision": tree})
    _write_weights(directory, tensors, clip_part.rows("vision_model."), vit.first_layers(vision))


def _write_blip2(directory: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A BLIP-2 directory without a language model."""
    assert isinstance(BLIP2.resampler, QFormerConfig)
    config_json = {
        "architectures": [minigpt4.HUB_CLASS], "model_type": minigpt4.HUB_TYPE, "torch_dtype": "float16",
        "num_query_tokens": BLIP2.resampler.queries, "vision_config": eva.config_json(BLIP2.vision),
        "qformer_config": qformer.hub_config_json(BLIP2.resampler, BLIP2.vision.width),
    }  # fmt: skip
    files.write_json(directory / "config.json", config_json)
    files.write_json(directory / "preprocessor_config.json", processor.blip_json(BLIP2.vision))
    _write_weights(directory, {name: tensors[name] for name in _blip2_names(tensors)}, minigpt4.hub_rows(BLIP2), {})


def _write_weights(
    directory: Path, params_by_name: Mapping[str, np.ndarray], rows: list[Row], first_layers: Mapping[str, int]
) -> None:
    """Writes model.safetensors in float16, by the same table that reads it back."""
    params_by_name = {name: np.asarray(tensor, np.float16) for name, tensor in params_by_name.items()}
    entries = table.entries(params_by_name, rows, first_layers, "conversion")
    specs = {name: files.Spec(entry.their_shape, np.dtype(np.float16)) for entry in entries for name in entry.theirs}
    tensors = (pair for entry in entries for pair in table.their_tensors(entry, params_by_name[entry.ours]))
    files.write_safetensors(directory / "model.safetensors", views.joined_specs(specs), views.joined(tensors))
