"""The grid: which rows are run, what each is trained on, and one whole run of each on the demo's world."""

import json

import pytest

from llava_jax.convert import __main__ as convert
from llava_jax.demo import bases, records, story, world
from llava_jax.evaluate import __main__ as command
from llava_jax.evaluate import ablate
from llava_jax.evaluate.score import Result, Value

SIZES = records.Sizes(train=12, heldout=12, unseen=4, heldout_per_kind=1, unseen_per_kind=1)
STEPS = ("--stage1-set", "train.steps=2", "--stage2-set", "train.steps=2", "--stage1-set", "data.batch_samples=4",
         "--stage2-set", "data.batch_samples=4", "--stage2-set", "data.row_tokens=256")  # fmt: skip


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


def test_a_smaller_share_lies_in_a_larger_and_zero_leaves_a_type_out(tmp_path):
    files = []
    for name in ablate.TYPES:
        rows = [{"id": f"{name}{i}", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
                for i in range(40)]  # fmt: skip
        files.append(write_json(tmp_path / f"{name}.json", rows))

    def ids(shares, limit=None, seed=0):
        return [row["id"] for row in ablate.mixture(files, shares, seed, limit)]

    full, some = ids((1, 1, 1)), ids((1, 0.05, 0.1))
    assert (len(full), len(some)) == (120, 40 + 2 + 4)
    assert set(some) < set(full) and set(ids((0, 0.05, 0))) < set(ids((0, 0.5, 0)))
    assert ids((0, 0.5, 0)) != ids((0, 0.5, 0), seed=1)
    assert len(ids((1, 1, 1), limit=7)) == 7 and set(ids((0, 1, 0), limit=3)) < set(ids((0, 1, 0)))


def test_differences_are_against_the_first_row_and_the_papers_stand_beside():
    results = [(row, Result("scienceqa", "ScienceQA", "", {}, 10, 1, {"Avg": Value(mean, 0.0)}, "Avg", {}, ()))
               for row, mean in zip(ablate.GRIDS["scienceqa"], (60.0, 50.0, 55.5))]  # fmt: skip
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in ablate.table(results).splitlines()]
    assert lines[0] == ["", "Avg", "paper"]
    assert lines[2:] == [
        ["penultimate layer, reasons first, both stages", "60.00", "90.92"],
        ["the tower's last layer", "50.00 (-10.00)", "89.96 (-0.96)"],
        ["the answer first", "55.50 (-4.50)", "89.77 (-1.15)"],
    ]


def test_the_grids_are_the_papers():
    titles = {name: [row.paper for row in rows] for name, rows in ablate.GRIDS.items()}
    assert titles == {"scienceqa": [90.92, 89.96, 89.77, 85.81, 89.84], "mixes": [85.1, 81.9, 80.5, 73.8, 21.5]}


@pytest.mark.parametrize("args, message", [
    (("scienceqa",), "needs --scienceqa"), (("mixes",), "--conversation, --detail, --reasoning"),
])  # fmt: skip
def test_a_grid_without_its_data_is_refused(tmp_path, capsys, args, message):
    names = ("workdir", "base", "stage1", "stage2", "pretrain", "images")
    required = [arg for name in names for arg in (f"--{name}", "x")]
    assert command.main(["ablate", *args, *required]) == 64
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def demo_world(tmp_path_factory):
    """A small demo world with its test set, and the bases of two layers."""
    folder = tmp_path_factory.mktemp("demo")
    test_sets = records.write(folder / "world", 0, SIZES)
    for name, layer in (("base", -2), ("base_last_layer", -1)):
        args = ("assemble", folder / name, "--vision", bases.ASSETS / "clip", "--llm", bases.ASSETS / "llama",
                "--select-layer", layer)  # fmt: skip
        assert convert.main([str(arg) for arg in args]) == 0
    return folder, test_sets["heldout"]


