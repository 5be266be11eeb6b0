"""GGUF: what is read back is what the checkpoint holds, and the file's tokenizer gives the ids of `prompt.encode`.

llama.cpp itself is asked in `test_served.py`, where it is installed; its tokenizer is written down once more here.
"""

import dataclasses
import json
import re
import unicodedata

import numpy as np
import pytest
from etils import epath

from llava_jax.checkpoint import model_json
from llava_jax.convert import chat_template, exporting, importing, llama_cpp, llama_cpp_words, source, tokenizer_files
from llava_jax.convert.__main__ import main as convert
from llava_jax.data import records
from llava_jax.errors import UsageError
from llava_jax.models.parts import RopeScaling
from llava_jax.models.presets import get
from llava_jax.prompt import templates, tokenizer
from llava_jax.prompt.encode import Format, encode, with_labels
from tests.convert import tiny
from tests.prompt import chat_models
from tests.prompt.chat_models import MODELS

gguf = pytest.importorskip("gguf")
MARKER = "<__media_Ab3__>"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    tiny.write_hub(folder / "in", tiny.hub_tensors())
    importing.import_checkpoint(folder / "in", folder / "ours")
    for kind in llama_cpp.KINDS:
        exporting.export("gguf", folder / "ours", folder / kind, dtype=kind)
    return folder


