"""What a command line says of a config, and what of it is refused."""

import pytest

from llava_jax import config_args
from llava_jax.errors import UsageError


def test_a_command_line_is_read_in_any_order():
    argv = ["--config.mesh.fsdp", "-1", "--workdir", "w", "--config.log.wandb=", "--config=c.py"]
    assert config_args.command(argv, "program", "what it does") == ("c.py", "w", {"mesh.fsdp": "-1", "log.wandb": ""})


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
        config_args.command(argv, "program", "what it does")


def test_an_override_without_a_value_is_refused():
    with pytest.raises(UsageError, match="--config.train.lr wants a value"):
        config_args.overrides(["--config", "c", "--config.train.lr"])
    assert config_args.overrides(["a", "--config.log.wandb=", "b"]) == (["a", "b"], {"log.wandb": ""})


def test_help_is_printed_and_leaves(capsys):
    with pytest.raises(SystemExit) as left:
        config_args.command(["--help"], "program", "what it does")
    assert left.value.code == 0 and "what it does\nusage: program" in capsys.readouterr().out


def test_an_option_or_an_override_that_is_given_twice_is_refused():
    start = ["--config", "c", "--workdir", "w"]
    for again in (["--workdir=x"], ["--config", "d"], ["--config.train.lr=1", "--config.train.lr=2"]):
        with pytest.raises(UsageError, match=f"{again[0].split('=')[0]} is given more than once"):
            config_args.command([*start, *again], "program")
