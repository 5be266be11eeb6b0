"""Tokenizers: LLaMA's SentencePiece in both legacy modes, and those of Hugging Face directories."""

import json
import pickle
from pathlib import Path

import pytest

from llava_jax.errors import UsageError
from llava_jax.prompt import tokenizer as tokenizers

MODEL = Path(__file__).resolve().parents[1] / "golden" / "tiny_llama.model"
TEXTS = ["", " ", "Hi there</s>USER: Color?", "  two", "3 cats\n", "答案 🌋 naïve\0", "<s><unk> x", "[INST] <<SYS>>\n"]


@pytest.mark.parametrize("legacy", [False, True])
def test_decode_gives_back_the_text(legacy):
    tokenizer = tokenizers.load(MODEL, legacy=legacy)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, bos=False), skip_special=False) == text
    assert tokenizer.decode(tokenizer.encode("Hi</s>", bos=True)) == "Hi"


@pytest.mark.parametrize("legacy", [False, True])
def test_tokens_cover_the_text_in_order(legacy):
    tokenizer = tokenizers.load(MODEL, legacy=legacy)
    for text in TEXTS:
        tokens = tokenizer.tokenize(text)
        ends = [0, *(token.end for token in tokens)]
        assert [token.start for token in tokens] == ends[:-1] and ends[-1] == len(text)


def test_legacy_decides_what_follows_a_special_token():
    pieces = {}
    for legacy in (False, True):
        tokenizer = tokenizers.load(MODEL, legacy=legacy)
        pieces[legacy] = [tokenizer.piece(i) for i in tokenizer.encode("Hi</s>USER", bos=False)]
    assert pieces[False][-2:] == ["US", "ER"] or pieces[False][-1] == "USER"
    assert "▁" in "".join(pieces[True][pieces[True].index("</s>") :])
    assert "▁" not in "".join(pieces[False][pieces[False].index("</s>") :])


def test_legacy_must_be_stated():
    with pytest.raises(ValueError, match="legacy is not stated: give legacy=true or false"):
        tokenizers.load(MODEL)


def test_a_saved_tokenizer_loads_as_it_was(tmp_path):
    tokenizer = tokenizers.load(MODEL, legacy=True, added=("<im_start>", "<im_end>"))
    tokenizers.save(tokenizer, tmp_path)
    again = tokenizers.load(tmp_path)
    assert (again.legacy, again.size, again.specials) == (True, 962, tokenizer.specials)
    assert again.files() == tokenizer.files() and (again.bos_id, again.eos_id, again.pad_id) == (1, 2, 0)
    assert pickle.loads(pickle.dumps(again)).encode("a <im_end>", bos=True) == tokenizer.encode("a <im_end>", bos=True)
    assert again.encode("<im_end>", bos=False) == [961] and again.decode([961, 2]) == ""


def test_older_directories_name_added_tokens_in_a_file_of_their_own(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(MODEL.read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<im_end>": 961, "<im_start>": 960}')
    found = tokenizers.load(tmp_path, legacy=False)
    assert [(word.text, word.id, word.special) for word in found.words[3:]] == [
        ("<im_start>", 960, False), ("<im_end>", 961, False)
    ]  # fmt: skip
    (tmp_path / "added_tokens.json").write_text('{"<im_end>": 970}')
    with pytest.raises(ValueError, match="970.*leave gaps: want ids from 960"):
        tokenizers.load(tmp_path, legacy=False)


def test_the_saved_files_mean_the_same_to_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizers.load(MODEL, legacy=False, added=("<im_start>",))
    tokenizers.save(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hi there</s>USER: Color?", "答案 <im_start> 3"):
        assert theirs(text).input_ids == tokenizer.encode(text, bos=True)


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        tokenizers.load(tmp_path / "missing", legacy=True)
    with pytest.raises(FileNotFoundError, match="want tokenizer.model or tokenizer.json"):
        tokenizers.load(tmp_path)
    (tmp_path / "x.model").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="x.model: not a SentencePiece model"):
        tokenizers.load(tmp_path / "x.model", legacy=True)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json: not JSON"):
        tokenizers.load(tmp_path)


NESTED = "[" * 100_000
DAMAGED = [
    ("tokenizer_config.json", "[]", "is '\\[\\]': want an object"),
    ("tokenizer_config.json", NESTED, "not JSON"),
    ("tokenizer_config.json", '{"a": ' + NESTED, "not JSON"),
    ("tokenizer_config.json", '{"tokenizer_class": ["LlamaTokenizer"]}', "tokenizer_class is .*want a text"),
    ("tokenizer_config.json", '{"legacy": "yes"}', "legacy is 'yes': want true or false"),
    ("tokenizer_config.json", '{"add_bos_token": 1}', "add_bos_token is '1': want true or false"),
    ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder is .*want an object"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"960": {}}}', "960: content is 'None': want a text"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"960": "<x>"}}', "960 is '<x>': want an object"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<x>"}}}', "x is 'x': want the id"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"960": {"content": "<x>", "special": 1}}}', "special is '1'"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"960": {"content": "a"}, "00960": {"content": "b"}}}',
     "'a' and 'b' both have the id 960"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"970": {"content": "a"}}}', "970.*leave gaps: want ids from"),
    ("tokenizer_config.json", '{"eos_token": 2}', "eos_token is '2': want a text"),
    ("tokenizer_config.json", '{"eos_token": {"content": 2}}', "eos_token: content is '2': want a text"),
    ("tokenizer_config.json", '{"extra_special_tokens": "<x>"}', "special_tokens is '<x>': want a list or an object"),
    ("special_tokens_map.json", '{"pad_token": []}', None),  # as good as none
    ("special_tokens_map.json", '{"pad_token": ["<x>"]}', "pad_token is .*want a text"),
    ("added_tokens.json", '{"<x>": "960"}', "'<x>' is '960': want the id of a token"),
    ("added_tokens.json", '{"<x>": true}', "'<x>' is 'True': want the id of a token"),
    ("added_tokens.json", '["<x>"]', "want an object"),
    ("added_tokens.json", "\xff", "not JSON"),
]  # fmt: skip


