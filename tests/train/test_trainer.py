"""The trainer, called from Python: on a data set that is an object, in any thread, again and again in one process."""

import asyncio
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from PIL import Image

import llava_jax
from llava_jax import Conversation, Hook, Trainer, Turn
from llava_jax import config as configs
from llava_jax.checkpoint import reader
from llava_jax.errors import DataError, UsageError
from llava_jax.train import metrics
from tests.ports import free_port
from tests.train import tiny

PACKED = {"data.layout": "packed", "data.rows_per_chip": 2, "data.rows_per_group": 2, "data.row_tokens": 200,
          "data.images_per_group": 6}  # fmt: skip


class Squares:
    """The records of `tiny.write_run` as conversations. images: "path" or "object"."""

    fingerprint = "squares, version 1"

    def __init__(self, folder, images="path"):
        self.folder, self.images = folder, images
        self.records = json.loads((folder / "records.json").read_text())

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        question, answer = (turn["value"] for turn in record["conversations"])
        path = self.folder / "images" / record["image"]
        image = str(path) if self.images == "path" else Image.open(path)
        return Conversation((Turn("user", question), Turn("assistant", answer)), (image,), record["id"])


class Killed(Exception):
    """What ends a run in the middle of its steps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compiled):
    folder = tmp_path_factory.mktemp("trainer") / "run"
    tiny.write_run(folder)
    return folder


def settings(folder, **changes):
    return configs.load(folder / "config.py", {"train.steps": 8, "log.every": 100, **changes})


def losses(workdir):
    return [row["loss"] for row in metrics.read(workdir)]


@pytest.fixture(scope="module")
def whole(folder):
    """{layout: the losses of a run on the records' file that nobody disturbs}."""
    found = {}
    for layout, changes in (("padded", {}), ("packed", PACKED)):
        trainer = Trainer(settings(folder, **changes), workdir=folder.parent / layout)
        assert trainer.fit()
        found[layout] = losses(trainer.workdir)
    return found


def killed(step, state, stop):
    raise Killed


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_data_set_that_is_an_object_trains_as_its_file_and_is_resumed_after_a_kill_and_a_stop(
    folder, whole, tmp_path, layout
):
    config = settings(folder, **(PACKED if layout == "packed" else {}))
    squares = Squares(folder, "path" if layout == "packed" else "object")
    with pytest.raises(Killed):
        Trainer(config, squares, hooks=[Hook(4, killed)], workdir=tmp_path).fit()
    assert reader.latest_step(tmp_path) == 3 and losses(tmp_path) == whole[layout][:4]
    trainer = Trainer(config, squares, hooks=[Hook(5, lambda *_: trainer.stop())], workdir=tmp_path)
    assert not trainer.fit()
    assert reader.latest_step(tmp_path) == len(losses(tmp_path)) == 5
    assert trainer.fit()  # the same trainer goes on, too
    assert losses(tmp_path) == whole[layout] and reader.latest_step(tmp_path) == 8
    assert "data.sources.0.path" not in json.loads((tmp_path / "config.json").read_text())


def test_another_fingerprint_is_other_data(folder, whole, tmp_path):
    squares = Squares(folder)
    assert Trainer(settings(folder), squares, workdir=tmp_path).fit()
    squares.fingerprint = "squares, version 2"
    with pytest.raises(UsageError, match="saved data state does not fit this run .fingerprint: "):
        Trainer(settings(folder), squares, workdir=tmp_path).fit()


class Changed(Squares):
    """The same, but for one conversation."""

    def __init__(self, folder, changed):
        super().__init__(folder)
        self.changed = changed

    def __getitem__(self, index):
        return self.changed if index == 3 else super().__getitem__(index)


TURNS = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A square."))
PICTURE = Image.new("RGB", (28, 28))


@pytest.mark.parametrize("conversation, words", [
    ({"conversations": []}, r"unreadable: a dict: want a llava_jax.Conversation"),
    (Conversation((Turn("human", "Hi."), TURNS[1])), r"unknown_role: turns\[0\].role='human': want 'user' or"),
    (Conversation((), (PICTURE,)), r"empty_conversations: turns=\(\)"),
    (Conversation(TURNS), r"marker_without_image"),
    (Conversation(TURNS, (PICTURE,), weight=0.0), r"bad_weight: weight=0.0"),
    (Conversation(TURNS, (np.zeros((28, 28, 3), np.uint8),)), r"bad_image: .*image given as ndarray: want a path"),
    (Conversation(TURNS, ("nowhere.jpg",), "odd"), r"id='odd' missing_image: .*nowhere.jpg"),
])  # fmt: skip
def test_a_conversation_that_cannot_be_trained_on_is_named(folder, conversation, words):
    trainer = Trainer(settings(folder), Changed(folder, conversation))
    with pytest.raises(DataError, match=r"Changed\[3\]") as raised:
        for _ in zip(range(3), trainer._feed):
            pass
    with pytest.raises(DataError, match=words):
        raise raised.value
    assert "Mend what Changed[NUMBER] gives, or leave it out, or raise data.skip_budget" in str(raised.value)


class Untold(Squares):
    fingerprint = None


@pytest.mark.parametrize("dataset, words", [
    (list, r"dataset of type list: want `len\(dataset\)`, `dataset\[i\]`.* and `dataset.fingerprint`"),
    (Untold, r"Untold.fingerprint=None: want a text that changes whenever a conversation does"),
])  # fmt: skip
def test_what_is_no_data_set_is_refused_with_what_it_lacks(folder, tmp_path, dataset, words):
    made = dataset(folder) if dataset is Untold else [Conversation(TURNS, (PICTURE,))]
    with pytest.raises(UsageError, match=words):
        Trainer(settings(folder), made, workdir=tmp_path / "out").fit()
    assert not (tmp_path / "out").exists()


def test_without_sources_and_without_a_data_set_there_is_nothing_to_train_on(folder, tmp_path):
    config = settings(folder)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=()))
    with pytest.raises(UsageError, match="data.sources is empty: want at least one Source"):
        Trainer(config, workdir=tmp_path).fit()


