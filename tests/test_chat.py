"""The chat command: one answer or a conversation, streamed, with its history; one clear line for an error."""

import http.server
import io
import threading

import pytest

from llava_jax import chat, cli
from llava_jax.generate.assistant import Assistant
from llava_jax.prompt.conversation import Conversation, Turn
from tests.generate import tiny

NEW = "12"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a checkpoint and a picture."""
    folder = tmp_path_factory.mktemp("chat")
    tiny.save(folder / "model")
    tiny.picture().save(folder / "it.png")
    return folder


@pytest.fixture(scope="module")
def assistant(root) -> Assistant:
    return Assistant.open(root / "model")


def run(root, *arguments: str) -> int:
    defaults = {"--checkpoint": str(root / "model"), "--max-new-tokens": NEW}
    return chat.main([*(arg for pair in defaults.items() if pair[0] not in arguments for arg in pair), *arguments])


def test_a_prompt_is_answered_once(root, assistant, capsys):
    assert run(root, "--image", str(root / "it.png"), "--prompt", "What is it?") == 0
    expected = assistant.reply(tiny.question("What is it?"), int(NEW))
    assert capsys.readouterr().out == expected.text + "\n"


def test_without_a_prompt_the_conversation_has_a_history(root, assistant, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\nWhere is it?\n\nnever read\n"))
    assert run(root, "--image", str(root / "it.png")) == 0
    turns = (Turn("user", "<image>\nWhat is it?"),)
    first_reply = assistant.reply(Conversation(turns, (tiny.picture(),)), int(NEW))
    turns += (Turn("assistant", first_reply.text), Turn("user", "Where is it?"))
    second = assistant.reply(Conversation(turns, (tiny.picture(),)), int(NEW))
    assert capsys.readouterr().out == f"{first_reply.text}\n{second.text}\n"


def test_the_end_of_the_input_ends_the_conversation(root, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run(root) == 0
    assert capsys.readouterr().out == ""


def test_text_alone_with_a_temperature_repeats_with_its_seed(root, assistant, capsys):
    settings = ["--prompt", "Hello", "--temperature", "1", "--top-p", "0.9", "--top-k", "40", "--seed", "3",
                "--repetition-penalty", "0.2"]  # fmt: skip
    assert run(root, *settings) == run(root, *settings) == 0
    conversation = Conversation((Turn("user", "Hello"),))
    sampling = {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "seed": 3}
    expected = assistant.reply(conversation, int(NEW), **sampling, repetition_penalty=0.2).text
    assert expected != assistant.reply(conversation, int(NEW), **sampling).text
    assert capsys.readouterr().out == f"{expected}\n{expected}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--image", "nowhere.png"], 64, "nowhere.png': no such file"),
        (["--image", "model/model.json"], 64, "not a picture that can be read"),
        (["--temperature", "-1"], 64, "temperature=-1.0: want a number >= 0"),
        (["--repetition-penalty", "0"], 64, "repetition_penalty=0.0: want a number above 0 (1 changes nothing)"),
        (["--temperature", "hot"], 64, "--temperature: invalid float value: 'hot'"),
        (["--tempo", "1"], 64, "unrecognized arguments: --tempo"),
        (["--max-new-tokens", "5000"], 64, "the model has 1024"),
        (["--checkpoint", "nowhere"], 66, "nowhere: there is no such checkpoint"),
        (["--checkpoint", "."], 66, "no model.json here"),
    ],
)
def test_a_fault_is_one_clear_line_and_its_exit_code(root, capsys, monkeypatch, arguments, code, message):
    monkeypatch.chdir(root)
    try:
        exit_code = run(root, "--prompt", "Hello", *arguments)
    except SystemExit as stop:  # argparse's own way to end
        exit_code = stop.code
    assert exit_code == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_checkpoint_must_be_named(capsys):
    with pytest.raises(SystemExit) as caught:
        chat.main(["--prompt", "Hello"])
    assert caught.value.code == 64
    assert "--checkpoint" in capsys.readouterr().err


def test_without_a_limit_the_answer_may_fill_the_model(root, assistant, capsys):
    """The demo's model has 512 positions in all: a fixed default of 512 new tokens was refused."""
    question = tiny.question("What is it?")
    room = assistant._room(question, None)
    prompt = assistant.reply(question, int(NEW)).prompt_tokens
    assert room == min(512, assistant.model.config.llm.max_positions - prompt)
    assert assistant.reply(question) == assistant.reply(question, room)
    with pytest.raises(ValueError, match=r"max_new_tokens=1 need \d+ positions"):
        assistant.reply(tiny.question("What is it? " * 4000))


