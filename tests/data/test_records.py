"""A record's keys are read, refused or told; the same talk has the same ids in whatever words it is written."""

import base64
import json
import random

import numpy as np
import pytest
from etils import epath

from llava_jax.data.keys import HARMLESS, READ, RECORD_KEYS, TURN_KEYS
from llava_jax.data.problems import Problem
from llava_jax.data.records import Record, parse
from llava_jax.data.sources import open_source
from llava_jax.errors import DataError
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.encode import IMAGE_MARKER, encode
from tests.data.conftest import png

HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}
TEXT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]


def parsed(raw, root=None):
    return parse(Record("x.json", 3, None, raw), None if root is None else epath.Path(root))


def talk(raw) -> Conversation:
    return Record("x.json", 3, None, raw).conversation


def refused(raw) -> str:
    """"reason: detail" of a record."""
    problem = parsed(raw)
    assert isinstance(problem, Problem), problem
    return ": ".join(problem)


def test_a_record_becomes_a_conversation():
    record = {"id": 7, "image": "a/cat.jpg", "conversations": [HUMAN, GPT], "model": ""}
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."))
    assert talk(record) == Conversation(turns, ("a/cat.jpg",), "7")
    assert talk({"conversations": TEXT}).id == "x.json[3]" == talk({"id": None, "conversations": TEXT}).id


def written(rng: random.Random) -> tuple[dict, dict]:
    """One talk twice: in LLaVA's own words, and in others, drawn at random."""
    images = [f"{rng.randrange(5)}.png" for _ in range(rng.randrange(4))]
    rounds, left = rng.randrange(1, 4), list(range(len(images)))
    system = rng.choice([None, "", "Be brief."])
    weight = rng.choice([None, 2, 0.5])
    llava, other, shown = [], [], list[int]()
    named = rng.choice(["record", "parts", "index"])
    for number in range(rounds):
        here = left if number == rounds - 1 else [left.pop(0) for _ in range(rng.randrange(len(left) + 1))]
        loss = rng.choice([None, True, False]) if number else True
        before = rng.choice(["", "Look:"]) if here else ""
        pieces = [*([before] if before else []), *(IMAGE_MARKER for _ in here), f"Question {number}?"]
        llava.append({"from": "human", "value": "\n".join(pieces)})
        llava.append({"from": "gpt", "value": f"Answer {number}."} | ({} if loss is None else {"loss": loss}))
        parts = [{"type": "text", "text": before, "image": None}] * bool(before)
        for place in here:
            shown.append(place)
            own = rng.choice([{"type": "image", "image": images[place]}, {"type": "image", "path": images[place]},
                              {"type": "image_url", "image_url": {"url": images[place], "detail": "low"}}])  # fmt: skip
            parts.append({"parts": own, "record": {"type": "image"}, "index": {"type": "image", "index": place}}[named])
        parts.append({"type": "text", "text": f"Question {number}?"})
        content = rng.choice([parts, "\n".join(pieces)]) if named == "record" else parts
        role, text = rng.choice([("role", "content"), ("from", "value")])
        user, assistant = rng.choice([("user", "assistant"), ("human", "gpt")])
        other.append({role: user, text: content, "weight": None})
        marks = [{"train": loss}, {"weight": int(loss or 0)}, {"loss": loss, "weight": 1.0 * bool(loss)}]
        other.append({role: assistant, text: f"Answer {number}."} | ({} if loss is None else rng.choice(marks)))
    record: dict = {"image": images} if images else {}
    made: dict = {rng.choice(["conversations", "messages"]): other}
    if named != "parts":
        made[rng.choice(["image", "images"])] = images
    if weight is not None:
        record["weight"] = made["weight"] = weight
    if system is not None:
        llava.insert(0, {"from": "system", "value": system})
        place = rng.choice(["system", "system_prompt", "turn", "both"])
        if place in ("turn", "both"):
            other.insert(0, {"role": "system", "content": system})
        if place != "turn":
            made["system" if place == "both" else place] = system
    return record | {"conversations": llava}, made


