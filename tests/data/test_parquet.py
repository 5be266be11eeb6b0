"""Parquet files and directories of Hugging Face `datasets`: the records of the same talk in JSON."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_jax import files
from llava_jax.data import parquet
from llava_jax.data.index import sizes, word_lengths
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.sources import open_source
from llava_jax.errors import DataError, UsageError
from tests.data.conftest import findings, png, record

ROWS = [record(i) for i in range(12)]


def struct(row: dict) -> dict:
    """A record as `datasets` keeps it: the picture inside, and no picture is null."""
    shade = row.get("image", "").removesuffix(".png")
    return row | {"image": {"bytes": png(40 * int(shade)), "path": row["image"]} if shade else None}


def listed(row: dict) -> dict:
    """Messages of parts, and a list of pictures."""
    messages = []
    for turn in row["conversations"]:
        text = turn["value"].removeprefix("<image>\n")
        parts = [{"type": "image", "text": None}] * (text != turn["value"]) + [{"type": "text", "text": text}]
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": parts, "weight": None})
    shown = struct(row)["image"]
    return {"id": row["id"], "messages": messages, "images": [shown["bytes"]] if shown else [], "extra": "x"}


def sequences(row: dict) -> dict:
    """A `Sequence` of features, which `datasets` keeps as an object of lists; pictures by path."""
    turns = row["conversations"]
    return {"id": row["id"], "image": {"bytes": None, "path": row["image"]} if "image" in row else None,
            "conversations": {key: [turn[key] for turn in turns] for key in ("from", "value")}}  # fmt: skip


@pytest.mark.parametrize("shape", [struct, listed, sequences, lambda row: {"image": None} | row])
def test_rows_are_the_records_of_the_same_json(make, folder, tmp_path, v1, shape):
    pq.write_table(pa.Table.from_pylist([shape(row) for row in ROWS]), tmp_path / "a.parquet", row_group_size=5)
    tables, listed_json = open_source(tmp_path / "a.parquet", folder), make(ROWS)
    assert [record.id for record in tables] == [f"r{i}" for i in range(12)] and len(tables.groups) == 3
    assert word_lengths(tables).tolist() == word_lengths(listed_json).tolist()
    assert sizes(tables, v1).tolist() == sizes(listed_json, v1).tolist()
    assert findings(tables, v1) == []
    settings = {"format": v1, "batch_samples": 4, "row_tokens": 160, "threads": 2, "seed": 3}
    feeds = [Pipeline(sources=[one], **settings) for one in (tables, listed_json)]
    for (a, ids), (b, others), _ in zip(*feeds, range(6)):
        assert ids == others and all((x == y).all() for x, y in zip(a, b, strict=True))


def test_directories_of_datasets_are_found_by_split(tmp_path):
    table = pa.Table.from_pylist([struct(row) for row in ROWS])

    def write(*names):
        for i, name in enumerate(names):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.slice(4 * i, 4), tmp_path / name)

    def ids(place, split="train"):
        return [record.id for record in open_source(tmp_path / place, split=split)]

    write("hub/data/train-00000-of-00002.parquet", "hub/data/train-00001-of-00002.parquet", "hub/data/test.parquet")
    assert ids("hub") == [f"r{i}" for i in range(8)] and ids("hub", "test") == [f"r{i}" for i in range(8, 12)]
    write("auto/default/train/0000.parquet", "auto/default/validation/0000.parquet")
    assert ids("auto") == ["r0", "r1", "r2", "r3"] and ids("auto", "validation") == ["r4", "r5", "r6", "r7"]
    write("own/a.parquet", "own/b.parquet")
    assert ids("own") == [f"r{i}" for i in range(8)]
    write("sft/data/train_sft-00000-of-00001.parquet")
    with pytest.raises(UsageError, match="split 'train' does not exist: choose one of train_sft, or name a file"):
        ids("sft")
    assert ids("sft", "train_sft") == ids("sft/data/train_sft-00000-of-00001.parquet") == ["r0", "r1", "r2", "r3"]
    write("two/a/train.parquet", "two/b/train.parquet")
    with pytest.raises(UsageError, match=r"holds several data sets \(.*two/a, .*two/b\): name one of them"):
        ids("two")


@pytest.fixture
def saved(tmp_path):
    """What `DatasetDict.save_to_disk` writes: streams of batches, a state for each split."""
    table = pa.Table.from_pylist([struct(row) for row in ROWS])
    for split, first in (("train", 0), ("test", 8)):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
        for i, name in enumerate(names):
            with pa.ipc.new_stream(str(folder / name), table.schema) as out:
                out.write_table(table.slice(first + 2 * i, 2), max_chunksize=1)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return tmp_path / "saved"


def test_what_save_to_disk_wrote_is_read(saved):
    assert [record.id for record in open_source(saved)] == ["r0", "r1", "r2", "r3"]
    assert [record.id for record in open_source(saved, split="test")] == ["r8", "r9", "r10", "r11"]
    assert [record.id for record in open_source(saved / "test")] == ["r8", "r9", "r10", "r11"]
    one = open_source(saved / "train" / "data-00001-of-00002.arrow")
    assert [record.id for record in one] == ["r2", "r3"] and one[0].raw["image"]["bytes"] == png(80)
    with pytest.raises(UsageError, match="split 'val' does not exist: choose one of train, test"):
        open_source(saved, split="val")
    (saved / "train" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="_data_files"):
        open_source(saved)


def test_what_is_damaged_or_another_table_is_named(tmp_path, v1):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="columns are text: want conversations or messages"):
        open_source(tmp_path / "other.parquet")
    table = pa.Table.from_pylist([struct(row) for row in ROWS])
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=4, compression="none", use_dictionary=False, write_page_checksum=True)
    whole = path.read_bytes()
    for damaged in (whole[:-200], b"", b"x" * 2000):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet: no whole parquet file"):
            open_source(path)
    groups = pq.ParquetFile(pa.BufferReader(whole)).metadata
    start = groups.row_group(1).column(0).data_page_offset
    path.write_bytes(whole[:start] + b"\xff" * 8 + whole[start + 8 :])
    source = open_source(path)
    assert [record.index for record in source if record.fault] == [4, 5, 6, 7]
    assert {finding.reason for finding in findings(source, v1)} == {"unreadable"}
    feed = Pipeline(sources=[source], format=v1, batch_samples=4, row_tokens=160, one_pass=True, skip_budget=0.4)
    assert len(list(feed)) == 3 and sorted(one.index for one in feed.bad) == [4, 5, 6, 7]


def test_a_group_is_read_once_for_its_neighbours_and_old_ones_are_forgotten(tmp_path, monkeypatch):
    pq.write_table(pa.Table.from_pylist([struct(row) for row in ROWS]), tmp_path / "a.parquet", row_group_size=4)
    read, real = [], pq.ParquetFile.read_row_group

    def counted(self, number):
        read.append(number)
        return real(self, number)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    source = open_source(tmp_path / "a.parquet")
    assert not read
    assert len(list(source)) == 12 and read == [0, 1, 2]
    assert source[0].id == "r0" and read == [0, 1, 2]
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 1)
    assert [source[i].id for i in (11, 0, 1, 11)] == ["r11", "r0", "r1", "r11"] and read == [0, 1, 2, 0, 2]


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path):
    for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS[:-1])):
        pq.write_table(pa.Table.from_pylist([struct(row) for row in rows]), tmp_path / f"{name}.parquet")
    a, b, c = (open_source(tmp_path / f"{name}.parquet").fingerprint for name in "abc")
    assert a == b != c


def test_a_bucket_holds_parquet_and_arrow_wants_a_disk(tmp_path, bucket, saved):
    pq.write_table(pa.Table.from_pylist([struct(row) for row in ROWS]), tmp_path / "train.parquet", row_group_size=5)
    files.write_whole(f"{bucket}/hub/data/train.parquet", (tmp_path / "train.parquet").read_bytes())
    here, there = open_source(tmp_path / "train.parquet"), open_source(f"{bucket}/hub")
    assert [record.raw for record in here] == [record.raw for record in there] and here.fingerprint == there.fingerprint
    files.write_whole(f"{bucket}/a.arrow", (saved / "train" / "data-00000-of-00002.arrow").read_bytes())
    with pytest.raises(UsageError, match=r"a\.arrow: want a path on a disk, as Arrow files are mapped"):
        open_source(f"{bucket}/a.arrow")
    assert np.array_equal(word_lengths(here), word_lengths(there))
