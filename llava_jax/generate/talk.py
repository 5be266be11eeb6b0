"""Conversations that go on, turn by turn, with a model that reads only what is new in each."""

from collections.abc import Callable

from etils import epath

from llava_jax.errors import UsageError
from llava_jax.generate import batching, placement, scheduler
from llava_jax.generate.assistant import NEW_TOKENS, Assistant, Reply
from llava_jax.generate.pages import prompt_of
from llava_jax.generate.sampling import Sampling
from llava_jax.generate.scheduler import Job, Scheduler
from llava_jax.prompt.conversation import Conversation
from llava_jax.prompt.encode import encode

MOST_POSITIONS = 4096  # of a conversation: 2 GB of a 7B in bfloat16


class Talk:
    """Answers one conversation at a time, as `serve` does.

    Keys and values of the last conversations' prompts stay, and features of their pictures: where the next one begins
    as one before, that part is not computed again, and no id changes by it. What pages cannot hold is answered by
    `Assistant.reply`: a model of "flamingo_xattn" or on several processes, one that leaves no memory for pages, a
    longer conversation, a repetition penalty.

        talk = Talk(llava_jax.load("runs/task"))
        print(talk.reply(conversation).text)
    """

    def __init__(self, assistant: Assistant) -> None:
        self._assistant = assistant
        self._positions, self._scheduler = 0, None
        if assistant.model.config.cross is None and not placement.spans_processes(assistant.mesh):
            self._positions, self._scheduler = _pages(assistant)

    def reply(
        self, conversation: Conversation, max_new_tokens: int | None = None, temperature: float = 0.0,
        top_p: float = 1.0, top_k: int = 0, seed: int = 0, image_root: epath.PathLike | None = None,
        on_piece: Callable[[str], None] | None = None, repetition_penalty: float = 1.0,
    ) -> Reply:  # fmt: skip
        """The answer to a conversation that ends with the user's turn; arguments and errors are `Assistant.reply`'s."""
        sampling = Sampling(temperature, top_p, top_k, seed, repetition_penalty)
        example = encode(conversation, self._assistant.format, image_root, reply=True)
        tokens = len(example.tokens)
        left = self._positions - tokens
        limit = min(NEW_TOKENS, left) if max_new_tokens is None else max_new_tokens
        if repetition_penalty != 1 or not 1 <= limit <= left:
            return self._assistant.reply(conversation, max_new_tokens, temperature, top_p, top_k, seed, image_root,
                                         on_piece, repetition_penalty)  # fmt: skip
        return self._answer(Job(prompt_of(example), limit, sampling, self._assistant.format.template.stops), on_piece)

    def _answer(self, job: Job, on_piece: Callable[[str], None] | None) -> Reply:
        target: Scheduler = self._scheduler
        number, text, ids, ended_by = target.submit(job), "", list[int](), ""
        try:
            while target.busy:
                for _, update in target.step():
                    text, ended_by = text + update.piece, update.ended_by
                    ids += [token.id for token in update.tokens]
                    if on_piece and update.piece:
                        on_piece(update.piece)
        finally:
            target.cancel(number)  # after Ctrl-C
        return Reply(text, tuple(ids), ended_by, len(job.prompt.tokens))


def _pages(assistant: Assistant) -> tuple[int, Scheduler | None]:
    """Positions of a conversation, and what answers it; 0 and None where there is no memory for its pages."""
    positions = batching.positions(assistant.model, MOST_POSITIONS, scheduler.reading()[1])
    try:
        return positions, scheduler.of_assistant(assistant, 1, positions)()
    except UsageError:
        return 0, None
