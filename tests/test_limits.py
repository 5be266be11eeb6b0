"""What no run can have is refused by name, with what is wanted, before any work."""

import dataclasses
import re

import numpy as np
import pytest

from llava_jax import batch, cli, known_names, limits, typed
from llava_jax import config as configs
from llava_jax.errors import UsageError
from llava_jax.models import presets
from llava_jax.train import program

FILE = """
from llava_jax.config import Lora, Source, default

def get_config():
    config = default()
    config.model.preset = "tiny"
    config.data.sources = (Source("a.json", "pictures"),)
    config.data.update(batch_samples=16, row_tokens=128)
    config.train.update(lr=1e-3, steps=10)
    config.rates = (("projector/.*", config.train.get_ref("projector_lr")), (".*", config.train.get_ref("lr")))
    config.init = ((".*", "random"),)
    config.lora = ((".*", Lora(rank=8, alpha=16.0)),)
    return config
"""
REFUSED = """
data.batch_samples 0 -1 1.5 1000000000 99999999999999999999 nan inf many true
data.row_tokens 0 -5 1e9 1000000000 none ²
data.rows_per_chip -1 1000000000
data.rows_per_group 0 2 1000000000
data.images_per_group 0 -1 1000000000
data.skip_budget -0.1 1 1.01 nan inf
data.threads 0 100000
data.lengths 64 (64,)
data.layout ragged
data.order random
data.sources.0.weight -1 1e12 nan inf 0
data.sources.-1.weight 1
data.sources.².weight 1
data.sources.3.weight 1
train.lr -1 nan inf 1e30 fast none
train.projector_lr -1 nan 1e30
train.steps 0 -1 1.5 1e20 99999999999999999999
train.epochs 3 0 nan
train.seed -1 1.5 9223372036854775808 99999999999999999999999
train.warmup_ratio -0.1 1 1.5 nan
train.b1 1 -0.1 2 nan 0.99999999999
train.b2 1 1.0 -1
train.eps 0 -1e-8 1e-50 nan 10
train.weight_decay -0.1 1e9 inf
train.clip_norm 0 -1 nan 1e30
train.first_lr 1 -1
train.last_lr 1 nan
train.loss mean
train.group_samples 0 -1
train.label_smoothing 1 -0.1 nan 1e-1x
train.z_loss -1e-4 nan inf
train.accumulate 0 -2 3 1000000000
train.optimizer sgd
train.lora_dropout 1 0.999999 -0.1 nan
train.max_nonfinite 0 -3
train.eval_every -1
train.patience -1 1.5
train.sample_every -1 1e10
train.watchdog_secs 0 nan inf
mesh.data 0 -2
mesh.fsdp 0
mesh.slices 0 -1
checkpoint.every 0 -1
checkpoint.keep 0 -1
log.every 0
log.tensorboard maybe
model.dtype bf16 float16
model.remat some
prompt.image_mode highres
prompt.legacy maybe
profile -1 1000000
"""
ACCEPTED = """
data.batch_samples 128
data.images_per_group 10
data.skip_budget 0 0.5 0.999
data.threads 1 64
data.sources.0.weight 0.5 10
train.lr 0 1e-3 1
train.steps 1 100000000
train.seed 0 9223372036854775807
train.warmup_ratio 0 0.5
train.b1 0 0.9 0.99
train.b2 0.95 0.99999
train.eps 1e-15 1e-6
train.clip_norm none 0.3 1
train.lora_dropout 0 0.5 0.9
train.weight_decay 0 0.1
train.label_smoothing 0 0.1
train.z_loss 0 1e-4 1
checkpoint.every 1
"""


def values(table):
    return [(key, text) for key, *texts in map(str.split, table.strip().splitlines()) for text in texts]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "one.py").write_text(FILE)
    return tmp_path / "one.py"


def test_there_are_100_values_that_no_run_can_have():
    assert len(values(REFUSED)) >= 100


@pytest.mark.parametrize("key, text", values(REFUSED))
def test_a_value_that_no_run_can_have_is_refused_on_one_line_by_its_key(file, key, text):
    with pytest.raises(UsageError) as error:
        configs.load(file, {key: text})
    message = str(error.value)
    assert "one.py" in message and key.rpartition(".")[2] in message and "\n" not in message
    assert "want" in message or "set " in message


@pytest.mark.parametrize("key, text", values(ACCEPTED))
def test_values_that_people_use_are_taken(file, key, text):
    configs.load(file, {key: text})


@pytest.mark.parametrize("change", [{"rank": 0}, {"rank": 10**9}, {"alpha": 0.0}, {"alpha": -1.0}, {"alpha": np.nan}])
def test_an_adapter_that_cannot_learn_is_refused(change):
    with pytest.raises(UsageError, match=r"lora.\w+=\S+: want "):
        configs.Lora(**{"rank": 8, "alpha": 16.0} | change)


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(UsageError, match="every weight is 0"):
        configs.Data(sources=(configs.Source("a", weight=0.0), configs.Source("b", weight=0.0)))
    with pytest.raises(UsageError, match="data.validation.0.weight=-1.0: want 0 to 1,000"):
        configs.Data(sources=(configs.Source("a"),), validation=(configs.Source("a", weight=-1.0),))


