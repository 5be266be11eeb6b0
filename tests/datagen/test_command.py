"""The whole command: three kinds for twenty pictures, accepted by `data validate`, trained on; no kill loses any."""

import json
import random
import threading
import time

import pytest

from llava_jax.data.__main__ import main as data_command
from llava_jax.datagen.__main__ import main
from tests.datagen import small
from tests.fake_openai import FakeOpenAI, always, first

KINDS = ("conversation", "detail", "reasoning")
PICTURES = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.write_world(tmp_path_factory.mktemp("world"), PICTURES)


def run(server, kind, source, out, *args):
    return main([kind, *map(str, source), "--out", str(out), "--base-url", server.url, "--model", "m", *map(str, args)])


def read(path):
    return json.loads(path.read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def generated(world, tmp_path_factory):
    """(folder with the three files, what the server saw)."""
    out = tmp_path_factory.mktemp("made")
    with FakeOpenAI(small.reply) as server:
        for kind in KINDS:
            assert run(server, kind, ["--records", world / "records.json"], out) == 0
        return out, list(server.bodies)


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_gets_a_record_that_the_data_command_accepts(kind, world, generated, capsys):
    out, _ = generated
    records = read(out / f"{kind}.json")
    assert [record["id"] for record in records] == [f"{i:012}" for i in range(PICTURES)]
    for i, record in enumerate(records):
        texts = [turn["value"] for turn in record["conversations"]]
        assert len(texts) == (4 if kind == "conversation" else 2)
        assert texts[0].count("<image>") == 1 and not any("<image>" in text for text in texts[1:])
        assert f"This is {i}:" in texts[1], "the answer belongs to this picture"
    args = ["validate", str(out / f"{kind}.json"), "--images", str(world / "images"), "--open-images"]
    assert data_command(args) == 0
    assert f"{PICTURES} records, 0 bad" in capsys.readouterr().out


def test_the_picture_stands_before_or_after_the_first_question(generated):
    firsts = [record["conversations"][0]["value"] for kind in KINDS for record in read(generated[0] / f"{kind}.json")]
    before = sum(first.startswith("<image>\n") for first in firsts)
    after = sum(first.endswith("\n<image>") for first in firsts)
    assert before + after == 3 * PICTURES and min(before, after) > PICTURES // 2


def test_conversations_are_made_from_captions_and_the_others_from_boxes_too(generated):
    _, bodies = generated
    boxes = [" corner" in small.context_of(body) or "]" in small.context_of(body) for body in bodies]
    assert boxes == [False] * PICTURES + [True] * 2 * PICTURES
    assert [len(body["messages"]) for body in bodies[::PICTURES]] == [1 + 2 * n + 1 for n in (2, 3, 3)]


def test_coco_files_say_the_same_as_records(world, generated, tmp_path):
    source = ["--captions", world / "captions.json", "--instances", world / "instances.json"]
    with FakeOpenAI(small.reply) as server:
        for kind in KINDS:
            assert run(server, kind, source, tmp_path) == 0
            assert read(tmp_path / f"{kind}.json") == read(generated[0] / f"{kind}.json")


def test_a_second_run_asks_nobody_and_writes_the_same(world, tmp_path, capsys):
    with FakeOpenAI(small.reply) as server:
        for _ in range(2):
            assert run(server, "detail", ["--records", world / "records.json"], tmp_path) == 0
            content = (tmp_path / "detail.json").read_bytes()
        assert len(server.bodies) == PICTURES and content == (tmp_path / "detail.json").read_bytes()
    assert f"0 asked, {PICTURES} from the cache" in capsys.readouterr().out


def test_refused_answers_are_kept_with_the_reason_and_asked_again_if_wanted(world, tmp_path):
    def sometimes(body):
        with_seven = "This is 7:" in small.context_of(body)
        return "As the caption says." if with_seven and len(server.bodies) <= PICTURES else small.reply(body)

    with FakeOpenAI(sometimes) as server:
        source = ["--records", world / "records.json"]
        assert run(server, "detail", source, tmp_path / "once", "--concurrency", 1) == 0
        (reject,) = lines(tmp_path / "once" / "detail_rejects.jsonl")
        assert reject == {"id": f"{7:012}", "image": f"{7:012}.jpg", "reason": "sources: 'caption'",
                          "text": "As the caption says."}  # fmt: skip
        assert len(read(tmp_path / "once" / "detail.json")) == PICTURES - 1
        assert read(tmp_path / "once" / "detail_report.json")["refused_reasons"] == {"sources": 1}
        server.bodies.clear()
        assert run(server, "detail", source, tmp_path / "twice", "--concurrency", 1, "--attempts", 2) == 0
        assert len(read(tmp_path / "twice" / "detail.json")) == PICTURES and len(server.bodies) == PICTURES + 1
        assert len(lines(tmp_path / "twice" / "detail_rejects.jsonl")) == 1


def test_answers_that_were_cut_short_are_refused_and_a_file_without_records_is_65(world, tmp_path, capsys):
    with FakeOpenAI(small.reply, always("length")) as server:
        assert run(server, "reasoning", ["--records", world / "records.json"], tmp_path, "--limit", 3) == 65
    printed = capsys.readouterr()
    assert "0 records of 3 pictures, 3 answers refused" in printed.out
    assert "holds no record: all 3 answers were refused, {'unfinished': 3}: see reasoning_rejects.jsonl" in printed.err
    assert [row["reason"] for row in lines(tmp_path / "reasoning_rejects.jsonl")] == [
        "unfinished: finish_reason is 'length'"] * 3  # fmt: skip
    assert read(tmp_path / "reasoning.json") == []


def test_a_spent_budget_ends_in_what_there_is_and_a_raised_one_completes_it(world, tmp_path, capsys):
    prices = ["--usd-per-million-in", 1000, "--usd-per-million-out", 1000, "--max-new-tokens", 50]
    with FakeOpenAI(small.reply) as server:
        source = ["--records", world / "records.json"]
        assert run(server, "detail", source, tmp_path, "--max-usd", 12, *prices) == 75
        printed = capsys.readouterr()
        part = read(tmp_path / "detail.json")
        assert "budget" in printed.err and "run the same command again" in printed.err and "$" in printed.out
        assert 0 < len(part) < PICTURES
        assert len(lines(tmp_path / "detail_unanswered.jsonl")) == PICTURES - len(part)
        assert run(server, "detail", source, tmp_path, "--max-usd", 100, *prices) == 0
        assert len(read(tmp_path / "detail.json")) == PICTURES == len(server.bodies)
        assert lines(tmp_path / "detail_unanswered.jsonl") == []


def test_faults_of_the_server_cost_no_record(world, tmp_path):
    with FakeOpenAI(small.reply, first("500")) as server:
        assert run(server, "conversation", ["--records", world / "records.json"], tmp_path, "--limit", 4) == 0
    assert len(read(tmp_path / "conversation.json")) == 4


def test_the_key_is_in_no_file(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-77")
    with FakeOpenAI(small.reply, always("echo answer")) as server:
        assert run(server, "detail", ["--records", world / "records.json"], tmp_path, "--limit", 2) == 0
        assert server.keys == {"sk-canary-77"}
        server.faults = always("refused key")
        assert run(server, "detail", ["--records", world / "records.json"], tmp_path, "--limit", 4) == 75
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] + list(capsys.readouterr())
    assert len(texts) == 7 and not any("canary" in text for text in texts)


def kills(world, tmp_path, count, seed):
    """Kills the command `count` times at random moments, then lets it finish; (server's bodies, report, records).

    The server answers only so many requests of each start before the kill: a slow machine does not miss the moment.
    """
    rng, limits, killed = random.Random(seed), [0], threading.Event()

    def reply(body):
        if len(server.bodies) > limits[-1]:
            killed.wait(60)
        return small.reply(body)

    arguments = ["conversation", "--records", world / "records.json", "--out", tmp_path, "--model", "m",
                 "--concurrency", 4]  # fmt: skip
    with FakeOpenAI(reply, latency_secs=0.02) as server:
        for _ in range(count):
            begun = len(server.bodies)
            limits.append(begun + rng.randrange(2, 10))
            killed.clear()
            child = small.start(*arguments, "--base-url", server.url)
            while len(server.bodies) < begun + 2 and child.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.06))
            child.kill()
            child.communicate()
            killed.set()
            assert child.returncode == -9, "it was killed in the middle"
        child = small.start(*arguments, "--base-url", server.url)
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
        return list(server.bodies), read(tmp_path / "conversation_report.json"), read(tmp_path / "conversation.json")


