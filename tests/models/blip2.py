"""A tiny random Blip2ForConditionalGeneration with a LLaMA, its names in ours, and what it computes.

All but CASES, `inputs` and the levels needs torch; `tests/golden/blip2.npz` records what it computes for tests without.
transformers' own first values make vacuous tests (weights of 1e-10, queries of 0), so every one is drawn again.
"""

import re
from dataclasses import replace

import numpy as np

from llava_jax.models.presets import EvaConfig, LlamaConfig, LlavaConfig, QFormerConfig
from tests.golden import make_models

IMAGE_ID = make_models.IMAGE_ID
CONFIG = LlavaConfig(
    EvaConfig(image_size=28, patch_size=14, width=44, mlp_width=120, layers=3, heads=2), "qformer",  # heads of 22
    LlamaConfig(vocab=96, width=32, mlp_width=48, layers=2, heads=4, kv_heads=4, head_width=8, max_positions=256),
    ln_vision_eps=1e-6,
    resampler=QFormerConfig(queries=5, width=24, mlp_width=40, layers=4, heads=3),
)  # fmt: skip
CASES = {
    "heads of 22, eps of HF": CONFIG,
    "another eps, every third layer looks": replace(
        CONFIG, vision=replace(CONFIG.vision, width=32, heads=4, eps=1e-3), ln_vision_eps=1e-3,
        resampler=QFormerConfig(queries=3, width=16, mlp_width=20, layers=6, heads=2, cross_every=3, eps=1e-5),
    ),
}  # fmt: skip
STEP = 1 / 65  # between two levels; no number of theirs is 0, and four fit in bfloat16, so a lost digit is seen
# Theirs, without what both say of a layer -> ours. Written apart from the conversion's tables, which it tests.
RENAMES = (
    (r"vision_model\.embeddings\.class_embedding", "vision/cls"),
    (r"vision_model\.embeddings\.position_embedding", "vision/pos"),
    (r"vision_model\.embeddings\.patch_embedding\.", "vision/patch/"),
    (r"vision_model\.post_layernorm\.", "ln_vision/"),
    (r"vision_model\.encoder\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?", r"vision/blocks/@\1/"),
    (r"layer_norm([12])\.", r"ln\1/"),
    (r"projection\.(weight|bias)$", r"o/\1"),
    (r"language_o/", "projector/0/"),
    (r"query_tokens", "resampler/queries"),
    (r"qformer\.layernorm\.", "resampler/ln/"),
    (r"qformer\.encoder\.layer\.(\d+)\.attention\.(?:attention|output)\.", r"resampler/attention/@\1/"),
    (r"qformer\.encoder\.layer\.(\d+)\.crossattention\.(?:attention|output)\.", r"resampler/cross/@\1/"),
    (r"qformer\.encoder\.layer\.(\d+)\.intermediate_query\.dense", r"resampler/mlp/@\1/fc1"),
    (r"qformer\.encoder\.layer\.(\d+)\.output_query\.dense", r"resampler/mlp/@\1/fc2"),
    (r"qformer\.encoder\.layer\.(\d+)\.output_query\.", r"resampler/mlp/@\1/"),
    (r"(@\d+)/(query|key|value)\.", lambda m: f"{m[1]}/{m[2][0]}/"),
    (r"(@\d+)/dense", r"\1/o"),
    (r"LayerNorm", "ln"),
    (r"language_model\.lm_head", "llm/head"),
    (r"language_model\.model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?", r"llm/blocks/@\1/"),
    (r"language_model\.model\.", "llm/"),
    (r"input_layernorm", "ln1"),
    (r"post_attention_layernorm", "ln2"),
    (r"([qkvo]|gate|up|down)_proj", r"\1"),
    (r"embed_tokens\.weight", "embed/table"),
    (r"\.", "/"),
)


