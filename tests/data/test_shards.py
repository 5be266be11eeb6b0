"""Tar shards of pictures and captions: pairs, cleaning, and what is damaged."""

import io
import json
import tarfile

import pytest

from llava_jax.data.shards import clean_caption
from llava_jax.data.sources import open_source
from llava_jax.errors import DataError
from tests.data.conftest import png


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
    assert source[0].conversation.turns[1].text == "a cat" and source[0].pictures == (b"not opened here",)
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


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.jpg": b"x"}, "0 has jpg but lacks a caption"),
        ({"0.txt": b"x"}, "0 has txt but lacks a picture"),
        ({"0.txt": b"x", "0.jpg": b"x", "0.JPG": b"y"}, "holds 0.jpg twice"),
    ],
)
def test_half_a_pair_is_refused_by_name(tmp_path, files, message):
    write(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "a.tar")


def test_a_damaged_shard_and_a_caption_that_is_none_are_refused(shards):
    whole = (shards / "00000.tar").read_bytes()
    (shards / "00000.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match="00000.tar: no whole, plain tar file"):
        open_source(shards)
    (shards / "00000.tar").write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(DataError, match="00000.tar: no whole, plain tar file"):
        open_source(shards)
    write(shards / "00000.tar", {"0.jpg": b"x", "0.json": b'{"text": "a"}'})
    with pytest.raises(DataError, match="0: no caption can be read"):
        open_source(shards)[0]
