"""The command: each verb, one clear line and an exit code for what is wrong, and nothing half-written left."""

import subprocess
import sys

import pytest

from llava_jax.convert import importing
from llava_jax.convert.__main__ import main
from tests.convert import tiny


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return tiny.write_hub(tmp_path_factory.mktemp("command") / "in", tiny.hub_tensors())


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_every_verb_does_its_work(tmp_path, capsys, hub):
    ours, out = tmp_path / "ours", tmp_path / "out"
    assert run(capsys, "import", hub, ours, "--template", "llava_v1") == (0, f"import has written {ours}\n", "")
    assert run(capsys, "export", "--format", "hf", ours, out)[0] == 0
    assert run(capsys, "merge", ours, tmp_path / "whole")[0] == 0
    code, text, _ = run(capsys, "inspect", tmp_path / "whole")
    assert code == 0 and "fingerprint sums:" in text and "llm/blocks/q/kernel" in text and '"llava_v1"' in text
    assert run(capsys, "verify", tmp_path / "whole")[0] == 0
    clip, llm = tiny.write_clip(tmp_path / "clip"), tiny.write_llama(tmp_path / "llm")
    assert run(capsys, "assemble", tmp_path / "new", "--vision", clip, "--llm", llm)[0] == 0
    code, text, error = run(capsys, "assemble", tmp_path / "new", "--vision", clip, "--llm", llm)
    assert code == 64 and error.count("\n") == 1 and "exists already and is not overwritten" in error
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "out", "whole", "clip", "llm", "new"}
    code, _, error = run(capsys, "import", ours, tmp_path / "twice")
    assert code == 66 and "is a llava_jax checkpoint already (model.json): import nothing" in error
    leaf = next((tmp_path / "whole" / "0" / "params" / "vision.cls").glob("[0-9]*"))
    content = bytearray(leaf.read_bytes())
    content[3] ^= 4
    leaf.write_bytes(content)
    code, _, error = run(capsys, "verify", tmp_path / "whole")
    assert code == 66 and error.count("\n") == 1 and "parameter vision/cls is damaged" in error


@pytest.mark.parametrize("arguments, code, message", [
    (["import", "none", "DST"], 66, "none/config.json is missing"),
    (["import", "HUB", "DST", "--template", "v9"], 64, "template 'v9' is unknown"),
    (["import", "HUB", "DST", "--vision", "clip"], 64, "holds its own tower"),
    (["export", "--format", "hf", "none", "DST"], 66, "there is no such checkpoint"),
    (["export", "--format", "onnx", "none", "DST"], 64, "invalid choice"),
    (["inspect", "none"], 66, "there is no such checkpoint"),
    (["verify", "none", "--step", "x"], 64, "want the number of a step, or best"),
    (["assemble", "DST", "--vision", "HUB", "--llm", "HUB"], 66, "tower's model_type is 'llava'; wanted one of clip"),
    (["import", "llava-hf/llava-1.5-7b-hf", "DST"], 66, "hf download llava-hf/llava-1.5-7b-hf --local-dir"),
    (["assemble", "DST", "--vision", "openai/clip", "--llm", "HUB"], 66, "`hf download openai/clip --local-dir clip`"),
    (["import", "https://huggingface.co/llava-hf/x", "DST"], 64, "a path that begins with https://: want a path on a"),
    (["paint"], 64, "invalid choice"),
    ([], 64, "required"),
])  # fmt: skip
def test_what_is_wrong_is_one_line_and_a_code(tmp_path, capsys, hub, arguments, code, message):
    places = {"HUB": str(hub), "DST": str(tmp_path / "dst"), "none": str(tmp_path / "none")}
    found, _, error = run(capsys, *[places.get(argument, argument) for argument in arguments])
    assert (found, message in error) == (code, True), error
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_the_middle_leaves_nothing(tmp_path, capsys, hub, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importing.model_json, "write", full)
    code, _, error = run(capsys, "import", hub, tmp_path / "dst")
    assert code == 66 and error == "convert import: [Errno 28] No space left on device\n"
    assert not list(tmp_path.iterdir())


def test_a_failure_in_the_middle_leaves_nothing(tmp_path, capsys, hub):
    broken = tmp_path / "broken"
    tiny.write_hub(broken, tiny.hub_tensors())
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, _, error = run(capsys, "import", broken, tmp_path / "dst")
    assert code == 66 and "no whole safetensors file" in error
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.slow
def test_the_module_is_a_program():
    command = [sys.executable, "-m", "llava_jax.convert", "inspect", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 66 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_clip_config_that_says_nonsense_is_one_line_and_a_code(capsys, tmp_path):
    clip, llm = tiny.write_clip(tmp_path / "clip"), tiny.write_llama(tmp_path / "llm")
    old = '{"vision_config": {}, "vision_config_dict": [1]}'
    for content in ('{"vision_config": [1]}', old, '{"hidden_size": "wide"}', '{"layer_norm_eps": NaN}'):
        (clip / "config.json").write_text(content)
        code, _, error = run(capsys, "assemble", tmp_path / "dst", "--vision", clip, "--llm", llm)
        assert code == 66 and "; wanted " in error and error.count("\n") == 1, error
    assert not (tmp_path / "dst").exists()
