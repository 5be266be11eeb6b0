"""Free ports, for servers and coordinators that are given theirs before they start."""

import itertools
import os
import random
import socket

FIRST, COUNT = 15_000, 16_000  # below those that Linux gives to outgoing connections, which may come at any time
# Each of pytest-xdist's workers has ports of its own, and each process begins somewhere else.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_numbers = itertools.count(random.SystemRandom().randrange(COUNT))


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that was not returned lately."""
    for number in itertools.islice(_numbers, COUNT):
        port = FIRST + (number * WORKERS + WORKER) % COUNT
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:  # it is in use
                continue
        return port
    raise AssertionError(f"no port from {FIRST} to {FIRST + COUNT} is free")
