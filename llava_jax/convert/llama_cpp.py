"""GGUF: the two files that llama.cpp reads, a decoder with its tokenizer, and a tower with its connector (mmproj).

Source: gguf 0.19.0 constants.py; llama.cpp of llama-cpp-python 0.3.36, conversion/base.py, conversion/llama.py and
tools/mtmd/clip.cpp.
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from llava_jax import files
from llava_jax.checkpoint import model_json
from llava_jax.convert import chat_template, exported, llama_cpp_words, readme, table, tokenizer_files
from llava_jax.convert.source import Source
from llava_jax.errors import UsageError
from llava_jax.models import registry
from llava_jax.models.names import Row
from llava_jax.models.parts import DecoderConfig, RopeScaling
from llava_jax.prompt import templates

if TYPE_CHECKING:
    import gguf

KINDS = ("f32", "f16", "q8_0")  # of matrices; vectors and positions are float32 in all
_WIDE = ("v.position_embd.weight",)  # no matrices: llama.cpp adds them
_BLOCK = 32  # values of a row that share a scale in q8_0


def export(source: Source, partial: epath.Path, final: epath.Path, kind: str) -> None:
    """Writes `model-KIND.gguf`, `mmproj-KIND.gguf` and README.md into `partial`.

    Raises:
      UsageError: llama.cpp has no such part or prompt, named; `final` is in a bucket; a value does not fit in f16; gguf
        is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UsageError('--format gguf wants the package gguf, which is missing: `pip install ".[gguf]"` in the clone')
    files.want_disk(final, "--format gguf", "the gguf library writes to no bucket")
    _check(source)
    config, prompt = source.config, source.metadata.prompt
    decoder, tower = registry.decoder_of(config.llm).gguf, registry.tower_of(config.vision).gguf
    assert decoder is not None and tower is not None
    # Rows without a word are never said here, but llama.cpp would; and a picture is no word of its files.
    rows = tokenizer_files.kept_rows(source.words, source.words.size)
    marked = tokenizer_files.with_image_token(source.directory / model_json.TOKENIZER, prompt.legacy).tokenizer
    chat = chat_template.render(templates.get(prompt.template), marked, chat_template.LLAMA_CPP)
    if chat is None:
        raise UsageError(f"{source.directory}: template {prompt.template!r} cannot be written as a chat template, and "
                         "llama.cpp would take another one; use --format hf")  # fmt: skip
    words = llama_cpp_words.keys(source.words, prompt, rows, str(source.directory))
    keys = _decoder_keys(decoder.architecture, config.llm, rows) | words
    keys["tokenizer.chat_template"] = chat.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    keys |= {"general.type": "model", "general.name": final.name}
    specs = exported.specs_of(source, rows)
    paired = config.llm.head_width if decoder.paired else None
    extra = _rope_factors(config.llm) if _scaling(config.llm) == "llama3" else {}
    _write(partial / f"model-{kind}.gguf", decoder.architecture, keys, kind,
           _Tensors(source, specs, ("llm/",), decoder.rows, paired, extra))  # fmt: skip
    connector = registry.connector(config.projector).gguf[config.projector]
    _write(partial / f"mmproj-{kind}.gguf", "clip", _tower_keys(source, final.name), kind,
           _Tensors(source, specs, ("vision/", "projector/"), [*tower, *connector], None, {}))  # fmt: skip
    files.write_whole(partial / "README.md", readme.gguf(source.words, config, prompt, final.name, kind).encode())


def _check(source: Source) -> None:
    """Refuses what llama.cpp computes otherwise, or not at all."""
    config, prompt = source.config, source.metadata.prompt
    decoder, tower = registry.decoder_of(config.llm), registry.tower_of(config.vision)
    connector = registry.connector(config.projector)
    decoders = [part.kind for part in registry.decoders().values() if part.gguf]
    towers = [part.kind for part in registry.towers().values() if part.gguf]
    scaling, vision = _scaling(config.llm), config.vision
    faults = (
        (decoder.gguf, f"decoder {decoder.kind!r}", f"one of {', '.join(decoders)}"),
        (tower.gguf, f"tower {tower.kind!r}", f"one of {', '.join(towers)}"),
        (config.projector in connector.gguf, f"projector {config.projector!r}", "mlp2x_gelu"),
        (vision.select_feature == "patch", f"select_feature {vision.select_feature!r}", "'patch'"),
        (vision.mlp_width != vision.width, f"tower whose mlp_width is its width, {vision.width}", "another: it would "
         "take each of the two layers for the other"),
        (prompt.image_mode == "pad", f"image mode {prompt.image_mode!r}", "'pad', which is all it does to a picture"),
        (not prompt.image_start_end, "image_start_end (mm_use_im_start_end)", "no marks around images"),
        (scaling is None or (decoder.gguf and scaling in decoder.gguf.scalings), f"rope_scaling {scaling!r} of this "
         "decoder", "another"),
    )  # fmt: skip
    for fine, name, wish in faults:
        if not fine:
            raise UsageError(f"{source.directory}: llama.cpp has no {name}; wanted {wish}. Use --format hf")


def _scaling(config: DecoderConfig) -> str | None:
    return config.rope_scaling and config.rope_scaling.kind


def _decoder_keys(architecture: str, config: DecoderConfig, rows: int) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "vocab_size": rows, "context_length": config.usable_positions, "embedding_length": config.width,
        "block_count": config.layers, "feed_forward_length": config.mlp_width, "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads, "attention.key_length": config.head_width,
        "attention.value_length": config.head_width, "attention.layer_norm_rms_epsilon": float(config.eps),
        "rope.dimension_count": config.head_width, "rope.freq_base": float(config.rope_theta),
    }  # fmt: skip
    if _scaling(config) == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_scaling.factor)}
    return {f"{architecture}.{name}": value for name, value in keys.items()}


