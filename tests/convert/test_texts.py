"""The text files of an export: tokenizer.json and the chat template give the ids of `prompt.encode`; processors."""

import json
import random

import pytest

from llava_jax.checkpoint import model_json
from llava_jax.convert import chat_template, processor, readme, tokenizer_files
from llava_jax.data import records
from llava_jax.errors import UnusableCheckpoint
from llava_jax.models.presets import get
from llava_jax.prompt import encode, templates, tokenizer
from llava_jax.prompt.conversation import Conversation, Turn
from tests.convert import tiny
from tests.prompt.chat_models import MODELS

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCUSER ASSISTANT:.,\n 0123456789é漢🙂'  "
MULTI = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A red square."), Turn("user", "Which colour?"))
RENDERED = ("v1", "llava_v1", "llava_v0", "mpt", "chatml_direct", "llama_2", "llava_llama_2", "mistral_instruct",
            "mistral")  # fmt: skip


def words(legacy: bool) -> tokenizer_files.Words:
    return tokenizer_files.with_image_token(tiny.TOKENIZER, legacy)


def fast(found: tokenizer_files.Words):
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_str(tokenizer_files.files(found, "LlavaProcessor")["tokenizer.json"].decode())


@pytest.mark.parametrize("legacy", [True, False])
def test_tokenizer_json_gives_the_ids_of_the_tokenizer_on_any_text(legacy):
    random.seed(0)
    ours = words(legacy)
    theirs = fast(ours)
    for _ in range(1000):
        text = "".join(random.choice(ALPHABET) for _ in range(random.randint(1, 60)))
        text = text.replace("b", "</s>", 1) if random.random() < 0.3 else text
        text = "x" + text.replace("c", "<image>", 1)  # a text that begins with a special token is not written
        assert theirs.encode(text).ids == ours.tokenizer.encode(text, bos=True), repr(text)


def test_tokenizer_json_has_the_pieces_and_merges_that_transformers_finds(tmp_path):
    transformers = pytest.importorskip("transformers")
    guest = transformers.AutoTokenizer.from_pretrained(tiny.write_tokenizer(tmp_path))
    theirs = json.loads(guest.backend_tokenizer.to_str())
    found = json.loads(tokenizer_files.files(words(False), None)["tokenizer.json"])
    assert found["model"]["vocab"] == theirs["model"]["vocab"]
    assert {tuple(merge.split(" ")) for merge in found["model"]["merges"]} == set(map(tuple, theirs["model"]["merges"]))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert found[part] == theirs[part]


@pytest.mark.parametrize("name", RENDERED)
@pytest.mark.parametrize("legacy", [True, False])
def test_the_chat_template_gives_the_ids_of_encode(name, legacy):
    jinja2 = pytest.importorskip("jinja2")
    found = words(legacy)
    text = chat_template.render(templates.get(name), found.tokenizer)
    assert text is not None
    source = text.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    rendered = jinja2.Environment().from_string(source)
    form = encode.Format(templates.get(name), found.tokenizer, 28, 1, "pad")
    cases = [(MULTI[:1], 1, None), (MULTI, 1, None), (MULTI, 1, "Be brief."), (MULTI[2:], 0, None)]
    for turns, images, system in cases:
        conversation = Conversation(turns, ("x.png",) * images, system=system)
        wanted, _ = encode.with_labels(encode.encode(conversation, form, reply=True, open_images=False))
        out = rendered.render(messages=messages(turns, images, system), bos_token="<s>", add_generation_prompt=True)
        ids = fast(found).encode(out, add_special_tokens=False).ids
        assert [-200 if number == 960 else number for number in ids] == wanted.tolist()
    whole = Conversation((*MULTI, Turn("assistant", "Red.")), ("x.png",))
    wanted, _ = encode.with_labels(encode.encode(whole, form, open_images=False))
    out = rendered.render(messages=messages(whole.turns, 1, None), bos_token="<s>", add_generation_prompt=False)
    ids = fast(found).encode(out, add_special_tokens=False).ids
    assert [-200 if number == 960 else number for number in ids] == wanted.tolist()


def messages(turns, images, system):
    found = [{"role": "system", "content": system}] if system else []
    for index, turn in enumerate(turns):
        content = [{"type": "text", "text": turn.text.replace("<image>\n", "")}]
        content += [{"type": "image"}] * (images if index == 0 else 0)  # wherever it stands, it comes first
        found.append({"role": turn.role, "content": content})
    return found


@pytest.mark.parametrize("name", sorted(set(templates.TEMPLATES) - {*RENDERED, *MODELS}))
def test_a_template_that_jinja_cannot_say_is_left_out_and_the_readme_says_so(name):
    assert chat_template.render(templates.get(name), words(False).tokenizer) is None
    prompt = model_json.PromptMetadata(name, False, "pad", False)
    text = readme.hub(get("tiny"), prompt, "DIR", False)
    assert "there is no chat template" in text and f"`{name}`" in text


