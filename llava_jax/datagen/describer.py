"""A checkpoint as the describer of `curate`, apart from it because it brings jax."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

from etils import epath

from llava_jax.datagen.curate import Ask
from llava_jax.datagen.generate import MARKER
from llava_jax.generate.assistant import Assistant
from llava_jax.openai_client import Answer, Failure
from llava_jax.openai_client.cache import Cache
from llava_jax.prompt.conversation import Conversation, Turn


def checkpoint_asks(
    assistant: Assistant, name: str, cache: Cache, images: epath.PathLike, temperature: float, max_tokens: int
) -> Ask:
    """A describer from a checkpoint, `assistant.slots` pictures at a time; `cache` keeps its answers.

    name: which checkpoint it is, for the cache: an answer of another one is not taken.
    """

    def ask(dialogues: Iterable[tuple[str, Sequence[str]]]) -> Iterator[tuple[int, Answer | Failure]]:
        waiting: list[tuple[int, str, Conversation]] = []
        for index, (path, said) in enumerate(dialogues):
            told = [name, path, *said, temperature, max_tokens]
            key = hashlib.sha256(json.dumps(told).encode()).hexdigest()
            if found := cache.get(key):
                yield index, found
                continue
            turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]
            turns[0] = Turn("user", f"{MARKER}\n{turns[0].text}")
            waiting.append((index, key, Conversation(tuple(turns), (path,), id=path)))
            if len(waiting) == assistant.slots:
                yield from answered(waiting)
                waiting = []
        if waiting:
            yield from answered(waiting)

    def answered(batch: list[tuple[int, str, Conversation]]) -> Iterator[tuple[int, Answer]]:
        told = [conversation for _, _, conversation in batch]
        replies = assistant.replies(told, max_tokens, temperature, image_root=images)
        for (index, key, _), reply in zip(batch, replies):
            # The words' tokens alone: neither the end token nor a stop string counts as length.
            tokens = len(assistant.format.tokenizer.encode(reply.text, bos=False))
            answer = Answer(reply.text, reply.ended_by, reply.prompt_tokens, tokens)
            cache.keep(key, name, answer)
            yield index, answer

    return ask
