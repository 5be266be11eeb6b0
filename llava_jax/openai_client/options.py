"""The command-line options of a server and of its budget, the same in every command that asks one."""

import argparse
import os

from llava_jax.errors import UsageError
from llava_jax.openai_client.client import Budget, Client
from llava_jax.openai_client.wire import KEY_VARIABLE, Endpoint

LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")


def add(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds them to a verb; required: the verb cannot do without a server."""
    group = parser.add_argument_group("the server", f"any OpenAI-compatible one; its key is in ${KEY_VARIABLE}")
    group.add_argument("--base-url", required=required, metavar="URL", help="https://api.openai.com/v1, or your own")
    group.add_argument("--model", required=required, metavar="NAME", help="as the server calls it")
    group.add_argument("--limit-field", choices=LIMIT_FIELDS, default=LIMIT_FIELDS[0],
                       help="what it calls the limit of an answer; newer OpenAI models want the second")  # fmt: skip
    group.add_argument("--concurrency", type=int, default=8, help="requests at once; default 8")
    group.add_argument("--timeout-secs", type=float, default=120.0, help="of one attempt in all; default 120")
    group.add_argument("--retries", type=int, default=5, help="after 429, 5xx, timeouts, broken answers; default 5")
    group.add_argument("--max-tokens-spent", type=int, metavar="N", help="stop before all runs together took more")
    group.add_argument("--max-usd", type=float, metavar="USD", help="the same in dollars; needs the two prices")
    group.add_argument("--usd-per-million-in", type=float, default=0.0, metavar="USD", help="of a million tokens sent")
    group.add_argument("--usd-per-million-out", type=float, default=0.0, metavar="USD", help="of those of answers")


def open_client(options: argparse.Namespace, cache: str | os.PathLike) -> Client:
    """The client of these options; cache: its log, which makes a second run free.

    Raises:
      UsageError: a value that cannot be, or no server.
    """
    if options.base_url is None or options.model is None:
        raise UsageError("want --base-url and --model of an OpenAI-compatible server")
    endpoint = Endpoint(options.base_url, options.model, options.timeout_secs, options.retries, options.concurrency,
                        limit_field=options.limit_field)  # fmt: skip
    budget = Budget(options.max_tokens_spent, options.max_usd, options.usd_per_million_in, options.usd_per_million_out)
    return Client(endpoint, cache, budget)