def pairs(matrix, heads):
    """Rows of each head as llama.cpp wants them: 0, H/2, 1, H/2 + 1, ..."""
    width = len(matrix) // heads
    order = [head * width + i + half * width // 2
             for head in range(heads) for i in range(width // 2) for half in (0, 1)]  # fmt: skip
    return matrix[order]


def expected():
    """llama.cpp's tensors of `tiny.hub_tensors`, by names spelled out here."""
    inner = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "self_attn.out_proj": "attn_out", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "layer_norm1": "ln1",
             "layer_norm2": "ln2"}  # fmt: skip
    outer = {"language_model.model.embed_tokens.weight": "token_embd.weight",
             "language_model.model.norm.weight": "output_norm.weight",
             "language_model.lm_head.weight": "output.weight", "embeddings.class_embedding": "v.class_embd",
             "embeddings.patch_embedding.weight": "v.patch_embd.weight",
             "embeddings.position_embedding.weight": "v.position_embd.weight"}  # fmt: skip
    found = {}
    for name, tensor in tiny.hub_tensors().items():
        short = name.removeprefix("vision_tower.vision_model.")
        if match := re.search(r"layers\.(\d+)\.(.+)\.(weight|bias)", name):
            blocks = "v.blk" if "vision" in name else "blk"
            heads = {"self_attn.q_proj": tiny.HEADS, "self_attn.k_proj": tiny.KV_HEADS}.get(match[2])
            tensor = pairs(tensor, heads) if heads and blocks == "blk" else tensor
            found[f"{blocks}.{match[1]}.{inner[match[2]]}.{match[3]}"] = tensor
        elif match := re.search(r"linear_([12])\.(.+)", name):
            found[f"mm.{2 * int(match[1]) - 2}.{match[2]}"] = tensor
        elif "post_layernorm" not in name:
            found[outer.get(short) or f"v.pre_ln.{short.rpartition('.')[2]}"] = tensor
    return {name: tensor for name, tensor in found.items() if not name.startswith("v.blk.2.")}  # -2 never runs it


def read(folder, kind):
    files = [gguf.GGUFReader(folder / kind / f"{name}-{kind}.gguf") for name in ("model", "mmproj")]
    return files, {tensor.name: tensor for file in files for tensor in file.tensors}


@pytest.mark.parametrize("kind", llama_cpp.KINDS)
def test_every_tensor_is_read_back_as_it_was_cast_or_as_gguf_quantises_it(ours, kind):
    _, found = read(ours, kind)
    assert set(found) == set(expected())
    kinds = set()
    for name, tensor in expected().items():
        stored = found[name]
        assert tuple(stored.shape[::-1]) == tensor.shape, name
        flat = tensor.ndim == 1 or name == "v.position_embd.weight" or (tensor.ndim > 2 and kind == "q8_0")
        wide = {"f32": "F32", "f16": "F16", "q8_0": "F16" if tensor.shape[-1] % 32 else "Q8_0"}[kind]
        assert stored.tensor_type.name == ("F32" if flat else wide), name
        wanted = gguf.quants.quantize(np.ascontiguousarray(tensor), stored.tensor_type)
        assert np.array_equal(np.asarray(stored.data).reshape(wanted.shape), wanted), name
        kinds.add(stored.tensor_type.name)
    assert len(kinds) == {"f32": 1, "f16": 2, "q8_0": 3}[kind]


def test_the_keys_say_what_the_model_is(ours):
    (model, mmproj), _ = read(ours, "q8_0")
    keys = {name: field.contents() for file in (model, mmproj) for name, field in file.fields.items()}
    wanted = {
        "llama.block_count": 3, "llama.embedding_length": 48, "llama.feed_forward_length": 96, "llama.vocab_size": 960,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 12,
        "llama.rope.freq_base": 10000.0, "llama.context_length": 1024, "general.file_type": 7,
        "clip.projector_type": "mlp", "clip.use_gelu": False, "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True, "clip.vision.block_count": 2, "clip.vision.feature_layer": [2],
        "clip.vision.image_size": 28, "clip.vision.patch_size": 14, "clip.vision.attention.head_count": 2,
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    assert {name: keys[name] for name in wanted} == wanted
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert keys["clip.vision.image_mean"] == pytest.approx(get("llava15_7b").vision.mean)
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.scores"]) == tiny.PIECES
    assert "{%- generation -%}" not in keys["tokenizer.chat_template"]
    assert model.fields["general.architecture"].contents() == "llama"
    assert mmproj.fields["general.architecture"].contents() == "clip"


class LlamaCpp:
    """llama.cpp's tokenizer of a file's keys. Source: llama.cpp of llama-cpp-python 0.3.36, src/llama-vocab.cpp."""

    def __init__(self, keys):
        self.keys = {name.removeprefix("tokenizer.ggml."): value for name, value in keys.items()}
        self.texts = [text.decode() for text in self.keys["tokens"]]
        self.ids = {text: number for number, text in enumerate(self.texts)}
        types = self.keys["token_type"]
        words = sorted((text for text, kind in zip(self.texts, types) if kind in (2, 3, 4)), key=len, reverse=True)
        self.cut = re.compile("(" + "|".join(map(re.escape, words)) + ")")
        self.words = set(words)
        if self.keys["model"] == "gpt2":
            self.fast = self._byte_level()

    def encode(self, text, add_special):
        ids = [self.keys["bos_token_id"]] if add_special and self.keys["add_bos_token"] else []
        prefixed = self.keys.get("add_space_prefix", False)
        behind = True
        for piece in filter(None, self.cut.split(text)):
            if piece in self.words:
                ids.append(self.ids[piece])
            elif self.keys["model"] == "gpt2":
                ids += self.fast.encode(piece).ids
            else:
                ids += self._merged((" " if prefixed and behind else "") + piece)
            behind = piece in self.words
        return ids

    def _merged(self, text):
        symbols = list(text.replace(" ", "▁"))
        while True:
            scored = [(self.keys["scores"][self.ids[a + b]], -i) for i, (a, b) in enumerate(zip(symbols, symbols[1:]))
                      if a + b in self.ids]  # fmt: skip
            if not scored:
                break
            at = -max(scored)[1]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        found = [[self.ids[one]] if one in self.ids else [self.ids[f"<0x{byte:02X}>"] for byte in one.encode()]
                 for one in symbols]  # fmt: skip
        return sum(found, [])

    def _byte_level(self):
        import tokenizers
        from tokenizers import pre_tokenizers

        digits = {"qwen2": r"\p{N}", "llama-bpe": r"\p{N}{1,3}"}[self.keys["pre"]]
        split = pre_tokenizers.Split(tokenizers.Regex(chat_models._CUTS % digits), "isolated")
        merges = [tuple(merge.split(" ")) for merge in self.keys["merges"]]
        whole = self.keys["pre"] == "llama-bpe"  # llama.cpp takes words of the vocabulary before their merges there
        fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=self.ids, merges=merges, ignore_merges=whole))
        fast.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        return fast


