"""Records with videos: read in every form, measured without decoding, planned exactly, refused alike by all."""

import dataclasses
import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_jax.data import index, inspection, page
from llava_jax.data.__main__ import main
from llava_jax.data.check import Checks, check_pictures, example, read, rules_of
from llava_jax.data.datasets import of_dataset
from llava_jax.data.packed import Packed
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.problems import Problem
from llava_jax.data.records import Record, parse
from llava_jax.data.sources import open_source
from llava_jax.data.validate import validate
from llava_jax.errors import DataError, MissingPackage, UsageError, exit_code
from llava_jax.prompt import templates, tokenizer, video
from llava_jax.prompt.anyres import Tiling
from llava_jax.prompt.conversation import Conversation, Turn, Video
from llava_jax.prompt.encode import Format
from llava_jax.prompt.images import to_pixels
from llava_jax.prompt.video import FrameRule
from tests import videos

TOKENIZER = Path(__file__).parent.parent / "golden" / "tiny_llama.model"
WORDS = tokenizer.load(TOKENIZER, legacy=True)
FORMAT = Format(templates.get("v1"), WORDS, 28, 16, "anyres", tiling=Tiling(((1, 1), (2, 1)), several=False),
                video=FrameRule(4))  # fmt: skip
BLIND = Format(templates.get("v1"), WORDS, 28, 16, "anyres", tiling=FORMAT.tiling)
ANSWER = {"from": "gpt", "value": "To the left."}


def asked(text):
    return [{"from": "human", "value": text}, ANSWER]


def parsed(raw):
    found = parse(Record("a.json", 0, None, raw))
    return found if isinstance(found, Problem) else found.conversation


def test_videos_are_read_in_every_form():
    """LLaVA-NeXT's key with either marker, lists, typed parts, beside pictures in any order."""
    a, b = Video("a.mp4"), Video("b")
    part = {"type": "text", "text": "Which came first?"}
    for raw, images, text, in_place in (
        ({"video": "a.mp4", "conversations": asked("<image>\nWhere?")}, (a,), "<image>\nWhere?", False),
        ({"video": "a.mp4", "conversations": asked("<video>\nWhere?")}, (a,), "<image>\nWhere?", False),
        ({"videos": ["a.mp4", "b"], "conversations": asked("<video> or <image>?")}, (a, b), "<image> or <image>?",
         True),
        ({"video": ["a.mp4"], "image": "c.png", "conversations": asked("<image>, <video>?")}, ("c.png", a),
         "<image>, <image>?", True),
        ({"video": "a.mp4", "images": ["c.png", "d.png"], "conversations": asked("<image><video><image>")},
         ("c.png", a, "d.png"), "<image><image><image>", True),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, part]},
                       {"role": "assistant", "content": "A"}]}, (a,), "<image>\nWhich came first?", True),
        ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "video"}, part]},
                       {"role": "assistant", "content": "A"}], "images": ["c.png"], "videos": ["a.mp4", "b"]},
         ("c.png", a, b), "<image>\n<image>\n<image>\nWhich came first?", True),
        ({"messages": [{"role": "user", "content": [{"type": "video", "index": 1}, {"type": "video", "index": 0}]},
                       {"role": "assistant", "content": "A"}], "videos": ["a.mp4", "b"]}, (b, a),
         "<image>\n<image>", True),
        ({"video": {"bytes": b"x", "path": None}, "conversations": asked("<video>?")}, (Video(b"x"),), "<image>?",
         False),
    ):  # fmt: skip
        found = parsed(raw)
        assert (found.images, found.turns[0].text, found.images_in_place) == (images, text, in_place), raw


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"video": "a", "videos": ["b"], "conversations": asked("<video>")}, "both video and videos: keep one"),
        ({"video": "a", "image": "b", "conversations": asked("<image>")}, "1 <image> for 1 image(s), 0 <video> for 1"),
        ({"video": 3, "conversations": asked("<video>")}, "bad_shape video=3: want a path"),
        ({"video_path": "a", "conversations": asked("<video>")}, "not read: rename it to `video`"),
        ({"conversations": [{"from": "human", "value": "?", "video": "b"}, ANSWER]}, "`videos`, in the order"),
        ({"videos": ["a"], "conversations": [{"from": "human", "value": [{"type": "video", "video": "b"}]}, ANSWER]},
         "some videos are named in the parts of messages"),
    ],
)  # fmt: skip
def test_videos_that_are_named_wrongly_are_refused(raw, message):
    found = parsed(raw)
    assert isinstance(found, Problem) and message in f"{found.reason} {found.detail}"


