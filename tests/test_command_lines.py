"""Sixty command lines that are typed wrong: one line, the code of a usage error, and no time spent on jax."""

import importlib
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llava_jax import cli
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.known_names import KNOWN_NAMES

ROOT = Path(__file__).parents[1]
SERVER = "--base-url http://127.0.0.1:9/v1 --model m"
CUSTOM = "--benchmark custom --data bench"
JUDGE = f"evaluate judge {CUSTOM} --answers a.jsonl --rules r.json --out o"
SCIENCE = "evaluate ensemble complement --data bench --ours a.jsonl --gpt4 a.jsonl --out o"
GRID = "--workdir w --base b --stage1 c --stage2 c --pretrain p --images i"
# What is typed -> what the line says.
LINES = {
    "evaluate": "the following arguments are required: VERB",
    "evaluate nonsense": "invalid choice: 'nonsense'",
    "evaluate list scienceQ": "did you mean scienceqa?",
    "evaluate list pope mme": "unrecognized arguments: mme (see python -m llava_jax.evaluate list --help)",
    "evaluate list --benchmark": "argument --benchmark: expected one argument",
    "evaluate list --bench pope": "unrecognized arguments: --bench; did you mean --benchmark?",
    "evaluate answer": "the following arguments are required: --benchmark, --data, --out",
    f"evaluate answer {CUSTOM} --out o": "want either --checkpoint DIR, or --base-url",
    f"evaluate answer {CUSTOM} --out o --checkpoint c {SERVER}": "want either --checkpoint DIR, or --base-url",
    f"evaluate answer {CUSTOM} --out o --checkpoint c --dtype int4": "--dtype: invalid choice: 'int4'",
    f"evaluate answer {CUSTOM} --out o --checkpoint c --template v9": "--template: invalid choice: 'v9'",
    f"evaluate answer {CUSTOM} --out o --checkpoint c --slots few": "--slots: invalid int value: 'few'",
    f"evaluate answer {CUSTOM} --out o --out p --checkpoint c": "argument --out: is given more than once",
    f"evaluate answer {CUSTOM} --out o {SERVER} --budget-usd 3": "did you mean --max-usd? (see python -m "
    "llava_jax.evaluate answer --help)",
    f"evaluate answer {CUSTOM} --out o {SERVER} --max-tokens 3": "did you mean --max-new-tokens?",
    "evaluate answer --benchmark nope --data d --out o --checkpoint c": "--benchmark nope: want one of scienceqa",
    f"evaluate answer {CUSTOM} --option match=x --out o --checkpoint c": "--option match=x: want one of exact",
    f"evaluate answer {CUSTOM} --option letters --out o --checkpoint c": "custom knows match=",
    f"evaluate score {CUSTOM}": "the following arguments are required: ANSWERS",
    f"evaluate score {CUSTOM} --option letters=loose a.jsonl": "want one of strict, lenient",
    f"evaluate score {CUSTOM} --submission s a.jsonl": "custom has no submission file",
    f"evaluate score {CUSTOM} {CUSTOM} a.jsonl": "argument --benchmark: is given more than once",
    f"evaluate score {CUSTOM} a.jsonl --nmae x": "did you mean --name?",
    f"{JUDGE}": "a judge reviews LLaVA-Bench",
    f"{JUDGE} --repeats two": "--repeats: invalid int value: 'two'",
    f"{JUDGE} --budget-tokens 5": "did you mean --max-tokens-spent?",
    "evaluate ensemble either --data d": "invalid choice: 'either'",
    f"{SCIENCE} --benchmark scienceqa": "unrecognized arguments: --benchmark scienceqa",
    "evaluate report": "the following arguments are required: SCORES, --out",
    "evaluate report s.json --out o --plots pdf": "--plots: invalid choice: 'pdf'",
    "evaluate ablate": "the following arguments are required: grid, --workdir",
    f"evaluate ablate all {GRID}": "invalid choice: 'all'",
    f"evaluate ablate scienceqa {GRID}": "grid scienceqa needs --scienceqa DIR",
    f"evaluate ablate mixes {GRID}": "grid mixes needs --conversation, --detail, --reasoning, --benchmark, --data",
    "datagen": "the following arguments are required: VERB",
    "datagen nonsense": "invalid choice: 'nonsense'",
    "datagen conversation": "the following arguments are required: --base-url, --model, --out",
    f"datagen conversation --out o {SERVER}": "want either --captions captions.json [--instances instances.json] or",
    f"datagen conversation --out o {SERVER} --budget-usd 20": "did you mean --max-usd? (see python -m "
    "llava_jax.datagen conversation --help)",
    f"datagen conversation --out o {SERVER} --max-tokens 9": "did you mean --max-new-tokens?",
    f"datagen detail --out o {SERVER} --records r.jsonl --max-usd 20": "max_usd=20.0 without prices",
    f"datagen detail --out o {SERVER} --records nowhere.jsonl": "nowhere.jsonl: No such file or directory",
    f"datagen detail --out o {SERVER} --records r.jsonl --attempts 0": "--attempts 0: want at least 1",
    f"datagen detail --out o {SERVER} --records r.jsonl --retries -1": "retries=-1: want at least 0",
    f"datagen detail --out o {SERVER} --records r.jsonl --concurrency 0": "concurrency=0: want at least 1",
    f"datagen detail --out o {SERVER} --records r.jsonl --limit-field tokens": "--limit-field: invalid choice",
    "datagen detail --out o --base-url localhost:8000 --model m --records r.jsonl": "want http(s)://HOST[:PORT]/v1",
    "datagen detail --out o --base-url http://h/v1 --model= --records r.jsonl": "want the name that the server knows",
    "datagen brief --out r.jsonl --records r.jsonl": "r.jsonl",
    "datagen filter --records r.jsonl --out o --least 5 --most 3": "want 1 <= least <= most",
    "datagen filter --records r.jsonl --out o --phrases nltk": "nltk",
    "datagen curate": "the following arguments are required: STEP",
    "datagen curate polish --out o": "invalid choice: 'polish'",
    "datagen curate filter --out o": "run `curate correct --out o` first",
    "datagen curate describe --out o": "the following arguments are required: --images",
    "datagen curate describe --out o --images bench": "want a describer: either --checkpoint DIR, or",
    "datagen curate describe --out o --images nowhere --checkpoint c": "'nowhere': no such folder",
    "convert": "the following arguments are required: verb",
    "convert import SRC": "the following arguments are required: DST (see python -m llava_jax.convert import --help)",
    "convert merge a b --step newest": "--step: newest: want the number of a step, or best",
    f"evaluate answer {CUSTOM} --out o --checkpoint c --step -1": "--step: -1: want the number of a step, or best",
    "convert export --format onnx a b": "--format: invalid choice: 'onnx'",
    "convert assemble d --vision v --llm l --vision w": "argument --vision: is given more than once",
    "convert assemble d --vision v --llm l --select 3": "unrecognized arguments: --select",
    "plan --nonsense": "unrecognized arguments: --nonsense",
    "plan --config c.py": "--topology is missing",
    "plan --config c.py --topology v5e:2x2 --topology v5e:4x4": "argument --topology: is given more than once",
    "plan --config.train.lr=1 --config.train.lr=2": "--config.train.lr is given more than once",
    "plan --config c.py --topology v5e:9x9": "v5e comes as",
    "data": "the following arguments are required: VERB",
    "data validate": "validate wants RECORDS, or --config FILE",
    "data validate r.jsonl --image i": "did you mean --images?",
    "data show r.jsonl": "the following arguments are required: --tokenizer",
    "demo --family blip": "--family: invalid choice: 'blip'",
    "demo --seed -1": "--seed -1: want 0 or more",
    "serve": "the following arguments are required: --checkpoint",
    "serve --checkpoint c --prot 80": "did you mean --port?",
    "serve --checkpoint c --port http": "--port: invalid int value: 'http'",
    "serve --checkpoint c --api-key secret": "did you mean --api-key-file?",
    "demo bases a b": "unrecognized arguments: b (see python -m llava_jax.demo bases --help)",
}  # fmt: skip


