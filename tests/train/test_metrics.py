"""Logs: they go on after a resume, on a disk and in a bucket, and a damaged one stops no run."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from llava_jax import config as configs
from llava_jax import files
from llava_jax.errors import UsageError
from llava_jax.train import metrics
from tests import buckets
from tests.train import tiny

QUIET = configs.Log(tensorboard=False)


def _lines(*steps):
    return b"".join(json.dumps({"step": step, "loss": 0.1 + step}).encode() + b"\n" for step in steps)


def _steps(workdir, name=metrics.STEPS):
    return [row["step"] for row in metrics.read(workdir, name)]


def test_rows_beyond_the_step_of_a_resume_are_dropped_and_a_cut_line_too(place, capsys):
    files.write_whole(place / metrics.STEPS, _lines(1, 2, 3, 4, 5) + b'{"step": 6, "lo')
    writer = metrics.open_writer(place, QUIET, 3, {})
    metrics.write(writer, metrics.STEPS, {"step": 4, "loss": np.float32(0.1).item(), "ids": ["ä\n"]})
    metrics.close(writer)
    found = metrics.read(place)
    assert [row["step"] for row in found] == [1, 2, 3, 4] and np.float32(found[-1]["loss"]) == np.float32(0.1)
    assert capsys.readouterr().err == ""


def test_a_disk_has_each_row_at_once_and_a_bucket_with_the_next_flush(place):
    writer = metrics.open_writer(place, QUIET, 0, {})
    metrics.write(writer, metrics.STEPS, {"step": 1})
    assert _steps(place) == ([] if files.is_bucket(place) else [1])
    metrics.write(writer, metrics.STEPS, {"step": 2})
    metrics.flush(writer)
    assert _steps(place) == [1, 2]
    metrics.write(writer, metrics.STEPS, {"step": 3})
    metrics.close(writer)
    assert _steps(place) == [1, 2, 3]


def test_a_flush_writes_only_the_logs_that_have_grown(bucket_proxy, bucket):
    writer = metrics.open_writer(bucket, configs.Log(), 0, {})
    metrics.write(writer, metrics.VALIDATION, {"step": 1, "loss": 1.0})
    with buckets.faults(bucket_proxy, lambda method, path: None) as seen:
        metrics.flush(writer)
        metrics.flush(writer)
    written = {re.search(r"name=(?:tensorboard/)?([a-z.]+)", request.path)[1] for request in seen.requests}
    assert written == {"validation.jsonl", "events.out.tfevents."} and len(seen.requests) == 4  # two requests a write
    metrics.close(writer)


@pytest.mark.parametrize(
    "damage",
    [b"{}\n", b"[]\n", b'{"step": "3"}\n', b'{"step": 2, "lo\xff\n', b"\0" * 40 + b"\n", b"[" * 100_000 + b"\n"],
)
def test_a_damaged_log_is_set_aside_and_its_whole_rows_go_on(place, capsys, damage):
    damaged = _lines(1) + damage + _lines(2, 3)
    files.write_whole(place / metrics.STEPS, damaged)
    metrics.close(metrics.open_writer(place, QUIET, 2, {}))
    assert _steps(place) == [1, 2]
    assert files.read(place / "metrics.jsonl.damaged") == damaged
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (f"{place}/metrics.jsonl is damaged (line 2 is no row of a log): it is now called "
                    "metrics.jsonl.damaged, and its whole rows go on in a new one")  # fmt: skip


def test_what_stands_in_a_logs_place_is_set_aside_as_often_as_need_be(tmp_path, capsys):
    for expected in ("metrics.jsonl.damaged", "metrics.jsonl.damaged1"):
        (tmp_path / metrics.STEPS).unlink(missing_ok=True)
        (tmp_path / metrics.STEPS).mkdir()
        metrics.close(metrics.open_writer(tmp_path, QUIET, 0, {}))
        assert (tmp_path / expected).is_dir() and "it is a directory" in capsys.readouterr().err


def _tensorboard(path):
    """The events of a file, as tensorboardX's own protocol reads them."""
    record_writer = pytest.importorskip("tensorboardX.record_writer")
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    content, events, start = files.read(path), [], 0
    while start < len(content):
        length = int.from_bytes(content[start : start + 8], "little")
        data = content[start + 12 : start + 12 + length]
        for part, place in ((content[start : start + 8], start + 8), (data, start + 12 + length)):
            checksum = int.from_bytes(content[place : place + 4], "little")
            assert checksum == record_writer.masked_crc32c(part)
        events.append(proto.Event.FromString(data))
        start += 16 + length
    return events


