"""A thousand damaged files of four kinds of checkpoint and of a workdir: nothing silent, and no traceback."""

import collections
import contextlib
import functools
import hashlib
import io
import shutil
import sys

import jax
import numpy as np
import pytest

from llava_jax import params
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import reports
from llava_jax.errors import UnusableCheckpoint, UsageError
from llava_jax.generate.assistant import Assistant
from llava_jax.train import metrics
from llava_jax.train.__main__ import main
from tests import mutations
from tests.train import tiny
from tests.train.conftest import compiled  # noqa: F401 - one cache of programs for all starts
from tests.train.test_lora import write_config

SENTENCES = ("A chat between a curious user.", "  two  blanks\n", "é中🙂", "</s> a")
RUN = {"train.steps": 6, "checkpoint.every": 2, "train.eval_every": 2, "checkpoint.best": "true",
       "data.order": "modality_length", "log.tensorboard": "true"}  # fmt: skip


def train(config, workdir, **changes):
    return main(["--config", str(config), "--workdir", str(workdir),
                 *[f"--config.{key}={value}" for key, value in changes.items()]])  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, compiled):  # noqa: F811
    """A folder with a run of stage 1 and what it began with, and one of LoRA that rests on it."""
    folder = tmp_path_factory.mktemp("made")
    config = tiny.write_run(folder / "run")
    assert train(config, folder / "stage1", **RUN) == 0
    lora = write_config(config)
    assert train(lora, folder / "lora", **RUN, **{"model.base": folder / "stage1"}) == 0
    reports.merge(folder / "lora", folder / "merged", "best")
    return folder


def kept(folder, made, *names):
    """A tree with some of the directories that were made."""
    for name in names:
        shutil.copytree(made / name, folder / name)
    return folder


def digest(leaves):
    flat = params.flatten(leaves)
    return {name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for name, leaf in flat.items()}


def opened(directory, step=None):
    """All that an answer depends on."""
    assistant = Assistant.open(directory, step=step)
    form, leaves = assistant.format, jax.tree_util.tree_leaves_with_path(assistant.params)
    ids = [form.tokenizer.tokenize(text) for text in SENTENCES]
    digests = [(jax.tree_util.keystr(path), hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest())
               for path, leaf in leaves]  # fmt: skip
    return assistant.model.config, form.template, form.image_mode, form.image_start_end, ids, digests


LORA = ("run/base", "stage1", "lora")
# {what is opened, and which step of it: the directories that it is made of}
CHECKPOINTS = {"run/base": LORA[:1], "merged": ("merged",), "stage1": LORA[:2], "stage1 best": LORA[:2], "lora": LORA,
               "lora best": LORA}  # fmt: skip


def read_checkpoint(name, tree):
    place, _, step = name.partition(" ")
    return opened(tree / place, step or None)


def read_older(name, tree):
    return opened(tree / name, 4) if name in ("stage1", "lora") else None


def resumed(made, name, tree):
    """Goes on after step 4 of 6; what came of it, which a command shows in one line where it fails."""
    with mutations.heard() as said, contextlib.redirect_stdout(io.StringIO()):
        code = train(made / "run" / "config.py", tree, **RUN)
    lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    if code:
        assert len(lines) == 1 and code in (64, 65, 66) and "Traceback" not in said.getvalue(), (code, said.getvalue())
        raise (UnusableCheckpoint if code == 66 else UsageError)(lines[0])
    print(said.getvalue(), file=sys.stderr)
    losses = {row["step"]: row["loss"] for row in metrics.read(tree) if row["step"] > 4}
    validated = {row["step"]: row["loss"] for row in metrics.read(tree, metrics.VALIDATION) if row["step"] > 4}
    facts = model_json.read(tree), model_json.read_tokenizer_files(tree), reader.steps(tree)[-1], reader.best_step(tree)
    return losses, validated, facts, digest(reader.load_params(tree))


def tallied(outcomes):
    """{kind: how many}; the faults are printed, and there are none."""
    found, faults = collections.Counter(), []
    for what, outcome in outcomes:
        found[outcome.kind] += 1
        if outcome.kind.isupper():
            faults.append(f"{outcome.kind} {what}: {outcome.said}")
    assert not faults, "\n".join(faults)
    return found


COUNTS = [(20, 10), pytest.param(700, 300, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count, _", COUNTS)
def test_a_damaged_checkpoint_is_refused_in_one_line_or_is_the_same(made, tmp_path, count, _):
    trees = {name: kept(tmp_path / name.replace("/", "-"), made, *parts) for name, parts in CHECKPOINTS.items()}
    away = made.rename(made.with_name("away"))  # else a base that is damaged would be found where it was made
    try:
        found = tallied(mutations.run(trees, read_checkpoint, count, 0, tmp_path, read_older))
    finally:
        away.rename(made)
    assert sum(found.values()) == count and found["refused"] and found["equal"]


@pytest.mark.parametrize("_, count", COUNTS)
def test_a_damaged_workdir_goes_on_to_the_same_end_or_is_refused_in_one_line(made, tmp_path, _, count):
    workdir = kept(tmp_path / "kept", made, "stage1") / "stage1"
    shutil.rmtree(workdir / "6")
    found = tallied(mutations.run({"workdir": workdir}, functools.partial(resumed, made), count, 1, tmp_path))
    assert sum(found.values()) == count and found["refused"] and found["equal"]
