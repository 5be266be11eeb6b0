"""Answers of eight forced CPU devices, in a process of its own: `python -m tests.generate.meshes FILE 4,1,2,1 ...`.

FILE holds the ids that one device gives to `asked()`; a mesh of each of the sizes must give the same, bit for bit in
any company.
"""

import json
import sys
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from llava_jax import sharding
from llava_jax.generate import engine
from llava_jax.generate.assistant import Assistant, Reply
from llava_jax.models.llava import Llava
from llava_jax.prompt import templates
from llava_jax.prompt.conversation import Conversation, Turn
from tests.generate import tiny

# Heads that can be cut into 4, and key heads that can be cut into 2 only.
CONFIG = replace(tiny.CONFIG, llm=replace(tiny.CONFIG.llm, heads=8, kv_heads=2))
SLOTS, NEW = 8, 12
DRAWN = {"temperature": 1.0, "top_p": 0.9, "seed": 3}


def asked() -> list[Conversation]:
    """50 prompts, one in five without a picture."""
    words = [f"{'Why? ' * (i % 3)}What is number {i:02}?" for i in range(50)]
    alone = [Conversation((Turn("user", text),), id=text) for text in words]
    return [alone[i] if i % 5 == 0 else tiny.question(text, i) for i, text in enumerate(words)]


def assistant(mesh: Mesh | None = None, slots: int = SLOTS) -> Assistant:
    weights = jax.tree.map(np.asarray, tiny.weights(CONFIG))
    return Assistant(Llava(CONFIG), weights, tiny.wording(templates.get("v1")), slots, mesh)


def ids(replies: list[Reply]) -> list[list[int]]:
    return [list(reply.ids) for reply in replies]


def bits(speaks: Assistant, company: list[Conversation], slot: int) -> list[np.ndarray]:
    """All that a batch says of one row: its ids, and its keys and values."""
    runner, shape = speaks._engine(), speaks._shape(company[slot], NEW, None)
    examples = [speaks.encode(one, reply=True) for one in company]
    requests = [speaks._request(example, NEW, engine.Sampling()) for example in examples]
    state, first = runner.start(speaks.params, requests, shape)
    state, more = runner.advance(speaks.params, state, [False] * len(company))
    return [first[slot], more[slot], *(np.asarray(leaf)[slot] for leaf in jax.tree.leaves(state.cache))]


def check(sizes: tuple[int, ...], wanted: dict[str, list[list[int]]]) -> None:
    speaks, questions = assistant(sharding.make_mesh(dict(zip(sharding.AXES, sizes)))), asked()
    assert ids(speaks.replies(questions, NEW)) == wanted["greedy"], sizes
    drawn = speaks.replies(questions[:SLOTS], NEW, **DRAWN)
    assert ids(drawn) == wanted["drawn"], sizes
    assert speaks.reply(questions[3], NEW, **DRAWN) == drawn[3]
    pictured = [one for one in questions if one.images]
    alone = bits(speaks, pictured[:1], 0)
    for company, slot in (([*pictured[1:6], pictured[0]], 5), ([pictured[7], pictured[0], pictured[4]], 1)):
        assert all(map(np.array_equal, bits(speaks, company, slot), alone)), (sizes, slot)
    print(sizes, flush=True)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        ids_of_one = json.load(file)
    assert assistant().mesh == sharding.mesh_of_copies(SLOTS, jax.devices())  # small, so it is copied
    for words in sys.argv[2:]:
        check(tuple(map(int, words.split(","))), ids_of_one)
