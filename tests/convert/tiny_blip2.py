"""A tiny MiniGPT-4 as others keep it, written from numpy alone, with every name spelled out and no table of ours."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from llava_jax.convert import torch_zip
from tests.convert import tiny
from tests.convert.tiny import Tensors

# The files of LAVIS do not say how many heads there are: 88 numbers wide in the tower, 64 in the Q-Former.
WIDTH, MLP, BLOCKS, SIDE, PATCH = 88, 96, 3, 28, 14
QUERIES, Q_WIDTH, Q_MLP, Q_LAYERS = 5, 64, 80, 4


def tower(rng: np.random.Generator, prefix: str = "visual_encoder.", blocks: int = BLOCKS) -> Tensors:
    """With LAVIS's names; the released file has no prefix, and a block more than runs."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, (SIDE // PATCH) ** 2 + 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,),
    }  # fmt: skip
    for i in range(blocks):
        block = f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            shapes[f"{block}{norm}.weight"] = shapes[f"{block}{norm}.bias"] = (WIDTH,)
        shapes |= {block + "attn.q_bias": (WIDTH,), block + "attn.v_bias": (WIDTH,)}
        shapes |= {block + "attn.qkv.weight": (3 * WIDTH, WIDTH)}
        shapes |= {block + "attn.proj.weight": (WIDTH, WIDTH), block + "attn.proj.bias": (WIDTH,)}
        shapes |= {block + "mlp.fc1.weight": (MLP, WIDTH), block + "mlp.fc1.bias": (MLP,)}
        shapes |= {block + "mlp.fc2.weight": (WIDTH, MLP), block + "mlp.fc2.bias": (WIDTH,)}
    return {prefix + name: drawn(rng, shape) for name, shape in shapes.items()}


def connector(rng: np.random.Generator) -> Tensors:
    """The Q-Former and the norm before it, with LAVIS's names."""
    shapes: dict[str, tuple[int, ...]] = {
        "query_tokens": (1, QUERIES, Q_WIDTH), "ln_vision.weight": (WIDTH,), "ln_vision.bias": (WIDTH,),
        "Qformer.bert.embeddings.LayerNorm.weight": (Q_WIDTH,), "Qformer.bert.embeddings.LayerNorm.bias": (Q_WIDTH,),
    }  # fmt: skip

    def linear(name: str, outer: int, inner: int) -> None:
        shapes[name + ".weight"], shapes[name + ".bias"] = (outer, inner), (outer,)

    for i in range(Q_LAYERS):
        layer = f"Qformer.bert.encoder.layer.{i}."
        for attention, inner in (("attention", Q_WIDTH), ("crossattention", WIDTH)):
            if attention == "crossattention" and i % 2:
                continue
            linear(f"{layer}{attention}.self.query", Q_WIDTH, Q_WIDTH)
            linear(f"{layer}{attention}.self.key", Q_WIDTH, inner)
            linear(f"{layer}{attention}.self.value", Q_WIDTH, inner)
            linear(f"{layer}{attention}.output.dense", Q_WIDTH, Q_WIDTH)
            shapes[f"{layer}{attention}.output.LayerNorm.weight"] = (Q_WIDTH,)
            shapes[f"{layer}{attention}.output.LayerNorm.bias"] = (Q_WIDTH,)
        linear(f"{layer}intermediate_query.dense", Q_MLP, Q_WIDTH)
        linear(f"{layer}output_query.dense", Q_WIDTH, Q_MLP)
        shapes[f"{layer}output_query.LayerNorm.weight"] = shapes[f"{layer}output_query.LayerNorm.bias"] = (Q_WIDTH,)
    return {name: drawn(rng, shape) for name, shape in shapes.items()}


def projection(rng: np.random.Generator, inner: int = Q_WIDTH) -> Tensors:
    """The linear layer as MiniGPT-4's checkpoints hold it."""
    return {"llama_proj.weight": drawn(rng, (tiny.WIDTH, inner)), "llama_proj.bias": drawn(rng, (tiny.WIDTH,))}


