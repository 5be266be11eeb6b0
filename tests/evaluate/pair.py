"""One of two processes that answer a benchmark: `python -m tests.evaluate.pair DATA CHECKPOINT FOLDER WORDS...`.

First each its share, then with a model that "fits" the devices of both only, then with places that are not shared.
"""

import os
import sys

import jax

from llava_jax.evaluate import __main__ as command
from llava_jax.generate import placement
from tests.generate import tiny


def main(data: str, checkpoint: str, folder: str, *args: str) -> int:
    def ask(out: str) -> int:
        return command.main(["answer", "--data", data, "--checkpoint", checkpoint, "--out", out, *args])

    assert ask(f"{folder}/apart.jsonl") == 0
    size = sum(param.nbytes for param in jax.tree.leaves(tiny.weights()))
    placement.memory_bytes = lambda device: size / 3  # of four devices, two in each process
    assert ask(f"{folder}/together.jsonl") == 0
    os.chdir(f"{folder}/{jax.process_index()}")
    placement.memory_bytes = lambda device: size * 10
    return ask("mine.jsonl")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
