"""Config files and overrides: what is read, and what is refused with which words."""

import dataclasses
import json
from pathlib import Path

import pytest

from llava_jax import config as configs
from llava_jax import errors, typed
from llava_jax.errors import UsageError

TEXT = '''
from llava_jax.config import Source, default

def get_config():
    config = default()
    config.model.update(base="base", start="stage1")
    config.data.sources = (Source("a.json", "pictures"), Source("b.json", weight=0.5))
    config.train.update(lr=1e-3, epochs=1)
    config.rates = (
        ("vision/.*", None),
        ("projector/.*", config.train.get_ref("projector_lr")),
        ("llm/blocks/.*", (None, config.train.get_ref("lr"))),
        ("llm/.*", config.train.get_ref("lr")),
    )
    config.init = (("projector/.*", config.model.get_ref("start")), (".*", config.model.get_ref("base")))
    return config
'''


@pytest.fixture
def write(tmp_path):
    def write(text=TEXT, name="one.py"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_a_file_becomes_frozen_dataclasses_with_defaults(write):
    config = configs.load(write())
    assert config.train == configs.Train(lr=1e-3, projector_lr=1e-3, epochs=1.0)
    assert config.data.sources[1] == configs.Source("b.json", weight=0.5)
    assert config.rates[2:] == (("llm/blocks/.*", (None, 1e-3)), ("llm/.*", 1e-3))
    assert config.init == (("projector/.*", "stage1"), (".*", "base"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.lr = 1.0


def test_overrides_are_typed_and_reach_the_tables(write):
    overrides = {"train.lr": "2e-3", "train.epochs": "none", "train.steps": "7", "mesh.fsdp": "-1",
                 "prompt.legacy": "True", "data.sources.1.path": "7", "log.tensorboard": "false",
                 "model.start": "other"}  # fmt: skip
    config = configs.load(write(), overrides)
    assert config.rates[1:] == (("projector/.*", 2e-3), ("llm/blocks/.*", (None, 2e-3)), ("llm/.*", 2e-3))
    assert config.init[0] == ("projector/.*", "other")
    assert (config.train.epochs, config.train.steps, config.mesh.fsdp) == (None, 7, -1)
    assert (config.prompt.legacy, config.log.tensorboard, config.data.sources[1].path) == (True, False, "7")


def test_projector_lr_follows_lr_until_it_is_set(write):
    config = configs.load(write(), {"train.projector_lr": "2e-5"})
    assert dict(config.rates)["projector/.*"] == 2e-5 and dict(config.rates)["llm/.*"] == 1e-3


def test_no_base_is_random(write):
    assert configs.load(write(), {"model.base": ""}).init[1] == (".*", "random")


@pytest.mark.parametrize(
    "key, text, message",
    [
        ("train.lrr", "1", "unknown key 'train.lrr'; did you mean 'train.lr'"),
        ("trian.lr", "1", "unknown key 'trian.lr'; did you mean 'train.lr'"),
        ("rates", "1", "rates: a table is set in the file"),
        ("data.lengths", "3", "data.lengths='3': want tuple.*: a tuple is set in the file"),
        ("data.sources.3.path", "a", "unknown key 'data.sources.3.path': want data.sources.0, 1, 2 and a name"),
        ("data.sources.0.pth", "a", "unknown key 'data.sources.0.pth': want one of data.sources.0.path,"),
        ("data.sources.2.weight", "2", "data.sources.2.path is empty"),
        ("data.validation.1.path", "a", "unknown key 'data.validation.1.path': want data.validation.0 and a name"),
        ("data.hold_out", "0.02", "data.hold_out=0.02: nothing evaluates these records; set train.eval_every"),
        ("data.hold_out", "1", "data.hold_out=1.0: want 0 to 0.9"),
        ("lora.rank", "8", "lora.rank=8: the config has no adapters; begin with configs/llava15_7b_task_lora.py"),
        ("train.lr", "fast", "train.lr='fast': want float"),
        ("train.lr", "none", "train.lr='none': want float"),
        ("train.lr", "nan", "train.lr=nan: want 0 to 10"),
        ("train.seed", "1.5", "train.seed='1.5': want int"),
        ("train.steps", "3", "train.steps=3, train.epochs=1.0: want exactly one"),
        ("train.last_lr", "1", "train.last_lr=1.0: want 0 to "),
        ("train.loss", "grop_mean", "want one of token_mean, group_mean; did you mean 'group_mean'"),
        ("train.accumulate", "3", "train.accumulate=3 does not divide data.batch_samples=128"),
        ("log.tensorboard", "maybe", "log.tensorboard='maybe': want bool"),
        ("data.skip_budget", "2", "data.skip_budget=2.0: want 0 to 0.999999"),
        ("mesh.data", "-1", "mesh=.*: want sizes of at least 1, or -1 for at most one"),
        ("checkpoint.every", "0", "checkpoint.every=0: want 1 to 2,147,483,647"),
    ],
)
def test_a_wrong_override_is_refused_by_file_and_key(write, key, text, message):
    with pytest.raises(ValueError, match=message) as error:
        configs.load(write(), {key: text})
    assert "one.py" in str(error.value)


@pytest.mark.parametrize("unused", [{"first_lr": 1e-6, "warmup_ratio": 0.0}, {"last_lr": 1e-6, "schedule": "constant"}])
def test_a_rate_that_no_schedule_uses_is_refused(unused):
    with pytest.raises(ValueError, match="leave out what is not used"):
        configs.Train(lr=1e-3, steps=10, **unused)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("epochs=1", "epoch=1", "unknown key 'train.epoch'; did you mean 'train.epochs'"),
        ("config.init", "config.inits", "unknown key 'inits'; did you mean 'init'"),
        ("lr=1e-3, ", "", "train.lr=None: want float"),
        ("epochs=1", "steps=1.5", "train.steps=1.5: want int"),
        ('"vision/.*", None', '"vision/.*"', "rates.0=.*: want"),
        ("(Source(", "[(Source(", "'\\[' was never closed|does not match"),
        ("return config", "return 1", r"get_config\(\) returns int"),
        ("get_config", "get", r"no function get_config\(\)"),
        ('"llm/.*", config.train.get_ref("lr")', '"llm/.*", 1.0', None),
    ],
)
def test_a_wrong_file_is_refused_by_name_and_key(write, old, new, message):
    path = write(TEXT.replace(old, new))
    if message is None:  # the scalar still reaches another row
        configs.load(path)
        return
    with pytest.raises((ValueError, SyntaxError), match=message) as error:
        configs.load(path)
    assert isinstance(error.value, SyntaxError) or "one.py" in str(error.value)


def test_a_scalar_that_no_table_reads_is_refused(write):
    path = write(TEXT.replace('config.train.get_ref("projector_lr")', 'config.train.get_ref("lr")'))
    assert configs.load(path).train.projector_lr == 1e-3
    with pytest.raises(ValueError, match=r"one.py: no row of rates or init reads train.projector_lr=2e-05"):
        configs.load(path, {"train.projector_lr": "2e-5"})
    path = write(TEXT.replace('config.model.get_ref("start")', '"elsewhere"'))
    with pytest.raises(ValueError, match=r"no row of rates or init reads model\.start='stage1'"):
        configs.load(path)


def test_a_missing_file_names_its_neighbour(write, tmp_path):
    write()
    with pytest.raises(FileNotFoundError, match=r"ones.py: no such file; did you mean 'one.py'"):
        configs.load(tmp_path / "ones.py")


def test_a_file_may_start_from_its_sibling(write):
    write()
    text = "from llava_jax.config import start_from\ndef get_config():\n    config = start_from(__file__, 'one.py')\n"
    path = write(text + "    config.train.lr = 5e-4\n    return config\n", "two.py")
    config = configs.load(path, {"train.seed": "1"})
    assert dict(config.rates)["projector/.*"] == 5e-4 and config.train.seed == 1


def test_a_description_survives_json_and_a_difference_reads(write):
    old = typed.describe(configs.load(write()))
    assert json.loads(json.dumps(old)) == old
    assert old["rates"][0] == ["vision/.*", None] and old["data.sources.1.weight"] == 0.5
    new = typed.describe(configs.load(write(), {"train.seed": "1"})) | {"train.new": 1}
    assert typed.difference(old, old) == []
    assert typed.difference(old, new) == ["train.new: (no such key) -> 1", "train.seed: 42 -> 1"]


FAULTY = [
    ("def get_config(:\n    pass\n", "line 1: SyntaxError: "),
    ("x = 1\n\0\n", "null bytes"),
    ("import nowhere_at_all\n", "line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ("from llava_jax.config import Sorce\n", "line 1: ImportError: cannot import name 'Sorce'"),
    ("def get_config():\n    return {}['x']\n", "line 2: KeyError: 'x'"),
    ("def get_config():\n\n    raise RuntimeError('two\\nlines')\n", "line 3: RuntimeError: two lines"),
    ("class Odd(Exception):\n    pass\n\ndef get_config():\n    raise Odd('it is')\n", "line 5: Odd: it is"),
    ("import sys\n\nsys.exit(3)\n", "line 3: SystemExit: 3"),
    ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
    ("def get_config(x):\n    pass\n", "TypeError: get_config() missing 1 required positional argument: 'x'"),
    ("assert False, 'never'\n", "line 1: AssertionError: never"),
    ("def get_config():\n    return get_config()\n", "line 2: RecursionError: maximum recursion depth exceeded"),
    ("from llava_jax.config import default\nc = default()\nc.trian.lr = 1\n", "line 3: AttributeError: "),
    ("from llava_jax.config import Lora\nLora(rank=0, alpha=1.0)\n", "line 2: lora.rank=0: want 1 to 65,536"),
    ("from llava_jax.config import start_from\nstart_from(__file__, 'two.py')\n", "line 2: config "),
    ("x = '\udce9'\n", "UnicodeDecodeError"),
    ("get_config = 1\n", "TypeError: 'int' object is not callable"),
]  # fmt: skip


@pytest.mark.parametrize("text, message", FAULTY)
def test_a_file_that_fails_is_one_line_with_file_and_line(tmp_path, text, message):
    (tmp_path / "one.py").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError) as error:
        configs.load(tmp_path / "one.py")
    assert str(error.value).startswith(f"config {tmp_path}/one.py: ") and message in str(error.value)
    assert "\n" not in str(error.value) and errors.exit_code(error.value) == 64


def test_a_file_that_fails_names_the_file_that_it_starts_from(tmp_path):
    (tmp_path / "one.py").write_text("from llava_jax.config import start_from\n\nstart_from(__file__, 'two.py')\n")
    (tmp_path / "two.py").write_text("def get_config():\n    return x\n")
    with pytest.raises(UsageError, match=r"one.py: line 3: config \S+two.py: line 2: NameError: name 'x' is not"):
        configs.load(tmp_path / "one.py")


def test_an_interrupt_of_a_config_file_goes_through(write):
    with pytest.raises(KeyboardInterrupt):
        configs.load(write("raise KeyboardInterrupt\n"))


@pytest.mark.parametrize("text", ["1" + "0" * 400, "-1" + "0" * 400, "1e999"])
def test_a_number_that_no_float_holds_is_refused(write, text):
    with pytest.raises(UsageError, match="train.lr="):
        configs.load(write(), {"train.lr": text})
    with pytest.raises(UsageError, match="train.lr=|line 8: OverflowError"):
        configs.load(write(TEXT.replace("lr=1e-3", f"lr={text}")))


def test_validation_and_adapters_are_set_by_flags(write):
    flags = {"data.validation.0.path": "v.json", "data.validation.0.images": "pics", "data.sources.2.path": "c.json"}
    data = configs.load(write(), flags | {"train.eval_every": "50"}).data
    assert data.validation == (configs.Source("v.json", "pics"),)
    assert [source.path for source in data.sources] == ["a.json", "b.json", "c.json"]
    task = Path(__file__).parent.parent / "configs" / "llava15_7b_task_lora.py"
    flags = {"lora.rank": "16", "lora.alpha": "32", "data.hold_out": "0.02", "train.eval_every": "9"}
    config = configs.load(task, flags)
    assert config.lora == (("llm/.*", configs.Lora(16, 32.0)), (".*", None)) and config.data.hold_out == 0.02
    with pytest.raises(ValueError, match="unknown key 'lora.rnak': want one of lora.rank, lora.alpha"):
        configs.load(task, {"lora.rnak": "16"})


def test_a_step_of_any_size_suits_an_order_by_length_and_only_a_mean_of_groups_wants_a_multiple(write):
    task = Path(__file__).parent.parent / "configs" / "llava15_7b_task.py"
    assert configs.load(task, {"data.batch_samples": "20"}).data.order == "modality_length"
    with pytest.raises(ValueError, match="train.group_samples=16 does not divide data.batch_samples=20"):
        configs.load(task, {"data.batch_samples": "20", "train.loss": "group_mean"})