def adapters(rng: np.random.Generator, rank: int = 2, default: str = ".default") -> Tensors:
    """MiniGPT-v2's, of queries and values."""
    kv = tiny.WIDTH // tiny.HEADS * tiny.KV_HEADS
    found = {}
    for i in range(tiny.LAYERS):
        layer = f"llama_model.base_model.model.model.layers.{i}.self_attn."
        for name, outer in (("q_proj", tiny.WIDTH), ("v_proj", kv)):
            found[f"{layer}{name}.lora_A{default}.weight"] = drawn(rng, (rank, tiny.WIDTH))
            found[f"{layer}{name}.lora_B{default}.weight"] = drawn(rng, (outer, rank))
    return found


def released(folder: Path, seed: int = 0) -> tuple[Path, Path, Path]:
    """`eva_vit_g.pth` (one block more, a norm and a head that nobody runs), `blip2_pretrained.pth` (with a buffer and
    the projection to T5) and a checkpoint of MiniGPT-4, as they were released."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    vision = tower(rng, "", BLOCKS + 1) | {"norm.weight": drawn(rng, (WIDTH,)), "head.weight": drawn(rng, (4, WIDTH))}
    blip2 = connector(rng) | {"t5_proj.weight": drawn(rng, (6, Q_WIDTH)), "t5_proj.bias": drawn(rng, (6,))}
    blip2["Qformer.bert.embeddings.position_ids"] = np.arange(512)[None]
    torch_zip.write_torch(folder / "eva_vit_g.pth", vision)
    torch_zip.write_torch(folder / "blip2_pretrained.pth", blip2, within="model")
    torch_zip.write_torch(folder / "minigpt4.pth", projection(rng), within="model")
    return folder / "eva_vit_g.pth", folder / "blip2_pretrained.pth", folder / "minigpt4.pth"


_HUB = (
    ("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"), ("blocks.", "encoder.layers."), (".norm", ".layer_norm"),
    (".attn.proj", ".self_attn.projection"), (".attn.", ".self_attn."),
)  # fmt: skip


def hub_tensors(seed: int = 0, vocab: int = tiny.PIECES) -> Tensors:
    """A whole Blip2ForConditionalGeneration with a LLaMA, in Hugging Face's names."""
    rng = np.random.default_rng(seed)
    found = {}
    biases: dict[str, list[np.ndarray]] = {}
    for name, tensor in tower(rng, "").items():
        for old, new in _HUB:
            name = name.replace(old, new)
        if name.endswith(("q_bias", "v_bias")):
            biases.setdefault(name[: -len("q_bias")], []).append(tensor)
        else:
            found["vision_model." + name] = tensor
    for name, (q, v) in biases.items():
        found[f"vision_model.{name}qkv.bias"] = np.concatenate([q, np.zeros_like(q), v])
    for name, tensor in connector(rng).items():
        name = name.replace("ln_vision.", "vision_model.post_layernorm.").replace("attention.self.", "attention.@.")
        name = name.replace("Qformer.bert.embeddings.LayerNorm.", "qformer.layernorm.")
        found[name.replace("Qformer.bert.", "qformer.").replace("@", "attention")] = tensor
    for name, tensor in projection(rng).items():
        found[name.replace("llama_proj", "language_projection")] = tensor
    return found | tiny.text_tensors(rng, "language_model.model.", "language_model.lm_head.weight", vocab)


def write_hub(folder: Path, tensors: Tensors, vocab: int = tiny.PIECES, text: str = "llama") -> Path:
    """A BLIP-2 directory of Hugging Face."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = {
        "model_type": "blip-2", "num_query_tokens": QUERIES, "image_token_index": 4,
        "text_config": tiny.TEXT_CONFIG | {"vocab_size": vocab, "model_type": text},
        "vision_config": {"hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": BLOCKS,
                          "num_attention_heads": 1, "image_size": SIDE, "patch_size": PATCH},
        "qformer_config": {"hidden_size": Q_WIDTH, "intermediate_size": Q_MLP, "num_hidden_layers": Q_LAYERS,
                           "num_attention_heads": 1, "encoder_hidden_size": WIDTH},
    }  # fmt: skip
    tiny.write_json(folder / "config.json", config)
    processor = {"image_processor_type": "BlipImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    tiny.write_json(folder / "preprocessor_config.json", processor)
    return tiny.write_tokenizer(folder)


def drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.standard_normal(shape, np.float32) * 0.2).astype(np.float32)