def process_state():
    """What a run may not change of its process."""
    logger = logging.getLogger("llava_jax")
    return {"handlers": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
            "wakeup": signal.set_wakeup_fd(-1), "jax": dict(jax.config.values), "level": logger.level,
            "logging": [*logger.handlers], "propagate": logger.propagate}  # fmt: skip


def test_it_trains_in_any_thread_and_leaves_the_process_as_it_was(folder, whole, tmp_path):
    before, ended, found = process_state(), [], {threading.current_thread()}
    trainers = [Trainer(settings(folder), workdir=tmp_path / name) for name in ("thread", "main")]
    found = set(threading.enumerate())
    thread = threading.Thread(target=lambda: ended.append(trainers[0].fit()))
    thread.start()
    thread.join()
    ended.append(trainers[1].fit())
    assert ended == [True, True] and process_state() == before
    assert losses(tmp_path / "thread") == losses(tmp_path / "main") == whole["padded"]
    left = {thread.name for thread in set(threading.enumerate()) - found}
    assert not left & {"lock", "watchdog", "sigterm", "signals"}, left


def test_two_runs_at_once_know_nothing_of_each_other(folder, whole, tmp_path):
    """One is stopped, and refuses a third on its directory, while the other goes on."""
    here, other = (Trainer(settings(folder), workdir=tmp_path / name) for name in ("here", "other"))
    reached, go_on, ended = threading.Event(), threading.Event(), []

    def wait(step, state, stop):
        reached.set()
        assert go_on.wait(120)

    stopped = Trainer(settings(folder), hooks=[Hook(2, wait)], workdir=tmp_path / "here")
    thread = threading.Thread(target=lambda: ended.append(stopped.fit()))
    thread.start()
    try:
        assert reached.wait(120)
        with pytest.raises(UsageError, match="two runs cannot share a directory"):
            here.fit()
        stopped.stop()
        assert other.fit()
    finally:
        go_on.set()
        thread.join()
    assert ended == [False] and len(losses(tmp_path / "here")) == reader.latest_step(tmp_path / "here") < 8
    assert here.fit() and losses(tmp_path / "here") == losses(tmp_path / "other") == whole["padded"]


def test_it_trains_inside_a_running_event_loop_as_in_a_notebook(folder, whole, tmp_path):
    async def cell():
        return Trainer(settings(folder), workdir=tmp_path).fit()

    assert asyncio.run(cell()) and losses(tmp_path) == whole["padded"]


