"""The command, in this process: what it leaves on disk, how it goes on, and how it refuses."""

import dataclasses
import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest

from llava_jax import files, params
from llava_jax.checkpoint import model_json, reader
from llava_jax.models import presets
from llava_jax.models.llava import abstract_params
from llava_jax.train import metrics
from llava_jax.train.__main__ import main
from tests.train import tiny


def train(config, workdir, **changes):
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    return main(["--config", str(config), "--workdir", str(workdir), *overrides])


def losses(workdir):
    return {row["step"]: row["loss"] for row in metrics.read(workdir)}


def disk_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled):
    """(config, workdir) of a whole run of stage 1: 12 steps, checkpoints every 3."""
    folder = tmp_path_factory.mktemp("stage1")
    config = tiny.write_run(folder / "run")
    assert train(config, folder / "out") == 0
    return config, folder / "out"


@pytest.fixture
def copied(finished, tmp_path):
    """The same run, to be damaged or gone on with."""
    config, workdir = finished
    return config, shutil.copytree(workdir, tmp_path / "copy")


def test_a_run_leaves_a_checkpoint_that_describes_itself(finished):
    config, workdir = finished
    metadata, names = model_json.read(workdir), set(params.flatten(abstract_params(presets.get("tiny"))))
    assert presets.config_from_json(dict(metadata.model)) == presets.get("tiny")
    assert metadata.prompt == model_json.PromptMetadata("v1", True, "square", False)
    assert model_json.read_tokenizer_files(workdir) == model_json.read_tokenizer_files(config.parent / "base")
    assert set(reader.own_specs(workdir)) == {name for name in names if name.startswith("projector/")}
    assert set(reader.tensor_specs(workdir)) == names
    assert reader.steps(workdir) == [9, 12] and list(losses(workdir)) == list(range(1, 13))


def test_frozen_leaves_take_no_bytes_in_a_checkpoint(finished):
    """Weights and two moments of what moves, and files' own overhead; the frozen model would be 0.8 MB."""
    trainable_rates = 4 * sum(spec.size for spec in reader.own_specs(finished[1]).values())
    assert 3 * trainable_rates < disk_bytes(finished[1] / "12") < 3 * trainable_rates + 120_000 < 4 * 199_472


def test_the_last_line_says_what_to_do_with_the_checkpoint(copied, capsys):
    config, workdir = copied
    assert train(config, workdir) == 0  # a finished run is finished
    lines = capsys.readouterr().out.strip().splitlines()
    assert "goes on after step 12" in lines[-3] and not any(line.startswith("step") for line in lines)
    assert lines[-2].startswith("warning: only 11 updates have a learning rate")
    for words in ("llava_jax.chat --checkpoint", "evaluate", "export --format hf", str(workdir)):
        assert words in lines[-1]


def test_a_finished_run_is_evaluated_by_the_command_that_its_last_line_names(copied, capsys):
    config, workdir = copied
    assert train(config, workdir, **{"train.eval_every": 1}) == 0
    assert "step 12: validation loss" in capsys.readouterr().out
    (row,) = metrics.read(workdir, metrics.VALIDATION)
    assert row["step"] == 12 and len(losses(workdir)) == 12


def test_going_on_repeats_the_losses_bit_for_bit(copied):
    config, workdir = copied
    before = losses(workdir)
    shutil.rmtree(workdir / "12")
    assert train(config, workdir) == 0
    assert losses(workdir) == before and reader.steps(workdir) == [9, 12]


def test_a_damaged_last_step_costs_only_itself(copied, capsys):
    config, workdir = copied
    before = losses(workdir)
    (workdir / "12" / "state" / "_METADATA").write_text("{")
    assert train(config, workdir) == 0
    assert "step 12 is damaged" in capsys.readouterr().err
    assert losses(workdir) == before


def test_changed_settings_are_refused_with_the_difference_and_harmless_ones_are_not(copied, capsys):
    config, workdir = copied
    assert train(config, workdir, **{"train.lr": 0.5, "data.batch_samples": 8}) == 64
    error = capsys.readouterr().err
    assert "train.lr: 0.01 -> 0.5" in error and "data.batch_samples: 4 -> 8" in error
    assert train(config, workdir, **{"log.every": 1, "checkpoint.keep": 5, "data.threads": 1}) == 0


