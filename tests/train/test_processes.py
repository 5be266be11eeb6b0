"""Several processes are one run: the same rows and losses on every mesh, and one end for all of them."""

import json
import shutil

import pytest

from llava_jax.train import metrics
from tests.train import tiny
from tests.train.forks import finish

SETTINGS = ("--config.train.steps=10", "--config.checkpoint.every=5", "--config.data.batch_samples=8",
            "--config.train.loss=group_mean", "--config.train.group_samples=4")  # fmt: skip
TREES = {"data.layout": "packed", "data.row_tokens": 128, "data.rows_per_chip": 2, "data.rows_per_group": 1,
         "data.images_per_group": 2, "data.share_images": True, "train.steps": 6, "checkpoint.every": 3,
         "mesh.fsdp": 2}  # fmt: skip
# {name: (mesh, processes, devices of each)}
ACROSS = {
    "fsdp": (("fsdp=2",), 2, 1),
    "tensor": (("fsdp=1", "tensor=2"), 2, 1),
    "context": (("fsdp=1", "context=2"), 2, 1),
    "mixed": (("data=2", "fsdp=1", "tensor=2"), 2, 2),
    "fsdp, four": (("fsdp=4",), 4, 1),
    "tensor, four": (("fsdp=1", "tensor=4"), 4, 1),
    "context, four": (("fsdp=1", "context=4"), 4, 1),
    "mixed, four": (("fsdp=2", "tensor=2"), 4, 1),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory, compiled):
    return tiny.write_run(tmp_path_factory.mktemp("processes") / "run")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, compiled, config, forks):
    """The rows of a run of one process with two devices."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    finish(forks.job(1, 2, config, folder, *SETTINGS, **compiled))
    return metrics.read(folder)


@pytest.mark.parametrize("mesh", [name if ACROSS[name][1] == 2 else pytest.param(name, marks=pytest.mark.slow)
                                  for name in ACROSS])  # fmt: skip
def test_the_losses_are_those_of_one_process_wherever_the_mesh_spans_processes(
    config, alone, forks, compiled, tmp_path, mesh
):
    axes, processes, devices = ACROSS[mesh]
    words = [f"--config.mesh.{axis}" for axis in axes]
    ended = finish(forks.job(processes, devices, config, tmp_path / "out", *SETTINGS, *words, **compiled))
    rows = metrics.read(tmp_path / "out")
    assert len(rows) == len(alone) == 10
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone], rel=5e-6)
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in alone]
    assert all("step 1/10" not in one.out for one in ended[1:])  # process 0 speaks for all


def test_rows_of_one_picture_are_those_of_one_process_where_the_mesh_spans_two(forks, compiled, tmp_path):
    config = tiny.write_run(tmp_path / "run")
    records = json.loads((tmp_path / "run" / "records.json").read_text())
    for number, record in enumerate(records):  # of two pictures five records each, whose questions differ
        record["image"] = f"{number % 2}.jpg"
        record["conversations"][0]["value"] = f"<image>\nWhat is it, {number}?"
    (tmp_path / "run" / "records.json").write_text(json.dumps(records))
    settings = [f"--config.{name}={value}" for name, value in TREES.items()]
    losses = []
    for name, processes, devices in (("one", 1, 2), ("two", 2, 1)):
        finish(forks.job(processes, devices, config, tmp_path / name, *settings, **compiled))
        losses.append([row["loss"] for row in metrics.read(tmp_path / name)])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=5e-6)


def broken(config, folder, name):
    """(config file, words) of a process whose copy of the data, or whose code, differs from the other's."""
    records = json.loads((config.parent / "records.json").read_text())
    images = shutil.copytree(config.parent / "images", folder / "images")
    if name == "a fault of ours":  # beyond what anybody checks: it is raised in the middle of the first step's reading
        other = folder / "config.py"
        other.write_text(config.read_text() + "\nimport llava_jax.data.feed as feed\nfeed.packed = None\n")
        return other, ()
    match name:
        case "a record that is bad":
            records[7]["conversations"][1].pop("value")
        case "other data":
            records[3]["conversations"][1]["value"] = "A circle."
        case "a missing picture":
            (images / "5.jpg").unlink()
    (folder / "records.json").write_text(json.dumps(records))
    source = "--config.data.sources.0"
    return config, (f"{source}.path={folder / 'records.json'}", f"{source}.images={images}")


# {what differs on process 1: (exit code, words of the one line)}
FAILURES = {
    "a record that is bad": (64, "data state fingerprint is "),
    "other data": (64, "data state fingerprint is "),
    "a missing picture": (65, "missing_image"),
    "a fault of ours": (1, "TypeError"),
}


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("what", FAILURES)
def test_where_one_process_fails_both_end_with_the_same_code_in_one_line(
    config, forks, compiled, tmp_path, what, who
):
    code, words = FAILURES[what]
    other, own = broken(config, tmp_path, what)
    configs, each = [config, config], [(), ()]
    configs[who], each[who] = other, own
    ended = finish(forks.job(2, 1, configs, tmp_path / "out", *SETTINGS, each=each, **compiled), code)
    lines = [line for one in ended for line in one.err.splitlines() if "error: " in line]
    assert len(lines) == 1 and words in lines[0], ended


def test_a_workdir_that_the_other_process_does_not_see_is_refused_before_anything_is_compiled(
    config, forks, compiled, tmp_path
):
    workdirs = [tmp_path / "one", tmp_path / "two"]
    ended = finish(forks.job(2, 1, config, workdirs, *SETTINGS, **compiled), 64)
    lines = [line for one in ended for line in one.err.splitlines() if "error: " in line]
    assert len(lines) == 1 and "process 1 of 2 does not see" in lines[0] and "gs://BUCKET/RUN" in lines[0]


def test_other_settings_on_one_process_are_named_with_their_values(config, forks, compiled, tmp_path):
    each = [(), ("--config.train.lr=0.5",)]
    ended = finish(forks.job(2, 1, config, tmp_path / "out", *SETTINGS, each=each, **compiled), 64)
    assert "train.lr is 0.01 on process 0 and 0.5 on process 1 of 2" in ended[0].err and not ended[1].err
