"""What `answer` sends to a server: pictures of the benchmark's folder, and no question that could not be sent."""

import base64
import json
import os

import pytest
from etils import epath
from PIL import Image

from llava_jax.evaluate import __main__ as command
from llava_jax.evaluate import answer, answers
from llava_jax.evaluate.questions import Question
from tests.fake_openai import FakeOpenAI
from tests.generate import tiny


def run(*args):
    return command.main([str(arg) for arg in args])


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ask(data, server, out, *args):
    return run("answer", "--benchmark", "custom", "--data", data, "--base-url", server.url, "--model", "any",
               "--out", out, "--concurrency", 2, "--retries", 0, *args)  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """A benchmark's folder, and a private one beside it that no question may reach."""
    bench, private = tmp_path / "bench", tmp_path / "private"
    (bench / "images" / "deep").mkdir(parents=True)
    private.mkdir()
    tiny.picture(0).save(bench / "images" / "deep" / "good.png")
    tiny.picture(1).save(private / "passport.png")
    tiny.picture(2).save(bench / "images" / "bitmap.bmp")
    (bench / "images" / "link.png").symlink_to(private / "passport.png")
    (bench / "images" / "linked").symlink_to(private)
    (bench / "images" / "inside.png").symlink_to(bench / "images" / "deep" / "good.png")
    (bench / "images" / "notes.gif").write_text("GIve nobody these notes")
    os.mkfifo(bench / "images" / "pipe.png")
    return bench


VALID_IMAGES = ("deep/good.png", "inside.png", "bitmap.bmp")


@pytest.mark.parametrize("image", ["{private}/passport.png", "../../private/passport.png", "link.png",
                                   "linked/passport.png", "deep/../../../private/passport.png", "notes.gif",
                                   "pipe.png", "/etc/hostname"])  # fmt: skip
def test_a_picture_leaves_the_machine_only_from_the_benchmarks_folder(image, data, tmp_path, capsys):
    image = image.replace("{private}", str(tmp_path / "private"))
    rows = [{"id": str(i), "image": name, "question": f"What is {i}?"} for i, name in enumerate((*VALID_IMAGES, image))]
    write(data / "questions.jsonl", rows)
    with FakeOpenAI(lambda body: "Yes.") as server:
        assert ask(data, server, tmp_path / "a.jsonl") == 65
        assert len(server.bodies) == len(VALID_IMAGES)
        bodies = json.dumps(server.bodies)
    for path in (tmp_path / "private" / "passport.png", data / "images" / "notes.gif"):
        assert base64.b64encode(path.read_bytes()).decode().strip("=")[-40:] not in bodies
    assert "id='3' bad_image: " in capsys.readouterr().out
    rows = answers.read([tmp_path / "a.jsonl"]).answers
    assert [row.text for row in rows] == ["Yes."] * 3 + [""] and rows[3].metadata["fault"] == "bad_image"


def test_the_folder_itself_may_be_a_link_and_may_lie_deep(data, tmp_path):
    (data / "images").rename(tmp_path / "elsewhere")
    (data / "images").symlink_to(tmp_path / "elsewhere")
    write(data / "questions.jsonl", [{"id": "0", "image": "deep/good.png", "question": "What?", "answer": "a"}])
    with FakeOpenAI() as server:
        assert ask(data, server, tmp_path / "a.jsonl") == 0
        url = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    content = (tmp_path / "elsewhere" / "deep" / "good.png").read_bytes()
    assert url == f"data:image/png;base64,{base64.b64encode(content).decode()}"


def test_pictures_that_are_bytes_of_the_benchmark_are_sent(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    url = answer._data_url(Question("1", "?", (data,)).images[0], epath.Path(tmp_path))
    assert url.startswith("data:image/png;base64,")


def test_half_a_character_costs_its_question_and_is_named(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    texts = ("fine", "bad \ud83d half", "also fine")
    write(tmp_path / "questions.jsonl", [{"id": str(i), "question": text} for i, text in enumerate(texts)])
    with FakeOpenAI(lambda body: "Yes.") as server:
        for count in (2, 2):  # the second run asks only what has no answer
            assert ask(tmp_path, server, tmp_path / "a.jsonl") == 65
            assert "id='1' not_answered: cannot be sent" in capsys.readouterr().out
            assert len(server.bodies) == count
    rows = answers.read([tmp_path / "a.jsonl"]).answers
    assert [row.text for row in rows] == ["Yes.", "", "Yes."] and rows[1].prompt == texts[1]


@pytest.mark.parametrize("args, message", [
    ((), "want either --checkpoint DIR, or --base-url URL with --model NAME"),
    (("--checkpoint", "x", "--base-url", "http://a/v1", "--model", "m"), "want either --checkpoint DIR, or"),
    (("--base-url", "http://a/v1"), "want --base-url and --model"),
    (("--base-url", "http://a/v1", "--model", "m", "--max-new-tokens", 0), "--max-new-tokens 0: want at least 1"),
    (("--base-url", "http://a/v1", "--model", "m", "--temperature", "nan"), "temperature=nan"),
    (("--base-url", "http://a/v1", "--model", "m", "--top-p", "7"), "top_p=7.0"),
    (("--base-url", "http://a/v1", "--model", "m", "--max-usd", 1), "without prices"),
    (("--base-url", "http://a/v1", "--model", "m", "--hosts", 0), "--host 0: want"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_one_line(args, message, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    write(tmp_path / "questions.jsonl", [{"id": "0", "question": "What?"}])
    command_line = ("answer", "--benchmark", "custom", "--data", tmp_path, "--out", tmp_path / "a.jsonl")
    assert run(*command_line, *args) == 64
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
