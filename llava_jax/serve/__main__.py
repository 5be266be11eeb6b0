"""Serves a checkpoint over HTTP, by OpenAI's API, with a page at /: `python -m llava_jax.serve --checkpoint DIR`."""

import argparse
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence

from llava_jax import cli
from llava_jax.errors import MissingFile, UsageError

NAME = "llava-jax"  # of the model; harnesses treat names that hold "o1", "gpt" or "step" in ways of their own
DRAIN_SECS = 60  # that answers under way have when the server ends
MOST_POSITIONS = 8192  # of a row where nobody says; LLaMA 3.1's 131,072 are 16 GB a slot


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until SIGTERM or Ctrl-C, and returns its exit code; an error is one line."""
    args = _arguments(argv)
    return cli.run("serve", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    key = _key(args.api_key_file)
    _check_host(args.host, key)
    for name, low, high in (("slots", 1, 1024), ("queue", 0, 100_000), ("positions", 64, 2**20)):
        value = vars(args)[name]
        if not low <= value <= high:
            raise UsageError(f"--{name}={value}: want {low} to {high}")
    cli.show_progress()
    with _listening(args.host, args.port) as listener:
        from llava_jax.serve import server  # takes seconds to import

        host, port = listener.getsockname()[:2]
        print(f"serve: loads {args.checkpoint}", flush=True)
        service = server.service(args, NAME)
        print(f"serve: http://{f'[{host}]' if ':' in host else host}:{port} ({args.slots} answers at once, "
              f"{service.positions:,} positions each); compiles", flush=True)  # fmt: skip
        hosts = None if key else ("localhost", "127.0.0.1", "::1", args.host)
        return server.run(service, listener, key, hosts, DRAIN_SECS)


def _key(path: str | None) -> bytes | None:
    """The key in a file, without white space around it."""
    if path is None:
        return None
    if not os.path.isfile(path):
        raise MissingFile(f"--api-key-file {path}: no such file")
    with open(path, "rb") as file:
        key = file.read(4096).strip()
    if len(key) < 8 or not key.decode("latin-1").isascii() or any(byte <= 32 or byte == 127 for byte in key):
        raise UsageError(f"--api-key-file {path}: want a key of at least 8 ASCII characters without blanks (such as "
                         "`openssl rand -hex 24` makes)")  # fmt: skip
    return key


def _check_host(host: str, key: bytes | None) -> None:
    """Refuses to serve everybody."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and key is None:
        raise UsageError(f"--host {host}: other machines could use the model without a key: want --api-key-file, or "
                         "--host 127.0.0.1")  # fmt: skip


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens, before the model is loaded: a port that is taken is said at once."""
    if not 0 <= port < 2**16:
        raise UsageError(f"--port {port}: want 0 (any) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        return listener
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: cannot listen there ({error.strerror}): choose another port, "
                         "or --port 0 for any") from None  # fmt: skip


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    from llava_jax.prompt import templates

    parser = cli.Parser(prog="python -m llava_jax.serve", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="what `train` or `convert` wrote")
    add("--step", type=cli.step, metavar="N", help="of the checkpoint, or best; default: the latest")
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    add("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    add("--api-key-file", metavar="FILE", help="holds the key that clients must send; any other address than this "
        "machine's own wants it")  # fmt: skip
    add("--slots", type=int, default=16, help="answers at once (default: %(default)s)")
    add("--queue", type=int, default=32, help="requests that wait; more are refused with 429 (default: %(default)s)")
    add("--positions", type=int, default=MOST_POSITIONS, help="tokens of prompt and answer, if the model has so many "
        "(default: %(default)s)")  # fmt: skip
    add("--picture-hosts", metavar="HOST,HOST", help="pictures may also be https addresses of these hosts, "
        "which the server asks; http://HOST: by http (default: data: URLs only)")  # fmt: skip
    add("--template", choices=list(templates.TEMPLATES), help="default: the checkpoint's own")
    add("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 elsewhere")
    add("--weights", choices=["int8"], help="the language model's matrices in int8, on TPUs and GPUs; default: --dtype")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