def test_evaluate_is_the_validation_loss_and_the_mean_of_the_answers_logps(folder, tmp_path):
    seen = []

    def look(step, state, stop):
        seen.append((step, trainer.evaluate(Squares(folder))))

    config = settings(folder, **{"train.eval_every": 4})
    trainer = Trainer(config, hooks=[Hook(4, look)], workdir=tmp_path)
    first = trainer.evaluate()
    assert trainer.fit()
    rows = metrics.read(tmp_path, metrics.VALIDATION)
    assert seen == [(row["step"], row["loss"]) for row in rows] and [step for step, _ in seen] == [4, 8]
    assert trainer.evaluate() == trainer.evaluate(Squares(folder)) == rows[-1]["loss"] < first
    squares = Squares(folder)
    model = llava_jax.load(trainer.save(), slots=8, dtype="float32")
    logps = np.concatenate(model.logps([squares[i] for i in range(len(squares))]))
    assert -logps.mean() == pytest.approx(rows[-1]["loss"], rel=1e-5)
    assert Trainer(config, workdir=tmp_path).evaluate() == rows[-1]["loss"]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=()),
                                 train=dataclasses.replace(config.train, eval_every=0))  # fmt: skip
    with pytest.raises(UsageError, match="no records are held out: give `evaluate` a dataset"):
        Trainer(config, workdir=tmp_path).evaluate()


def test_save_in_a_hook_writes_the_state_of_its_step(folder, whole, tmp_path):
    saved = []

    def save(step, state, stop):
        if step == 4:
            assert trainer.save() == trainer.workdir
            saved.append((reader.latest_step(tmp_path), int(state.step)))

    trainer = Trainer(settings(folder), hooks=[Hook(2, save), Hook(5, killed)], workdir=tmp_path)
    with pytest.raises(Killed):
        trainer.fit()
    assert saved == [(4, 4)] and reader.latest_step(tmp_path) == 4
    assert Trainer(settings(folder), workdir=tmp_path).fit() and losses(tmp_path) == whole["padded"]


def test_a_run_that_has_lost_its_directory_writes_nothing_more(folder, tmp_path):
    def lose(step, state, stop):
        if step == 4:
            trainer._lost(f"{tmp_path}: another process has taken over this directory")

    trainer = Trainer(settings(folder), hooks=[Hook(2, lose)], workdir=tmp_path)
    with pytest.raises(UsageError, match="has taken over this directory"):
        trainer.fit()
    assert reader.latest_step(tmp_path) == 3
    assert Trainer(settings(folder), workdir=tmp_path).fit() and reader.latest_step(tmp_path) == 8


def test_a_program_is_there_before_any_run_and_a_run_without_a_directory_gets_one(folder):
    trainer = Trainer(settings(folder, **{"train.steps": "none", "train.epochs": 2}))
    assert trainer.program.steps == 6 and trainer.program.batch.tokens.shape == (4, 96)
    assert reader.latest_step(trainer.save()) == trainer.step == 0


SCRIPT = """
import sys
from llava_jax import Hook, Trainer, config, distributed
trainer = Trainer(config.load(sys.argv[1], {"train.steps": 8}), hooks=[Hook(5, lambda *_: stop())], workdir=sys.argv[2])
stop = trainer.stop if distributed.index() == 1 else lambda: None
ended = [trainer.fit(), trainer.fit()]
print(ended, trainer.step, trainer.evaluate())
"""


@pytest.mark.slow
def test_one_of_two_processes_stops_both_and_the_same_trainers_go_on(folder, tmp_path, compiled):
    settings = compiled | {"LLAVA_JAX_MULTIHOST": "1", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu",
                           "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "PYTHONPATH": str(tiny.ROOT)}
    words = [sys.executable, "-c", SCRIPT, str(folder / "config.py"), str(tmp_path / "out")]
    both = [subprocess.Popen(words, env=os.environ | settings | {"JAX_PROCESS_ID": str(i)}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)]  # fmt: skip
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    last = [out.splitlines()[-1] for out, _ in said]
    assert last[0] == last[1] and last[0].startswith("[False, True] 8 ")
    assert "goes on after step " in said[0][0] and len(losses(tmp_path / "out")) == 8
