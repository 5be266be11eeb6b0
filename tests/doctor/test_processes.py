"""Two processes of one job: the same exit code on both, and a process that fails, hangs or dies is named."""

import json

import pytest

from llava_jax.doctor.report import FAIL
from tests.doctor import job


@pytest.fixture
def pair(tmp_path):
    """Two processes; `second` is what differs in the second one."""

    def run(workdir, *args, second=None, devices=1, **common):
        arguments = ["--workdir", str(workdir), "--json", str(tmp_path / "doctor.json"), *args]
        first_process = {"args": arguments, **common}
        results = job.run(tmp_path, [first_process, first_process | (second or {})], devices)
        return results, json.loads((tmp_path / "doctor.json").read_text())

    return run


def table(content, number):
    """{check: verdict} of one process."""
    return {line["check"]: line["verdict"] for line in content["processes"][number]["lines"]}


def test_rows_and_workdir_of_a_model_that_spans_two_processes(pair, tmp_path):
    checks = ["devices", "rows", "speed", "workdir"]
    results, content = pair(tmp_path / "run", "--mesh.tensor=4", devices=2, checks=checks)
    assert [result.code for result in results] == [0, 0], results
    for number in range(2):
        verdicts = table(content, number)
        assert set(verdicts.values()) == {"ok", "skipped"} and verdicts["over tensor (4)"] == "ok"
        assert verdicts["workdir: seen by all"] == verdicts["workdir: list"] == verdicts["clocks of processes"] == "ok"
    assert "4 rows in 1 parts; process 0: 0, 1: 0" in results[0].output and "verdict" not in results[1].output


def test_a_workdir_that_is_not_shared_is_found_and_nothing_is_trained_in_it(pair, tmp_path):
    other = {"args": ["--workdir", str(tmp_path / "other"), "--json", str(tmp_path / "doctor.json")]}
    results, content = pair(tmp_path / "run", second=other, checks=["workdir", "training"])
    assert [result.code for result in results] == [1, 1]
    verdicts = table(content, 0)
    assert verdicts["workdir: seen by all"] == FAIL and verdicts["training"] == "skipped"
    assert "process 0 does not see what process 1 has written" in results[0].output


def test_a_fault_of_one_process_is_the_exit_code_of_both(pair, tmp_path):
    results, content = pair(tmp_path / "run", second={"fault": "fails"}, checks=["kernels", "workdir"])
    assert [result.code for result in results] == [1, 1] and table(content, 1)["attention: xla"] == FAIL
    assert "process 1 of 2: garbage" in results[0].output and table(content, 0)["workdir: write"] == "ok"


@pytest.mark.parametrize("fault, checks, message", [
    ("breaks", ["rows"], "process 1 breaks off the check of rows"),
    pytest.param("hangs", ["workdir"], "process 1 does not answer in the check of workdir", marks=pytest.mark.slow),
    pytest.param("dies", ["workdir"], "process 1 does not answer in the check of workdir", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_process_that_does_not_answer_costs_no_table(pair, tmp_path, fault, checks, message):
    results, content = pair(tmp_path / "run", second={"fault": fault}, checks=["devices", *checks], limit_secs=30.0)
    assert results[0].code == 1 and results[1].code in (1, -9), results
    assert message in results[0].output and "verdict  check" in results[0].output
    assert table(content, 0)["versions"] == "ok" and content["verdict"] == FAIL
