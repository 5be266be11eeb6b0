"""What a config.json of others may say that makes another model of the same tensors, and that nothing here has: each is
refused by its name. And what a config.json calls its model, for every refusal.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from llava_jax.errors import UnusableCheckpoint, UsageError
from llava_jax.models.parts import Decoder, Tower

P = TypeVar("P", Tower, Decoder)

# Key of the original code's config.json -> its values in LLaVA-1.0, 1.5 and 1.6, and what any other means. How pictures
# are cut into tiles, `convert.tiling` reads.
_ORIGINAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "s2": ((None, False), "an image is seen at several scales"),
    "mm_resampler_type": ((None,), "a resampler stands before the projector"),
}
_NAFLEX = "a SigLIP2 NaFlex, for pictures of any shape; a SigLIP2 of fixed resolution says 'siglip'"
_MIXTURE = "a mixture of experts"
# model_type of a part that is not here, but is easily taken for one that is -> what it is.
_ALMOST = {
    "siglip2": _NAFLEX, "siglip2_vision_model": _NAFLEX, "mixtral": _MIXTURE, "qwen2_moe": _MIXTURE,
    "qwen3_moe": _MIXTURE,
}  # fmt: skip
_KEPT = {  # key that an export of ours writes -> whether a value may be one of it
    "template": lambda value: isinstance(value, str), "image_start_end": lambda value: isinstance(value, bool),
    "image_mode": lambda value: value in ["square", "pad", "squash", "anyres"],
    "tiling": lambda value: isinstance(value, dict), "video": lambda value: isinstance(value, dict),
    "ln_vision_eps": lambda value: value is None or isinstance(value, float),
}  # fmt: skip
_NAMES = ("model_type", "architectures", "mm_vision_tower")  # what a config.json calls its model and parts


def refuse_quantised(content: Mapping[str, Any], where: str) -> None:
    """Raises UnusableCheckpoint where config.json says that the weights are of a few bits.

    Args:
      where: the directory.
    """
    parts = (content, content.get("text_config"), content.get("vision_config"))
    for quant in (part.get("quantization_config") for part in parts if isinstance(part, Mapping)):
        if quant:
            raise UnusableCheckpoint(
                f"{where} holds {_method(quant)} weights: import the float model it was made of, or dequantise and "
                "save it with transformers first"
            )


def _method(settings: Any) -> str:
    """"bitsandbytes 4-bit" of a quantization_config."""
    if not isinstance(settings, Mapping):
        return "quantised"
    bits = 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else settings.get("bits")
    name = settings.get("quant_method", "bitsandbytes" if "load_in_8bit" in settings else "quantised")
    return f"{name} {bits}-bit" if bits else str(name)


def refuse_original(content: Mapping[str, Any], where: str) -> None:
    """Raises UnusableCheckpoint where the original code's config.json is not of a LLaVA-1.0, 1.5 or 1.6."""
    for key, (allowed, meaning) in _ORIGINAL.items():
        if content.get(key) not in allowed:
            wanted = " or ".join(repr(value) for value in allowed if value is not None) or "none"
            raise UnusableCheckpoint(
                f"{where}: {key} is {content[key]!r}: {meaning}; wanted {wanted}, as LLaVA-1.0, 1.5 and 1.6 have it"
            )


def part_of(kind: Any, known: Mapping[str, P], where: str) -> P:
    """The part whose `model_type` config.json says. Raises UnusableCheckpoint: there is none such."""
    if isinstance(kind, str) and kind in known:
        return known[kind]
    almost = f" ({_ALMOST[kind]})" if isinstance(kind, str) and kind in _ALMOST else ""
    raise UnusableCheckpoint(f"{where} model_type is {kind!r}{almost}; wanted one of {', '.join(known)}")


def read_part(part: Tower | Decoder, content: Mapping[str, Any], where: str, *feature: Any) -> Any:
    """A part's config. Raises UnusableCheckpoint, also where a value is such as no model can have."""
    try:
        return part.read_config(content, where, *feature)
    except UsageError as error:
        raise UnusableCheckpoint(f"{where}: {error}") from None


def kept(content: Any, where: str) -> dict[str, Any]:
    """What an export of ours kept of the prompt. Raises UnusableCheckpoint: no export of ours has written that."""
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UnusableCheckpoint(f"{where} is {content!r}; wanted an object of {', '.join(_KEPT)}")
    for key, fits in _KEPT.items():
        if key in content and not fits(content[key]):
            raise UnusableCheckpoint(f"{where}: {key} is {content[key]!r}; no export of llava_jax has written that")
    return content


def identity(content: Mapping[str, Any]) -> str:
    """"config.json: model_type 'llava', architectures [...], vision_config.model_type 'siglip_vision_model'"."""
    found = {name: content.get(name) for name in _NAMES}
    for part in ("text_config", "vision_config"):
        inner = content.get(part)
        found[f"{part}.model_type"] = inner.get("model_type") if isinstance(inner, Mapping) else None
    pairs = [f"{name} {str(value)[:80]!r}" for name, value in found.items() if value is not None]
    return "config.json: " + (", ".join(pairs) or "no model_type, no architectures")