def hf_model(config: LlavaConfig = CONFIG, seed: int = 0):
    """The model in float64, since the reference is exact and ours is compared in float32."""
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig
    from transformers import LlamaConfig as HFLlama

    v, q, t = config.vision, config.resampler, config.llm
    vision = Blip2VisionConfig(
        hidden_size=v.width, intermediate_size=v.mlp_width, num_hidden_layers=v.layers, num_attention_heads=v.heads,
        image_size=v.image_size, patch_size=v.patch_size, layer_norm_eps=v.eps,
    )  # fmt: skip
    qformer = Blip2QFormerConfig(
        hidden_size=q.width, num_hidden_layers=q.layers, num_attention_heads=q.heads, intermediate_size=q.mlp_width,
        encoder_hidden_size=v.width, cross_attention_frequency=q.cross_every, layer_norm_eps=q.eps,
    )  # fmt: skip
    llama = HFLlama(
        vocab_size=t.vocab, hidden_size=t.width, intermediate_size=t.mlp_width, num_hidden_layers=t.layers,
        num_attention_heads=t.heads, num_key_value_heads=t.kv_heads, head_dim=t.head_width, rms_norm_eps=t.eps,
        max_position_embeddings=t.max_positions,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=llama, num_query_tokens=q.queries,
        image_token_index=IMAGE_ID,
    )  # fmt: skip
    model = redrawn(Blip2ForConditionalGeneration(config), seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("qkv.bias"):
                value[v.width : 2 * v.width] = 0
    return model


def inputs(config: LlavaConfig = CONFIG, seed: int = 1) -> dict[str, np.ndarray]:
    """A batch with one image a row, in our fields."""
    return make_models.inputs(config, seed=seed)


def redrawn(model, seed: int):
    """The torch module in float64 for inference, with each parameter drawn around 0, or around 1 if it scales a norm.

    Each is one of 256 levels, so that a recording holds a byte for it.
    """
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            centre = float(bool(re.search(r"norm|\.ln\.", name.lower())) and name.endswith("weight"))
            draw = centre + 0.2 * rng.standard_normal(tuple(value.shape))
            value.copy_(torch.from_numpy(of_levels(to_levels(draw))))
    return model.double().eval()


def to_levels(values: np.ndarray) -> np.ndarray:
    """Numbers from -2 to 2 -> the levels below them, int8."""
    return np.clip(np.floor(values / STEP), -128, 127).astype(np.int8)


def of_levels(levels: np.ndarray) -> np.ndarray:
    """Levels -> their numbers, float32: the middle between a level and the next."""
    return (levels.astype(np.float32) + np.float32(0.5)) * np.float32(STEP)


def to_names(state: dict, config: LlavaConfig = CONFIG) -> dict[str, np.ndarray]:
    """transformers' names and layouts -> ours, layers stacked. Torch tensors in."""
    flat, layers = {}, {}
    for name, tensor in _without_key_bias(state):
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        array = tensor.detach().float().numpy()
        if name in ("vision/cls", "vision/pos", "resampler/queries"):
            array = array.reshape(array.shape[2:] if name == "vision/cls" else array.shape[1:])
        elif array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif name.endswith("weight") and array.ndim == 2:
            array = array.T
        name = re.sub(r"weight$", "scale" if re.search(r"(ln[12]?|ln_vision|norm)/weight", name) else "kernel", name)
        match = re.search(r"/@(\d+)", name)
        if match:
            layers.setdefault(name.replace(match[0], ""), []).append((int(match[1]), array))
        else:
            flat[name] = array
    return flat | {name: np.stack([array for _, array in sorted(parts, key=lambda part: part[0])])
                   for name, parts in layers.items()}  # fmt: skip


def _without_key_bias(state: dict):
    for name, tensor in state.items():
        if not name.endswith("qkv.bias"):
            yield name, tensor
            continue
        q, _, v = tensor.chunk(3)
        yield name.replace("qkv.bias", "q.bias"), q
        yield name.replace("qkv.bias", "v.bias"), v


def pixel_values(pixels: np.ndarray, config: LlavaConfig = CONFIG):
    """uint8 [B, H, W, 3] -> their normalised float64 [B, 3, H, W]."""
    import torch

    values = (pixels.astype(np.float64) / 255 - config.vision.mean) / config.vision.std
    return torch.tensor(values.transpose(0, 3, 1, 2))


def expected(model, batch: dict[str, np.ndarray], config: LlavaConfig = CONFIG) -> dict[str, np.ndarray]:
    """transformers' logits, hidden states of tower and Q-Former, features, loss and every gradient for that batch."""
    import torch

    ids = torch.tensor(np.where(batch["image_slots"] >= 0, IMAGE_ID, batch["tokens"]).astype(np.int64))
    labels = np.full(ids.shape, -100, np.int64)
    labels[:, 1:] = np.where(batch["weights"][:, :-1] > 0, batch["targets"][:, :-1], -100)
    pixels = pixel_values(batch["pixels"][:, 0], config)
    out = model(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor(labels))
    model.zero_grad()
    out.loss.backward()
    tower = model.vision_model(pixels, output_hidden_states=True)
    queries = model.query_tokens.expand(len(ids), -1, -1)
    seen = model.qformer(query_embeds=queries, encoder_hidden_states=tower.last_hidden_state, output_hidden_states=True)
    found = {"logits": out.logits, "loss": out.loss, "normed": tower.last_hidden_state,
             "features": model.language_projection(seen.last_hidden_state)}  # fmt: skip
    found |= {f"vision/{i}": state for i, state in enumerate(tower.hidden_states)}
    found |= {f"resampler/{i}": state for i, state in enumerate(seen.hidden_states)}
    gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    return {name: value.detach().float().numpy() for name, value in found.items()} | {
        f"grad/{name}": value for name, value in to_names(gradients, config).items()
    }