def test_there_are_sixty_lines():
    assert len(LINES) >= 60


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_is_typed_wrong_is_answered_in_one(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench" / "images").mkdir(parents=True)
    (tmp_path / "bench" / "questions.jsonl").write_text('{"id": "1", "question": "?", "answer": "a"}\n')
    (tmp_path / "a.jsonl").write_text('{"question_id": "1", "text": "a"}\n')
    (tmp_path / "r.jsonl").write_text('{"id": 1, "image": "a.jpg", "caption": "A cat."}\n')
    command, *words = shlex.split(line)
    try:
        code = importlib.import_module(f"llava_jax.{command}.__main__").main(words)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 64 and LINES[line] in printed.err
    assert printed.err.count("\n") == 1 and not printed.out


QUICK = ("evaluate nonsense", "evaluate list scienceQ", f"evaluate answer {CUSTOM} --out o",
         "evaluate answer --benchmark nope --data d --out o --checkpoint c",
         "evaluate score --benchmark nope --data d a.jsonl", f"evaluate ablate scienceqa {GRID}", "datagen nonsense",
         "datagen curate filter --out o",
         f"datagen conversation --out o {SERVER} --budget-usd 20", "convert import SRC", "plan --config c.py",
         "data nonsense", "demo --family blip", "chat --nonsense", "doctor --nonsense", "train --nonsense",
         "train --config nowhere.py --workdir w", "serve --nonsense", "serve --checkpoint c --host 0.0.0.0",
         "serve --checkpoint c --slots 0")  # fmt: skip
SCRIPT = """
import runpy, sys
command, *words = sys.argv[1:]
sys.argv = [command, *words]
code = None
try:
    runpy.run_module(f"llava_jax.{command}", run_name="__main__")
except SystemExit as stop:
    code = stop.code
print(code, sorted({"jax", "flax", "optax", "orbax", "transformers", "torch", "matplotlib"} & set(sys.modules)))
"""


@pytest.mark.parametrize("line", QUICK)
def test_a_usage_error_is_quick_for_it_imports_nothing_heavy(line, tmp_path):
    """0.2 s of one quiet core, where `python -c pass` takes 0.03 s; the limit is for machines that are busy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    completed = subprocess.run([sys.executable, "-c", SCRIPT, *shlex.split(line)], cwd=tmp_path, capture_output=True,
                               text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert completed.stdout == "64 []\n", completed.stdout + completed.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


def test_names_that_are_repeated_for_quick_parsing_are_those_of_their_modules():
    from llava_jax.convert import __main__ as convert
    from llava_jax.convert import llama_cpp, table
    from llava_jax.demo import __main__ as demo
    from llava_jax.demo import story
    from llava_jax.evaluate import ablate
    from llava_jax.generate import assistant

    assert set(evaluate.DTYPES) == set(assistant.DTYPES)
    assert (evaluate.GRIDS, evaluate.TYPES) == (tuple(ablate.GRIDS), ablate.TYPES)
    assert set(convert.DTYPES) == {*table.FLOATS, *llama_cpp.KINDS} and {*demo.FAMILIES, "quick"} == set(story.FAMILIES)


# ---- the commands of the documents


COMMANDS = ("evaluate", "datagen", "convert", "data", "plan", "demo", "serve")
FENCES = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def documented():
    """(command, arguments) of every line of README.md and launch/README.md that starts one of COMMANDS."""
    for path in (ROOT / "README.md", ROOT / "launch" / "README.md"):
        blocks = [block for language, block in FENCES.findall(path.read_text(encoding="utf-8")) if language == "sh"]
        for block in blocks:
            for line in block.replace("\\\n", " ").splitlines():
                match = re.search(r"python3? -m llava_jax\.(\w+)(.*)", line)
                if match and match[1] in COMMANDS:
                    args = [arg for arg in shlex.split(match[2], comments=True) if arg not in (";", "&&")]
                    yield match[1], args


def test_the_documents_name_commands():
    assert {command for command, _ in documented()} >= set(COMMANDS)


@pytest.mark.parametrize("command, words", list(documented()))
def test_every_documented_command_passes_its_parser(command, words, monkeypatch, capsys):
    module = importlib.import_module(f"llava_jax.{command}.__main__")
    parsed = []
    parse = cli.Parser.parse_args

    def stop(self, args=None, namespace=None):
        parsed.append(parse(self, args, namespace))
        raise SystemExit(0)

    monkeypatch.setattr(cli.Parser, "parse_args", stop)
    try:
        module.main(words)
    except SystemExit as exit_error:
        assert not exit_error.code, capsys.readouterr().err
    assert len(parsed) == 1, capsys.readouterr().err


def test_the_datagen_command_of_the_readme_runs_as_far_as_its_files(tmp_path, monkeypatch, capsys):
    """Case 08: --max-usd is a limit of the budget, whose prices are given beside it."""
    monkeypatch.chdir(tmp_path)
    (words,) = [words for command, words in documented() if command == "datagen" and words[0] == "conversation"]
    assert "--max-usd" in words
    from llava_jax.datagen.__main__ import main
    from tests.fake_openai import FakeOpenAI

    (tmp_path / "captions_train2017.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "1.jpg", "width": 8, "height": 8}],
        "annotations": [{"image_id": 1, "caption": "A cat."}]}))  # fmt: skip
    (tmp_path / "instances_train2017.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "1.jpg", "width": 8, "height": 8}], "categories": [], "annotations": []}))
    with FakeOpenAI(lambda body: "Question: What?\n===\nAnswer: A cat.") as server:
        words[words.index("--base-url") + 1] = server.url
        assert main(words) == 0
    assert len(json.loads((tmp_path / "data" / "mine" / "conversation.json").read_text())) == 1


def test_the_glossary_of_the_readme_is_what_the_commands_answer():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Glossary")[1].split("\n## ")[0]
    rows = [[[word.partition("=")[0] for word in re.findall(r"`([^`]+)`", cell)] for cell in line.split("|")[1:3]]
            for line in section.splitlines() if line.startswith("| `")]  # fmt: skip
    assert len(rows) > 20
    for here, elsewhere in rows:
        for name in elsewhere:
            assert any(key in KNOWN_NAMES[name] for key in here), (name, here)
