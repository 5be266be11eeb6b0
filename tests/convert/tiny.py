"""Tiny checkpoints of others, written from numpy alone, with every name spelled out and no table of ours in sight."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from llava_jax.convert import torch_zip

TOKENIZER = Path(__file__).parents[1] / "golden" / "tiny_llama.model"
PIECES = 960  # of that tokenizer
DTYPES = {"float32": np.dtype("f4"), "float16": np.dtype("f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

WIDTH, HEADS, KV_HEADS, MLP, LAYERS = 48, 4, 2, 96, 3
VISION_WIDTH, VISION_MLP, VISION_LAYERS, SIDE, PATCH = 32, 64, 3, 28, 14

VISION_CONFIG = {
    "model_type": "clip_vision_model", "hidden_size": VISION_WIDTH, "intermediate_size": VISION_MLP,
    "num_hidden_layers": VISION_LAYERS, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH,
    "projection_dim": 16,
}  # fmt: skip
TEXT_CONFIG = {
    "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": PIECES,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip
PREPROCESSOR = {
    "image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
}  # fmt: skip

Tensors = dict[str, np.ndarray]


def vision_tensors(rng: np.random.Generator, prefix: str) -> Tensors:
    """A CLIP tower, in torch's axes."""
    width, mlp = VISION_WIDTH, VISION_MLP
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": ((SIDE // PATCH) ** 2 + 1, width),
        "pre_layrnorm.weight": (width,), "pre_layrnorm.bias": (width,),
        "post_layernorm.weight": (width,), "post_layernorm.bias": (width,),
    }  # fmt: skip
    for i in range(VISION_LAYERS):
        layer = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}self_attn.{name}.weight"] = (width, width)
            shapes[f"{layer}self_attn.{name}.bias"] = (width,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (width,)
        shapes |= {f"{layer}mlp.fc1.weight": (mlp, width), f"{layer}mlp.fc1.bias": (mlp,)}
        shapes |= {f"{layer}mlp.fc2.weight": (width, mlp), f"{layer}mlp.fc2.bias": (width,)}
    return {prefix + name: _random(rng, shape) for name, shape in shapes.items()}


def text_tensors(rng: np.random.Generator, prefix: str, head: str, vocab: int = PIECES) -> Tensors:
    """A LLaMA decoder, in torch's axes."""
    kv = WIDTH // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        prefix + "embed_tokens.weight": (vocab, WIDTH),
        prefix + "norm.weight": (WIDTH,),
    }
    for i in range(LAYERS):
        layer = f"{prefix}layers.{i}."
        shapes |= {layer + "input_layernorm.weight": (WIDTH,), layer + "post_attention_layernorm.weight": (WIDTH,)}
        shapes |= {layer + f"self_attn.{n}_proj.weight": (kv if n in "kv" else WIDTH, WIDTH) for n in "qkvo"}
        shapes |= {layer + "mlp.gate_proj.weight": (MLP, WIDTH), layer + "mlp.up_proj.weight": (MLP, WIDTH)}
        shapes |= {layer + "mlp.down_proj.weight": (WIDTH, MLP)}
    shapes[head] = (vocab, WIDTH)
    return {name: _random(rng, shape) for name, shape in shapes.items()}


def projector_tensors(rng: np.random.Generator, first: str, second: str) -> Tensors:
    """A two-layer projector."""
    shapes = {first + ".weight": (WIDTH, VISION_WIDTH), first + ".bias": (WIDTH,)}
    shapes |= {second + ".weight": (WIDTH, WIDTH), second + ".bias": (WIDTH,)}
    return {name: _random(rng, shape) for name, shape in shapes.items()}


