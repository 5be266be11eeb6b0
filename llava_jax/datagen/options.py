"""Options that several verbs share: the server, and the source of the subjects."""

import argparse
from collections.abc import Sequence

from llava_jax.datagen import subjects
from llava_jax.datagen.subjects import Subject
from llava_jax.errors import UsageError
from llava_jax.openai_client import options as server

# "does not exceed 80 tokens" is short. Source: arXiv:2304.10592, section 3.2
SHORT_TOKENS = 80
DESCRIBE_TOKENS = 300  # Source: Vision-CAIR/MiniGPT-4 minigpt4/conversation/conversation.py @ d94738a
ANSWER_TOKENS = 2048


def add_endpoint(sub: argparse.ArgumentParser, required: bool = True, max_new_tokens: int = ANSWER_TOKENS) -> None:
    """The options of the server, its budget and its sampling."""
    server.add(sub, required)
    sub.add_argument("--temperature", type=float, help="default: the server's own")
    sub.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="of an answer; default %(default)s")


def add_subjects(sub: argparse.ArgumentParser) -> None:
    """The options of the pictures and their captions and boxes."""
    group = sub.add_argument_group("the pictures", "COCO annotation files or records of your own")
    group.add_argument("--captions", metavar="FILE", help="COCO: captions_*.json")
    group.add_argument("--instances", metavar="FILE", help="COCO: instances_*.json, the boxes")
    group.add_argument("--crowds", action="store_true", help="use COCO's boxes of groups too")
    group.add_argument("--records", metavar="FILE", help=".json list or .jsonl of {id, image, captions, boxes}; "
                       "a box: {category, bbox: [left, top, right, bottom], 0 to 1}")  # fmt: skip
    group.add_argument("--limit", type=int, help="only the first N")


def read_subjects(options: argparse.Namespace) -> Sequence[Subject]:
    """The subjects of `add_subjects`' options.

    Raises:
      UsageError: not exactly one source, or no number that --limit can be. FileNotFoundError, DataError: see
        `subjects`.
    """
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit {options.limit}: want at least 1")
    if (options.captions is None) == (options.records is None):
        raise UsageError("want either --captions captions.json [--instances instances.json] or --records FILE")
    if options.records:
        pictures = subjects.from_records(options.records)
    else:
        pictures = subjects.from_coco(options.captions, options.instances, options.crowds)
    return pictures[: options.limit]
