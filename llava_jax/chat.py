"""A conversation with a checkpoint about pictures: `python -m llava_jax.chat --checkpoint DIR --image FILE`.

With `--prompt` it answers once; without, it reads turn by turn until /quit, an empty line or the end of the input.
"""

import argparse
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llava_jax import cli, heap
from llava_jax.errors import MissingFile, UsageError

if TYPE_CHECKING:
    from llava_jax.generate.assistant import Assistant, Reply

MARKER = "<image>"
HELP = """/image FILE   shows another picture with the next question (a URL with --allow-urls)
/video PLACE  the same of a video: a file, or a folder of frames
/system TEXT  starts a new conversation with this system text
/reset        starts a new conversation; the pictures of the command line are shown again
/quit         ends, as an empty line does"""
URL_SECS, URL_BYTES = 30.0, 50 * 2**20


@dataclass(frozen=True)
class Session:
    """A conversation so far: turns, the pictures of their markers, and pictures for the next question."""

    turns: tuple[Any, ...] = ()
    images: tuple[Any, ...] = ()
    pending_images: tuple[Any, ...] = ()
    system: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chat and returns its exit code; an error is one line."""
    args = _arguments(argv)
    return cli.run("chat", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    with heap.importing():  # takes seconds
        from llava_jax import compilations
        from llava_jax.generate.assistant import Assistant
        from llava_jax.generate.sampling import Sampling
        from llava_jax.generate.talk import Talk

    Sampling(args.temperature, args.top_p, args.top_k, args.seed, args.repetition_penalty)
    images = tuple(_OPEN[kind](source, args.allow_urls) for kind, source in args.shown)
    compilations.keep()
    assistant = Assistant.open(args.checkpoint, dtype=args.dtype, step=args.step, template=args.template,
                               weights=args.weights)  # fmt: skip
    initial = Session(pending_images=images, system=args.system)
    if args.prompt is None:
        _banner(assistant, initial, args)
        converse(Talk(assistant).reply, initial, args)
    else:
        _answer(assistant.reply, _ask(initial, args.prompt), args)
    return 0


def converse(reply: Callable[..., "Reply"], initial: Session, args: argparse.Namespace) -> None:
    """Questions and answers in turn, each with the whole history; a wrong question does not end the conversation."""
    session = initial
    while question := _question():
        try:
            command, _, argument = question.partition(" ")
            if command == "/quit":
                return
            if question.startswith("/"):
                session = _run_command(command, argument.strip(), session, initial, args)
            else:
                session = _answer(reply, _ask(session, question), args)
        except (ValueError, OSError) as error:
            print(f"chat: {error}", file=sys.stderr, flush=True)


def _banner(assistant: "Assistant", initial: Session, args: argparse.Namespace) -> None:
    if not sys.stdin.isatty():
        return
    import readline  # noqa: F401 - gives `input` line editing and a history

    config = assistant.model.config
    print(f"{args.checkpoint}: {config.llm.layers} layers of width {config.llm.width}, pictures of "
          f"{config.vision.image_size} pixels, template {assistant.format.template.name}, "
          f"{len(initial.pending_images)} picture(s) shown with the first question\n{HELP}")  # fmt: skip


def _run_command(command: str, argument: str, session: Session, initial: Session, args: argparse.Namespace) -> Session:
    match command:
        case "/image" | "/video":
            shown = _OPEN[command[1:]](argument, args.allow_urls)
            return replace(session, pending_images=(*session.pending_images, shown))
        case "/system":
            return replace(initial, system=argument)
        case "/reset":
            return replace(initial, system=session.system)
        case "/help":
            print(HELP)
            return session
    raise UsageError(f"{command} is no command of chat:\n{HELP}")


def _ask(session: Session, question: str) -> Session:
    """Adds the next question: its markers stand for the pending pictures; without markers they are shown before it.

    Raises:
      UsageError: the markers are not as many as the pictures.
    """
    from llava_jax.prompt.conversation import Turn, with_markers

    text = with_markers(question, session.pending_images)
    images = (*session.images, *session.pending_images)
    return replace(session, turns=(*session.turns, Turn("user", text)), images=images, pending_images=())


def _answer(reply: Callable[..., "Reply"], session: Session, args: argparse.Namespace) -> Session:
    """Adds what `reply` answers, which is printed while it is generated."""
    from llava_jax.prompt.conversation import Conversation, Turn

    # LLaVA's rule for its one picture is to show it first; several stand where they were named.
    in_place = len(session.images) > 1
    conversation = Conversation(session.turns, session.images, "chat", session.system, images_in_place=in_place)
    answer = reply(
        conversation, args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed,
        on_piece=lambda piece: print(piece, end="", flush=True), repetition_penalty=args.repetition_penalty,
    )  # fmt: skip
    print(flush=True)
    return replace(session, turns=(*session.turns, Turn("assistant", answer.text)))


def _open(source: str, allow_urls: bool) -> Any:
    """The picture of a path, or of a URL where those are allowed."""
    from llava_jax.prompt.images import open_image

    if not source:
        raise UsageError("/image needs a file")
    if not source.startswith(("http://", "https://")):
        return open_image(source)
    if not allow_urls:
        raise UsageError(f"{source}: URLs are fetched only with --allow-urls; or download the picture first")
    try:
        with urllib.request.urlopen(source, timeout=URL_SECS) as response:
            content = response.read(URL_BYTES + 1)
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise UsageError(f"{source}: cannot be fetched ({error}); download it and name the file") from None
    if len(content) > URL_BYTES:
        raise UsageError(f"{source}: over {URL_BYTES >> 20} MB; download it and name a smaller file")
    return open_image(content)


def _open_video(source: str, allow_urls: bool) -> Any:
    """The video of a path; its frames are read when it is shown."""
    from llava_jax import files
    from llava_jax.prompt.conversation import Video

    if not source or source.startswith(("http://", "https://")):
        raise UsageError(f"/video {source}: want a file or a folder of frames; download it first")
    if not files.exists(source):
        raise MissingFile(f"video {source!r}: no such file or folder")
    return Video(source)


_OPEN = {"image": _open, "video": _open_video}


def _question() -> str:
    """The next line, with a prompt on a terminal; empty at the end of the input."""
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
    parser.set_defaults(shown=[])  # pictures and videos, in the order of the command line
    add("--image", metavar="FILE", action="append", dest="shown", type=lambda source: ("image", source),
        help="a picture; given again, several in that order; "
        f"{MARKER} in the question says where each is shown (default: before it)")  # fmt: skip
    add("--video", metavar="FILE|DIR", action="append", dest="shown", type=lambda source: ("video", source),
        help="the same of a video: a file (extra `video`), or a folder of frames")  # fmt: skip
    add("--prompt", metavar="TEXT", help="answer this and end; left out, questions are read in turn")
    add("--system", metavar="TEXT", help="in place of the template's own system text")
    add("--allow-urls", action="store_true", help="--image and /image may fetch from http(s)")
    add("--template", choices=list(templates.TEMPLATES), help="default: the checkpoint's own")
    add("--temperature", type=float, default=0.0, help="0 is greedy (the default)")
    add("--top-p", type=float, default=1.0, help="draw from this mass of the likeliest ids")
    add("--top-k", type=int, default=0, help="draw from this many of the likeliest ids; 0: all")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: tokens of the conversation are less likely; "
        "1: off")  # fmt: skip
    add("--max-new-tokens", type=int, help="default: 512, or what the model has room for")
    add("--seed", type=int, default=0)
    add("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 elsewhere")
    add("--weights", choices=["int8"], help="the language model's matrices in int8, on TPUs and GPUs; default: --dtype")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