def write(folder):
    """A mixture: two videos in files, one in a folder, a picture and a text; then four that are bad."""
    videos.write(folder / "a.mp4", videos.moving(10))
    videos.write(folder / "b.webm", videos.moving(3, seed=3))
    videos.write_folder(folder / "c", videos.moving(6, seed=5))
    Image.new("RGB", (60, 30), "red").save(folder / "d.png")
    (folder / "damaged.mp4").write_bytes((folder / "a.mp4").read_bytes()[:900])
    (folder / "empty").mkdir()
    shown = [{"video": "a.mp4"}, {"video": "b.webm"}, {"videos": ["c"]}, {"image": "d.png"}, {}]
    bad = [{"video": "none.mp4"}, {"video": "damaged.mp4"}, {"video": "empty"}, {"video": "../a.mp4"}]
    records = [{"id": f"r{i}", **one, "conversations": asked("<image>\nWhere?" if one else "Where?")}
               for i, one in enumerate([*shown, *bad])]  # fmt: skip
    (folder / "good.json").write_text(json.dumps(records[: len(shown)]))
    (folder / "all.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("videos"))


def test_lengths_are_those_of_decoded_records(folder, tmp_path, monkeypatch):
    source = open_source(folder / "good.json", folder)
    with monkeypatch.context() as patch:
        patch.setattr(video, "_decoded", None)  # measuring decodes nothing
        sizes = index.sizes(source, FORMAT, tmp_path)
    assert sizes[:, 1].tolist() == [4, 3, 4, 3, 0]
    assert index.sizes(source, FORMAT, tmp_path).tolist() == sizes.tolist()
    longer = Format(*(vars(FORMAT) | {"video": FrameRule(8)}).values())
    assert index.sizes(source, longer, tmp_path)[:, 1].tolist() == [8, 3, 6, 3, 0]
    assert index.sizes(source, BLIND, tmp_path)[:, 1].tolist() == [0, 0, 0, 3, 0]
    feed = Packed(sources=[source], format=FORMAT, rows=1, row_tokens=260, images_per_group=14, order="sequential",
                  threads=1, cache_dir=tmp_path)  # fmt: skip
    seen, shown = [], 0
    for batch, ids in zip(range(2), feed):
        batch, ids = ids
        seen += ids
        shown += int((batch.pixels.max(axis=(2, 3, 4)) > 0).sum())
        ends = [int((batch.segments == segment).sum()) for segment in range(1, len(ids) + 1)]
        assert ends == [int(sizes[int(id[1:]), 0]) for id in ids]
    assert len(seen) >= 5 and shown > 10


def test_validate_refuses_what_training_refuses(folder):
    source = open_source(folder / "all.json", folder)
    checks = Checks(rules_of(FORMAT), FORMAT, 260, 14)
    verdicts = list(validate(source, checks, open_images=True))
    refused = {one.index: next(finding for finding in one.findings if finding.fatal) for one in verdicts if one.fatal}
    assert {i: one.reason for i, one in refused.items()} == {
        5: "missing_image", 6: "bad_image", 7: "bad_image", 8: "unsafe_path"}  # fmt: skip
    assert "no such file or folder" in refused[5].detail and "damaged" in refused[6].detail
    feed = Pipeline(sources=[source], format=FORMAT, batch_samples=9, row_tokens=260, images_per_group=14, threads=1,
                    order="sequential", skip_budget=0.5, one_pass=True)  # fmt: skip
    batch, _ = next(iter(feed))
    assert feed.bad_records() == 4 and np.flatnonzero(batch.weights.sum(1) == 0).tolist() == [5, 6, 7, 8]
    with pytest.raises(DataError, match="id='r5' missing_image: .*none.mp4"):
        next(iter(Pipeline(sources=[source], format=FORMAT, batch_samples=9, row_tokens=260, images_per_group=14,
                           threads=1, order="sequential", skip_budget=0.0, one_pass=True)))  # fmt: skip


def test_validate_refuses_videos_without_times_where_the_prompt_says_them(folder):
    source = open_source(folder / "good.json", folder)
    stamped = dataclasses.replace(FORMAT, video=FrameRule(4, time_stamps=True))
    verdicts = list(validate(source, Checks(rules_of(stamped), stamped, 400, 14), open_images=True))
    assert [one.index for one in verdicts if one.fatal] == [2]
    assert "a folder of frames, or a file without a frame rate, has no times" in verdicts[2].findings[0].detail
    feed = Pipeline(sources=[source], format=stamped, batch_samples=5, row_tokens=400, images_per_group=14, threads=1,
                    order="sequential", skip_budget=0.2, one_pass=True)  # fmt: skip
    batch, _ = next(iter(feed))
    assert np.flatnonzero(batch.weights.sum(1) == 0).tolist() == [2]
    assert index.sizes(source, stamped)[2].tolist() == [0, 0]
    assert (index.sizes(source, stamped)[:2, 0] > index.sizes(source, FORMAT)[:2, 0] + 50).all()


def test_a_run_without_a_rule_names_the_key_to_set(folder):
    source = open_source(folder / "good.json", folder)
    verdicts = validate(source, Checks(rules_of(BLIND), BLIND, 260, 14))
    assert [[str(one) for one in verdict.findings if one.fatal][:1] for verdict in verdicts][3:] == [[], []]
    found = next(validate(source, Checks(rules_of(BLIND), BLIND, 260, 14))).findings[0]
    assert found.reason == "unread_key" and "video='a.mp4': video is not read without a rule" in found.detail
    assert "set prompt.frames" in found.detail


def test_more_frames_than_a_pool_holds_name_the_key_to_raise(folder):
    source = open_source(folder / "good.json", folder)
    verdict = next(validate(source, Checks(rules_of(FORMAT), FORMAT, 260, 3)))
    assert [one.reason for one in verdict.findings] == ["too_many_images"]
    assert "4 images for images_per_group=3: set data.images_per_group=4" in verdict.findings[0].detail
    verdict = next(validate(source, Checks(rules_of(FORMAT), FORMAT, 20, 14)))
    assert verdict.findings[0].reason == "no_learned_tokens"  # the row is shorter than the frames


def test_parquet_holds_videos_as_bytes(folder, tmp_path):
    turns = [[{"from": "human", "value": "<video>?"}, ANSWER]]
    table = pa.table({"id": ["x"], "video": [(folder / "a.mp4").read_bytes()], "conversations": turns})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert index.sizes(source, FORMAT)[0, 1] == 4
    assert not check_pictures(source[0].conversation, None, FORMAT)


def test_a_parquet_of_data_sets_holds_several_videos_of_a_record(folder, tmp_path):
    turns = [[{"from": "human", "value": "<video>, <video>?"}, ANSWER]]
    held = [[{"bytes": (folder / name).read_bytes(), "path": name} for name in ("a.mp4", "b.webm")]]
    pq.write_table(pa.table({"videos": held, "conversations": turns}), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert index.sizes(source, FORMAT)[0, 1] == 4 + 3
    frames = example(read(source[0], rules_of(FORMAT)), Checks(rules_of(FORMAT), FORMAT, 260, 14), None).images
    wanted = [to_pixels(frame, 28, "squash") for name in ("a.mp4", "b.webm")
              for frame in video.frames(Video(folder / name), FORMAT.video)]  # fmt: skip
    np.testing.assert_array_equal(frames, wanted)


@pytest.fixture(scope="module")
def shard(folder, tmp_path_factory):
    """Videos of every kind and a picture, with their captions; then a damaged video, and one without frames."""
    place = tmp_path_factory.mktemp("shard") / "a.tar"
    with tarfile.open(place, "w") as tar:
        for i, name in enumerate(("a.mp4", "b.webm", "c.avi", "d.mov", "e.MKV")):
            path = folder / name.lower()
            if not path.exists():
                videos.write(path, videos.moving(10, seed=i))
            _add(tar, f"{i}{path.suffix if i < 4 else '.MKV'}", path.read_bytes())
            _add(tar, f"{i}.json", json.dumps({"caption": f"Clip {i}!"}).encode())
        for name, content in (("5.png", (folder / "d.png").read_bytes()), ("5.txt", b"A red field."),
                              ("6.mp4", (folder / "damaged.mp4").read_bytes()), ("6.txt", b"Nothing."),
                              ("7.mp4", b""), ("7.txt", b"Nothing."), ("stats.log", b"")):  # fmt: skip
            _add(tar, name, content)
    return place


def _add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def test_videos_of_a_shard_are_records_like_files(folder, shard, monkeypatch):
    source = open_source(shard)
    assert [record.id for record in source] == [str(i) for i in range(8)]
    monkeypatch.setattr(tempfile, "mkstemp", None)  # nothing is unpacked
    talk = source[0].conversation
    assert talk.images == (Video((folder / "a.mp4").read_bytes()),)
    assert [turn.text for turn in talk.turns] == ["<image>", "clip 0"]
    with monkeypatch.context() as patch:
        patch.setattr(video, "_decoded", None)  # measuring decodes nothing
        assert index.sizes(source, FORMAT)[:, 1].tolist() == [4, 3, 4, 4, 4, 3, 0, 0]
    assert index.sizes(source, BLIND)[:, 1].tolist() == [0, 0, 0, 0, 0, 3, 0, 0]
    for i, name in enumerate(("a.mp4", "b.webm", "c.avi", "d.mov", "e.mkv")):
        found = example(read(source[i], rules_of(FORMAT)), Checks(rules_of(FORMAT), FORMAT, 260, 14), None)
        frames = video.frames(Video(folder / name), FORMAT.video)
        np.testing.assert_array_equal(found.images, [to_pixels(frame, 28, "squash") for frame in frames])


def test_a_bad_video_of_a_shard_costs_itself_by_id(shard):
    source, checks = open_source(shard), Checks(rules_of(FORMAT), FORMAT, 260, 14)
    refused = [one.findings[0] for one in validate(source, checks, open_images=True) if one.fatal]
    assert [(one.id, one.reason) for one in refused] == [("6", "bad_image"), ("7", "bad_image")]
    assert "no video, or a damaged one" in refused[0].detail and "given as 0 bytes" in refused[1].detail
    settings = {"sources": [source], "format": FORMAT, "row_tokens": 260, "images_per_group": 14, "threads": 0,
                "order": "sequential", "one_pass": True}  # fmt: skip
    for feed in (Pipeline(batch_samples=4, skip_budget=0.25, **settings), Packed(rows=1, skip_budget=0.25, **settings)):
        seen = [id for _, ids in feed for id in ids]
        assert set("012345") <= set(seen) and {one.id for one in feed.bad} == {"6", "7"}
    with pytest.raises(DataError, match="id='6' bad_image: .*no video, or a damaged one"):
        list(Pipeline(batch_samples=4, skip_budget=0.0, **settings))
    verdict = next(validate(source, Checks(rules_of(BLIND), BLIND, 260, 14)))
    assert "video is not read without a rule" in verdict.findings[0].detail


def test_a_data_set_of_conversations_may_hold_videos_of_any_path(folder):
    class Clips:
        fingerprint = "one"

        def __len__(self):
            return 1

        def __getitem__(self, i):
            return Conversation((Turn("user", "<image>?"), Turn("assistant", "A")), (Video(str(folder / "a.mp4")),))

    assert index.sizes(of_dataset(Clips()), FORMAT)[0, 1] == 4


def test_show_marks_a_video_and_tfds_refuses_one(folder, tmp_path, capsys):
    assert main(["show", str(folder / "good.json"), "--tokenizer", str(TOKENIZER), "--legacy", "true"]) == 0
    out = capsys.readouterr().out
    assert out.count(" <video> ") == 3 and out.count(" <image> ") == 1
    command = ["prepare", str(folder / "good.json"), "--images", str(folder), "--out", str(tmp_path)]
    assert main(command) == 65
    assert "id='r0': a video, which this data set cannot hold" in capsys.readouterr().err


def test_a_rule_belongs_to_a_format_of_frames():
    with pytest.raises(UsageError, match="prompt.fps=2.0 with prompt.frames=0"):
        video.rule(0, 2.0)


def test_a_page_draws_the_frames_of_a_video_and_show_says_where_they_are(folder):
    source, checks = open_source(folder / "good.json", folder), Checks(rules_of(FORMAT), FORMAT, 260, 14)
    found = [inspection.examine(source[i], checks, source) for i in (0, 2, 3)]
    video_, clip, still = (one.pictures[0] for one in found)
    assert (video_.frames, clip.frames, still.frames) == (4, 4, 0) and video_.noun == "video"
    first = video_.span.start
    assert str(video_) == (f"64 x 48 pixels, 4 frames: 17 features (newlines: 1) at positions {first} to {first + 16}")
    assert video_.facts()["frames"] == 4 and "frames" not in still.facts()
    text = page.write(found, "videos", FORMAT, 260).decode()
    assert text.count("<figcaption>Frame ") == 8 and f"Frame 4: positions {first + 12} to {first + 15}<" in text
    assert ">video 1: 17 features</a>" in text and "Video 1: 64 x 48 pixels, 4 frames" in text


@pytest.mark.parametrize("kind", ["json", "tar"])
def test_without_pyav_no_record_is_to_blame(folder, shard, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "av", None)
    source = open_source(folder / "good.json", folder) if kind == "json" else open_source(shard)
    checks = Checks(rules_of(FORMAT), FORMAT, 260, 14)
    for fails in (lambda: index.sizes(source, FORMAT), lambda: list(validate(source, checks))):
        with pytest.raises(MissingPackage, match="`pip install av` .the extra `video`.") as error:
            fails()
        assert exit_code(error.value) == 64