def as_llama_cpp_sends(talk):
    """Messages as its server hands them to a template: what has pictures is a text with markers in it."""
    return [message | {"content": message["content"].replace("<image>", MARKER)} for message in talk.messages]


CASES = {"v1": False, "llava_v1": True, "mistral": False, "qwen": None, "qwen_3": None, "llama_3": None}


@pytest.mark.parametrize("name", CASES)
def test_the_files_template_and_tokenizer_give_the_ids_of_encode(tmp_path, name):
    jinja2 = pytest.importorskip("jinja2")
    legacy, template = CASES[name], templates.get(name)
    made = MODELS[name].write(tmp_path / "words") if name in MODELS else tiny.TOKENIZER
    words = tokenizer.load(made, None if name in MODELS else legacy)
    prompt = model_json.PromptMetadata(name, legacy, "pad", False)
    theirs = LlamaCpp(llama_cpp_words.keys(words, prompt, words.size, "it"))
    marked = tokenizer_files.with_image_token(made, None if name in MODELS else legacy).tokenizer
    text = chat_template.render(template, marked, chat_template.LLAMA_CPP)
    text = text.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    environment, form, shown = jinja2.Environment(), Format(template, words, 28, 1, "pad"), 0
    begin = words.piece(words.bos_id) if words.adds_bos else ""
    for talk in chat_models.talks(15, seed=2):
        texts = talk.texts
        if len(talk.conversation.images) == 1:  # llama.cpp's clients send a picture first
            texts = tuple(f"<image>{text.replace('<image>', '').strip()}" if "<image>" in text else text
                          for text in texts)  # fmt: skip
        texts = tuple(unicodedata.normalize("NFC", text) for text in texts)  # Qwen's tokenizer does, llama.cpp not
        talk = talk._replace(texts=texts, system=talk.system and unicodedata.normalize("NFC", talk.system))
        messages = [{"role": one["role"], "content": typed(one["content"])} for one in talk.messages[:-1]]
        conversation = records.Record("it", 0, None, {"messages": messages}).conversation
        wanted = with_labels(encode(conversation, form, reply=True, open_images=False))[0].tolist()
        out = environment.from_string(text).render(
            messages=as_llama_cpp_sends(talk)[:-1], bos_token=begin, add_generation_prompt=True
        )
        found, out = [], out.removeprefix(begin)  # its server takes one away that its tokenizer adds
        for number, piece in enumerate(out.split(MARKER)):
            found += [-200] * (number > 0) + theirs.encode(piece, add_special=number == 0)
        assert found == wanted, talk
        shown += wanted.count(-200)
    assert shown > 15


def typed(text):
    texts = text.split("<image>")
    found = [[{"type": "image", "image": "x.png"}, {"type": "text", "text": one}] for one in texts]
    return [part for both in found for part in both][1:]


