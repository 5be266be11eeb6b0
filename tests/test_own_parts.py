"""Parts of a user's own, defined in `own_parts` without an edit in the package, in every command."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from llava_jax import config as configs
from llava_jax import params
from llava_jax.chat import main as chat
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import exporting, importing
from llava_jax.convert.__main__ import main as convert
from llava_jax.errors import UsageError
from llava_jax.evaluate.__main__ import main as evaluate
from llava_jax.models import presets, registry
from llava_jax.models.llava import abstract_params
from llava_jax.models.parts import DecoderConfig
from llava_jax.plan.__main__ import main as plan
from llava_jax.prompt import tokenizer
from llava_jax.train import inputs, metrics
from llava_jax.train import program as programs
from llava_jax.train.__main__ import main as train
from tests.train import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(config of a run, its base): a model of the three parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(registry.VARIABLE, "tests.own_parts")
        registry.towers()
    from tests.own_parts import ParallelConfig, PatchConfig

    folder = tmp_path_factory.mktemp("own")
    run = tiny.write_run(folder / "run")
    model = presets.LlavaConfig(
        PatchConfig(image_size=14, patch_size=7, width=16, mlp_width=8, layers=1, heads=1), "gated",
        ParallelConfig(vocab=960, width=24, mlp_width=32, layers=2, heads=2, kv_heads=1, head_width=12,
                       max_positions=256),
    )  # fmt: skip
    rng, place = np.random.default_rng(0), folder / "base"
    with reader.TensorWriter(place / "0" / reader.PARAMS) as writer:
        for name, leaf in params.flatten(abstract_params(model)).items():
            writer.write(name, rng.normal(name.endswith("scale"), 0.2, leaf.shape).astype(np.float32))
    prompt = model_json.PromptMetadata("v1", True, "square", False)
    metadata = model_json.Metadata(presets.config_to_json(model), prompt)
    model_json.write(place, metadata, tokenizer.load(tiny.TOKENIZER, legacy=True).files())
    run.write_text(run.read_text().replace(str(folder / "run" / "base"), str(place)))
    return run, place


def flat(directory):
    return params.flatten(reader.load_params(directory, put=lambda name, leaf: leaf))


def test_they_train_resume_answer_and_go_out_and_in_again(base, tmp_path, capsys, monkeypatch):
    run, _ = base
    settings = ["--config.train.lr=0.02", "--config.train.warmup_ratio=0"]
    for steps in (3, 6):  # the second start goes on after step 3
        changes = [f"--config.train.steps={steps}", f"--config.train.lengthen={steps == 6}"]
        assert train(["--config", str(run), "--workdir", str(tmp_path / "out"), *settings, *changes]) == 0
    losses = [row["loss"] for row in metrics.read(tmp_path / "out")]
    assert len(losses) == 6 and losses[-1] < losses[0]

    picture = str(run.parent / "images" / "0.jpg")
    answers = []
    for directory in (tmp_path / "out", tmp_path / "again"):
        if directory.name == "again":
            exporting.export("llava", tmp_path / "out", tmp_path / "llava-parallel")
            importing.import_checkpoint(tmp_path / "llava-parallel", directory)
        capsys.readouterr()
        question = ["--image", picture, "--prompt", "What is it?", "--max-new-tokens", "8"]
        assert chat(["--checkpoint", str(directory), *question]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""
    one, two = flat(tmp_path / "out"), flat(tmp_path / "again")
    assert set(one) == set(two)
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[name])


def test_adapters_reach_all_their_kernels_and_are_merged(base, tmp_path):
    run, _ = base
    text = run.read_text().replace(
        "    return config",
        "    from llava_jax.config import Lora\n    config.lora = (('llm/.*', Lora(rank=2, alpha=4.0)), ('.*', None))\n"
        "    config.rates = (('.*/lora_[ab]', config.train.get_ref('lr')), ('.*', None))\n"
        "    config.init = (('.*/lora_.*', 'random'), ('.*', config.model.get_ref('base')))\n    return config",
    )
    adapted = tmp_path / "lora.py"
    adapted.write_text(text)
    assert train(["--config", str(adapted), "--workdir", str(tmp_path / "out"), "--config.train.steps=2"]) == 0
    kernels = {name for name in reader.own_specs(tmp_path / "out") if name.endswith("lora_a")}
    assert {"llm/blocks/q/lora_a", "llm/blocks/down/lora_a"} <= kernels
    assert convert(["merge", str(tmp_path / "out"), str(tmp_path / "merged")]) == 0
    assert not any("lora" in name for name in flat(tmp_path / "merged"))


def test_a_run_of_them_is_planned_with_the_sizes_of_its_base(base, tmp_path, capsys):
    pytest.importorskip("libtpu")
    run, _ = base
    assert plan(["--config", str(run), "--topology", "v5e:2x2", "--json", str(tmp_path / "plan.json")]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and all(part["useful"] > 0 for part in found["flops_by_part"].values())
    config = configs.load(run)
    flops = programs.build(config, inputs.model_config(config.model), 4).flops
    block = 2 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 32)  # q and o, k and v, gate, up and down
    # Two blocks and the head, frozen: the forward pass and the gradient of their inputs.
    assert (flops.tokens, flops.supervised) == (2 * 2 * block, 2 * 2 * 24 * 960)


def test_they_answer_a_benchmark(base, tmp_path, capsys):
    run, place = base
    row = {"question": "What is it?", "answer": "A square.", "image": "0.jpg"}
    data = tmp_path / "data"
    data.mkdir()
    (data / "questions.jsonl").write_text("".join(json.dumps({"id": str(i), **row}) + "\n" for i in range(3)))
    (data / "images").symlink_to(run.parent / "images")
    said = ["--benchmark", "custom", "--data", str(data)]
    answers = str(tmp_path / "answers.jsonl")
    assert evaluate(["answer", *said, "--checkpoint", str(place), "--out", answers, "--max-new-tokens", "4"]) == 0
    assert evaluate(["score", *said, answers]) == 0
    assert "of 3" in capsys.readouterr().out


def test_a_part_that_exists_is_not_registered_again_and_an_unknown_kind_says_how_to_add_one(base, monkeypatch):
    for part in (registry.tower("clip"), registry.decoder("qwen3"), registry.connector("linear")):
        with pytest.raises(UsageError, match="there is a .* already; want its own"):
            registry.register(part)
    with pytest.raises(UsageError, match="of the name or the config of 'clip_2' already"):
        registry.register(replace(registry.tower("clip"), kind="clip_2"))
    with pytest.raises(UsageError, match="no part has a DecoderConfig; there are llama"):
        registry.decoder_of(DecoderConfig(8, 8, 8, 1, 1, 1, 8))
    data = presets.config_to_json(presets.get("tiny"))
    with pytest.raises(UsageError, match=r"llm.kind='lama': want one of llama.*mean 'llama'.*llava_jax.register"):
        presets.config_from_json(data | {"llm": data["llm"] | {"kind": "lama"}})
    monkeypatch.setenv(registry.VARIABLE, "no_such_module_of_parts")
    with pytest.raises(UsageError, match="LLAVA_JAX_PARTS names the module 'no_such_module_of_parts'"):
        registry.towers()


@pytest.mark.parametrize("text, words", [
    ('raise ValueError("boom\\nmore")', "which fails: ValueError: boom$"),
    ("def broken(:", "which fails: SyntaxError: invalid"),
    ("import no_such_lib", "fails: ModuleNotFoundError: No module named 'no_such_lib'$"), ("exit(3)", "SystemExit: 3$"),
    ("x = 1", "which registers no part: want one that calls `llava_jax.register"),
    ("from llava_jax.models import mlp, registry\nregistry.register(mlp.PLAIN)", "UsageError: register: there is a "),
])  # fmt: skip
def test_a_module_of_parts_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, text, words):
    (tmp_path / "odd_parts_of_mine.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_parts_of_mine", raising=False)
    monkeypatch.setenv(registry.VARIABLE, " tests.own_parts, odd_parts_of_mine")
    with pytest.raises(UsageError, match=rf"LLAVA_JAX_PARTS names the module 'odd_parts_of_mine', .*{words}"):
        registry.decoders()
    monkeypatch.delitem(sys.modules, "odd_parts_of_mine", raising=False)
