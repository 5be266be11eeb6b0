"""What all commands share: options that are given once, by one whole name, and errors that name their verb."""

import argparse
import io
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from llava_jax import __main__ as commands
from llava_jax import cli, files
from llava_jax.errors import DataError, UsageError


def parser():
    top = cli.Parser(prog="tool")
    verbs = top.add_subparsers(required=True, metavar="VERB")
    make = verbs.add_parser("make")
    make.add_argument("source", nargs="?")
    group = make.add_argument_group("money")
    group.add_argument("--max-usd", type=float)
    group.add_argument("--max-tokens-spent", type=int)
    make.add_argument("--files", nargs="+")
    make.add_argument("--option", action="append", default=[])
    make.add_argument("--fast", action="store_true")
    either = make.add_mutually_exclusive_group()
    either.add_argument("--left")
    either.add_argument("--right")
    return top


@pytest.mark.parametrize("command_line, message", [
    ("make --max-usd 1 --max-usd 2", "tool make: argument --max-usd: is given more than once (see tool make --help)"),
    ("make --max-usd=1 --max-usd=1", "--max-usd: is given more than once"),
    ("make --files a --files b", "--files: is given more than once"),
    ("make --left a --left b", "--left: is given more than once"),
    ("make --budget-usd 1", "unrecognized arguments: --budget-usd; did you mean --max-usd? (see tool make --help)"),
    ("make --budget-tokens=1", "did you mean --max-tokens-spent?"),
    ("make --max-usb 1", "did you mean --max-usd?"),
    ("make --max 1", "unrecognized arguments: --max; did you mean --max-usd?"),
    ("make --max-tokens 1", "did you mean --max-tokens-spent?"),
    ("make a b", "unrecognized arguments: b (see tool make --help)"),
    ("make --max_usd 1", "did you mean --max-usd?"),
    ("make --learning_rate 1", "unrecognized arguments: --learning_rate; here that is --config.train.lr (see"),
    ("make --max-usd x", "invalid float value: 'x' (see tool make --help)"),
    ("other", "argument VERB: invalid choice: 'other'"),
    ("", "the following arguments are required: VERB"),
])  # fmt: skip
def test_a_usage_error_is_one_line_that_names_the_verbs_own_help(command_line, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(command_line.split())
    printed = capsys.readouterr()
    assert caught.value.code == 64 and message in printed.err
    assert printed.err.count("\n") == 1 and printed.err.endswith("--help)\n") and not printed.out


def test_what_collects_values_or_is_a_switch_may_be_repeated():
    tool = parser()
    for _ in range(2):  # and a parser may be used again
        options = tool.parse_args("make a --option x=1 --option y=2 --fast --fast --max-usd 3 --files a b".split())
        assert (options.option, options.fast, options.max_usd, options.source) == (["x=1", "y=2"], True, 3.0, "a")
        assert options.files == ["a", "b"]


def test_text_that_the_terminal_cannot_show_ends_no_command(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.run("tool", lambda: print("é \ud800") or 0) == 0
    out.flush()
    assert out.buffer.getvalue() == b"\\xe9 \\ud800\n"


def test_a_file_where_a_folder_is_wanted_is_one_line(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert cli.run("tool", lambda: (tmp_path / "out" / "deep").mkdir(parents=True) or 0) == 64
    assert cli.run("tool", lambda: (tmp_path / "out").mkdir() or 0) == 64
    assert capsys.readouterr().err.count("\n") == 2


def test_errors_of_ours_end_with_their_code_and_others_with_a_traceback(capsys):
    def fail():
        raise DataError("a.json: bad")

    assert cli.run("tool", fail) == 65 and capsys.readouterr().err == "tool: a.json: bad\n"
    with pytest.raises(argparse.ArgumentTypeError):
        cli.run("tool", lambda: (_ for _ in ()).throw(argparse.ArgumentTypeError("fault")))


@pytest.mark.parametrize("url", ["https://huggingface.co/org/name", "s3://bucket/x", "az://bucket/x", "ftp://x"])
def test_a_url_in_the_place_of_a_path_is_one_line(url, capsys):
    scheme = url.partition("/")[0] + "//"
    reads = (lambda: epath.Path(url).read_text(), lambda: files.read(url), lambda: files.exists(url))
    for read in reads:
        assert cli.run("tool", read) == 64
        (line,) = capsys.readouterr().err.splitlines()
        assert f"tool: a path that begins with {scheme}: want a path on a disk" in line and "hf download" in line
    with pytest.raises(KeyError):
        cli.run("tool", lambda: {}["https://x"])


def test_the_settings_of_a_config_are_taken_out_of_a_command():
    args = ["a.json", "--config", "f.py", "--config.train.lr=1e-4", "--config.data.hold_out", "0.1", "--out", "b"]
    assert cli.overrides(args) == (["a.json", "--config", "f.py", "--out", "b"],
                                   {"train.lr": "1e-4", "data.hold_out": "0.1"})  # fmt: skip
    for args, message in ((["--config.a"], "wants a value"), (["--config.a=1", "--config.a=2"], "more than once")):
        with pytest.raises(UsageError, match=f"--config.a .*{message}"):
            cli.overrides(args)


def test_a_command_line_is_read_in_any_order():
    argv = ["--config.mesh.fsdp", "-1", "--workdir", "w", "--config.log.wandb=", "--config=c.py"]
    assert cli.command(argv, "program", "what it does") == ("c.py", "w", {"mesh.fsdp": "-1", "log.wandb": ""})


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config", "c"], "--workdir is missing"),
        (["--workdir", "w"], "--config is missing"),
        (["--config", "c", "--workdir", "w", "--lr=1"], "unknown argument '--lr=1'; here that is --config.train.lr"),
        (["--config", "c", "--workdir", "w", "word"], "unknown argument 'word'"),
        (["--config", "c", "--workdir"], "--workdir is missing"),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_usage(argv, message):
    with pytest.raises(ValueError, match=message + "; usage: program --config FILE"):
        cli.command(argv, "program", "what it does")


def test_help_is_printed_and_leaves(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.command(["--help"], "program", "what it does")
    assert caught.value.code == 0 and "what it does\nusage: program" in capsys.readouterr().out


def test_an_option_or_an_override_that_is_given_twice_is_refused():
    start = ["--config", "c", "--workdir", "w"]
    for repeated in (["--workdir=x"], ["--config", "d"], ["--config.train.lr=1", "--config.train.lr=2"]):
        with pytest.raises(UsageError, match=f"{repeated[0].split('=')[0]} is given more than once"):
            cli.command([*start, *repeated], "program")


def test_lines_of_progress_are_plain_and_come_once_whatever_else_has_set_up_logging():
    code = ("import logging\nfrom llava_jax import cli\nlogging.warning('another library')\ncli.show_progress()\n"
            "cli.show_progress()\nlogging.getLogger('llava_jax.data').info('counts 3 of 9')")
    command = [sys.executable, "-c", code]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert completed.stderr.splitlines() == ["WARNING:root:another library", "counts 3 of 9"]


def test_the_package_lists_every_command_that_there_is(capsys):
    package = Path(cli.__file__).parent
    modules = {path.parent.name for path in package.glob("*/__main__.py")} | {"chat"}
    assert commands.main() == 0 and set(commands.COMMANDS) == modules
    printed = capsys.readouterr().out
    assert all(f"python -m llava_jax.{name} " in printed for name in modules)