@pytest.mark.parametrize("count, pictures", [(3, 40), pytest.param(30, 300, marks=pytest.mark.slow)])
def test_kill_9_loses_nothing_and_doubles_nothing(count, pictures, tmp_path):
    world = tmp_path / "world"
    small.write_world(world, pictures)
    bodies, report, records = kills(world, tmp_path / "out", count, seed=count)
    assert [record["id"] for record in records] == [f"{i:012}" for i in range(pictures)]
    for i, record in enumerate(records):
        assert f"This is {i}:" in record["conversations"][1]["value"]
    resent = len(bodies) - pictures
    assert 0 <= resent <= report["spent"]["unsure"] <= count * 4, "only requests in flight were sent again, and counted"
    assert {small.context_of(body) for body in bodies} == {
        "\n".join(row["captions"]) for row in read(world / "records.json")
    }


@pytest.mark.slow
def test_stage_2_trains_on_what_was_made(world, generated, tmp_path):
    from llava_jax.train import metrics
    from llava_jax.train.__main__ import main as train
    from tests.train import tiny

    tiny.write_base(tmp_path / "base")
    all_records = [{**record, "id": f"{record['id']}-{kind}"}
                   for kind in KINDS for record in read(generated[0] / f"{kind}.json")]  # fmt: skip
    (tmp_path / "all.json").write_text(json.dumps(all_records))
    changes = {
        "model.base": tmp_path / "base", "data.sources.0.path": tmp_path / "all.json", "train.steps": 3,
        "data.sources.0.images": world / "images", "prompt.image_mode": "square",
    }  # fmt: skip
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    config = small.ROOT / "configs" / "tiny_finetune.py"
    assert train(["--config", str(config), "--workdir", str(tmp_path / "run"), *overrides]) == 0
    losses = [row["loss"] for row in metrics.read(tmp_path / "run")]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["detail", "--out", "o"], 64, "--base-url"),
        (["detail", "--out", "o", "--base-url", "http://a/v1", "--model", "m"], 64, "either --captions"),
        (["brief", "--out", "o", "--captions", "a", "--records", "b"], 64, "either --captions"),
        (["brief", "--out", "o", "--records", "nowhere.json"], 64, "nowhere.json"),
        (["brief", "--out", "o", "--records", "{tmp}/broken.jsonl"], 65, "broken.jsonl:2: no valid JSON"),
        (["brief", "--out", "o", "--records", "{tmp}/twice.jsonl"], 65, "'1' the first"),
        (["brief", "--out", "o", "--records", "{tmp}/outside.jsonl"], 65, "relative to the image folder"),
        (["brief", "--out", "o", "--records", "{tmp}/pixels.jsonl"], 65, "divide pixels"),
        (["brief", "--out", "o", "--captions", "{tmp}/broken.jsonl"], 65, "no valid JSON"),
        (["brief", "--out", "o", "--captions", "{tmp}/list.json"], 65, "--records"),
        (["detail", "--out", "o", "--records", "{tmp}/good.jsonl", "--base-url", "a", "--model", "m"], 64, "base_url"),
        (["detail", "--out", "o", "--records", "{tmp}/good.jsonl", "--base-url", "http://a", "--model", "m",
          "--prompts", "{tmp}"], 64, "system_message.txt"),
        (["detail", "--out", "o", "--records", "{tmp}/good.jsonl", "--base-url", "http://a", "--model", "m",
          "--max-usd", "1"], 64, "prices"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_an_exit_code(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = '{"id": 1, "image": "a.jpg", "caption": "A cat."}\n'
    for name, text in {
        "good.jsonl": good, "broken.jsonl": good + '{"id": 2, "image', "twice.jsonl": good + good,
        "outside.jsonl": good.replace("a.jpg", "../a.jpg"), "list.json": "[]",
        "pixels.jsonl": good.replace("}", ', "boxes": [{"category": "cat", "bbox": [3, 4, 50, 60]}]}'),
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    try:
        exit_code = main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    except SystemExit as error:
        exit_code = error.code
    assert exit_code == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
