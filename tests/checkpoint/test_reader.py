"""A checkpoint directory: which steps count, what comes from a base, and what its fingerprint notices."""

import dataclasses
import shutil

import numpy as np
import pytest

from llava_jax import params
from llava_jax.checkpoint import model_json, reader
from llava_jax.errors import UnusableCheckpoint

PROMPT = model_json.PromptMetadata("v1", False, "pad", False)
BASE = {"llm/norm/scale": np.arange(4, dtype=np.float16), "projector/0/bias": np.zeros(2, np.float16)}
MOVED = {"projector/0/bias": np.ones(2, np.float32)}


def write(directory, named, step=0, base=()):
    with reader.TensorWriter(directory / str(step) / "params") as writer:
        for name, leaf in named.items():
            writer.write(name, leaf)
    model_json.write(directory, model_json.Metadata({"width": 4}, PROMPT, base), {"tokenizer.model": b"pieces"})
    return directory


def on_base(tmp_path, path="../base", patterns=(".*",)):
    base = write(tmp_path / "base", BASE)
    entry = model_json.Base(path, 0, reader.fingerprint(base), patterns)
    return base, write(tmp_path / "run", MOVED, step=9, base=(entry,))


def test_the_latest_step_is_the_newest_whole_one_and_a_damaged_one_is_named(tmp_path, caplog):
    assert reader.latest_step(tmp_path / "none") is None
    for step in (2, 10):
        write(tmp_path, BASE, step)
    (tmp_path / "11").mkdir()  # Orbax would call it the latest
    shutil.copytree(tmp_path / "10", tmp_path / "12")
    (tmp_path / "12" / "params" / "llm.norm.scale" / ".zarray").unlink()  # half deleted
    shutil.copytree(tmp_path / "10", tmp_path / "13.orbax-checkpoint-tmp")
    assert reader.steps(tmp_path) == [2, 10]
    assert reader.latest_step(tmp_path) == reader.latest_step(tmp_path) == 10
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        f"step {step} is damaged, or was copied in part: step 10 is taken" for step in (12, 11)
    ]  # fmt: skip
    with pytest.raises(UnusableCheckpoint, match="no usable step 11; usable are 2, 10"):
        reader.load_params(tmp_path, step=11)
    with pytest.raises(UnusableCheckpoint, match="no usable checkpoint step|no model.json"):
        reader.load_params(tmp_path / "11")


def test_leaves_not_in_a_checkpoint_come_from_its_base_in_the_bases_dtype(tmp_path):
    base, run = on_base(tmp_path)
    loaded = params.flatten(reader.load_params(run))
    assert {name: leaf.dtype.name for name, leaf in loaded.items()} == {
        "llm/norm/scale": "float16", "projector/0/bias": "float32"
    }  # fmt: skip
    np.testing.assert_array_equal(loaded["projector/0/bias"], MOVED["projector/0/bias"])
    assert reader.tensor_specs(run)["llm/norm/scale"].shape == (4,)
    assert list(reader.own_specs(run)) == ["projector/0/bias"]
    np.testing.assert_array_equal(reader.read_tensor(run, None, "llm/norm/scale"), BASE["llm/norm/scale"])
    shutil.move(tmp_path, tmp_path.with_name("elsewhere"))  # the two together: the path is relative
    assert set(reader.tensor_specs(tmp_path.with_name("elsewhere") / "run")) == set(BASE)


def test_a_base_gives_only_what_its_patterns_name_and_may_have_a_base_itself(tmp_path):
    base, run = on_base(tmp_path)
    entry = model_json.Base(str(run), 9, reader.fingerprint(run), ("llm/.*",))
    last = write(tmp_path / "last", {"vision/cls": np.ones(1, np.float32)}, base=(entry,))
    assert set(reader.tensor_specs(last)) == {"vision/cls", "llm/norm/scale"}
    with pytest.raises(UnusableCheckpoint, match="no parameter projector/0/bias in it nor in its bases"):
        reader.load_params(last, names=["projector/0/bias"])


def test_a_base_that_moved_or_changed_is_refused_with_the_remedy(tmp_path):
    base, run = on_base(tmp_path)
    shutil.move(base, tmp_path / "away")
    with pytest.raises(UnusableCheckpoint, match=r"base, step 0 of .*base, .*is not there .*set its `path`.*assemble"):
        reader.tensor_specs(run)
    write(tmp_path / "base", BASE | {"llm/norm/scale": np.arange(1, 5, dtype=np.float16)})
    with pytest.raises(UnusableCheckpoint, match="has changed"):
        reader.tensor_specs(run)


def test_a_checkpoint_that_is_its_own_base_is_refused(tmp_path):
    run = write(tmp_path / "run", MOVED)
    entry = model_json.Base(".", 0, reader.fingerprint(run), (".*",))
    model_json.write(run, dataclasses.replace(model_json.read(run), base=(entry,)), {})
    with pytest.raises(UnusableCheckpoint, match="changed|its own base"):
        reader.tensor_specs(run)


def test_the_fingerprint_sees_every_change_of_a_leaf_and_no_change_of_place(tmp_path):
    first = reader.fingerprint(write(tmp_path / "a", BASE))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert reader.fingerprint(tmp_path / "b") == first
    scale = BASE["llm/norm/scale"]
    flipped = scale.copy()
    flipped.view(np.uint16)[2] ^= 1
    changes = [{"llm/norm/scale": flipped}, {"llm/norm/scale": scale.reshape(2, 2)}, {"x": scale}]
    changes += [{"llm/norm/scale": scale.view(np.int16).astype(np.int32)}]
    prints = {reader.fingerprint(write(tmp_path / str(i), BASE | change)) for i, change in enumerate(changes)}
    assert len(prints | {first}) == len(changes) + 1
    (tmp_path / "b" / "0" / "params" / "_CHECKSUMS").unlink()
    assert reader.fingerprint(tmp_path / "b") == first  # made from the arrays where nobody wrote checksums


def test_loading_casts_only_when_asked_and_puts_each_leaf_as_it_comes(tmp_path):
    write(tmp_path, BASE)
    seen = []

    def put(name, leaf):
        seen.append((name, leaf.dtype.name))
        return leaf.sum()

    loaded = reader.load_params(tmp_path, names=["llm/norm/scale"], dtype=np.float32, put=put)
    assert seen == [("llm/norm/scale", "float32")] and loaded == {"llm": {"norm": {"scale": 6.0}}}


def test_specs_that_do_not_fit_are_named_with_shape_and_dtype():
    have = {"a": np.zeros((2, 3), np.float16), "b": np.zeros(1), "c": np.zeros(2, np.float32)}
    wish = {"a": np.zeros((3, 2)), "c": np.zeros(2, np.float16), "d": np.zeros(1)}
    with pytest.raises(UnusableCheckpoint) as error:
        reader.check_specs(have, wish, "DIR", dtypes=True)
    for part in (
        "d is missing",
        "b is unexpected",
        "a has shape (2, 3), wanted (3, 2)",
        "c has dtype float32, wanted float16",
    ):
        assert part in str(error.value)
    reader.check_specs(have, have, "DIR", dtypes=True)


