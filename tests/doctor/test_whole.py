"""The whole command on a good machine: no red line, exit code 0, and nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from llava_jax import files
from tests.doctor import job

TRAINING_CHECKS = ("training: killed", "training: preempted", "training: another mesh")


def doctor(tmp_path, devices, *args):
    """{check: line} of one process, which must end with 0."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    del environment["JAX_COMPILATION_CACHE_DIR"]  # it makes one for itself and the run that it kills
    command = [sys.executable, "-m", "llava_jax.doctor", "--json", str(tmp_path / "doctor.json"), *args]
    completed = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True,
                               timeout=400)  # fmt: skip
    assert completed.returncode == 0, completed.stdout + completed.stderr[-3000:]
    [process] = json.loads((tmp_path / "doctor.json").read_text())["processes"]
    return {line["check"]: line for line in process["lines"]}


def without_a_red_line(lines):
    assert {line["verdict"] for line in lines.values()} <= {"ok", "skipped"}, lines
    return [lines[name]["verdict"] for name in TRAINING_CHECKS]


def test_a_laptop_with_eight_forced_devices(tmp_path):
    lines = doctor(tmp_path, 8)
    assert without_a_red_line(lines) == ["ok", "ok", "ok"]
    assert lines["training: killed"]["figure"].startswith("`train` killed by SIGKILL")


@pytest.mark.slow
def test_one_device(tmp_path):
    assert without_a_red_line(doctor(tmp_path, 1)) == ["ok", "ok", "skipped"]


@pytest.mark.slow
def test_a_bucket(tmp_path, bucket):
    lines = doctor(tmp_path, 8, "--workdir", f"{bucket}/runs/doctor", "--mesh.tensor=2")
    assert without_a_red_line(lines) == ["ok", "ok", "ok"] and lines["workdir: rename"]["verdict"] == "skipped"
    assert files.listed(epath.Path(bucket)) == []


@pytest.mark.slow
def test_two_processes_of_four_devices(tmp_path):
    args = ["--workdir", str(tmp_path / "run"), "--json", str(tmp_path / "doctor.json")]
    results = job.run(tmp_path, [{"args": args}] * 2, devices=4, secs=400)
    assert [result.code for result in results] == [0, 0], results[0].output
    content = json.loads((tmp_path / "doctor.json").read_text())
    for process in content["processes"]:
        assert without_a_red_line({line["check"]: line for line in process["lines"]}) == ["ok", "ok", "ok"]
    assert list((tmp_path / "run").iterdir()) == []
