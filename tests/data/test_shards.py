"""Tar shards of pictures and captions: pairs, cleaning, and what is damaged."""

import io
import json
import tarfile
import types

import gcsfs.retry
import pytest

from llava_jax import files
from llava_jax.data.index import sizes
from llava_jax.data.packed import Packed
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.shards import clean_caption
from llava_jax.data.sources import open_source
from llava_jax.errors import DataError, Unreachable
from tests import buckets
from tests.data.conftest import findings, png


def write(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    write(tmp_path / "00001.tar", {"b/7.png": png(7), "b/7.json": json.dumps({"caption": "A Boat!"}).encode()})
    write(tmp_path / "00000.tar", {"0.jpg": b"not opened here", "0.txt": b"A  cat.", "0.json": b"{}", "stats.log": b""})
    return tmp_path


def test_pairs_of_all_shards_are_records_with_their_pictures(shards):
    source = open_source(shards)
    assert [record.id for record in source] == ["0", "b/7"]
    talk = source[1].conversation
    assert [turn.text for turn in talk.turns] == ["<image>", "a boat"] and talk.images == (png(7),)
    assert source[0].conversation.turns[1].text == "a cat" and source[0].conversation.images == (b"not opened here",)
    assert len(open_source(shards / "00001.tar")) == 1
    write(shards / "2.tar", {"2.jpg": b"x", "2.txt": b'{"cap"} on a shelf'})  # a text may begin as JSON does
    assert open_source(shards / "2.tar")[0].conversation.turns[1].text == '{ cap } on a shelf'


def test_the_fingerprint_is_of_what_is_in_the_shards_and_not_where_they_lie(shards, tmp_path_factory):
    other = tmp_path_factory.mktemp("moved")
    for path in shards.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert open_source(other).fingerprint == open_source(shards).fingerprint
    write(other / "00001.tar", {"b/7.png": png(7), "b/7.txt": b"A boat!"})
    assert open_source(other).fingerprint != open_source(shards).fingerprint


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ('A "red" (old) Boat: on~the *lake*!', "a red old boat on the lake"),
        ("  two\n\nlines; #1 ", "two lines 1"),
        ("it's 3,5 km - far?", "it's 3,5 km - far?"),
        (" ".join(map(str, range(60))), " ".join(map(str, range(50)))),
        ("", ""),
    ],
)
def test_captions_are_cleaned_as_blips(text, clean):
    assert clean_caption(text) == clean


SOUND = {"good.jpg": png(3), "good.txt": b"A good one."}


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"0.jpg": b"x"}, "the shard has 0.jpg but lacks a caption"),
        ({"0.txt": b"x"}, "the shard has 0.txt but lacks a picture"),
        ({"0.gif": b"x", "0.txt": b"x"}, "the shard has 0.gif, .txt but lacks a picture (jpg, jpeg, png, webp)"),
        ({"0.txt": b"x"}, "lacks a picture (jpg, jpeg, png, webp) or video (mp4, webm, avi, mov, mkv)"),
        ({"0.mp4": b"x"}, "the shard has 0.mp4 but lacks a caption"),
        ({"0.mp4": b"x", "0.jpg": b"x", "0.txt": b"a"}, "0.jpg, .mp4, .txt: want a picture or a video for a caption"),
        ({"0.webm": b"x", "0.txt": b"x", "0.WEBM": b"y"}, "0.webm is there twice"),
        ({"0.txt": b"x", "0.jpg": b"x", "0.JPG": b"y"}, "0.jpg is there twice"),
        ({"0.jpg": b"x", "0.json": b'{"text": "a"}'}, "no caption can be read in 0.json (KeyError('caption'))"),
        ({"0.jpg": b"x", "0.json": b'{"caption": 7}'}, "caption='7': want a string"),
        ({"0.jpg": b"x", "0.json": b"[]"}, "no caption can be read in 0.json"),
        ({"0.jpg": b"x", "0.json": b"[" * 100_000}, "no caption can be read in 0.json (RecursionError"),
        ({"0.jpg": b"x", "0.txt": b"caf\xe9"}, "no caption can be read in 0.txt (UnicodeDecodeError"),
        ({"0.jpg": b"x", "0.txt": b"a" * 1_000_001}, "0.txt has 1000001 bytes, a caption at most 1000000"),
    ],
)
def test_a_bad_pair_costs_itself_by_name(tmp_path, v1, files, fault):
    write(tmp_path / "a.tar", {**files, **SOUND})
    source = open_source(tmp_path / "a.tar")
    bad, good = source
    assert bad.id == "0" and fault in bad.fault, bad.fault
    assert good.fault == "" and good.conversation.images == (png(3),)
    with pytest.raises(DataError, match=r"a\.tar\[0\] id='0' unreadable: "):
        print(bad.conversation)
    assert sizes(source, v1).tolist() == [[0, 0], [sizes(source, v1)[1, 0], 1]]
    for open_images in (False, True):
        (finding,) = findings(source, v1, 160, opened=open_images)
        assert (finding.id, finding.reason, finding.detail) == ("0", "unreadable", bad.fault)
    settings = {"format": v1, "batch_samples": 1, "row_tokens": 160, "one_pass": True, "order": "sequential"}
    for layout in (Pipeline, lambda batch_samples, **rest: Packed(rows=batch_samples, **rest)):
        feed = layout(sources=[source], skip_budget=0.5, threads=0, **settings)
        assert "good" in [name for _, ids in feed for name in ids]
        assert [one.id for one in feed.bad] == ["0"]
    with pytest.raises(DataError, match="id='0' unreadable"):
        list(Pipeline(sources=[source], skip_budget=0.0, threads=0, **settings))