def test_what_llama_cpp_has_not_is_refused_by_name_and_leaves_nothing(ours, tmp_path):
    opened = source.open_source(ours / "ours")
    config, prompt = opened.config, opened.metadata.prompt

    def other(**changes):
        metadata = dataclasses.replace(opened.metadata, prompt=dataclasses.replace(prompt, **changes))
        return opened._replace(metadata=metadata)

    def sized(part, **changes):
        changed = {part: dataclasses.replace(vars(config)[part], **changes)}
        return opened._replace(config=dataclasses.replace(config, **changed))

    cases = {
        "image mode 'square'": other(image_mode="square"),
        "image_start_end": other(image_start_end=True),
        "projector 'linear'": opened._replace(config=dataclasses.replace(config, projector="linear")),
        "select_feature 'cls_patch'": sized("vision", select_feature="cls_patch"),
        "mlp_width is its width": sized("vision", mlp_width=config.vision.width),
        "rope_scaling 'dynamic'": sized("llm", rope_scaling=RopeScaling("dynamic", 2.0)),
        "template 'minigpt4'": other(template="minigpt4"),
    }
    for words, one in cases.items():
        with pytest.raises(UsageError, match=re.escape(words)):
            llama_cpp.export(one, epath.Path(tmp_path), epath.Path(tmp_path) / "out", "f32")
    with pytest.raises(UsageError, match="--format gguf gs://bucket/out: want a path on a disk"):
        llama_cpp.export(opened, epath.Path(tmp_path), epath.Path("gs://bucket/out"), "f32")
    assert not list(tmp_path.iterdir())


def test_llama_3s_slow_rotations_are_divided_as_here():
    import jax.numpy as jnp

    from llava_jax.models import layers

    config = dataclasses.replace(get("tiny").llm, head_width=64, rope_theta=5e5,
                                 rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 256))  # fmt: skip
    factors = llama_cpp._rope_factors(config)["rope_freqs.weight"]
    frequencies = 1 / (5e5 ** (np.arange(0, 64, 2) / 64))
    np.testing.assert_allclose(
        frequencies / factors, layers._slowed(jnp.asarray(frequencies, jnp.float32), config.rope_scaling), rtol=1e-5
    )
    assert factors[0] == 1 and factors[-1] == 8


def test_a_tokenizer_that_llama_cpp_cannot_follow_is_refused(tmp_path):
    words = tokenizer.load(MODELS["qwen"].write(tmp_path / "words"))
    content = json.loads(words.content)
    prompt = model_json.PromptMetadata("qwen", None, "pad", False)
    llama_3 = json.loads(json.dumps(content["pre_tokenizer"]).replace(r"\\p{N}|", r"\\p{N}{1,3}|"))
    model = {key: value for key, value in content["model"].items() if key != "ignore_merges"}
    for change, match in (({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer"),
                          ({"model": content["model"] | {"byte_fallback": True}}, "byte_fallback is True"),
                          ({"pre_tokenizer": llama_3, "model": model}, "ignore_merges is None.*wanted True"),
                          ):  # fmt: skip
        other = dataclasses.replace(words, content=json.dumps(content | change))
        with pytest.raises(UsageError, match=match):
            llama_cpp_words.keys(other, prompt, words.size, "it")


def test_a_weight_that_f16_cannot_hold_is_refused_and_nothing_is_left(tmp_path, capsys):
    tensors = tiny.hub_tensors()
    tensors["language_model.model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    tiny.write_hub(tmp_path / "in", tensors)
    importing.import_checkpoint(tmp_path / "in", tmp_path / "ours")
    command = ["export", "--format", "gguf", str(tmp_path / "ours"), str(tmp_path / "out")]
    assert convert(command) == 64
    assert "blk.1.ffn_up.weight does not fit in f16; use --dtype f32" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "ours"]
    assert convert([*command, "--dtype", "f32"]) == 0


def test_a_dtype_of_another_format_is_refused(ours, tmp_path, capsys):
    for format, dtype, wish in (("hf", "q8_0", "float32, float16, bfloat16"), ("gguf", "bfloat16", "f32, f16, q8_0")):
        command = ["export", "--format", format, "--dtype", dtype, str(ours / "ours"), str(tmp_path / "out")]
        assert convert(command) == 64
        assert f"wanted one of {wish} for --format {format}" in capsys.readouterr().err
