"""Talk with a checkpoint about a picture: `python -m llava_jax.chat --checkpoint DIR --image FILE`.

With `--prompt` it answers once; without, it goes on turn by turn until an empty line or the end of the input.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from llava_jax import cli
from llava_jax.generate.assistant import DTYPES, Assistant, Reply
from llava_jax.generate.sampling import Sampling
from llava_jax.prompt import templates
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.images import open_image


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chat and returns its exit code; what is wrong is said in one line."""
    args = _arguments(argv)
    return cli.run("chat", lambda: _run(args), "")


def _run(args: argparse.Namespace) -> int:
    Sampling(args.temperature, args.top_p, args.top_k, args.seed)
    images = () if args.image is None else (open_image(args.image),)
    assistant = Assistant.open(args.checkpoint, dtype=args.dtype, template=args.template)
    if args.prompt is None:
        talk(assistant, images, args)
    else:
        _answer(assistant, (Turn("user", _first(args.prompt, images)),), images, args)
    return 0


def talk(assistant: Assistant, images: tuple[Any, ...], args: argparse.Namespace) -> None:
    """Question and answer in turn, each with all that was said before."""
    turns: tuple[Turn, ...] = ()
    while question := _question():
        turns += (Turn("user", question if turns else _first(question, images)),)
        reply = _answer(assistant, turns, images, args)
        turns += (Turn("assistant", reply.text),)


def _answer(
    assistant: Assistant, turns: tuple[Turn, ...], images: tuple[Any, ...], args: argparse.Namespace
) -> Reply:
    """The reply, printed while it is made."""
    reply = assistant.reply(
        Conversation(turns, images, id="chat"), args.max_new_tokens, args.temperature, args.top_p, args.top_k,
        args.seed, on_piece=lambda piece: print(piece, end="", flush=True),
    )  # fmt: skip
    print(flush=True)
    return reply


def _first(question: str, images: tuple[Any, ...]) -> str:
    """LLaVA shows the picture before the first question."""
    return f"<image>\n{question}" if images else question


def _question() -> str:
    """The next line, asked for where someone is there to be asked; empty at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m llava_jax.chat", description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="what `train` or `convert` wrote")
    parser.add_argument("--image", metavar="FILE", help="the picture; left out, the talk is text alone")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end; left out, questions are read in turn")
    parser.add_argument("--template", choices=list(templates.TEMPLATES), help="default: the checkpoint's own")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (the default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from this mass of the likeliest ids")
    parser.add_argument("--top-k", type=int, default=0, help="draw from this many of the likeliest ids; 0: all")
    parser.add_argument("--max-new-tokens", type=int, help="default: 512, or what the model has room for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on a CPU, bfloat16 elsewhere")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