def test_files_that_are_none_of_ours_are_passed_over(tmp_path):
    write(tmp_path / "a.tar", {**SOUND, "good.wav": b"", "stats.log": b"", "0.gif": b"", "README": b""})
    assert [record.id for record in open_source(tmp_path / "a.tar")] == ["good"]


def test_a_shard_whose_end_is_lost_or_damaged_is_refused_as_a_whole(shards):
    whole = (shards / "00000.tar").read_bytes()
    damaged = bytearray(whole)
    damaged[1024 : 1024 + 100] = b"\xff" * 100  # the second header
    contents = {
        whole[:600]: "no whole, plain tar file",  # the first file is whole, what comes then is not
        whole[:520]: "ends within 0.jpg",
        whole[:1024]: "no end mark at byte 1024, so files may be lost",
        bytes(damaged): "a damaged header at byte 1024, so files may be lost",
        b"\x1f\x8b" + whole: "no whole, plain tar file",
        b"": "no whole, plain tar file",
    }
    for content, message in contents.items():
        (shards / "00000.tar").write_bytes(content)
        with pytest.raises(DataError, match=f"00000.tar: {message}"):
            open_source(shards)


def test_a_shard_that_changes_after_the_start_costs_the_pairs_that_are_gone(shards):
    source = open_source(shards)
    (shards / "00001.tar").write_bytes(b"short")
    faults = [record.fault.partition(".tar: ")[2] for record in source]
    assert faults == ["", "ends within its picture: has it changed?"]
    (shards / "00000.tar").unlink()
    assert "cannot be read" in source[0].fault


def test_captions_are_measured_without_reading_a_picture(place, bucket_proxy, v1, shards):
    for path in shards.iterdir():
        files.write_whole(place / "copy" / path.name, path.read_bytes())
    source = open_source(place / "copy")
    with buckets.faults(bucket_proxy, lambda method, path: 500):  # no request would be answered
        assert sizes(source, v1).tolist() == sizes(open_source(shards), v1).tolist()
        assert not findings(source, v1, 160, opened=False)
        assert not bucket_proxy.requests
    with buckets.faults(bucket_proxy, lambda method, path: None):
        assert [record.raw for record in source] == [record.raw for record in open_source(shards)]
        assert len(bucket_proxy.requests) == (2 if files.is_bucket(place) else 0)  # one a record
    assert source.fingerprint == open_source(shards).fingerprint


def test_a_bucket_that_does_not_answer_ends_the_run_and_costs_no_record(bucket, bucket_proxy, v1, shards, monkeypatch):
    async def at_once(secs):
        pass

    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=at_once))
    monkeypatch.setattr(files, "RETRY_SECS", 0.0)
    for path in shards.iterdir():
        files.write_whole(f"{bucket}/{path.name}", path.read_bytes())
    source = open_source(bucket)
    feed = Pipeline(sources=[source], format=v1, batch_samples=1, row_tokens=160, one_pass=True, skip_budget=0.9)
    with buckets.faults(bucket_proxy, lambda method, path: 503), pytest.raises(Unreachable, match="no answer for"):
        list(feed)
    assert not feed.bad
