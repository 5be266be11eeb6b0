"""`validate` refuses exactly what training refuses: the same records for the same reasons, in every kind of source."""

import io
import json
import random
import tarfile

import pytest

from llava_jax.data.builders import llava_instruct
from llava_jax.data.packed import Packed
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.problems import REASONS
from llava_jax.data.sources import Source, open_source
from llava_jax.errors import DataError
from tests.data.conftest import findings, png
from tests.data.test_validate import BAD, GOOD, NOTED

ROW_TOKENS, IMAGES = 400, 2
DAMAGED = (b"", b"<html>404</html>", png(3)[:44])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with sound pictures, damaged ones, and a link that leaves it."""
    folder = tmp_path_factory.mktemp("world") / "images"
    folder.mkdir()
    for shade in range(5):
        (folder / f"{shade}.png").write_bytes(png(40 * shade))
    for name, content in zip(("empty.png", "page.jpg", "half.png"), DAMAGED):
        (folder / name).write_bytes(content)
    (folder / "café.png").write_bytes(png(0))
    (folder.parent / "outside.png").write_bytes(png(0))
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    return folder


def drawn(rng: random.Random, opened: bool) -> list:
    """Records of every kind of fault, of notes and of none, a fault and a note together among them, in random order."""
    kinds = [raw for reason, _, raw in BAD if opened or reason != "bad_image"]
    rows = [*kinds, *(raw for *_, raw in NOTED), *GOOD, *(both(raw) for raw in kinds if isinstance(raw, dict))]
    rng.shuffle(rows)
    return [row | {"id": str(i)} if isinstance(row, dict) else row for i, row in enumerate(rows)]


def both(raw: dict) -> dict:
    """The record with a harmless note beside its fault: a separator written out."""
    rows = raw.get("conversations")
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict) or "value" not in rows[0]:
        return raw
    return raw | {"conversations": [rows[0] | {"value": f"{rows[0]['value']} </s>"}, *rows[1:]]}


def as_json(rng, folder, pictures, opened) -> Source:
    (folder / "a.json").write_text(json.dumps(drawn(rng, opened)))
    return open_source(folder / "a.json", pictures)


def as_lines(rng, folder, pictures, opened) -> Source:
    lines = [json.dumps(row).encode() for row in drawn(rng, opened)]
    for broken in (b'{"id": ', b"[" * 100_000, b'{"id": "\xff"}', b"\0"):
        lines.insert(rng.randrange(len(lines)), broken)
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    return open_source(folder / "a.jsonl", pictures)


def as_tfds(rng, folder, pictures, opened) -> Source:
    """Where pictures are bytes, so damaged ones show only when they are opened; and 8 bytes of the file are lost."""
    apart = {"bad_shape", "unread_key", "bad_mark", "bad_weight", "unknown_role", "missing_image", "unsafe_path",
             "lone_surrogate", "empty_conversations"}  # fmt: skip
    rows = [raw for reason, _, raw in BAD if reason not in apart and (opened or reason != "bad_image")]
    rows = [row | {"id": str(i)} for i, row in enumerate([*rows, *map(both, rows), *GOOD])]
    (folder / "a.json").write_text(json.dumps(rows))
    place = llava_instruct.write(open_source(folder / "a.json", pictures), folder / "out")
    (shard,) = place.glob("*.array_record*")
    content = bytearray(shard.read_bytes())
    content[1000:1008] = b"\xff" * 8
    shard.write_bytes(content)
    return open_source(place)


def as_shards(rng, folder, pictures, opened) -> Source:
    files = {f"{i}.txt": b"A cat." for i in range(12)} | {f"{i}.jpg": png(i) for i in range(12)}
    del files["0.txt"], files["1.jpg"], files["2.txt"]
    files |= {"2.json": b"[" * 100_000, "3.txt": b"\xff", "4.txt": b" ", "5.txt": b"<image> again", "6.txt": b"</s>",
              "1.gif": b"", "7.txt": b"\xc3\xa9" * 500}  # fmt: skip
    if opened:
        files |= {f"{8 + i}.jpg": content for i, content in enumerate(DAMAGED)}
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return open_source(folder / "a.tar")


def padded(source, v1, budget, **changes):
    return Pipeline(sources=[source], format=v1, batch_samples=4, row_tokens=ROW_TOKENS, images_per_group=IMAGES,
                    skip_budget=budget, one_pass=True, threads=2, **changes)  # fmt: skip


def bucketed(source, v1, budget):
    return padded(source, v1, budget, lengths=(100, 200))


def packed(source, v1, budget):
    return Packed(sources=[source], format=v1, rows=2, row_tokens=ROW_TOKENS, images_per_group=IMAGES,
                  skip_budget=budget, one_pass=True, threads=2)  # fmt: skip


@pytest.mark.parametrize("opened", [False, True], ids=["looked for", "opened"])
@pytest.mark.parametrize("write", [as_json, as_lines, as_tfds, as_shards])
def test_validate_refuses_exactly_what_training_refuses(write, opened, v1, tmp_path, pictures):
    source, wanted = write(random.Random(1), tmp_path, pictures, opened), dict[int, str]()
    for finding in findings(source, v1, ROW_TOKENS, IMAGES, opened):
        if finding.fatal:
            wanted.setdefault(finding.index, finding.reason)
    assert 3 <= len(wanted) < len(source)
    for layout in (padded, bucketed, packed):
        enough = (len(wanted) + 0.5) / len(source)
        feed = layout(source, v1, enough)
        ids = [name for _, ids in feed for name in ids]
        assert {finding.index: finding.reason for finding in feed.bad} == wanted
        assert {record.id for record in source} - set(ids) <= {source[index].id for index in wanted}
        for budget in (0.0, enough - 1 / len(source)):
            with pytest.raises(DataError, match=r"skip_budget=.* allows"):
                list(layout(source, v1, budget))


def test_the_corpus_has_every_reason_of_a_record():
    met = {reason for reason, *_ in BAD + NOTED}
    assert met >= {reason for reason, (fatal, _) in REASONS.items() if fatal} - {
        "bad_source", "unreadable", "not_a_caption", "empty_question", "bad_text", "replaced_image",
    }  # fmt: skip


def test_a_source_that_is_refused_as_a_whole_ends_the_run_whatever_the_budget(make, v1):
    bad = make([{"id": "x", "conversations": []}] * 2, "bad.json")
    good = make(40)
    feed = Pipeline(sources=[good, bad], format=v1, batch_samples=4, row_tokens=400, skip_budget=0.5, threads=0)
    with pytest.raises(DataError, match=r"All 2 records of source 'bad\.json' are refused"):
        for step, _ in enumerate(feed):
            assert step < 20


def test_lines_that_are_no_json_are_refused_before_the_first_step(tmp_path, v1):
    text = json.dumps(GOOD[0])
    (tmp_path / "a.jsonl").write_text("\n".join([text, "{", text, "x", text, text]))
    source = open_source(tmp_path / "a.jsonl")
    for budget in (0.0, 0.2):
        with pytest.raises(DataError, match=r"a\.jsonl:2 .* unreadable: no valid JSON.*Bad records so far: 2"):
            padded(source, v1, budget)
        with pytest.raises(DataError, match="Bad records so far: 2"):
            packed(source, v1, budget)
    assert len(list(padded(source, v1, 0.4))) == 2
