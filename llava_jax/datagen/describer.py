"""A checkpoint as the describer of `curate`; a module of its own because it imports jax."""

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


def checkpoint_describer(
    assistant: Assistant, name: str, cache: Cache, images: epath.PathLike, temperature: float, max_tokens: int
) -> Ask:
    """A describer from a checkpoint, `assistant.slots` pictures at a time; `cache` keeps its answers.

    name: which checkpoint it is, for the cache: an answer of another one is not taken.
    """

    def ask(dialogues: Iterable[tuple[str, Sequence[str]]]) -> Iterator[tuple[int, Answer | Failure]]:
        pending: list[tuple[int, str, Conversation]] = []
        for index, (path, dialogue) in enumerate(dialogues):
            request = [name, path, *dialogue, temperature, max_tokens]
            key = hashlib.sha256(json.dumps(request).encode()).hexdigest()
            if answer := cache.get(key):
                yield index, answer
                continue
            turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(dialogue)]
            turns[0] = Turn("user", f"{MARKER}\n{turns[0].text}")
            pending.append((index, key, Conversation(tuple(turns), (path,), id=path)))
            if len(pending) == assistant.slots:
                yield from replies_of(pending)
                pending = []
        if pending:
            yield from replies_of(pending)

    def replies_of(batch: list[tuple[int, str, Conversation]]) -> Iterator[tuple[int, Answer]]:
        conversations = [conversation for _, _, conversation in batch]
        replies = assistant.replies(conversations, max_tokens, temperature, image_root=images)
        for (index, key, _), reply in zip(batch, replies):
            # The text's tokens alone: neither the end token nor a stop string counts as length.
            tokens = len(assistant.format.tokenizer.encode(reply.text, bos=False))
            answer = Answer(reply.text, reply.ended_by, reply.prompt_tokens, tokens)
            cache.put(key, name, answer)
            yield index, answer

    return ask
