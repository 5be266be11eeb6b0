"""TFDS without TensorFlow: what is written is what is read."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from llava_jax import files
from llava_jax.data.builders.llava_instruct import write
from llava_jax.data.index import sizes
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.sources import open_source
from llava_jax.errors import DataError, UsageError
from llava_jax.prompt.conversation import Turn
from llava_jax.prompt.encode import encode
from tests.data.conftest import findings


def test_a_written_data_set_holds_the_same_conversations_and_the_files_bytes(make, folder, tmp_path):
    source = make(7)
    place = write(source, tmp_path / "out")
    again = open_source(place)
    assert [r.id for r in again] == [r.id for r in source]
    for one, two in zip(source, again, strict=True):
        assert one.conversation.turns == two.conversation.turns
        assert two.conversation.images == tuple((folder / i).read_bytes() for i in one.conversation.images)
        assert one.conversation.images_in_place == two.conversation.images_in_place
    assert open_source(tmp_path / "out" / "llava_instruct").fingerprint == again.fingerprint
    assert not list(tmp_path.glob("out/downloads"))


def test_a_list_of_images_stays_in_place(make, tmp_path):
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A."}]
    source = make([{"id": "one", "image": ["1.png"], "conversations": turns}])
    assert open_source(write(source, tmp_path / "out"))[0].conversation.images_in_place


def test_what_a_record_says_beside_its_turns_is_written_too(make, v1, folder, tmp_path, caplog):
    parts = [{"type": "image"}, {"type": "text", "text": "Same?"}, {"type": "image"}]
    answers = [{"role": "assistant", "content": "No.", "loss": False}, {"role": "assistant", "content": "Yes."}]
    messages = [{"role": "user", "content": parts}, answers[0], {"role": "user", "content": "Sure?"}, answers[1]]
    rows = [
        {"id": "a", "messages": messages, "images": ["0.png", "1.png"], "system": "Be brief.", "weight": 0.5,
         "mood": 1},  # fmt: skip
        {"id": "b", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    ]
    source = make(rows)
    again = open_source(write(source, tmp_path / "out"))
    assert "unknown_key: 'mood' is not read; 1 record(s) have it" in caplog.text
    for one, two in zip(source, again, strict=True):
        a, b = encode(one.conversation, v1, folder), encode(two.conversation, v1)
        assert a.tokens.tolist() == b.tokens.tolist() and a.learned.tolist() == b.learned.tolist()
        assert (a.weight, a.id) == (b.weight, b.id) and all(map(np.array_equal, a.images, b.images))


def test_a_data_set_of_an_older_release_is_read(tmp_path, v1):
    """It has neither `loss` nor `weight`."""
    text = tfds.features.Text()
    features = {"id": text, "conversations": tfds.features.Sequence({"from": text, "value": text})}

    class Older(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": iter([(0, {"id": "x", "conversations": [{"from": "human", "value": "Hi"},
                                                                     {"from": "gpt", "value": "Ho"}]})])}  # fmt: skip

        def _generate_examples(self):
            raise NotImplementedError

    builder = Older(data_dir=tmp_path / "out", file_format=tfds.core.FileFormat.ARRAY_RECORD)
    builder.download_and_prepare(download_dir=tmp_path / "downloads")
    (record,) = open_source(builder.data_dir)
    talk = record.conversation
    assert talk.turns == (Turn("user", "Hi"), Turn("assistant", "Ho")) and talk.weight == 1


def test_batches_of_a_tfds_directory_equal_those_of_the_json(make, v1, tmp_path):
    source = make(7)
    settings = {"format": v1, "batch_samples": 4, "row_tokens": 160, "threads": 0, "one_pass": True}
    ours = list(Pipeline(sources=[source], **settings))
    written = list(Pipeline(sources=[open_source(write(source, tmp_path / "out"))], **settings))
    for (a, ids), (b, others) in zip(ours, written, strict=True):
        assert ids == others and all((x == y).all() for x, y in zip(a, b, strict=True))


def test_tensorflow_is_never_imported(tmp_path):
    """In a process of its own; writing and reading."""
    code = (
        "import sys; from llava_jax.data.__main__ import main\n"
        f"assert main(['prepare', {str(tmp_path / 'a.jsonl')!r}, '--out', {str(tmp_path / 'out')!r}]) == 0\n"
        f"assert main(['validate', {str(tmp_path / 'out' / 'llava_instruct')!r}, '--open-images']) == 0\n"
        "assert not {'tensorflow', 'torch'} & set(sys.modules)\n"
    )
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": i, "conversations": turns}) for i in range(3)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_cannot_be_written_or_read_is_said(make, tmp_path):
    gone = [{"id": "x", "image": "gone.png", "conversations": [{"from": "human", "value": "<image>"},
                                                               {"from": "gpt", "value": "A."}]}]  # fmt: skip
    with pytest.raises(DataError, match=r"a\.json\[0\] id='x' missing_image"):
        write(make(gone), tmp_path / "out")
    assert not list(tmp_path.glob("out/llava_instruct/1*"))
    place = write(make(3), tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        write(make(3), tmp_path / "out")
    with pytest.raises(ValueError, match="split 'test' does not exist: choose one of train"):
        open_source(place, split="test")
    with pytest.raises(DataError, match="no TFDS data set"):
        open_source(tmp_path)


def test_a_damaged_record_costs_itself(make, v1, tmp_path):
    place = write(make(12), tmp_path / "out")
    (shard,) = place.glob("*.array_record*")
    content = bytearray(shard.read_bytes())
    content[1000:1008] = b"\xff" * 8  # the file begins with about 3,000 bytes of records
    shard.write_bytes(content)
    source = open_source(place)
    bad = [record.index for record in source if record.fault]
    assert 0 < len(bad) < 12
    assert [finding.index for finding in findings(source, v1, 160)] == bad
    assert np.flatnonzero(sizes(source, v1)[:, 0] == 0).tolist() == bad
    feed = Pipeline(sources=[source], format=v1, batch_samples=4, row_tokens=160, one_pass=True, skip_budget=0.9)
    assert len(list(feed)) == 3 and sorted(one.index for one in feed.bad) == bad


def test_a_data_set_in_a_bucket_is_read_and_none_is_written_there(make, v1, tmp_path, bucket):
    place = write(make(7), tmp_path / "out")
    for path in place.iterdir():
        files.write_whole(f"{bucket}/set/{path.name}", path.read_bytes())
    here, there = open_source(place), open_source(f"{bucket}/set")
    assert [record.raw for record in here] == [record.raw for record in there]
    assert here.fingerprint == there.fingerprint
    with pytest.raises(UsageError, match=f"--out {bucket}/out: want a path on a disk, as array_record"):
        write(make(7), f"{bucket}/out")
