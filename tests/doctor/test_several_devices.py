"""Eight devices of one process: their order, the rows that they hold, and what they tell each other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_jax.doctor.report import FAIL, WARN

# {fault: (the verdict that it must get, a part of the name of each line that must have it)}
FOUND = {
    "reversed mesh": (FAIL, ["order in the mesh"]), "rolled rows": (FAIL, ["on each device", "gathered"]),
    "lost rows": (FAIL, ["who loads them"]), "other rows": (FAIL, ["as one process reads them"]),
    "no sum": (FAIL, ["over fsdp"]), "slow machine": (WARN, ["matrix products", "memory", "over fsdp"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def lines():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.doctor.plants"]
    completed = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True,
                               timeout=300)  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads(completed.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", ["good order", "good rows", "good speed"])
def test_nothing_is_wrong_on_a_good_machine(lines, check):
    assert lines[check] and {line["verdict"] for line in lines[check]} <= {"ok", "skipped"}, lines[check]


@pytest.mark.parametrize("fault", FOUND)
def test_a_planted_fault_is_found(lines, fault):
    verdict, names = FOUND[fault]
    bad = [line for line in lines[fault] if line["verdict"] in (FAIL, WARN)]
    for name in names:
        assert [line["verdict"] for line in bad if name in line["check"]] == [verdict], lines[fault]
    assert all(line["remedy"] for line in bad)


def test_a_line_names_the_mesh_and_the_rows(lines):
    figures = {line["check"]: line["figure"] for check in ("good order", "good rows") for line in lines[check]}
    assert figures["devices"] == "8 x cpu: 1 process(es) with 8"
    assert figures["rows: who loads them"] == "8 rows in 8 parts; process 0: 0-7"


def test_a_figure_without_an_expectation_stands_alone_on_a_cpu(lines):
    speeds = [line for line in lines["good speed"] if "over" in line["check"] or line["check"] == "memory"]
    assert len(speeds) == 2 and all(line["value"] > 0 and not line["expectation"] for line in speeds)
