"""The course of a session: lines, exit codes, the file, and checks that fail, hang or come too late."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_jax import config as configs
from llava_jax.doctor import __main__ as command
from llava_jax.doctor import report, session, trial
from llava_jax.doctor.report import FAIL, OK, SKIPPED, WARN, Line
from llava_jax.doctor.session import Check
from llava_jax.errors import UsageError

HANGS = """
import time
from llava_jax import config as configs
from llava_jax.doctor import session, trial
from llava_jax.doctor.report import OK, Line
from llava_jax.doctor.session import Check

trial.write_files = lambda folder: None

def hang(found):
    yield Line("first", OK, "done")
    time.sleep(600)

session.examine(configs.Mesh(), None, {json!r}, [Check("easy", lambda found: [Line("easy", OK, "done")], 60.0),
                                                 Check("hard", hang, 1.0)])
"""


@pytest.fixture
def examine(monkeypatch, tmp_path):
    """(exit code, {check: line} of the file) of a session with other checks."""
    monkeypatch.setattr(trial, "write_files", lambda folder: None)

    def run(*checks):
        code = session.examine(configs.Mesh(), None, tmp_path / "doctor.json", checks)
        content = json.loads((tmp_path / "doctor.json").read_text())
        [process] = content["processes"]
        return code, {line["check"]: Line(**line) for line in process["lines"]}

    return run


def line_check(name, *verdicts, needs="", limit=60.0):
    lines = [Line(f"{name} {i}", verdict, "figure") for i, verdict in enumerate(verdicts)]
    return Check(name, lambda machine: lines, limit, needs=needs)


@pytest.mark.parametrize("verdicts, code", [((OK, SKIPPED), 0), ((OK, WARN), 0), ((OK, FAIL), 1)])
def test_only_a_fail_makes_the_exit_code_1(examine, capsys, verdicts, code):
    exit_code, lines = examine(line_check("a", *verdicts))
    assert exit_code == code and [line.verdict for line in lines.values()] == [*verdicts, OK]
    printed = capsys.readouterr().out
    assert "verdict  check" in printed and f"exit code {code} on all" in printed


def test_an_exception_is_a_line_and_the_checks_after_it_are_made(examine):
    def raise_error(machine):
        yield Line("before", OK, "done")
        raise KeyError("no such thing")

    code, lines = examine(Check("a", raise_error, 60.0), line_check("b", OK))
    assert code == 1 and lines["before"].verdict == lines["b 0"].verdict == OK
    line = lines["a: comes to its end"]
    assert line.verdict == FAIL and "KeyError" in line.figure and "in raise_error" in line.detail


def test_what_needs_a_check_that_fails_is_skipped(examine):
    _, lines = examine(line_check("disk", FAIL), line_check("run", OK, needs="disk"), line_check("other", OK))
    assert lines["run"] == report.skipped_line("run", "the check of disk fails") and lines["other 0"].verdict == OK


def test_what_would_take_too_long_is_skipped(examine, monkeypatch):
    monkeypatch.setattr(session, "TOTAL_SECS", 50.0)
    code, lines = examine(line_check("long", OK, limit=200.0), line_check("short", OK, limit=20.0))
    assert code == 0 and lines["long"].verdict == SKIPPED and lines["short 0"].verdict == OK


def test_a_check_that_hangs_costs_its_own_line_and_ends_with_1(tmp_path):
    path = tmp_path / "doctor.json"
    command = [sys.executable, "-c", HANGS.format(json=str(path))]
    completed = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
                               cwd=Path(__file__).parents[2], timeout=120)  # fmt: skip
    assert completed.returncode == 1 and "process 0 does not answer in the check of hard" in completed.stderr
    [process] = json.loads(path.read_text())["processes"]
    assert [(line["check"], line["verdict"]) for line in process["lines"]] == [
        ("easy", OK), ("hard: comes to its end", FAIL),
    ]  # fmt: skip
    assert "in hang" in process["lines"][1]["detail"] and "verdict  check" in completed.stdout


def test_the_file_says_what_the_machine_is(examine, tmp_path):
    examine(line_check("a", OK))
    content = json.loads((tmp_path / "doctor.json").read_text())
    assert content["verdict"] == OK and content["mesh"] == dataclasses.asdict(configs.Mesh())
    assert content["devices"][0]["kind"] == "cpu" and "jax" in content["processes"][0]["versions"]


def test_the_folder_in_the_workdir_is_gone_afterwards(monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "write_files", lambda folder: None)

    def writes(machine):
        machine.folder.mkdir(parents=True)
        (machine.folder / "file").write_text("x")
        return [Line("a", OK, "written")]

    assert session.examine(configs.Mesh(), tmp_path / "runs", None, [Check("a", writes, 60.0)]) == 0
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("args, message", [
    (["--mesh.tensor=3"], "does not fit 1 devices"), (["--json", "/no/such/folder/x.json"], "--json"),
])  # fmt: skip
def test_a_wrong_argument_is_one_line_and_64(capsys, monkeypatch, args, message):
    monkeypatch.setattr(trial, "write_files", lambda folder: None)
    assert command.main(args) == 64
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_several_processes_want_a_workdir(monkeypatch):
    monkeypatch.setattr(session.distributed, "join", lambda: None)
    monkeypatch.setattr(session.distributed, "count", lambda: 2)
    with pytest.raises(UsageError, match="--workdir is missing"):
        session.examine(configs.Mesh(), None, None, [])
