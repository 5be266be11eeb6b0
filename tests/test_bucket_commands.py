"""Each command does with all its paths in a bucket what it does on a disk, or refuses before it does any work.

convert has a test of its own (tests/convert/test_bucket.py), and so have logs (tests/train/test_metrics.py).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_jax import chat, config, files
from llava_jax.data import __main__ as data
from llava_jax.datagen import __main__ as datagen
from llava_jax.demo import __main__ as demo
from llava_jax.errors import UsageError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate import answer
from llava_jax.plan import __main__ as plan
from tests import buckets
from tests.datagen import small
from tests.fake_openai import FakeOpenAI
from tests.generate import tiny

TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat on a mat."}]
PROBLEM = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": "image.png",
           "grade": "grade2", "subject": "natural science", "topic": "t", "lecture": "L.", "solution": "E.",
           "split": "train"}  # fmt: skip


def _inputs(folder: Path) -> Path:
    """Records, pictures, raw files, a checkpoint and a benchmark."""
    records = [{"id": f"r{i}", "image": f"{i % 2}.png", "conversations": TALK} for i in range(5)]
    records += [{"id": "gone", "image": "gone.png", "conversations": TALK}, {"id": "odd", "conversations": TALK}]
    contents = {
        "records.json": records, "sqa/problems.json": {"3": PROBLEM}, "sqa/pid_splits.json": {"train": ["3"]},
        "captions.json": [{"id": i, "image": f"{i}.png", "captions": [f"This is {i}: a cat."]} for i in range(2)],
    }  # fmt: skip
    questions = [{"id": i, "image": f"{i % 2}.png", "question": f"Number {i}?", "answer": "7"} for i in range(3)]
    contents["bench/questions.jsonl"] = "".join(json.dumps(row) + "\n" for row in questions)
    for name, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        files.write_whole(folder / name, text.encode())
    for number, name in enumerate(("images/0.png", "images/1.png", "bench/images/0.png", "bench/images/1.png",
                                   "sqa/images/train/3/image.png")):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tiny.picture(number % 2).save(folder / name)
    tiny.save(folder / "model")
    shutil.copy(tiny.WORDS, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def roots(tmp_path_factory, bucket_server):
    """The same inputs on a disk and in a bucket."""
    disk = _inputs(tmp_path_factory.mktemp("inputs"))
    return disk, buckets.upload(disk, buckets.make(bucket_server, "inputs-of-commands"))


def both(roots, capsys, command, *words):
    """The exit code and the output of a command, which are the same for both roots in the place of "ROOT"."""
    outcomes = []
    for root in roots:
        code = command([word.replace("ROOT", str(root)) for word in words])
        printed = capsys.readouterr()
        outcomes.append((code, (printed.out + printed.err).replace(str(root), "ROOT")))
    assert _without_times(outcomes[0]) == _without_times(outcomes[1])
    return outcomes[0]


def _without_times(outcome):
    code, text = outcome
    return code, [line.partition(" bad, in ")[0] for line in text.splitlines() if "ETA" not in line]


def same_files(roots, name):
    disk, there = (buckets.contents(f"{root}/{name}") for root in roots)
    assert disk == there and disk
    return disk


TOKENIZER = ("--tokenizer", "ROOT/tokenizer.model", "--legacy", "true")


def test_data_shows_validates_measures_and_prepares(roots, capsys):
    code, out = both(roots, capsys, data.main, "show", "ROOT/records.json", *TOKENIZER)
    assert code == 0 and "⟦" in out
    code, out = both(roots, capsys, data.main, "validate", "ROOT/records.json", "--images", "ROOT/images",
                     "--open-images", *TOKENIZER)  # fmt: skip
    assert code == 65 and "id='gone' missing_image" in out and "7 records, 2 bad" in out
    code, out = both(roots, capsys, data.main, "index", "ROOT/records.json", *TOKENIZER, "--cache", "ROOT/lengths")
    assert code == 0 and "records=7" in out and len(same_files(roots, "lengths")) == 2
    code, out = both(roots, capsys, data.main, "prepare", "scienceqa", "--from", "ROOT/sqa", "--out", "ROOT/prepared")
    assert code == 0 and list(same_files(roots, "prepared")) == ["scienceqa_train_QCM-LEA.json"]
    code, out = both(roots, capsys, data.main, "prepare", "scienceqa", "--from", "ROOT/sqa", "--out", "ROOT/prepared")
    assert code == 64 and "exists already" in out


def test_evaluate_answers_merges_scores_and_reports(roots, capsys):
    options = ("--benchmark", "custom", "--data", "ROOT/bench")
    answer_args = (*options, "--checkpoint", "ROOT/model", "--slots", "1", "--max-new-tokens", "4", "--name", "m")
    for host in ("0", "1"):
        shard = ("--out", "ROOT/out/a.jsonl", "--host", host, "--hosts", "2")
        assert both(roots, capsys, evaluate.main, "answer", *answer_args, *shard)[0] == 0
    shards = [f"ROOT/out/a-0000{host}-of-00002.jsonl" for host in (0, 1)]
    assert both(roots, capsys, evaluate.main, "merge", *options, *shards, "--out", "ROOT/out/a.jsonl")[0] == 0
    code, out = both(roots, capsys, evaluate.main, "score", *options, "ROOT/out/a.jsonl", "--out", "ROOT/out/a.json")
    assert code == 0 and "3 questions" in out
    assert both(roots, capsys, evaluate.main, "report", "ROOT/out/a.json", "--out", "ROOT/out/report")[0] == 0
    assert {"a.jsonl", "a.json", "report/report.md"} <= same_files(roots, "out").keys()


def test_answers_that_are_in_the_bucket_at_a_kill_are_not_asked_again(roots, bucket, monkeypatch):
    questions, _ = evaluate.verbs.load_questions(evaluate.BENCHMARKS["custom"], roots[0] / "bench", {"match": "exact"})
    settings = answer.Settings(max_new_tokens=4)
    answered_ids = []

    def respond(jobs):
        for index, job in enumerate(jobs):
            if len(answered_ids) == 2:
                raise KeyboardInterrupt
            answered_ids.append(job.question.id)
            yield index, answer.Response("7", "stop")

    monkeypatch.setattr(answer, "FLUSH_SECS", -1.0)  # each answer
    for _ in range(2):
        try:
            answer.run(questions, respond, f"{bucket}/a.jsonl", "m", "run", settings)
        except KeyboardInterrupt:
            answered_ids.append("killed")
    assert answered_ids == ["0", "1", "killed", "2"]


def test_chat_opens_a_checkpoint_and_a_picture(roots, capsys):
    words = ("--checkpoint", "ROOT/model", "--image", "ROOT/images/0.png", "--prompt", "What is it?",
             "--max-new-tokens", "4")  # fmt: skip
    code, out = both(roots, capsys, chat.main, *words)
    assert code == 0 and len(out) > 1
    code, out = both(roots, capsys, chat.main, *words[:3], "ROOT/images/gone.png", "--prompt", "What?")
    assert (code, out) == (64, "chat: image 'ROOT/images/gone.png': no such file\n")


def test_datagen_reads_from_a_bucket_and_writes_on_a_disk(roots, capsys, tmp_path):
    with FakeOpenAI(small.reply) as server:
        for name, root in zip(("disk", "bucket"), roots):
            words = ["detail", "--records", f"{root}/captions.json", "--base-url", server.url, "--model", "m",
                     "--prompts", f"{root}/prompts"]  # fmt: skip
            for path in datagen.shots.PROMPTS.rglob("*.txt"):
                files.write_whole(f"{root}/prompts/{path.relative_to(datagen.shots.PROMPTS)}", path.read_bytes())
            assert datagen.main([*words, "--out", str(tmp_path / name)]) == 0
    made = [(tmp_path / name / "detail.json").read_bytes() for name in ("disk", "bucket")]
    assert made[0] == made[1] and len(json.loads(made[0])) == 2


def test_plan_writes_its_numbers_into_a_bucket(bucket):
    plan._write(f"{bucket}/plan.json", {"chips": 16})
    assert json.loads(files.read(f"{bucket}/plan.json")) == {"chips": 16}


ABLATE = "ablate scienceqa --workdir W --base b --stage1 S --stage2 t.py --pretrain p.json --images i"
WISH = "want a path on a disk"
REFUSED = {
    "config": (plan, "--config gs://b/c.py --topology v5e:2x2", f"--config gs://b/c.py: {WISH}"),
    "demo": (demo, "--workdir gs://b/demo", f"--workdir: gs://b/demo: {WISH}"),
    "demo bases": (demo, "bases gs://b/demo", f"directory: gs://b/demo: {WISH}"),
    "datagen": (datagen, "brief --records r.json --out gs://b/o", f"--out: gs://b/o: {WISH}"),
    "tfds": (data, "prepare r.json --out gs://b/o", f"--out gs://b/o: {WISH}"),
    "tfds of raw files": (data, "prepare coco --from gs://b/r --to tfds --out gs://b/o", f"--out gs://b/o: {WISH}"),
    "cache": (evaluate, "answer --benchmark custom --data gs://b/d --base-url http://127.0.0.1:1/v1 --model m "
                        "--out gs://b/a.jsonl", "--cache FILE names another"),
    "ablate": (evaluate, ABLATE.replace("W", "gs://b/w"), f"--workdir: gs://b/w: {WISH}"),
    "ablate's config": (evaluate, ABLATE.replace("S", "gs://b/s.py"), f"--stage1: gs://b/s.py: {WISH}"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_a_disk_is_refused_by_name_and_nothing_is_asked(bucket_proxy, capsys, monkeypatch, tmp_path, name):
    command, words, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    with buckets.faults(bucket_proxy, lambda method, path: None):
        try:
            code = command.main(words.split())
        except SystemExit as stop:
            code = stop.code
        assert not bucket_proxy.requests
    error = capsys.readouterr().err
    assert code == 64 and message in error and "gcloud storage cp" in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_a_config_in_a_bucket_is_refused_in_python_too():
    with pytest.raises(UsageError, match="--config gs://b/c.py: want a path on a disk, as a config is Python code"):
        config.load("gs://b/c.py")


def test_a_bucket_without_its_client_names_the_package(tmp_path):
    code = ("import sys; sys.modules['gcsfs'] = None\n"
            "from llava_jax.data.__main__ import main\nsys.exit(main(sys.argv[1:]))")  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    completed = subprocess.run([sys.executable, "-c", code, "validate", "gs://b/r.json"], cwd=tmp_path, env=environment,
                               capture_output=True, text=True)  # fmt: skip
    assert completed.returncode == 64 and completed.stderr == (
        'data: gs:// wants the package gcsfs, which is missing: `pip install ".[gcs]"` in the clone, or name a path on '
        "a disk\n"
    )