@pytest.mark.parametrize("mode", ["pad", "square", "squash"])
def test_the_image_processor_says_its_mode_both_ways(tmp_path, mode):
    config = get("llava15_7b").vision
    tiny.write_json(tmp_path / "preprocessor_config.json", processor.preprocessor_json(config, mode))
    assert processor.read_settings(tmp_path) == processor.ImageSettings(
        mode, 336, {"resample": "bicubic", "mean": config.mean, "std": config.std}
    )
    nested = {"image_processor": processor.preprocessor_json(config, "square")}
    tiny.write_json(tmp_path / "processor_config.json", nested)  # transformers 5; wins where both are there
    assert processor.read_settings(tmp_path).mode == "square"


def test_an_image_processor_that_sees_other_pixels_is_refused(tmp_path):
    assert processor.read_settings(tmp_path).mode is None
    for change in ({"do_normalize": False}, {"resample": 1}, {"do_center_crop": False, "size": {"shortest_edge": 336}}):
        content = processor.preprocessor_json(get("llava15_7b").vision, "square") | change
        tiny.write_json(tmp_path / "preprocessor_config.json", content)
        with pytest.raises(UnusableCheckpoint, match="image processor"):
            processor.read_settings(tmp_path)


def test_tokens_that_are_there_keep_their_ids_and_come_off_again(tmp_path):
    there = tokenizer.load(tiny.TOKENIZER, legacy=False, added=("<im_start>", "<image>"))
    tokenizer.save(there, tmp_path)
    found = tokenizer_files.with_image_token(tmp_path, False)
    assert (found.ids["<image>"], found.ids["<pad>"], found.tokenizer.size) == (961, 962, 963)
    assert tokenizer_files.kept_rows(found.tokenizer, 1024) == 961
    left = tokenizer_files.without_image_token(found.tokenizer)
    assert (left.ids, left.pad) == ({"<unk>": 0, "<s>": 1, "</s>": 2, "<im_start>": 960}, "<unk>")
    plain = tokenizer.load(tiny.TOKENIZER, legacy=False)
    assert tokenizer_files.kept_rows(plain, 960) == 960 and tokenizer_files.without_image_token(plain).pad == "<unk>"


def test_a_directory_with_tokenizer_json_alone_is_exported_with_the_same_ids(tmp_path):
    for name, content in tokenizer_files.files(words(False), None).items():
        if name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes(content.replace(b'"LlamaTokenizer"', b'"PreTrainedTokenizerFast"'))
    found = tokenizer_files.with_image_token(tmp_path, None)
    assert isinstance(found.tokenizer, tokenizer.HubTokenizer)
    assert (found.ids["<image>"], found.tokenizer.size) == (960, 962)
    written = tokenizer_files.files(found, "LlavaProcessor")
    assert "tokenizer.model" not in written and json.loads(written["added_tokens.json"])["<pad>"] == 961
    text = "A red square. USER: <image> \nWhat is it?</s>"
    assert fast(found).encode(text).ids == fast(words(False)).encode(text).ids
    one, two = (chat_template.render(templates.get("v1"), x.tokenizer) for x in (found, words(False)))
    assert one == two
    left = tokenizer_files.without_image_token(found.tokenizer)
    kept = json.loads(tokenizer_files.files(left, None)["tokenizer.json"])["added_tokens"]
    assert [token["content"] for token in kept] == ["<unk>", "<s>", "</s>"]


def part(value):
    return {"type": "image", "image": value[1:]} if value.startswith("@") else {"type": "text", "text": value}


SEVERAL = [
    [["@a.png", "@b.png", "Which is redder?"]],
    [["First ", "@a.png", " then ", "@b.png"]],
    [["@a.png", "One.\n", "@b.png", "\nTwo.", "", "@c.png"]],
    [["Left:\n", "@a.png", "@b.png"], "Red.", ["And ", "@c.png", "?"]],
    [["@a.png"], "Red.", ["@b.png", "Now?"]],
]  # fmt: skip


@pytest.mark.parametrize("name", RENDERED)
@pytest.mark.parametrize("legacy", [True, False])
def test_several_pictures_stand_in_the_chat_template_where_a_record_of_the_same_parts_has_them(name, legacy):
    jinja2 = pytest.importorskip("jinja2")
    found = words(legacy)
    source = chat_template.render(templates.get(name), found.tokenizer)
    rendered = jinja2.Environment().from_string(
        source.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    )
    form = encode.Format(templates.get(name), found.tokenizer, 28, 1, "pad")
    for talk in SEVERAL:
        roles = ("user", "assistant") * len(talk)
        said = [
            {"role": role, "content": text if isinstance(text, str) else [part(one) for one in text]}
            for role, text in zip(roles, talk)
        ]
        conversation = records.Record("it", 0, None, {"messages": said}).conversation
        wanted, _ = encode.with_labels(encode.encode(conversation, form, reply=True, open_images=False))
        out = rendered.render(messages=said, bos_token="<s>", add_generation_prompt=True)
        ids = fast(found).encode(out, add_special_tokens=False).ids
        assert [-200 if number == 960 else number for number in ids] == wanted.tolist(), talk
