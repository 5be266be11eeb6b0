"""lmms-eval, unmodified, by README's command, against the server: a task of one's own about the demo's world."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from llava_jax.convert import __main__ as convert
from llava_jax.demo import bases, records
from llava_jax.evaluate import __main__ as evaluate
from tests.serve.running import by_command

PYTHON = os.environ.get("LLAVA_JAX_LMMS_EVAL_PYTHON")
SIZES = records.Sizes(train=2, heldout=40, unseen=12, heldout_per_kind=8, unseen_per_kind=1)
TASK = """
task: demo_world
dataset_path: json
dataset_kwargs: {{data_files: {{test: {root}/questions.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.shown
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 32, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
SHOWN = """
from PIL import Image


def shown(doc):
    return [Image.open("{root}/images/" + doc["image"]).convert("RGB")]
"""


def run(command, *args):
    assert command.main([str(arg) for arg in args]) == 0


def command(url: str) -> list[str]:
    """README's command, for another server and task."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    line = next(line for line in readme.splitlines() if "-m lmms_eval" in line)
    words = [word.replace("http://127.0.0.1:8000", url) for word in line.split()]
    assert f"base_url={url}/v1" in line.replace("http://127.0.0.1:8000", url) and words[-2] == "--tasks"
    return [PYTHON, *words[words.index("-m") : -1], "demo_world"]


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="LLAVA_JAX_LMMS_EVAL_PYTHON is not set: a Python with lmms-eval")
def test_lmms_eval_finds_the_score_that_evaluate_finds(tmp_path):
    run(convert, "assemble", tmp_path / "base", "--vision", bases.ASSETS / "clip", "--llm", bases.ASSETS / "llama")
    test_set = records.write(tmp_path / "images", 0, SIZES)["heldout"]
    rows = [{"id": str(i), "image": test_set.pictures[picture], "question": turn.question, "answer": turn.answer,
             "category": turn.kind} for i, (picture, turn) in enumerate(test_set.questions)]  # fmt: skip
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--benchmark", "custom", "--data", tmp_path)
    run(evaluate, "answer", *options, "--checkpoint", tmp_path / "base", "--max-new-tokens", 32, "--slots", 16, "--out",
        tmp_path / "ours.jsonl")  # fmt: skip
    run(evaluate, "score", *options, tmp_path / "ours.jsonl", "--out", tmp_path / "ours.json")
    ours = [json.loads(line)["text"] for line in (tmp_path / "ours.jsonl").read_text().splitlines()]

    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "demo_world.yaml").write_text(TASK.format(root=tmp_path))
    (tmp_path / "task" / "pictures.py").write_text(SHOWN.format(root=tmp_path))
    environment = os.environ | {"OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    with by_command(tmp_path / "base") as (url, _):
        words = [*command(url), "--include_path", "task", "--output_path", "out", "--log_samples"]
        found = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    print(found.stdout[-1500:])
    results, samples = (next((tmp_path / "out").rglob(f"*{name}")) for name in ("results.json", ".jsonl"))
    score = json.loads(results.read_text())["results"]["demo_world"]["exact_match,none"]
    answers = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, samples.read_text().splitlines())}
    assert [answers[i] for i in range(len(rows))] == ours and len(set(ours)) > 5
    expected = json.loads((tmp_path / "ours.json").read_text())["numbers"]["accuracy"]["mean"]
    assert 100 * score == pytest.approx(expected, abs=1e-9) and expected > 0  # blind as it is, it guesses some
