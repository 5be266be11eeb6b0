"""Checkpoints of format 1, written before model.json had checksums (`tests/golden/make_format1.py`), are still read."""

import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from llava_jax.checkpoint import manager, model_json, reader
from llava_jax.errors import UnusableCheckpoint
from llava_jax.models import presets
from tests.golden.make_format1 import BASE, MOVED, PATH, PROMPT, STATE, WORDS


@pytest.fixture
def old(tmp_path) -> Path:
    with zipfile.ZipFile(PATH) as file:
        file.extractall(tmp_path)
    return tmp_path


def _restore(folder):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (MOVED, STATE))
    checkpoints = manager.open_checkpoints(folder, 2)
    saved = manager.restore(checkpoints, *structs)
    manager.close(checkpoints)
    return saved


@pytest.mark.parametrize("name", ["run", "sealed"])
def test_a_run_of_format_1_is_read_resumed_and_saved_again(old, name):
    found = model_json.read(old / name)
    assert found.prompt == PROMPT and presets.config_from_json(dict(found.model)) == presets.get("tiny")
    assert model_json.read_tokenizer_files(old / name) == WORDS
    loaded = reader.load_params(old / name)
    np.testing.assert_array_equal(loaded["llm"]["norm"]["scale"], BASE["llm/norm/scale"])
    np.testing.assert_array_equal(loaded["projector"]["0"]["bias"], MOVED["projector"]["0"]["bias"])
    saved = _restore(old / name)
    assert saved.step == 3 and saved.data == {"seed": 42}
    jax.tree.map(np.testing.assert_array_equal, (saved.params, saved.state), (MOVED, STATE))
    checkpoints = manager.open_checkpoints(old / name, 2)
    manager.save(checkpoints, saved._replace(step=4))
    manager.close(checkpoints)
    assert reader.steps(old / name) == [3, 4]
    model_json.write(old / name, found, WORDS)  # as `merge` and the next stage do
    assert model_json.read(old / name).base[0].path == "../base"
    assert json.loads((old / name / "model.json").read_text())["format"] == 2


def test_damage_of_format_1_is_noticed_too(old):
    array = old / "base" / "0" / "params" / "llm.norm.scale" / "0"
    before = array.read_bytes()
    array.write_bytes(before[:-1] + b"\x7f")
    with pytest.raises(UnusableCheckpoint, match="llm/norm/scale is damaged: .*CRC-32"):
        reader.load_params(old / "run")
    array.write_bytes(before)
    files = [path for path in (old / "run" / "3" / "params").rglob("*") if path.is_file() and path.parent.name == "d"]
    values = MOVED["projector"]["0"]["bias"].tobytes()
    flipped = 0
    for path in files:  # the array is compressed: some byte of some file is in it
        content = path.read_bytes()
        path.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
        try:
            assert reader.load_params(old / "run")["projector"]["0"]["bias"].tobytes() == values
        except UnusableCheckpoint:
            flipped += 1
        path.write_bytes(content)
    assert flipped
    (old / "base" / "0" / "params" / "_CHECKSUMS").write_text(json.dumps({name: 1 for name in BASE}))
    with pytest.raises(UnusableCheckpoint, match="has changed"):
        reader.tensor_specs(old / "run")


def test_keys_of_format_2_are_unknown_to_format_1(old):
    path = old / "run" / "model.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"checksum": "x"}))
    with pytest.raises(UnusableCheckpoint, match=r"unknown keys \['checksum'\]"):
        model_json.read(old / "run")
    assert set(content) == {"base", "family", "format", "model", "prompt", "source"}