def test_a_base_that_is_another_model_is_refused_and_one_that_lies_elsewhere_is_not(copied, tmp_path, capsys):
    """`model.base` may change on resume, as a base may move; another tokenizer would teach other ids in silence."""
    config, workdir = copied
    other, moved = (shutil.copytree(config.parent / "base", tmp_path / name) for name in ("other", "moved"))
    metadata = model_json.read(other)
    model = {**metadata.model, "llm": {**metadata.model["llm"], "rope_theta": 5e5}}
    model_json.write(other, dataclasses.replace(metadata, model=model), model_json.read_tokenizer_files(other))
    assert train(config, workdir, **{"model.base": other}) == 64
    assert "llm/rope_theta: 10000.0 -> 500000.0" in capsys.readouterr().err
    files = model_json.read_tokenizer_files(moved)
    assert train(config, workdir, **{"model.base": moved}) == 0
    files["tokenizer_config.json"] = files["tokenizer_config.json"].replace(b"true", b"false", 1)
    model_json.write(moved, model_json.read(moved), files)
    assert train(config, workdir, **{"model.base": moved}) == 64
    assert "tokenizer" in capsys.readouterr().err


def test_other_data_is_refused(copied, tmp_path, capsys):
    config, workdir = copied
    records = config.parent / "records.json"
    content = records.read_text()
    try:
        records.write_text(content.replace("What is it?", "What is this?"))
        assert train(config, workdir) == 64
    finally:
        records.write_text(content)
    assert "fingerprint" in capsys.readouterr().err


def test_a_changed_base_is_refused_on_going_on(copied, capsys):
    config, workdir = copied
    base = config.parent / "base"
    kept = base.rename(base.with_name("kept"))
    try:
        tiny.write_base(base, seed=1)
        assert train(config, workdir) == 66
    finally:
        shutil.rmtree(base)
        kept.rename(base)
    error = capsys.readouterr().err
    assert f"step 0 of {base}" in error and "convert assemble" in error


def test_frozen_leaves_that_begin_at_random_are_kept_where_every_reader_finds_them(run, tmp_path):
    text = run.read_text().replace("config.init = (", 'config.init = (("vision/cls|projector/0/bias", "random"), ')
    run.write_text(text)
    assert train(run, tmp_path / "out") == 0
    whole, base = (params.flatten(reader.load_params(folder)) for folder in (tmp_path / "out", run.parent / "base"))
    different = {name for name, leaf in whole.items() if not np.array_equal(leaf, base[name])}
    assert different == {"vision/cls", *(name for name in whole if name.startswith("projector/"))}
    assert set(reader.own_specs(tmp_path / "out" / "random")) == {"vision/cls"}


def test_stage_2_begins_with_stage_1s_projector_and_moves_the_decoder(finished, tmp_path):
    config, stage_1 = finished
    text = config.read_text().replace('(".*", None))', '("llm/.*", config.train.get_ref("lr")), (".*", None))')
    second = config.parent / "stage2.py"
    second.write_text(text)
    changes = {"model.base": stage_1, "train.steps": 2, "train.warmup_ratio": 0.5, "checkpoint.every": 1}
    assert train(second, tmp_path / "out", **changes) == 0
    after, before = (reader.load_params(folder) for folder in (tmp_path / "out", stage_1))
    first = reader.load_params(tmp_path / "out", step=1)  # the first update is at rate 0
    jax.tree.map(np.testing.assert_array_equal, first, before)
    same = {name.split("/")[0] for name, leaf in params.flatten(after).items()
            if np.array_equal(leaf, params.flatten(before)[name])}  # fmt: skip
    assert same == {"vision"} and set(reader.own_specs(tmp_path / "out")) == {
        name for name in params.flatten(before) if not name.startswith("vision/")
    }  # fmt: skip


def test_validation_and_samples_come_every_n_steps(run, tmp_path, capsys):
    assert train(run, tmp_path / "out", **{"train.eval_every": 6, "train.sample_every": 12}) == 0
    found = metrics.read(tmp_path / "out", metrics.VALIDATION)
    assert [row["step"] for row in found] == [6, 12] and found[0]["loss"] > 0
    samples = metrics.read(tmp_path / "out", metrics.SAMPLES)
    assert [row["id"] for row in samples] == ["r0", "r1", "r2", "r3"] and {row["step"] for row in samples} == {12}


