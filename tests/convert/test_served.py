"""`verify --served`: the table and the exit code, with transformers, and llama.cpp where xllamacpp is installed."""

import http.server
import importlib.util
import json
import re
import sys
import threading
import types

import numpy as np
import pytest
from etils import epath

from llava_jax.convert import exporting, importing, readers, served
from llava_jax.convert.__main__ import main as convert
from llava_jax.prompt import templates, tokenizer
from llava_jax.prompt.encode import Format
from tests.convert import tiny

SAME = re.compile(r" *\d+ \d pictures? +same +same +same +(\S+)")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    for name, seed in (("ours", 0), ("other", 1)):
        tiny.write_hub(folder / f"{name}_in", tiny.hub_tensors(seed))
        importing.import_checkpoint(folder / f"{name}_in", folder / name)
    exporting.export("hf", folder / "ours", folder / "hf")
    return folder


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(served, "PROMPTS", 4)
    monkeypatch.setattr(served, "NEW_TOKENS", 4)


def verify(folder, export, *options):
    return convert(["verify", "--served", str(folder / export), "--checkpoint", str(folder / "ours"), *options])


def test_35_prompts_of_all_shapes_are_the_same_every_time():
    prompts = served.make_prompts(28)
    assert prompts == served.make_prompts(28) and len(prompts) == 35
    assert {(len(prompt.pictures), len(prompt.turns)) for prompt in prompts} == {(1, 1), (2, 1), (1, 3)}
    assert len({picture for prompt in prompts for picture in prompt.pictures}) == 42


def test_an_export_answers_in_transformers_as_its_checkpoint(exported, few, capsys):
    pytest.importorskip("torch")
    assert verify(exported, "hf", "--with", "transformers") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["transformers", "prompt", "ids", "greedy", "ids", "text", "max", "|logp", "difference|"]
    rows = [SAME.fullmatch(line) for line in lines[1:5]]
    assert all(rows) and all(float(row[1]) < 1e-5 for row in rows)
    assert lines[5] == "transformers: 4 of 4 prompts have the same prompt ids, greedy ids and text"


def test_an_export_of_another_checkpoint_is_told_by_the_exit_code(exported, few, capsys):
    pytest.importorskip("torch")
    folder = exported
    paths = ["--served", str(folder / "hf"), "--checkpoint", str(folder / "other")]
    command = ["verify", *paths, "--with", "transformers"]
    assert convert(command) == 66
    out, error = capsys.readouterr()
    assert "DIFFER" in out and "transformers differ from those of" in error


def test_vllm_is_asked_for_no_more_positions_than_the_model_has(exported, few, monkeypatch):
    """It refuses more; vLLM itself is not installed where the tests run."""
    settings = {}

    class Model:
        def __init__(self, path, **given):
            settings.update(given)

        def chat(self, messages, sampling, use_tqdm):
            output = types.SimpleNamespace(token_ids=(5, 6), text="ab")
            return [types.SimpleNamespace(prompt_token_ids=[1, 2], outputs=[output])]

    fake = types.SimpleNamespace(LLM=Model, SamplingParams=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    path = epath.Path(exported / "hf")
    answers = list(readers.READERS["vllm"].ask(path, served.make_prompts(28)))
    assert [answer.ids for answer in answers] == [[5, 6]] * 4
    assert settings["limit_mm_per_prompt"] == {"image": 2}
    assert settings["max_model_len"] == tiny.TEXT_CONFIG["max_position_embeddings"] < readers.CONTEXT


def test_what_is_not_installed_is_skipped_by_name(exported, few, monkeypatch, capsys):
    pytest.importorskip("torch")
    absent = readers.READERS["vllm"]._replace(modules=("a_module_of_no_such_name",))
    monkeypatch.setitem(readers.READERS, "vllm", absent)
    assert verify(exported, "hf") == 0
    assert "vllm: skipped, a_module_of_no_such_name is not installed" in capsys.readouterr().out
    assert verify(exported, "hf", "--with", "vllm") == 64
    error = capsys.readouterr().err
    assert "nothing was compared, as none of vllm is installed: `pip install a_module_of_no_such_name`" in error


@pytest.mark.parametrize("arguments, wish", [
    (["verify"], "want DIR alone"), (["verify", "--served", "x"], "want DIR alone"),
    (["verify", "d", "--with", "vllm"], "goes with --served"),
    (["verify", "--served", "HF", "--checkpoint", "OURS", "--with", "ollama"], "--with ollama: wanted some of"),
    (["verify", "--served", "HF", "--checkpoint", "OURS", "--with", "llama.cpp"], r"no \*.gguf there"),
    (["verify", "--served", "gs://bucket/hf", "--checkpoint", "OURS"], "as others' programs read no bucket"),
    (["verify", "--served", "OURS", "--checkpoint", "OURS"], "wanted an export of the format hf"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(exported, arguments, wish, capsys):
    paths = {"HF": str(exported / "hf"), "OURS": str(exported / "ours")}
    assert convert([paths.get(one, one) for one in arguments]) == 64
    assert re.search(wish, capsys.readouterr().err)


def test_llama_cpps_server_is_asked_past_any_proxy(tmp_path, monkeypatch):
    replies = {"/props": {"media_marker": "<m>"}, "/apply-template": {"prompt": "a<m>b"}, "/tokenize": {"tokens": [5]},
               "/completion": {"tokens": [7], "content": "c"}}  # fmt: skip

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(replies[self.path]).encode())

        do_GET = do_POST

        def log_message(self, *_):
            pass

    def params():
        return types.SimpleNamespace(model=types.SimpleNamespace(), mmproj=types.SimpleNamespace())

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = types.SimpleNamespace(listening_address=f"http://127.0.0.1:{server.server_port}")
        module = types.SimpleNamespace(CommonParams=params, Server=lambda params: address,
                                       ggml_type=types.SimpleNamespace(GGML_TYPE_F32=0))  # fmt: skip
        monkeypatch.setitem(sys.modules, "xllamacpp", module)
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        for name in ("model", "mmproj"):
            (tmp_path / f"{name}-f32.gguf").write_bytes(b"")
        found = list(readers._ask_llama_cpp(epath.Path(tmp_path), served.make_prompts(28)[:1]))
        server.shutdown()
    assert found == [([5, -200, 5], [7], "c", None)]


def test_where_no_log_probability_is_known_none_is_compared():
    words = tokenizer.load(tiny.TOKENIZER, legacy=False)
    format = Format(templates.get("v1"), words, 28, 4, "pad")
    ours = readers.Answer([1], [5], "a", np.zeros((1, words.size), np.float32))
    row = served._compared(format, ours, ours._replace(logits=np.full_like(ours.logits, np.nan)))
    assert row.equal and row.text.split() == ["same", "same", "same", "-"]
    assert served._compared(format, ours, ours).text.endswith("0.0e+00")


@pytest.mark.slow
def test_llama_cpp_reads_the_same_prompts_and_says_the_same_of_text(exported, capsys):
    """Its CLIP is not ours (README of an export): ids of prompts are, and log-probabilities behind a text."""
    pytest.importorskip("xllamacpp")
    assert importlib.util.find_spec("gguf")
    exporting.export("gguf", exported / "ours", exported / "f32", dtype="f32")
    assert verify(exported, "f32") in (0, 66)
    lines = capsys.readouterr().out.splitlines()
    rows = [re.fullmatch(r" *\d+ \d pictures? +(\w+) +\w+ +\w+ +(\S+)", line) for line in lines[1:21]]
    assert all(row[1] == "same" and float(row[2]) < 0.1 for row in rows)