def test_rows_longer_than_the_model_can_tell_apart_are_refused_its_rope_counted():
    tiny = presets.get("tiny")
    config = configs.Config(
        data=configs.Data(sources=(configs.Source("a"),), batch_samples=16, row_tokens=1025),
        train=configs.Train(lr=1e-3, steps=1), rates=(), init=(),
    )  # fmt: skip
    with pytest.raises(UsageError, match="data.row_tokens=1025: the model has 1024 positions .*want at most 1024"):
        program.check(config, tiny)
    for kind in ("linear", "dynamic"):
        scaled = dataclasses.replace(tiny.llm, rope_scaling=presets.RopeScaling(kind, 1.5))
        program.check(config, dataclasses.replace(tiny, llm=scaled))
        assert scaled.usable_positions == 1536
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, row_tokens=4))
    with pytest.raises(UsageError, match="row_tokens=4: an image takes 4 positions and its text some more; want more"):
        program.check(short, tiny)


def test_a_step_that_fills_any_memory_is_refused():
    limits.check_step(rows=4096, row_tokens=4096, images=40_000, image_size=336)
    for sizes in ((2**20, 2**20, 1, 336), (16, 128, 2**20, 336)):
        with pytest.raises(UsageError, match=r"a step of .* takes [\d,]+ GiB, want at most 256: lower data.batch"):
            limits.check_step(*sizes)


@pytest.mark.parametrize("field", ["tokens", "targets"])
@pytest.mark.parametrize("wrong", [960, -1, 2**31 - 1])
def test_an_id_that_the_vocabulary_has_no_row_for_is_refused_by_its_place(field, wrong):
    shapes = batch.spec(2, 8, 1, 1, 28)
    fields = {name: np.zeros(one.shape, one.dtype) for name, one in shapes._asdict().items()}
    limits.check_ids(batch.Batch(**fields), 960)
    fields[field][1, 3] = wrong
    with pytest.raises(UsageError, match=rf"batch {field}\[1, 3\] is the id {wrong}: .* 960 rows .* 0 to 959"):
        limits.check_ids(batch.Batch(**fields), 960)


def test_a_batch_of_another_tokenizers_ids_is_refused_before_it_is_on_a_device():
    config = configs.Config(
        data=configs.Data(sources=(configs.Source("a"),), batch_samples=16, row_tokens=32),
        train=configs.Train(lr=1e-3, steps=1), rates=(("projector/.*", 1e-3), (".*", None)), init=(),
    )  # fmt: skip
    built = program.build(config, presets.get("tiny"), 1)
    fields = {name: np.zeros(one.shape, one.dtype) for name, one in batch.spec(16, 32, 16, 1, 28)._asdict().items()}
    assert built.put(batch.Batch(**fields)).tokens.shape == (16, 32)
    fields["targets"][2, 5] = 960
    with pytest.raises(UsageError, match=r"batch targets\[2, 5\] is the id 960"):
        built.put(batch.Batch(**fields))


KEYS = [f"{name}.{field.name}" for name, branch in configs.BRANCHES.items() for field in dataclasses.fields(branch)]


def test_every_bound_is_of_a_key_that_there_is():
    assert set(limits.BOUNDS) <= {*KEYS, "source.weight", "lora.rank", "lora.alpha", "profile"}


def test_names_of_others_lead_to_keys_that_there_are():
    sources = [f"data.sources.0.{field.name}" for field in dataclasses.fields(configs.Source)]
    for meant in known_names.KNOWN_NAMES.values():
        for key in re.findall(r"\b(?:data|train|model|prompt|mesh|checkpoint|log)\.[\w.]*\w", meant):
            assert key in (*KEYS, *sources), key


@pytest.mark.parametrize("name, meant", [
    ("learning_rate", "train.lr"), ("per_device_train_batch_size", "data.batch_samples"),
    ("batch_size", "data.batch_samples"), ("save_steps", "checkpoint.every"), ("logging_steps", "log.every"),
    ("eval_steps", "train.eval_every"), ("gradient_checkpointing", "model.remat"), ("bf16", "model.dtype=bfloat16"),
    ("output_dir", "--workdir"), ("resume", "the same command"), ("model_max_length", "data.row_tokens"),
    ("gradient_accumulation_steps", "train.accumulate"), ("mm_projector_lr", "train.projector_lr"),
    ("image_aspect_ratio", "prompt.image_mode"), ("lora_r", "lora.rank"), ("num_train_epochs", "train.epochs"),
])  # fmt: skip
def test_a_name_of_transformers_or_llava_leads_to_ours_wherever_it_is_said(file, name, meant):
    for key in (name, f"train.{name}"):
        with pytest.raises(UsageError, match=rf"unknown key '{key}'; here that is {meant}"):
            configs.load(file, {key: "1"})
    file.write_text(FILE.replace("config.init =", f"config.train.{name} = 1\n    config.init ="))
    with pytest.raises(UsageError, match=rf"one.py: unknown key 'train.{name}'; here that is {meant}"):
        configs.load(file)
    flag = "--config." + meant if re.match(r"(data|train|model|log|checkpoint|prompt|lora)\.", meant) else meant
    for word in (f"--{name}=1", f"--{name.replace('_', '-')}=1"):
        with pytest.raises(UsageError, match=rf"unknown argument '{word}'; here that is {flag}"):
            cli.command(["--config", "c", "--workdir", "w", word], "train")


def test_a_key_in_the_wrong_branch_leads_to_its_own():
    assert typed.near_key("data.seed", KEYS) == "; did you mean 'train.seed'?"
    assert typed.near_key("row_tokens", KEYS) == "; did you mean 'data.row_tokens'?"
    assert typed.near_key("train.lrr", KEYS) == "; did you mean 'train.lr'?"
    assert typed.near_key("qwertyuiop", KEYS) == ""