def hub_tensors(seed: int = 0, vocab: int = PIECES) -> Tensors:
    """A whole LLaVA in the hub's layout, float32."""
    rng = np.random.default_rng(seed)
    tensors = vision_tensors(rng, "vision_tower.vision_model.")
    tensors |= projector_tensors(rng, "multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
    return tensors | text_tensors(rng, "language_model.model.", "language_model.lm_head.weight", vocab)


def renamed(tensors: Tensors, layout: str) -> Tensors:
    """A LLaVA in the hub's layout, in another one."""
    found = {}
    for name, tensor in tensors.items():
        new = name
        if layout in ("new4", "new5"):
            new = "model." + name
            new = new.replace("model.language_model.model.", "model.language_model.")
            new = new.replace("model.language_model.lm_head", "lm_head")
        if layout in ("leg5", "new5"):
            new = new.replace("vision_tower.vision_model.", "vision_tower.")
        if layout == "original":
            new = name.replace("language_model.", "").replace("multi_modal_projector.linear_1", "model.mm_projector.0")
            new = new.replace("multi_modal_projector.linear_2", "model.mm_projector.2")
            new = new.replace("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model.")
        found[new] = tensor
    return found


def as_dtype(tensors: Tensors, dtype: str) -> Tensors:
    return {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}


def write_hub(folder: Path, tensors: Tensors, vocab: int = PIECES, **changes: Any) -> Path:
    """A Hugging Face directory of tensors in any of the four layouts; changes: keys of config.json."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = TEXT_CONFIG | {"vocab_size": vocab}
    config = {"model_type": "llava", "text_config": text, "vision_config": VISION_CONFIG, "vision_feature_layer": -2}
    config |= {"vision_feature_select_strategy": "default", "projector_hidden_act": "gelu", **changes}
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    return write_tokenizer(folder)


def write_original(folder: Path, tensors: Tensors, shards: int = 1, binary: bool = False, **changes: Any) -> Path:
    """A directory as the original code writes it, of tensors in the "original" layout."""
    folder.mkdir(parents=True)
    names = list(tensors)
    parts = [names[i::shards] for i in range(shards)]
    stem, end = ("pytorch_model", "bin") if binary else ("model", "safetensors")
    files = [f"{stem}-{i + 1:05d}-of-{shards:05d}.{end}" if shards > 1 else f"{stem}.{end}" for i in range(shards)]
    for file, part in zip(files, parts, strict=True):
        chosen = {name: tensors[name] for name in part}
        if binary:
            torch_zip.write_torch(folder / file, chosen)
        else:
            save_file(chosen, folder / file, metadata={"format": "pt"})
    if shards > 1:
        listed = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        write_json(folder / f"{stem}.{end}.index.json", {"metadata": {}, "weight_map": listed})
    config = TEXT_CONFIG | {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
    config |= {"mm_vision_tower": "some/clip", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    config |= {"mm_hidden_size": VISION_WIDTH, "image_aspect_ratio": "pad", "mm_use_im_start_end": False, **changes}
    write_json(folder / "config.json", config)
    return write_tokenizer(folder)


def write_clip(folder: Path, seed: int = 1, prefix: str = "vision_model.") -> Path:
    """A CLIP directory with its text tower's leftovers, as the hub has it."""
    folder.mkdir(parents=True)
    tensors = vision_tensors(np.random.default_rng(seed), prefix)
    if prefix:
        tensors |= {"logit_scale": np.array(2.6, np.float32), "visual_projection.weight": np.ones((4, 4), np.float32)}
        tensors["vision_model.embeddings.position_ids"] = np.arange(5)[None]
        tensors["text_model.embeddings.token_embedding.weight"] = np.ones((4, 4), np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(
        folder / "config.json", {"model_type": "clip", "vision_config": VISION_CONFIG} if prefix else VISION_CONFIG
    )
    processor = {"image_processor_type": "CLIPImageProcessor", "crop_size": SIDE, "size": SIDE}
    write_json(folder / "preprocessor_config.json", processor)
    return folder


def write_llama(folder: Path, seed: int = 2, binary: bool = False) -> Path:
    """A LLaMA directory with the buffers that old transformers saved."""
    folder.mkdir(parents=True)
    tensors = as_dtype(text_tensors(np.random.default_rng(seed), "model.", "lm_head.weight"), "float16")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    if binary:
        torch_zip.write_torch(folder / "pytorch_model.bin", tensors)
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", TEXT_CONFIG)
    return write_tokenizer(folder)


def write_tokenizer(folder: Path) -> Path:
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.standard_normal(shape, np.float32) * 0.2).astype(np.float32)