def test_records_that_are_held_out_are_evaluated_and_not_trained_on(run, tmp_path, capsys):
    """Beside the validation set of the config; at the end the run says what it cut off."""
    text = run.read_text()
    run.write_text(text[: text.index("validation=")] + text[text.index("batch_samples=") :])
    changes = {"data.hold_out": 0.2, "train.eval_every": 12, "data.row_tokens": 70}
    assert train(run, tmp_path / "out", **changes) == 0
    said = capsys.readouterr()
    assert "8 records, 12 steps of 4 samples" in said.out and "step 12: validation loss" in said.out
    assert [row["step"] for row in metrics.read(tmp_path / "out", metrics.VALIDATION)] == [12]
    assert said.out.count("supervised tokens (") == 1 and "were cut off in" in said.out
    assert train(run, tmp_path / "other", **{"train.eval_every": 12}) == 64
    assert "wants records, by --config.data.hold_out=0.02 or --config.data.valid" in capsys.readouterr().err


def test_a_leaf_that_a_checkpoint_of_init_lacks_is_named_with_the_checkpoint(run, tmp_path, capsys):
    with reader.TensorWriter(tmp_path / "half" / "0" / "params") as writer:
        writer.write("projector/0/kernel", np.zeros((32, 40), np.float32))
        writer.write("projector/0/bias", np.zeros(48, np.float32))
    row = '("projector/.*", config.model.get_ref("start")), '
    run.write_text(run.read_text().replace("config.init = (", f"config.init = ({row}"))
    assert train(run, tmp_path / "out", **{"model.start": tmp_path / "half"}) == 66
    error = capsys.readouterr().err
    assert "projector/2/bias is missing" in error and "projector/0/kernel has shape (32, 40)" in error
    assert str(tmp_path / "half") in error


