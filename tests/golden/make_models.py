"""Records `models.npz`: what transformers computes for a tiny random LLaVA (logits, hidden states, loss, gradients).

Run with `python -m tests.golden.make_models` where torch is installed (recorded with transformers 5.23.0, torch
2.13.0). The test of the same arrays needs no torch; `tests/models/test_parity.py` also runs it live.
"""

import re
from pathlib import Path

import numpy as np

from llava_jax.models.presets import LlamaConfig, LlavaConfig, VisionConfig

CONFIG = LlavaConfig(
    VisionConfig(image_size=14, patch_size=7, width=24, mlp_width=32, layers=3, heads=2), "mlp2x_gelu",
    LlamaConfig(vocab=96, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2, head_width=8, max_positions=256),
)  # fmt: skip
IMAGE_ID = 95
PATH = Path(__file__).with_name("models.npz")
RENAMES = (
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision/"),
    (r"(?:model\.)?multi_modal_projector\.linear_1", "projector/0"),
    (r"(?:model\.)?multi_modal_projector\.linear_2", "projector/2"),
    (r"(?:model\.)?language_model\.(?:model\.)?", "llm/"),
    (r"lm_head", "llm/head"),
    (r"embeddings\.class_embedding", "cls"),
    (r"embeddings\.patch_embedding", "patch"),
    (r"embeddings\.position_embedding\.weight", "pos"),
    (r"pre_layrnorm", "pre_ln"),
    (r"post_layernorm", "post_ln"),
    (r"encoder\.layers|layers", "blocks"),
    (r"(?:self_attn|mlp)\.", ""),
    (r"([qkvo]|gate|up|down)_proj", r"\1"),
    (r"out_proj", "o"),
    (r"layer_norm(\d)", r"ln\1"),
    (r"input_layernorm", "ln1"),
    (r"post_attention_ln|post_attention_layernorm", "ln2"),
    (r"embed_tokens\.weight", "embed/table"),
    (r"\.", "/"),
)


def hf_model(config: LlavaConfig = CONFIG, seed: int = 0, **text):
    """A random LlavaForConditionalGeneration of these sizes; every weight redrawn so that none is zero or one."""
    import torch
    from transformers import CLIPVisionConfig, LlavaForConditionalGeneration
    from transformers import LlamaConfig as HFLlama
    from transformers import LlavaConfig as HFConfig

    v, t = config.vision, config.llm
    vision = CLIPVisionConfig(
        hidden_size=v.width, intermediate_size=v.mlp_width, num_hidden_layers=v.layers, num_attention_heads=v.heads,
        image_size=v.image_size, patch_size=v.patch_size, hidden_act=v.act, projection_dim=v.width,
    )  # fmt: skip
    llama = HFLlama(
        vocab_size=t.vocab, hidden_size=t.width, intermediate_size=t.mlp_width, num_hidden_layers=t.layers,
        num_attention_heads=t.heads, num_key_value_heads=t.kv_heads, head_dim=t.head_width, rms_norm_eps=t.eps,
        max_position_embeddings=t.max_positions, **text,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        HFConfig(vision_config=vision, text_config=llama, image_token_index=IMAGE_ID,
                 tie_word_embeddings=llama.tie_word_embeddings, vision_feature_layer=v.select_layer,
                 vision_feature_select_strategy="default" if v.select_feature == "patch" else "full")  # fmt: skip
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            draw = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.2 * draw if "norm" in name and name.endswith("weight") else 0.2 * draw)
    return model.double().eval()  # the reference is exact; ours is compared in float32


def to_names(state: dict, config: LlavaConfig = CONFIG) -> dict[str, np.ndarray]:
    """transformers' names and layouts -> ours, blocks stacked and the tower's tail apart. Torch tensors in."""
    flat, layers = {}, {}
    for name, tensor in state.items():
        array = tensor.detach().float().numpy()
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif name.endswith("weight") and array.ndim == 2:
            array = array.T
        is_norm = "/ln" in name or "norm" in name or "_ln" in name
        name = name.replace("weight", "scale" if is_norm else "kernel").replace("vision/post_ln", "vision/tail/post_ln")
        match = re.fullmatch(r"(.*)/blocks/(\d+)/(.*)", name)
        if match:
            run = config.vision.run_layers if match[1] == "vision" else config.llm.layers
            stack = f"{match[1]}/blocks" if int(match[2]) < run else f"{match[1]}/tail/blocks"
            layers.setdefault(f"{stack}/{match[3]}", []).append(array)
        else:
            flat[name] = array
    return flat | {name: np.stack(parts) for name, parts in layers.items()}


def inputs(config: LlavaConfig = CONFIG, rows: int = 2, tokens: int = 24, seed: int = 1) -> dict[str, np.ndarray]:
    """A batch with one image a row, in our fields; the answer is the last third of the row."""
    rng = np.random.default_rng(seed)
    features = config.image_features
    ids = rng.integers(1, IMAGE_ID, (rows, tokens)).astype(np.int32)
    slots = np.full((rows, tokens), -1, np.int32)
    slots[:, 3 : 3 + features] = np.arange(features)
    ids[slots >= 0] = 0
    weights = np.zeros((rows, tokens), np.float32)
    weights[:, 2 * tokens // 3 : -1] = 1
    side = config.vision.image_size
    return {
        "tokens": ids, "targets": np.roll(ids, -1, axis=1), "weights": weights,
        "positions": np.tile(np.arange(tokens, dtype=np.int32), (rows, 1)), "segments": np.ones_like(ids),
        "image_slots": slots, "pixels": rng.integers(0, 256, (rows, 1, side, side, 3)).astype(np.uint8),
    }  # fmt: skip


def expected(model, batch: dict[str, np.ndarray], config: LlavaConfig = CONFIG) -> dict[str, np.ndarray]:
    """transformers' logits, tower hidden states, loss and every gradient for that batch."""
    import torch

    ids = torch.tensor(np.where(batch["image_slots"] >= 0, IMAGE_ID, batch["tokens"]).astype(np.int64))
    labels = np.full(ids.shape, -100, np.int64)
    labels[:, 1:] = np.where(batch["weights"][:, :-1] > 0, batch["targets"][:, :-1], -100)
    pixels = (batch["pixels"][:, 0].astype(np.float32) / 255 - config.vision.mean) / config.vision.std
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=next(model.parameters()).dtype)
    out = model(input_ids=ids, pixel_values=pixels, labels=torch.tensor(labels))
    model.zero_grad()
    out.loss.backward()
    tower = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    return {"logits": out.logits.detach().float().numpy(), "loss": out.loss.detach().float().numpy()} | {
        f"hidden/{i}": h.detach().float().numpy() for i, h in enumerate(tower)
    } | {f"grad/{name}": value for name, value in to_names(gradients, config).items()}


def main() -> None:
    """Writes models.npz next to this file."""
    model = hf_model()
    batch = inputs()
    params = to_names(dict(model.named_parameters()))
    arrays = {f"params/{n}": a for n, a in params.items()} | {f"batch/{n}": a for n, a in batch.items()}
    trained = ("grad/llm", "grad/projector")
    wanted = {n: a for n, a in expected(model, batch).items() if not n.startswith("grad/") or n.startswith(trained)}
    np.savez_compressed(PATH, **arrays, **{f"expected/{n}": a for n, a in wanted.items()})
    print(f"{PATH.name}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