def test_ids_are_those_of_the_same_talk_in_llavas_own_form(v1, folder):
    """500 talks: under `messages` or `conversations`, text or parts, pictures in the parts or in the record, a system
    text in four places, marks and weights by other names."""
    rng, seen = random.Random(1), set()
    for _ in range(500):
        own, other = written(rng)
        one, two = (encode(talk(raw), v1, folder) for raw in (own, other))
        assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.learned, two.learned), (own, other)
        assert one.image_spans == two.image_spans and one.weight == two.weight
        assert all(map(np.array_equal, one.images, two.images)) and len(one.images) == len(own.get("image", []))
        seen.add((len(one.images), one.weight, "messages" in other))
    assert len(seen) > 15


def test_one_picture_under_a_string_follows_llavas_rule_and_in_a_list_stays_in_place():
    for name in ("image", "images"):
        string, listed = ({name: value, "conversations": [HUMAN, GPT]} for value in ("a.jpg", ["a.jpg"]))
        assert talk(string).images == talk(listed).images == ("a.jpg",)
        assert not talk(string).images_in_place and talk(listed).images_in_place


def test_a_picture_is_a_path_bytes_or_both():
    data = "data:image/png;base64," + base64.b64encode(png(0)).decode()
    named = ("0.png", {"bytes": None, "path": "0.png"})
    held = (png(0), {"bytes": png(0), "path": "gone.png"}, data)
    for value, picture in [*((value, "0.png") for value in named), *((value, png(0)) for value in held)]:
        for raw in ({"image": value}, {"images": [value]}):
            assert talk(raw | {"conversations": [HUMAN, GPT]}).images == (picture,)
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    assert talk({"messages": messages}).images == (png(0),)


EMPTY = (None, "", [], {}, "[]")
REMEDIES = {key: use for key, use in RECORD_KEYS.items() if use not in (READ, HARMLESS)}


@pytest.mark.parametrize("key", REMEDIES)
def test_a_key_that_cannot_be_trained_on_is_refused_with_its_remedy_and_an_empty_one_is_none(key):
    raw = {"id": "v", key: ["clip.mp4"], "conversations": TEXT}
    assert refused(raw) == f"unread_key: {key}=['clip.mp4']: {REMEDIES[key]}"
    for value in EMPTY:
        assert talk(raw | {key: value}) == talk({"id": "v", "conversations": TEXT})


@pytest.mark.parametrize("key", [key for key, use in TURN_KEYS.items() if use not in (READ, HARMLESS)])
def test_a_key_of_a_turn_too(key):
    answer = TEXT[1] | {key: "x"}
    assert refused({"conversations": [TEXT[0], answer]}).startswith(f"unread_key: conversations[].{key}='x': ")
    assert talk({"conversations": [TEXT[0], answer | {key: None}]}).turns == talk({"conversations": TEXT}).turns


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"Image": "a.jpg", "conversations": TEXT}, "Image='a.jpg': keys are written in small letters: rename it to"),
        ({"System": "Be brief.", "conversations": TEXT}, "System='Be brief.': keys are"),
        ({"VIDEO": "a.mp4", "conversations": TEXT}, "VIDEO='a.mp4': keys are"),
        ({"conversations": [TEXT[0], TEXT[1] | {"Loss": False}]}, "conversations[].Loss=False: keys are"),
        ({"conversations": [TEXT[0], TEXT[1] | {"mask": 0}]}, "conversations[].mask=0: this mark is not read: write"),
    ],
)
def test_a_key_in_capitals_is_refused_where_it_would_be_read(raw, message):
    assert refused(raw).startswith(f"unread_key: {message}")
    assert parsed({"ID": "7", "Source": "web", "conversations": TEXT}).unknown == ()