def _rope_factors(config: DecoderConfig) -> dict[str, np.ndarray]:
    """What each of the H/2 frequencies is divided by, as `models.layers` slows them."""
    scaling = config.rope_scaling
    assert isinstance(scaling, RopeScaling)
    frequencies = config.rope_theta ** -(np.arange(0, config.head_width, 2) / config.head_width)
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = np.clip(share, 0, 1)
    return {"rope_freqs.weight": (1 / (share + (1 - share) / scaling.factor)).astype(np.float32)}


def _tower_keys(source: Source, name: str) -> dict[str, Any]:
    config = source.config.vision
    sizes = {
        "image_size": config.image_size, "patch_size": config.patch_size, "embedding_length": config.width,
        "feed_forward_length": config.mlp_width, "projection_dim": source.config.llm.width,
        "attention.head_count": config.heads, "attention.layer_norm_epsilon": float(config.eps),
        "block_count": config.run_layers,
        "feature_layer": [config.run_layers],  # without it llama.cpp leaves the last block out
        "image_mean": list(map(float, config.mean)), "image_std": list(map(float, config.std)),
    }  # fmt: skip
    return {
        "general.type": "mmproj", "general.name": name, "clip.has_vision_encoder": True,
        "clip.has_text_encoder": False, "clip.has_llava_projector": True, "clip.projector_type": "mlp",
        "clip.use_gelu": config.act != "quick_gelu",
        **{f"clip.vision.{key}": value for key, value in sizes.items()},
    }  # fmt: skip


class _Tensors:
    """Some parts of a checkpoint as llama.cpp calls and orders them, one of our parameters in memory at a time.

    paired: width of a head where queries and keys have their rotary halves in pairs. extra: tensors of no parameter.
    """

    def __init__(
        self, source: Source, specs: Mapping[str, Any], parts: tuple[str, ...], rows: Sequence[Row],
        paired: int | None, extra: Mapping[str, np.ndarray],
    ):  # fmt: skip
        leaves = {name: spec for name, spec in specs.items()
                  if name.startswith(parts) and not name.startswith("vision/tail/")}  # fmt: skip
        self._source, self._specs, self._paired, self._extra = source, specs, paired, extra
        self._entries = table.entries(leaves, rows, {}, "conversion")
        self.shapes = {name: array.shape for name, array in extra.items()}
        self.shapes |= {name: entry.their_shape for entry in self._entries for name in entry.theirs}

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, tensor in float32) in the order of `shapes`."""
        yield from self._extra.items()
        for name, tensor in exported.tensors_of(self._source, self._entries, self._specs):
            tensor = tensor.astype(np.float32)
            if self._paired and name.endswith(("attn_q.weight", "attn_k.weight")):
                tensor = paired(tensor, self._paired)
            yield name, tensor


def paired(matrix: np.ndarray, head_width: int) -> np.ndarray:
    """[N * H, D] with the two rotary halves of each head in pairs: rows 0, H/2, 1, H/2 + 1, ... of it."""
    halves = matrix.reshape(-1, 2, head_width // 2, matrix.shape[-1])
    return halves.swapaxes(1, 2).reshape(matrix.shape)


def _write(path: epath.Path, architecture: str, keys: Mapping[str, Any], kind: str, tensors: _Tensors) -> None:
    """One file, its tensors as they come."""
    import gguf

    types = {name: _type(name, shape, kind) for name, shape in tensors.shapes.items()}
    writer = gguf.GGUFWriter(str(path), architecture)
    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[kind]
    numbers = {"general.file_type": int(gguf.LlamaFileType[file_type]),
               "general.quantization_version": gguf.GGML_QUANT_VERSION}  # fmt: skip
    for key, value in (keys | numbers).items():
        _add_key(writer, key, value)
    for name, shape in tensors.shapes.items():
        block, size = gguf.GGML_QUANT_SIZES[types[name]]
        stored = np.dtype(np.float32)  # of no meaning where the type is stated
        writer.add_tensor_info(name, shape, stored, math.prod(shape) // block * size, raw_dtype=types[name])

    def write() -> None:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for (name, tensor), listed in zip(tensors, tensors.shapes, strict=True):
            assert name == listed, (name, listed)
            data = _encoded(name, tensor, types[name])
            file.write(data)
            writer.write_padding(file, len(data))

    try:
        files.retried(write, path, secs=0.0)  # once: the tensors come once
    finally:
        writer.close()


def _type(name: str, shape: tuple[int, ...], kind: str) -> "gguf.GGMLQuantizationType":
    """As llama.cpp's converter: vectors float32; of q8_0 rows that are no whole blocks, and no matrix, f16 and f32."""
    from gguf import GGMLQuantizationType as Type

    if len(shape) < 2 or name in _WIDE or kind == "f32" or (kind == "q8_0" and len(shape) > 2):
        return Type.F32
    return Type.Q8_0 if kind == "q8_0" and shape[-1] % _BLOCK == 0 else Type.F16


def _encoded(name: str, tensor: np.ndarray, kind: "gguf.GGMLQuantizationType") -> memoryview:
    import gguf

    with np.errstate(over="ignore"):
        data = gguf.quants.quantize(tensor, kind)
    if kind == gguf.GGMLQuantizationType.F16 and not np.isfinite(data).all():
        raise UsageError(f"{name} does not fit in f16; use --dtype f32")
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data


def _add_key(writer: "gguf.GGUFWriter", key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
              list: writer.add_array}  # fmt: skip
    adders[type(value)](key, value)