@pytest.mark.parametrize(
    "changes, code, words",
    [
        ({"train.learning_rate": 1}, 64, "here that is train.lr"),
        ({"model.preset": "tinyy"}, 64, "did you mean 'tiny'"),
        ({"prompt.template": "v7"}, 64, "v7"),
        ({"prompt.template": "mpt"}, 64, "template 'mpt' is written with <|im_end|> and <|im_start|>, no token of"),
        ({"data.row_tokens": 1152}, 64, "data.row_tokens=1152: the model has 1024 positions"),
        ({"data.row_tokens": 10**9}, 64, "data.row_tokens=1000000000: want 1 to 1,048,576"),
        ({"checkpoint.best": "true"}, 64, "checkpoint.best=True: no step has a validation loss; set train.eval_every"),
        ({"train.patience": 2, "train.eval_every": 1}, 64, "train.patience=2: the run would end with steps that are"),
        ({"train.eps": 0}, 64, "train.eps=0.0: want 1e-30 to 1"),
        ({"data.sources.0.path": "nowhere.json"}, 65, "nowhere.json"),
        ({"model.base": "nowhere"}, 66, "nowhere"),
        ({"mesh.fsdp": 7}, 64, "mesh"),
        ({"prompt.image_start_end": "true"}, 64, "<im_start>"),
        ({"log.wandb": "project"}, 64, "pip install wandb"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(run, tmp_path, capsys, changes, code, words):
    assert train(run, tmp_path / "out", **changes) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and words in line


def test_a_directory_with_a_checkpoint_of_another_kind_is_left_alone(run, tmp_path, capsys):
    with reader.TensorWriter(tmp_path / "imported" / "0" / "params") as writer:
        writer.write("a", np.zeros(1, np.float32))
    assert train(run, tmp_path / "imported") == 64
    assert "no training run wrote" in capsys.readouterr().err
    assert reader.steps(tmp_path / "imported") == [0]


def test_a_bad_picture_ends_the_run_with_its_record(run, tmp_path, capsys):
    (run.parent / "images" / "3.jpg").write_bytes(b"no picture")
    assert train(run, tmp_path / "out") == 65
    assert "r3" in capsys.readouterr().err


# {a state of the workdir: (what is done to it, exit code, words that are said)}
STATES = {
    "a directory whose name is no number": (lambda run: (run / "²").mkdir(), 0, "goes on after step 12"),
    "a file that is called as a step": (lambda run: (run / "99").write_text("x"), 0, "step 99 is damaged"),
    "settings that are gone": (lambda run: (run / "config.json").unlink(), 0, "config.json is gone: the settings of"),
    "Orbax's own file, damaged": (lambda run: (run / "12" / "_CHECKPOINT_METADATA").write_text("[]"), 0, "goes on"),
    "a step under another name": (lambda run: (run / "12").rename(run / "20"), 66, "20 holds the state after step 12"),
    "no model.json": (lambda run: (run / "model.json").unlink(), 66, "no model.json here"),
    "no tokenizer": (lambda run: shutil.rmtree(run / "tokenizer"), 66, "tokenizer: missing; copy the checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_a_workdir_in_an_odd_state_goes_on_or_is_refused_in_one_line(copied, capsys, state):
    config, workdir = copied
    change, code, words = STATES[state]
    before = losses(workdir)
    change(workdir)
    assert train(config, workdir) == code and losses(workdir) == before
    said = capsys.readouterr()
    assert words in said.out + said.err
    assert [line.startswith("error: ") for line in said.err.splitlines()].count(True) == (code > 0)


@pytest.mark.parametrize("name, words", [
    ("config.py", "File exists"), ("config.py/out", "Not a directory"), ("w" * 300, "File name too long")
])  # fmt: skip
def test_a_workdir_that_cannot_be_is_refused_in_one_line(run, capsys, name, words):
    assert train(run, run.parent / name) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


def test_a_workdir_on_a_disk_that_is_read_only_is_refused_in_one_line(run, tmp_path, monkeypatch, capsys):
    def refuses(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

    monkeypatch.setattr(files, "make_directory", refuses)
    assert train(run, tmp_path / "out") == 64
    assert capsys.readouterr().err == f"error: [Errno 30] Read-only file system: '{tmp_path / 'out'}'\n"


def test_a_finished_run_is_lengthened_with_its_optimizer_where_that_is_meant(copied, capsys):
    config, workdir = copied
    before = losses(workdir)
    assert train(config, workdir, **{"train.steps": 15}) == 64
    error = capsys.readouterr().err
    assert "train.steps: 12 -> 15" in error and "--config.train.lengthen=true" in error
    option = f"--config.model.base={workdir}"
    assert f"--workdir NEW {option}. " in error
    assert main(["--config", str(config), "--workdir", f"{workdir}-new", option]) == 0
    capsys.readouterr()
    assert train(config, workdir, **{"train.steps": 15, "train.lengthen": "true"}) == 0
    assert "goes on after step 12" in capsys.readouterr().out
    assert list(losses(workdir)) == list(range(1, 16)) and before.items() <= losses(workdir).items()
    assert train(config, workdir, **{"train.steps": 15}) == 0  # it is such a run now


def test_settings_of_an_older_version_are_completed_and_damaged_ones_set_aside(copied, capsys):
    config, workdir = copied
    path = workdir / "config.json"
    older, log, before = json.loads(path.read_text()), workdir / metrics.STEPS, losses(workdir)
    for key in ("watchdog_secs", "accumulate", "vision_lr", "label_smoothing", "z_loss", "patience"):
        del older[f"train.{key}"]
    del older["checkpoint.best"]
    path.write_text(json.dumps(older))
    log.write_text(log.read_text().replace('"lr": ', '"rate": ').replace('"data_wait": ', '"wait": '))
    shutil.rmtree(workdir / "12")
    assert train(config, workdir) == 0 and losses(workdir) == before
    assert [row.keys() >= {"rate"} for row in metrics.read(workdir)] == [True] * 9 + [False] * 3
    assert train(config, workdir, **{"train.accumulate": 2}) == 64
    assert "train.accumulate: 1 -> 2" in capsys.readouterr().err
    for content in ("[]", "{", "[" * 100_000):
        path.write_text(content)
        assert train(config, workdir) == 0
        assert "config.json is damaged" in capsys.readouterr().err
        assert json.loads(path.read_text())["train.accumulate"] == 1
    assert len(list(workdir.glob("config.json.damaged*"))) == 3
