"""What a config.json of others may say that makes another model of the same tensors, and that nothing here has: each is
refused by its name. And what a config.json calls its model, for every refusal.
"""

from collections.abc import Mapping
from typing import Any

from llava_jax.errors import UnusableCheckpoint

# Key of the original code's config.json -> its values in LLaVA-1.0, 1.5 and 1.6, and what any other means. How pictures
# are cut into tiles, `convert.tiling` reads.
_ORIGINAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "s2": ((None, False), "an image is seen at several scales"),
    "mm_resampler_type": ((None,), "a resampler stands before the projector"),
}
_NAMES = ("model_type", "architectures", "mm_vision_tower")  # what a config.json calls its model and parts


def refuse_quantised(content: Mapping[str, Any], where: str) -> None:
    """Raises UnusableCheckpoint where config.json says that the weights are of a few bits.

    Args:
      where: the directory.
    """
    parts = (content, content.get("text_config"), content.get("vision_config"))
    for said in (part.get("quantization_config") for part in parts if isinstance(part, Mapping)):
        if said:
            raise UnusableCheckpoint(
                f"{where} holds {_method(said)} weights: import the float model it was made of, or dequantise and save "
                "it with transformers first"
            )


def _method(said: Any) -> str:
    """"bitsandbytes 4-bit" of a quantization_config."""
    if not isinstance(said, Mapping):
        return "quantised"
    bits = 4 if said.get("load_in_4bit") else 8 if said.get("load_in_8bit") else said.get("bits")
    name = said.get("quant_method", "bitsandbytes" if "load_in_8bit" in said else "quantised")
    return f"{name} {bits}-bit" if bits else str(name)


def refuse_original(content: Mapping[str, Any], where: str) -> None:
    """Raises UnusableCheckpoint where the original code's config.json is not of a LLaVA-1.0, 1.5 or 1.6."""
    for key, (allowed, meaning) in _ORIGINAL.items():
        if content.get(key) not in allowed:
            wanted = " or ".join(repr(value) for value in allowed if value is not None) or "none"
            raise UnusableCheckpoint(
                f"{where}: {key} is {content[key]!r}: {meaning}; wanted {wanted}, as LLaVA-1.0, 1.5 and 1.6 have it"
            )


def identity(content: Mapping[str, Any]) -> str:
    """"config.json: model_type 'llava', architectures [...], vision_config.model_type 'siglip_vision_model'"."""
    found = {name: content.get(name) for name in _NAMES}
    for part in ("text_config", "vision_config"):
        inner = content.get(part)
        found[f"{part}.model_type"] = inner.get("model_type") if isinstance(inner, Mapping) else None
    said = [f"{name} {str(value)[:80]!r}" for name, value in found.items() if value is not None]
    return "config.json: " + (", ".join(said) or "no model_type, no architectures")