@pytest.mark.parametrize("name, text, message", DAMAGED)
def test_damaged_files_are_refused_in_one_line_that_names_file_and_key(tmp_path, name, text, message):
    (tmp_path / "tokenizer.model").write_bytes(MODEL.read_bytes())
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    if message is None:
        assert tokenizers.load(tmp_path, legacy=True).size == 960
        return
    with pytest.raises(UsageError, match=message) as error:
        tokenizers.load(tmp_path, legacy=True)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("text, message", [
    ("[]", "want an object"), (NESTED, "not JSON"), ("{}", "no vocabulary in it"),
    ('{"model": {"vocab": {"a": 0}}, "added_tokens": 1}', "added_tokens is '1': want a list"),
    ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b"}]}', "id is 'None': want the id of a token"),
    ('{"model": {"vocab": {"a": 0}}}', "not a tokenizer"),
    ('{"model": {"vocab": {"a": "0"}, "type": "WordLevel", "unk_token": "a"}}', "no vocabulary"),
    ('{"model": {"vocab": {"a": -1}, "type": "WordLevel", "unk_token": "a"}}', "not a tokenizer"),
    ('{"model": {"vocab": [["a", 0.5], 3]}}', "no vocabulary"),
    ('{"model": {"vocab": {"a": 0}, "type": "WordLevel", "unk_token": "a"}}', "names no eos_token"),
])  # fmt: skip
def test_a_damaged_tokenizer_json_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        tokenizers.load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_tokenizer_that_puts_other_words_around_every_text_is_refused(hub, tmp_path):
    content = json.loads((hub / "tokenizer.json").read_text())
    piece = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [piece],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    with pytest.raises(UsageError, match=r"puts \['<\|im_start\|>'\] around every text: want its bos_token first"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "bos_token": "<|im_start|>"}')
    assert tokenizers.load(tmp_path).adds_bos


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A byte-level tokenizer as ChatML models have it."""
    tokenizers_library = pytest.importorskip("tokenizers")
    pre, trainers = tokenizers_library.pre_tokenizers, tokenizers_library.trainers
    made = tokenizers_library.Tokenizer(tokenizers_library.models.BPE())
    made.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers_library.decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["a cat sat on the mat. What is this?"] * 3, trainer)
    folder = tmp_path_factory.mktemp("hub")
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_hub_tokenizer_recognises_special_tokens_only_where_it_may(hub):
    tokenizer = tokenizers.load(hub)
    text = "<|im_start|>a <|im_end|> 🌋<|im_end|>"
    free, bound = tokenizer.tokenize(text), tokenizer.tokenize(text, [(0, 12), (len(text) - 10, len(text))])
    assert [t.id for t in free].count(2) == 2 and [t.id for t in bound].count(2) == 1
    assert (bound[0].id, bound[-1]) == (1, (2, len(text) - 10, len(text)))
    assert tokenizer.decode([t.id for t in bound], skip_special=False) == text
    assert (tokenizer.adds_bos, tokenizer.eos_id, tokenizer.legacy) == (False, 0, None)
    assert tokenizer.bos_id is None and tokenizer.encode("a", bos=True) == tokenizer.encode("a", bos=False)


def test_a_hub_tokenizer_is_saved_with_its_added_tokens(hub, tmp_path):
    tokenizer = tokenizers.load(hub, added=("<im_start>",))
    tokenizers.save(tokenizer, tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.size == tokenizer.size and again.encode("a <im_start>", bos=False)[-1] == again.size - 1
    with pytest.raises(ValueError, match="legacy=True is for LLaMA"):
        tokenizers.load(hub, legacy=True)