def test_harmless_keys_are_harmless_and_unknown_ones_are_told():
    harmless = {key: "x" for key, use in RECORD_KEYS.items() if use == HARMLESS}
    assert parsed({"conversations": TEXT} | harmless).unknown == ()
    rows = [TEXT[0] | {"mood": "glad"}, TEXT[1] | {"mood": "glad"}]
    raw = {"conversations": rows, "source_file": "a.csv", "empty": None}
    assert parsed(raw).unknown == ("source_file", "conversations[].mood")
    part = {"type": "text", "text": "Hi", "cache_control": "x"}
    raw = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "Ho"}]}
    assert parsed(raw).unknown == ("content[].cache_control",)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"loss": "yes"}, "bad_mark: conversations[1].loss='yes': want true or 1"),
        ({"weight": 0.5}, "bad_mark: conversations[1].weight=0.5: want true or 1"),
        ({"train": 2}, "bad_mark: conversations[1].train=2"),
        ({"train": [1]}, "bad_mark: conversations[1].train=[1]"),
        ({"loss": True, "weight": 0}, "bad_mark: conversations[1]: {'loss': True, 'weight': 0} contradict each other"),
    ],
)
def test_a_mark_that_is_no_yes_or_no_is_refused_by_name(mark, message):
    assert refused({"conversations": [TEXT[0], TEXT[1] | mark]}).startswith(message)


