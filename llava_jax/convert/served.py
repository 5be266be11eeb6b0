"""`verify --served`: the same picture prompts asked of a checkpoint here and of its export in others' programs."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int

from llava_jax import files
from llava_jax.batch import Example, alone, lay_images
from llava_jax.checkpoint import reader
from llava_jax.convert import readers
from llava_jax.convert.readers import Answer, Prompt
from llava_jax.errors import UnusableCheckpoint, UsageError
from llava_jax.generate import engine
from llava_jax.generate.assistant import Assistant
from llava_jax.models.llava import Llava
from llava_jax.prompt import ending
from llava_jax.prompt.conversation import Conversation, Turn, with_markers
from llava_jax.prompt.encode import Format, encode, with_labels
from llava_jax.prompt.images import encode_png

PROMPTS, NEW_TOKENS = 35, 16
QUESTIONS = ("What is this?", "Describe the picture.", "How many colours are there, and which?", "Is it dark?\nWhy?",
             "What is in the middle? Answer with one word.")  # fmt: skip
SHAPES = ((1.0, 1.0), (1.5, 1.0), (0.75, 2.0), (2.0, 2.0))  # height and width in sides of the tower's picture


def verify(served: epath.PathLike, checkpoint: epath.PathLike, names: Sequence[str] | None = None,
           step: reader.Step = None) -> Iterator[str]:  # fmt: skip
    """Lines of a table: for every reader and prompt whether prompt ids, greedy ids and text are those of `checkpoint`.

    Both run in float32 (a GGUF file in its own type). The last column is the largest difference of a log-probability
    over the tokenizer's vocabulary and the tokens of the answer, as far as these are the same.

    Args:
      served: a directory that `export` wrote.
      names: of `readers.READERS`; None takes those that read its format.

    Raises:
      UsageError: no reader of that name or that format, or none is installed; `served` is in a bucket.
      UnusableCheckpoint: an answer differs; raised behind the table.
    """
    files.want_disk(served, "--served", "others' programs read no bucket")
    served = epath.Path(served)
    chosen = readers.choose(served, names)
    missing = {name: one.missing() for name, one in chosen.items()}
    for name in (name for name in chosen if missing[name]):
        yield f"{name}: skipped, {missing[name]} is not installed"
    if all(missing.values()):
        remedy = " or ".join(f"`pip install {' '.join(reader.modules)}`" for reader in chosen.values())
        raise UsageError(f"--served {served}: nothing was compared, as none of {', '.join(chosen)} is installed: "
                         f"{remedy}")  # fmt: skip
    assistant = Assistant.open(checkpoint, dtype="float32", step=step)
    prompts = make_prompts(assistant.format.image_size)
    ours = [answer(assistant, prompt) for prompt in prompts]
    faults = []
    for name in (name for name in chosen if not missing[name]):
        equal = []
        yield f"{name:<14}{'prompt ids':<12}{'greedy ids':<12}{'text':<8}max |logp difference|"
        for number, (prompt, mine, theirs) in enumerate(zip(prompts, ours, chosen[name].ask(served, prompts))):
            row = _compared(assistant.format, mine, theirs)
            equal.append(row.equal)
            yield f"{number + 1:>3} {len(prompt.pictures)} picture{'s' if len(prompt.pictures) > 1 else ' '}{row.text}"
        yield f"{name}: {sum(equal)} of {len(equal)} prompts have the same prompt ids, greedy ids and text"
        faults += [name] * (not all(equal))
    if faults:
        raise UnusableCheckpoint(f"{served}: the answers of {' and '.join(faults)} differ from those of {checkpoint}; "
                                 "the table above says where")  # fmt: skip


def make_prompts(side: int) -> list[Prompt]:
    """Questions about pictures that are computed: waves of colour, of several shapes, some of two pictures, and some
    behind a first answer."""
    prompts = []
    for number in range(PROMPTS):
        pictures = tuple(_picture(side, number + 100 * i) for i in range(2 if number % 5 == 3 else 1))
        texts = [QUESTIONS[number % 5]] + (["A small one.", "Which colour?"] if number % 5 == 4 else [])
        turns = tuple(Turn(role, text) for role, text in zip(("user", "assistant", "user"), texts))
        first = Turn("user", with_markers(turns[0].text, pictures))
        conversation = Conversation((first, *turns[1:]), pictures, str(number), images_in_place=len(pictures) > 1)
        prompts.append(Prompt(conversation, turns, pictures, NEW_TOKENS))
    return prompts


def _picture(side: int, seed: int) -> bytes:
    height, width = (round(side * share) for share in SHAPES[seed % 4])
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32) / side
    waves = [np.sin(a * rows + b * columns + c) for a, b, c in rng.uniform(-9, 9, (3, 3))]
    return encode_png((127.5 + 127.5 * np.stack(waves, -1)).astype(np.uint8))


def answer(assistant: Assistant, prompt: Prompt) -> Answer:
    """What the checkpoint answers, with the logits of every step."""
    reply = assistant.reply(prompt.conversation, max_new_tokens=prompt.new_tokens)
    example = encode(prompt.conversation, assistant.format, reply=True)
    ids = with_labels(example)[0].tolist()
    return Answer(ids, reply.ids, reply.text, _answer_logits(assistant, example, reply.ids))


def _answer_logits(assistant: Assistant, example: Example, ids: Sequence[int]) -> np.ndarray:
    """float32 [n, V]: behind the prompt, and behind each id of the answer but the last."""
    begin = len(example.tokens)
    size = engine.bucket(begin + len(ids), assistant.model.config.llm.usable_positions)
    tokens, slots = np.zeros(size, np.int32), np.full(size, -1, np.int32)
    tokens[: begin + len(ids)] = [*example.tokens, *ids]
    corners = alone(slots) if assistant.format.resizes else None
    lay_images(example, slots, corners, 0, len(example.images))
    batch = jax.tree.map(lambda x: x[None], (tokens, slots, np.stack(example.images), corners))
    steps = begin - 1 + np.arange(len(ids))
    return np.asarray(_logits(assistant.model, assistant.params, *batch, steps))


@functools.partial(jax.jit, static_argnames=("model",))
def _logits(
    model: Llava, weights: Any, tokens: Int[Array, "1 T"], slots: Int[Array, "1 T"], pixels: Array, corners: Any,
    steps: Int[Array, "N"],
) -> Float[Array, "N V"]:  # fmt: skip
    positions = jnp.arange(tokens.shape[1])[None]
    hidden, _ = model.apply(
        {"params": weights}, tokens, positions, slots, pixels, tokens.shape[1], corners, method="prefill"
    )
    return model.apply({"params": weights}, hidden[0, steps], method="head")


class _Row(NamedTuple):
    equal: bool
    text: str


def _compared(format: Format, ours: Answer, theirs: Answer) -> _Row:
    end = ending.of(format.template, format.tokenizer)
    ids, others = ([i for i in one.ids if i not in end.ids] for one in (ours, theirs))  # some give the end, some not
    text = theirs.text
    for stop in end.texts:
        text = text.partition(stop)[0]
    same = (ours.prompt == theirs.prompt, ids == others, ours.text == text.strip())
    shown = "-"
    if theirs.logits is not None and same[0]:
        steps = next((i for i, (a, b) in enumerate(zip(ids, others)) if a != b), min(len(ids), len(others)))
        steps = min(steps + 1, len(theirs.logits), len(ours.logits))  # up to the first that differs
        words = min(format.tokenizer.size, theirs.logits.shape[1])
        logps = [jax.nn.log_softmax(one.logits[:steps, :words]) for one in (ours, theirs)]
        differences = np.abs(logps[0] - logps[1])
        if not np.isnan(differences).all():
            shown = f"{np.nanmax(differences):.1e}"
    words = ["same" if one else "DIFFER" for one in same]
    return _Row(all(same), f" {words[0]:<12}{words[1]:<12}{words[2]:<8}{shown}")