def test_tensorboard_gets_the_numbers_and_forgets_those_that_a_resume_repeats(place):
    writer = metrics.open_writer(place, configs.Log(tensorboard=True), 300, {})
    metrics.write(writer, metrics.VALIDATION, {"step": 301, "loss": 2.5, "mfu": None, "words": "no number"})
    metrics.write(writer, metrics.STEPS, {"step": 302, "loss": float("nan"), "tokens": 10**6})
    metrics.close(writer)
    (path,) = files.listed(place / "tensorboard")
    version, session, first, second = _tensorboard(path)
    assert path.name.startswith("events.out.tfevents.") and version.file_version == "brain.Event:2"
    assert (session.step, session.session_log.status) == (301, 1)
    assert first.step == 301 and [(v.tag, v.simple_value) for v in first.summary.value] == [("validation/loss", 2.5)]
    assert second.step == 302 and [(v.tag, v.simple_value) for v in second.summary.value] == [("metrics/tokens", 1e6)]
    assert first.wall_time > 1.7e9


class Wandb(types.ModuleType):
    """Stands in for the package: a run with an id that is known goes on, any other begins."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.calls = {}, []

    def init(self, *, project, name, config, id, resume):
        self.calls.append({"project": project, "name": name, "config": config, "resume": resume})
        rows = self.runs.setdefault(id, [])
        return types.SimpleNamespace(log=lambda numbers, step: rows.append((step, numbers)), finish=lambda: None)


def test_a_preempted_run_goes_on_in_the_same_run_of_wandb(place, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = configs.Log(tensorboard=False, wandb="llava")
    for workdir, step in ((place / "a", 1), (place / "a", 2), (place / "b", 1)):
        writer = metrics.open_writer(workdir, log, step - 1, {"train.lr": 0.5})
        metrics.write(writer, metrics.STEPS, {"step": step, "loss": 1.0 * step})
        metrics.close(writer)
    assert list(wandb.runs.values()) == [
        [(1, {"metrics/loss": 1.0}), (2, {"metrics/loss": 2.0})], [(1, {"metrics/loss": 1.0})],
    ]  # fmt: skip
    assert wandb.calls[0] == {"project": "llava", "name": "a", "config": {"train.lr": 0.5}, "resume": "allow"}


def test_a_damaged_id_of_wandb_begins_a_new_run_and_says_so(tmp_path, monkeypatch, capsys):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / metrics.WANDB).write_bytes(b"a/b\xff")
    for _ in range(2):
        metrics.close(metrics.open_writer(tmp_path, configs.Log(tensorboard=False, wandb="llava"), 0, {}))
    assert len(wandb.runs) == 1 and "wandb_id is damaged" in capsys.readouterr().err


def test_wandb_that_is_not_installed_is_asked_for_by_name():
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    with pytest.raises(UsageError, match="pip install wandb"):
        metrics.check(configs.Log(tensorboard=False, wandb="llava"))


def test_logs_import_neither_torch_nor_tensorflow(tmp_path):
    code = (
        "import sys\nfrom llava_jax import config\nfrom llava_jax.train import metrics\n"
        f"metrics.close(metrics.open_writer({str(tmp_path)!r}, config.Log(tensorboard=True), 0, {{}}))\n"
        "print(sorted({'torch', 'tensorflow', 'tensorboardX'} & set(sys.modules)))"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, env=environment, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
    assert len(list(Path(tmp_path / "tensorboard").iterdir())) == 1
