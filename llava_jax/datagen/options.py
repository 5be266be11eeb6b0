"""Options that several verbs share: the endpoint, its budget, and where subjects come from."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava_jax.datagen import subjects
from llava_jax.datagen.subjects import Subject
from llava_jax.errors import UsageError
from llava_jax.openai_client import KEY_VARIABLE, Budget, Client, Endpoint

# "does not exceed 80 tokens" is short. Source: arXiv:2304.10592, section 3.2
SHORT_TOKENS = 80
DESCRIBE_TOKENS = 300  # Source: Vision-CAIR/MiniGPT-4 minigpt4/conversation/conversation.py @ d94738a


def add_endpoint(sub: argparse.ArgumentParser, required: bool = True) -> None:
    """The server that is asked, and how much it may cost."""
    group = sub.add_argument_group("the language model", f"any OpenAI-compatible server; its key is in ${KEY_VARIABLE}")
    group.add_argument("--base-url", required=required, metavar="URL", help="https://api.openai.com/v1, or your own")
    group.add_argument("--model", required=required, metavar="NAME", help="as the server calls it")
    group.add_argument("--temperature", type=float, help="default: the server's own")
    group.add_argument("--max-tokens", type=int, default=2048, help="of an answer; default %(default)s")
    group.add_argument("--limit-field", default="max_tokens", choices=("max_tokens", "max_completion_tokens"),
                       help="what the server calls --max-tokens; newer OpenAI models want the second")  # fmt: skip
    group.add_argument("--concurrency", type=int, default=8, help="requests at once; default 8")
    group.add_argument("--timeout-secs", type=float, default=120.0, help="of silence; default 120")
    group.add_argument("--retries", type=int, default=5, help="after 429, 5xx, timeouts, broken answers; default 5")
    group.add_argument("--budget-tokens", type=int, help="stop before all runs together took more")
    group.add_argument("--budget-usd", type=float, help="the same in dollars; needs the two prices")
    group.add_argument("--usd-per-million-in", type=float, default=0.0, help="price of a million tokens sent")
    group.add_argument("--usd-per-million-out", type=float, default=0.0, help="price of a million tokens of answers")


def open_client(options: argparse.Namespace, cache: Path) -> Client:
    """The client of `add_endpoint`'s options; cache: its log, which makes a second run free."""
    endpoint = Endpoint(options.base_url, options.model, options.timeout_secs, options.retries, options.concurrency,
                        limit_field=options.limit_field)  # fmt: skip
    budget = Budget(options.budget_tokens, options.budget_usd, options.usd_per_million_in, options.usd_per_million_out)
    return Client(endpoint, cache, budget)


def add_subjects(sub: argparse.ArgumentParser) -> None:
    """What pictures there are and what is known of them."""
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
      ValueError: not exactly one source. FileNotFoundError, DataError: see `subjects`.
    """
    if (options.captions is None) == (options.records is None):
        raise UsageError("want either --captions captions.json [--instances instances.json] or --records FILE")
    if options.records:
        found = subjects.from_records(options.records)
    else:
        found = subjects.from_coco(options.captions, options.instances, options.crowds)
    return found[: options.limit]