def common(folder, workdir):
    return ["--workdir", workdir, "--base", folder / "base", "--stage1", story.CONFIGS / "stage1.py", "--stage2",
            story.CONFIGS / "stage2.py", "--pretrain", folder / "world" / records.PRETRAIN, "--images",
            folder / "world", "--max-new-tokens", 8, "--slots", 4, *STEPS]  # fmt: skip


def science(folder, test_set):
    """The world's count questions as ScienceQA's files, with pictures."""
    root, problems = folder / "sqa", {}
    captions = json.loads((folder / "world" / records.PRETRAIN).read_text())
    captioned = {
        "train": [(row["image"], row["conversations"][1]["value"]) for row in captions],
        "test": [(picture, world.caption(scene)) for picture, scene in zip(test_set.pictures, test_set.scenes)],
    }
    for split, rows in captioned.items():
        for picture, caption in rows[:8]:
            identity = str(len(problems))
            folder_of_picture = root / "images" / split / identity
            folder_of_picture.mkdir(parents=True)
            (folder_of_picture / "image.png").write_bytes((folder / "world" / picture).read_bytes())
            answer = min(2, caption.count(" and ") + caption.count(","))
            problems[identity] = {
                "question": "How many shapes are there?", "choices": list(world.NUMBERS[1:]), "answer": answer,
                "hint": "", "image": "image.png", "grade": "grade1", "subject": "natural science", "topic": "shapes",
                "lecture": "", "solution": caption, "split": split,
            }  # fmt: skip
    (root / "problems.json").write_text(json.dumps(problems))
    splits = {split: [i for i, row in problems.items() if row["split"] == split] for split in captioned}
    (root / "pid_splits.json").write_text(json.dumps(splits))
    return root


@pytest.mark.slow
def test_the_grid_of_scienceqa_runs_on_the_demo_world(demo_world, tmp_path, capsys):
    folder, test_set = demo_world
    args = [str(arg) for arg in ("ablate", "scienceqa", *common(folder, tmp_path), "--last-layer",
                                 folder / "base_last_layer", "--scienceqa", science(folder, test_set))]  # fmt: skip
    assert command.main(args) == 0
    output = capsys.readouterr().out
    assert "skips small: it needs --small" in output
    lines = (tmp_path / "ablation.md").read_text().splitlines()
    assert len(lines) == 2 + 4 and lines[-1].startswith("| no stage 1")
    targets = {name: json.loads((tmp_path / name / "records.json").read_text())[0]["conversations"][1]["value"]
               for name in ("best", "answer_first")}  # fmt: skip
    assert targets["best"].endswith(targets["answer_first"].split(" BECAUSE:")[0])
    assert targets["answer_first"].startswith("The answer is")
    (tmp_path / "best" / "scores.json").unlink()  # answers and trainings stay: only the number is made anew
    assert command.main(args) == 0
    assert (tmp_path / "ablation.md").read_text().splitlines() == lines


@pytest.mark.slow
def test_the_grid_of_mixtures_runs_on_the_demo_world(demo_world, tmp_path):
    folder, test_set = demo_world
    data = tmp_path / "bench"
    data.mkdir()
    (data / "images").symlink_to(folder / "world")
    rows = [{"id": str(i), "image": test_set.pictures[picture], "question": turn.question, "answer": turn.answer,
             "category": turn.kind} for i, (picture, turn) in enumerate(test_set.questions)]  # fmt: skip
    (data / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    instructions = json.loads((folder / "world" / records.FINETUNE).read_text())
    paths = {name: write_json(tmp_path / f"{name}.json", instructions[i::3]) for i, name in enumerate(ablate.TYPES)}
    args = ["ablate", "mixes", *common(folder, tmp_path / "grid"), "--benchmark", "custom", "--data", data,
            *(arg for name, path in paths.items() for arg in (f"--{name}", path))]  # fmt: skip
    assert command.main([str(arg) for arg in args]) == 0
    lines = (tmp_path / "grid" / "ablation.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [row.title for row in ablate.GRIDS["mixes"]]
    assert not (tmp_path / "grid" / "none" / "stage2").exists()
