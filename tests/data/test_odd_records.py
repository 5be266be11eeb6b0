"""Records that are damaged at random: none ends a run with a traceback, and nothing in them is dropped unsaid."""

import copy
import json
import random

from llava_jax.data.keys import HARMLESS, PART_KEYS, RECORD_KEYS, TURN_KEYS
from llava_jax.data.problems import Problem
from llava_jax.data.records import Record, parse
from llava_jax.data.sources import open_source
from tests.data.conftest import findings
from tests.data.test_refusals import IMAGES, ROW_TOKENS, padded
from tests.data.test_validate import ASKED, SHOWN

SIGN = "zq7"  # what has to come out where it was put in
PARTS = [{"type": "image"}, {"type": "text", "text": "What?"}]
SOUND = (
    {"id": "a", "image": "0.png", "system": "Be brief.", "weight": 2, "conversations": SHOWN},
    {"id": "b", "images": ["0.png", "1.png"], "messages": [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": [PARTS[0], *PARTS]},
        {"role": "assistant", "content": "Yes.", "loss": True}]},
    {"id": "c", "conversations": [*ASKED, ASKED[0], ASKED[1] | {"train": False}], "model": "", "video": None},
)  # fmt: skip
VALUES = (SIGN, [SIGN], {"text": SIGN}, {"bytes": None, "path": SIGN}, [[SIGN]], f"<image>{SIGN}", f"{SIGN}\ud800",
          f"data:image/png;base64,{SIGN}", f"../{SIGN}", None, "", [], {}, True, 0, -1, 1.5, float("nan"),
          10**400)  # fmt: skip
NAMES = (*RECORD_KEYS, *TURN_KEYS, *PART_KEYS, "Image", "turns", "answer", "texts", "Value", "")
HARMLESS_NAMES = {name for table in (RECORD_KEYS, TURN_KEYS, PART_KEYS) for name in table if table[name] is HARMLESS}


def containers(value) -> list:
    """All objects and lists in a record that hold something."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] * bool(inside) + [found for one in inside for found in containers(one)]


def damaged(rng: random.Random) -> dict:
    """A sound record with one or two things changed, added, doubled, exchanged or gone."""
    record = copy.deepcopy(rng.choice(SOUND))
    for _ in range(rng.randrange(1, 3)):
        place = rng.choice(containers(record) or [record])
        keys = list(place if isinstance(place, dict) else range(len(place)))
        operation = rng.choice(("set", "set", "add", "add", "gone", "double", "exchange"))
        if operation == "set" and keys:
            place[rng.choice(keys)] = copy.deepcopy(rng.choice(VALUES))
        elif operation == "gone" and keys:
            del place[rng.choice(keys)]
        elif isinstance(place, dict):
            place[rng.choice(NAMES)] = copy.deepcopy(rng.choice(VALUES))
        elif operation == "double":
            place.append(copy.deepcopy(rng.choice(place)))
        else:
            rng.shuffle(place)
    return record


def strip(value):
    """Without the keys of which nothing is trained on."""
    if isinstance(value, list):
        return [strip(one) for one in value]
    if isinstance(value, dict):
        return {key: strip(one) for key, one in value.items() if key not in HARMLESS_NAMES and key.lower() != "id"}
    return value


def test_what_stands_in_a_record_is_trained_on_refused_or_told():
    accepted = 0
    for seed in range(3000):
        raw = damaged(random.Random(seed))
        result = parse(Record("x.json", 0, None, raw))
        if isinstance(result, Problem) or result.unknown or SIGN not in str(strip(raw)):
            continue
        accepted += 1
        assert SIGN in str(result.conversation), raw
    assert accepted > 50


def test_validate_and_training_refuse_the_same_of_them(folder, v1, tmp_path):
    rows = [damaged(random.Random(seed)) | {"id": str(seed)} for seed in range(300)]
    (tmp_path / "odd.json").write_text(json.dumps(rows))
    source, wanted = open_source(tmp_path / "odd.json", folder), dict[int, str]()
    for finding in findings(source, v1, ROW_TOKENS, IMAGES, True):
        assert "\n" not in str(finding) and str(finding).encode()
        if finding.fatal:
            wanted.setdefault(finding.index, finding.reason)
    feed = padded(source, v1, (len(wanted) + 0.5) / len(source))
    assert sum(1 for _ in feed) == len(source) // 4
    assert {finding.index: finding.reason for finding in feed.bad} == wanted
    assert 100 < len(wanted) < 280 and len(set(wanted.values())) > 10