def test_ctrl_c_ends_the_conversation_without_a_traceback(root, monkeypatch):
    def interrupt() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_question", interrupt)
    assert run(root) == 130


def test_ctrl_d_and_ctrl_c_leave_the_shell_a_line_of_its_own(monkeypatch, capsys):
    for end in (EOFError, KeyboardInterrupt):

        def raise_end(prompt, end=end):
            raise end

        monkeypatch.setattr("builtins.input", raise_end)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        assert cli.run("chat", lambda: len(chat._question())) == (0 if end is EOFError else cli.INTERRUPTED)
        printed = capsys.readouterr()
        assert printed.out == "\n" and printed.err == ("" if end is EOFError else "chat: interrupted\n")


def test_several_pictures_are_shown_in_order_or_where_the_question_names_them(root, assistant, capsys):
    tiny.picture().rotate(90).save(root / "other.png")
    images = ["--image", str(root / "it.png"), "--image", str(root / "other.png")]
    assert run(root, *images, "--prompt", "What are they?") == 0
    assert run(root, *images, "--prompt", "First <image>, then <image>.") == 0
    pictures = (tiny.picture(), tiny.picture().rotate(90))
    texts = ("<image>\n<image>\nWhat are they?", "First <image>, then <image>.")
    expected = [assistant.reply(Conversation((Turn("user", text),), pictures, images_in_place=True), int(NEW)).text
                for text in texts]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == "\n".join(expected).splitlines()
    assert run(root, *images, "--prompt", "Only <image>?") == 64
    assert "has 1 <image> for 2 picture(s)" in capsys.readouterr().err


def test_commands_add_a_picture_forget_and_end_and_a_mistake_costs_only_itself(root, assistant, capsys, monkeypatch):
    lines = ["Hello", "/image nowhere.png", "/paint", f"/image {root / 'it.png'}", "What is it?", "/reset", "Hello",
             "/quit", "never read"]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert run(root, "--system", "Be brief.") == 0
    out, error = capsys.readouterr()
    turns = (Turn("user", "Hello"),)
    first = assistant.reply(Conversation(turns, system="Be brief."), int(NEW)).text
    turns += (Turn("assistant", first), Turn("user", "<image>\nWhat is it?"))
    second = assistant.reply(Conversation(turns, (tiny.picture(),), system="Be brief."), int(NEW)).text
    assert out == f"{first}\n{second}\n{first}\n"
    assert "nowhere.png': no such file" in error and "/paint is no command" in error


def test_a_url_is_fetched_only_where_that_is_asked_for(root, capsys):
    content = (root / "it.png").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/it.png" else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/it.png"
    try:
        assert run(root, "--image", str(root / "it.png"), "--prompt", "What is it?") == 0
        assert run(root, "--image", url, "--prompt", "What is it?", "--allow-urls") == 0
        one, two = capsys.readouterr().out.splitlines()
        assert one == two
        assert run(root, "--image", url, "--prompt", "What is it?") == 64
        assert "--allow-urls" in capsys.readouterr().err
        assert run(root, "--image", url + "x", "--prompt", "What is it?", "--allow-urls") == 64
        assert "404" in capsys.readouterr().err
    finally:
        server.shutdown()
        server.server_close()
