"""Runs on pictures of any resolution: adapters, samples, several processes, kills, and a benchmark afterwards."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from llava_jax.checkpoint import reader
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate import answers
from llava_jax.generate.assistant import Assistant
from llava_jax.train import metrics
from llava_jax.train.__main__ import main
from tests.train import test_lora
from tests.train.forks import finish
from tests.train.test_tiles import conversations, write_run

SETTINGS = ("--config.train.steps=8", "--config.checkpoint.every=3", "--config.data.rows_per_chip=4")


@pytest.fixture(scope="module")
def config(tmp_path_factory, compiled):
    return write_run(tmp_path_factory.mktemp("tiled_runs"))


@pytest.fixture(scope="module")
def alone(config, compiled, forks, tmp_path_factory):
    """The workdir of a run of one process with one device."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    finish(forks.job(1, 1, config, folder, *SETTINGS, **compiled))
    return folder


def losses(workdir):
    return {row["step"]: row["loss"] for row in metrics.read(workdir)}


def test_losses_of_two_processes_are_those_of_one(config, alone, forks, compiled, tmp_path):
    words = (*SETTINGS[:2], "--config.data.rows_per_chip=2")
    finish(forks.job(2, 1, config, tmp_path / "out", *words, **compiled))
    found, wanted = losses(tmp_path / "out"), losses(alone)
    assert len(found) == 8 and found == pytest.approx(wanted, rel=5e-6)


def test_a_run_that_was_killed_repeats_every_loss_bit_for_bit(config, alone, forks, compiled, tmp_path):
    (process,) = forks.job(1, 1, config, tmp_path / "out", *SETTINGS, **compiled)
    while reader.latest_step(tmp_path / "out") is None:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    finish(forks.job(1, 1, config, tmp_path / "out", *SETTINGS, **compiled))
    assert losses(tmp_path / "out") == losses(alone)


def test_adapters_learn_from_tiles_and_samples_are_answered_on_the_way(config, tmp_path, capsys):
    lora = test_lora.write_config(config)
    command = ["--config", str(lora), "--workdir", str(tmp_path / "out"), "--config.train.steps=3",
               "--config.train.warmup_ratio=0", "--config.train.sample_every=3"]  # fmt: skip
    assert main(command) == 0
    samples = metrics.read(tmp_path / "out", metrics.SAMPLES)
    assert [row["id"] for row in samples] == ["0", "1", "2", "3"] and {row["step"] for row in samples} == {3}
    assert "image_newline" not in reader.own_specs(tmp_path / "out")
    after = reader.read_tensor(tmp_path / "out", None, "llm/blocks/q/lora_b")
    assert np.abs(after).max() > 0
    wanted = Assistant.open(tmp_path / "out", slots=4).replies(
        [replace(talk, turns=talk.turns[:1]) for talk in conversations()][:4], max_new_tokens=64
    )
    assert [row["answer"] for row in samples] == [reply.text for reply in wanted]


def test_a_benchmark_is_answered_as_by_the_assistant(config, alone, tmp_path):
    """Pictures are named relative to the benchmark's folder, and their headers decide the prompt's length."""
    rows = [{"id": talk.id, "question": "What is it?", "answer": "so", "image": f"{talk.id}.png"}
            for talk in conversations()]  # fmt: skip
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "images").symlink_to(config.parent / "images")
    command = ["answer", "--benchmark", "custom", "--data", str(tmp_path), "--checkpoint", str(alone),
               "--out", str(tmp_path / "a.jsonl"), "--max-new-tokens", "4", "--slots", "3"]  # fmt: skip
    assert evaluate.main(command) == 0
    assistant = Assistant.open(alone, slots=3)
    wanted = assistant.replies([replace(talk, turns=talk.turns[:1]) for talk in conversations()], max_new_tokens=4)
    assert [row.text for row in answers.read([tmp_path / "a.jsonl"]).answers] == [reply.text for reply in wanted]