def test_marks_are_of_answers():
    asked = {"conversations": [TEXT[0] | {"loss": False}, TEXT[1] | {"loss": True}]}
    assert talk(asked) == talk({"conversations": TEXT})
    asked["conversations"][0]["loss"] = True
    assert refused(asked).startswith("bad_mark: conversations[0].loss=True in a turn of the user: only answers")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": None}, "bad_shape: conversations=None: want a list"),
        ({"conversations": None, "instruction": "x"}, "the record's keys are ['id', 'conversations', 'instruction']"),
        ({"conversations": []}, "empty_conversations: conversations=[]"),
        ({"conversations": None, "messages": "Hi"}, "bad_shape: messages='Hi': want a list"),
        ({"messages": TEXT}, "bad_shape: both conversations and messages"),
        ({"conversations": [HUMAN, "x"]}, "bad_shape: conversations[1]='x'"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": 3}]}, "conversations[1].value=3: want a string"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown_role: conversations[0].from='bot'"),
        ({"conversations": [{"role": "tool", "content": "x"}]}, "unknown_role: conversations[0].role='tool'"),
        ({"conversations": [HUMAN | {"role": "user"}, GPT]}, "conversations[0] has both from and role"),
        ({"conversations": [HUMAN | {"content": "x"}, GPT]}, "conversations[0] has both value and content"),
        ({"conversations": [HUMAN, {"from": "system", "value": "x"}]}, "conversations[1].from='system'"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "system turn only"),
        ({"conversations": [{"from": "human", "value": [{"type": "audio"}]}]},
         "unread_key: conversations[0].value[0].type='audio': audio is not read"),
        ({"conversations": [{"from": "human", "value": [{"type": "file"}]}]}, "type='file': want one of text, image"),
        ({"conversations": [{"from": "human", "value": ["x"]}]}, "conversations[0].value[0]='x': want {type: text"),
        ({"conversations": [{"from": "human", "value": [{"type": "text"}]}]}, "want a string as text"),
        ({"conversations": [{"from": "human", "value": [{"type": "text", "text": "?", "image": "a"}]}]},
         "a picture in a part of text: want a part for each"),
        ({"conversations": [{"from": "human", "value": [{"type": "image", "text": "Look"}]}]}, "and no text in it"),
        ({"conversations": [{"from": "human", "value": [{"type": "image", "url": "a", "path": "b"}]}]}, "one picture"),
        ({"conversations": [{"role": "user", "content": [{"type": "image"}], "value": "x"}]}, "both value and content"),
        ({"conversations": [{"from": "human", "value": [{"type": "image", "index": -1}]}]}, "index=-1"),
        ({"conversations": [{"from": "human", "value": [{"type": "image", "index": 1}]}, GPT], "image": ["a"]},
         "marker_count: the parts of messages show the pictures [1] of 1 in image"),
        ({"conversations": [{"from": "human", "value": [{"type": "image", "image": "b"}]}, GPT], "image": ["a"]},
         "want all of them in one place"),
        ({"conversations": [{"from": "system", "value": [{"type": "image"}]}, HUMAN, GPT]}, "show it in a question"),
        ({"image": ["a", 3]}, "bad_shape: image=['a', 3]: want a path"),
        ({"image": {"bytes": None, "path": None}}, "bad_shape: image={'bytes': None, 'path': None}"),
        ({"image": "data:image/png;base64,?"}, "bad_image: image='data:image/png;base64,?': no base64"),
        ({"system": 3}, "bad_shape: system=3: want a string"),
        ({"system": "a", "system_prompt": "b"}, "bad_shape: system and system_prompt are different system texts"),
        ({"weight": True}, "bad_weight: weight=True: want a number"),
        ({"weight": -1}, "bad_weight: weight=-1"),
        ({"weight": float("nan")}, "bad_weight: weight=nan"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named_with_the_path_inside_it(change, message):
    record = {"id": "r1", "conversations": [HUMAN, GPT]} | change
    assert message in refused(record)
    with pytest.raises(DataError, match=r"x\.json\[3\] id='r1' "):
        talk(record)


@pytest.fixture
def pictures(tmp_path):
    """A folder `pics` with a picture, a link to it beside, and a link in it that leaves."""
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "red.png").write_bytes(png(0))
    (tmp_path / "outside.png").write_bytes(png(0))
    (tmp_path / "pics" / "leaves.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "other").symlink_to(tmp_path / "pics")
    return tmp_path


@pytest.mark.parametrize("root", ["pics", "other", ""])
def test_an_absolute_path_inside_the_image_folder_is_taken(pictures, root, monkeypatch):
    """However the folder is named: as it is, through a link, or as the one above."""
    monkeypatch.chdir(pictures)
    for written in (pictures / "pics" / "red.png", pictures / "other" / "red.png", pictures / "pics" / "leaves.png"):
        for folder in (pictures / root, root or "."):
            raw = {"image": str(written), "conversations": [HUMAN, GPT]}
            (path,) = parsed(raw, folder).conversation.images
            assert not path.startswith("/") and (pictures / (root or ".") / path).name == written.name
    for outside in (pictures / "outside.png", pictures / "pics2" / "red.png"):
        (path,) = parsed({"image": str(outside), "conversations": [HUMAN, GPT]}, pictures / "pics").conversation.images
        assert path == str(outside)
    (path,) = parsed({"image": "/x.png", "conversations": [HUMAN, GPT]}, "/").conversation.images
    assert path == "x.png"


def test_an_absolute_path_in_a_bucket_is_taken_too():
    raw = {"image": "gs://b/pics/a/red.png", "conversations": [HUMAN, GPT]}
    assert parsed(raw, "gs://b/pics").conversation.images == ("a/red.png",)
    assert parsed(raw, "gs://b/pic").conversation.images == ("gs://b/pics/a/red.png",)


def test_the_lines_of_a_file_are_records_and_a_line_that_is_no_json_costs_itself(tmp_path):
    rows = [json.dumps({"id": "é", "conversations": TEXT}).encode(), b'{"id": ', b"[" * 100_000, b'{"id": "\xff"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    source = open_source(tmp_path / "a.jsonl")
    assert [record.id for record in source][0] == "é" and source.unreadable == (1, 2, 3)
    assert [record.line for record in source] == [1, 2, 3, 4]
    for record in list(source)[1:]:
        assert record.fault.startswith("no valid JSON: ") and refused_by(record).startswith("unreadable: no valid JSON")


@pytest.mark.parametrize("name, text", [("a.json", "[{}, {}]"), ("a.jsonl", "{}\n{}")])
def test_a_record_that_says_a_key_twice_costs_itself(name, text, tmp_path):
    twice = ['{"id": 1, "id": 2}', '{"id": 1, "conversations": [{"from": "human", "from": "gpt", "value": "x"}]}']
    (tmp_path / name).write_text(text.format(*twice))
    for record, key in zip(open_source(tmp_path / name), ("id", "from")):
        assert f"the key '{key}' stands twice" in refused_by(record)


def refused_by(record: Record) -> str:
    return ": ".join(parse(record))
