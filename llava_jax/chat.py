"""Talk with a checkpoint about pictures: `python -m llava_jax.chat --checkpoint DIR --image FILE`.

With `--prompt` it answers once; without, it goes on turn by turn until /quit, an empty line or the end of the input.
"""

import argparse
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llava_jax import cli
from llava_jax.errors import UsageError

if TYPE_CHECKING:
    from llava_jax.generate.assistant import Assistant, Reply

MARKER = "<image>"
HELP = """/image FILE   shows another picture with the next question (a URL with --allow-urls)
/system TEXT  replaces the system text, from the beginning
/reset        forgets what was said; the pictures of the command line are shown again
/quit         ends, as an empty line does"""
URL_SECS, URL_BYTES = 30.0, 50 * 2**20


@dataclass(frozen=True)
class Talk:
    """What was said so far: turns, the pictures that their markers stand for, and pictures for the next question."""

    turns: tuple[Any, ...] = ()
    images: tuple[Any, ...] = ()
    waiting: tuple[Any, ...] = ()
    system: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chat and returns its exit code; what is wrong is said in one line."""
    args = _arguments(argv)
    return cli.run("chat", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from llava_jax.generate.sampling import Sampling  # what follows takes seconds to import

    Sampling(args.temperature, args.top_p, args.top_k, args.seed, args.repetition_penalty)
    images = tuple(_open(place, args.allow_urls) for place in args.image)
    from llava_jax.generate.assistant import Assistant

    assistant = Assistant.open(args.checkpoint, dtype=args.dtype, step=args.step, template=args.template)
    begin = Talk(waiting=images, system=args.system)
    if args.prompt is None:
        talk(assistant, begin, args)
    else:
        _answered(assistant, _asked(begin, args.prompt), args)
    return 0


def talk(assistant: "Assistant", begin: Talk, args: argparse.Namespace) -> None:
    """Question and answer in turn, each with all that was said before; what a question gets wrong costs only itself."""
    _banner(assistant, begin, args)
    now = begin
    while question := _question():
        try:
            word, _, rest = question.partition(" ")
            if word == "/quit":
                return
            if question.startswith("/"):
                now = _commanded(word, rest.strip(), now, begin, args)
            else:
                now = _answered(assistant, _asked(now, question), args)
        except (ValueError, OSError) as error:
            print(f"chat: {error}", file=sys.stderr, flush=True)


def _banner(assistant: "Assistant", begin: Talk, args: argparse.Namespace) -> None:
    if not sys.stdin.isatty():
        return
    import readline  # noqa: F401 - gives `input` line editing and a history

    config = assistant.model.config
    print(f"{args.checkpoint}: {config.llm.layers} layers of width {config.llm.width}, pictures of "
          f"{config.vision.image_size} pixels, template {assistant.format.template.name}, "
          f"{len(begin.waiting)} picture(s) shown with the first question\n{HELP}")  # fmt: skip


def _commanded(word: str, rest: str, now: Talk, begin: Talk, args: argparse.Namespace) -> Talk:
    match word:
        case "/image":
            return replace(now, waiting=(*now.waiting, _open(rest, args.allow_urls)))
        case "/system":
            return replace(begin, system=rest)
        case "/reset":
            return replace(begin, system=now.system)
        case "/help":
            print(HELP)
            return now
    raise UsageError(f"{word} is no command of chat:\n{HELP}")


def _asked(now: Talk, question: str) -> Talk:
    """With the next question: its markers stand for the pictures that wait; without markers they are shown before it.

    Raises:
      UsageError: as many markers as pictures are wanted.
    """
    from llava_jax.prompt.conversation import Turn, with_markers

    text = with_markers(question, len(now.waiting))
    return replace(now, turns=(*now.turns, Turn("user", text)), images=(*now.images, *now.waiting), waiting=())


def _answered(assistant: "Assistant", now: Talk, args: argparse.Namespace) -> Talk:
    """With the reply, which is printed while it is made."""
    from llava_jax.prompt.conversation import Conversation, Turn

    # LLaVA's rule for its one picture is to show it first; several stand where they were named.
    conversation = Conversation(now.turns, now.images, "chat", now.system, images_in_place=len(now.images) > 1)
    reply: Reply = assistant.reply(
        conversation, args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed,
        on_piece=lambda piece: print(piece, end="", flush=True), repetition_penalty=args.repetition_penalty,
    )  # fmt: skip
    print(flush=True)
    return replace(now, turns=(*now.turns, Turn("assistant", reply.text)))


def _open(place: str, allow_urls: bool) -> Any:
    """The picture of a path, or of a URL where those are allowed."""
    from llava_jax.prompt.images import open_image

    if not place:
        raise UsageError("/image wants a file")
    if not place.startswith(("http://", "https://")):
        return open_image(place)
    if not allow_urls:
        raise UsageError(f"{place}: pictures are fetched from the network only with --allow-urls; or download it first")
    try:
        with urllib.request.urlopen(place, timeout=URL_SECS) as answer:
            content = answer.read(URL_BYTES + 1)
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise UsageError(f"{place}: cannot be fetched ({error}); download it and name the file") from None
    if len(content) > URL_BYTES:
        raise UsageError(f"{place}: over {URL_BYTES >> 20} MB; download it and name a smaller file")
    return open_image(content)


def _question() -> str:
    """The next line, asked for where someone is there to be asked; empty at the end of the input."""
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt) as end:
        if prompt:
            print()  # Ctrl-D and Ctrl-C leave the cursor behind the prompt
        if isinstance(end, KeyboardInterrupt):
            raise
        return ""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    from llava_jax.prompt import templates

    parser = cli.Parser(prog="python -m llava_jax.chat", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="what `train` or `convert` wrote")
    add("--step", type=cli.step, metavar="N", help="of the checkpoint, or best; default: the latest")
    add("--image", metavar="FILE", action="append", default=[], help="a picture; given again, several in that order; "
        f"{MARKER} in the question says where each is shown (default: before it)")  # fmt: skip
    add("--prompt", metavar="TEXT", help="answer this and end; left out, questions are read in turn")
    add("--system", metavar="TEXT", help="in place of the template's own system text")
    add("--allow-urls", action="store_true", help="--image and /image may fetch from http(s)")
    add("--template", choices=list(templates.TEMPLATES), help="default: the checkpoint's own")
    add("--temperature", type=float, default=0.0, help="0 is greedy (the default)")
    add("--top-p", type=float, default=1.0, help="draw from this mass of the likeliest ids")
    add("--top-k", type=int, default=0, help="draw from this many of the likeliest ids; 0: all")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: what the conversation has said is less likely; "
        "1: off")  # fmt: skip
    add("--max-new-tokens", type=int, help="default: 512, or what the model has room for")
    add("--seed", type=int, default=0)
    add("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 elsewhere")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
