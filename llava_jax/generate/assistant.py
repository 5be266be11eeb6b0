"""`Assistant`: conversations in, answers out, for chat, evaluation, training's samples and the demo.

It is opened from a checkpoint's own card, or made from parameters in memory; either way a conversation takes the
road of training, `prompt.encode`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from llava_jax import params
from llava_jax.checkpoint import card as cards
from llava_jax.checkpoint import sharded, store
from llava_jax.checkpoint.leaves import Leaves
from llava_jax.errors import UsageError
from llava_jax.generate import engine, placement, stream
from llava_jax.generate.engine import Engine, Request, Shape
from llava_jax.generate.sampling import Sampling
from llava_jax.models import lora, presets
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.models.vit import NEVER_RUN
from llava_jax.prompt import ending, templates, tokenizer
from llava_jax.prompt.conversation import Conversation
from llava_jax.prompt.encode import Format, encode

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
NEW_TOKENS = 512  # of an answer at most, where nobody says
STREAM_STEPS = 4  # ids between two pieces of a streamed answer


@dataclass(frozen=True)
class Reply:
    """One answer.

    text: without white space at either end and without the stop string.
    ids: as made, with the id that ended it.
    ended_by: "stop" (end token or stop string) or "length" (max_new_tokens).
    prompt_tokens: positions the prompt took, image features included.
    """

    text: str
    ids: tuple[int, ...]
    ended_by: str
    prompt_tokens: int


@dataclass(frozen=True)
class Assistant:
    """A model that answers conversations, `slots` at a time; an answer never depends on the others in its batch.

    Made from memory it compiles nothing again for new parameters of the same shapes and dtypes:

        Assistant(model, params, format, slots=8).replies(conversations, max_new_tokens=32)

    mesh: of the devices that answer; None takes all devices of this process, or of its whole job where those cannot
      hold the model, in the way of `placement.copies` (and stays None where there is one). `params` lie on it
      afterwards. Where it spans processes, all of them make the same calls and get the same replies.
    """

    model: Llava
    params: Any
    format: Format
    slots: int = 1
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        llm = self.model.config.llm
        if self.slots < 1:
            raise UsageError(f"slots={self.slots}: want at least 1")
        if self.format.tokenizer.size > llm.vocab + llm.added_tokens:
            raise UsageError(
                f"the tokenizer has {self.format.tokenizer.size} tokens, the model {llm.vocab + llm.added_tokens}: "
                "they do not belong together"
            )
        if self.mesh is None:
            object.__setattr__(self, "mesh", _mesh(self.model, self.params, self.slots))
        if self.mesh is not None:
            object.__setattr__(self, "params", placement.place(self.params, self.mesh))

    @classmethod
    def open(
        cls, directory: epath.PathLike, slots: int = 1, dtype: str | None = None, step: store.Step = None,
        template: str | None = None, mesh: Mesh | None = None,
    ) -> "Assistant":  # fmt: skip
        """The assistant of a checkpoint; its model.json alone says what it is.

        Args:
          dtype: of weights and matrix products; None is float32 on a CPU, bfloat16 elsewhere.
          step: None is the latest, "best" that of the lowest validation loss.
          template: to be asked in the words of another one; None is the checkpoint's own.
          mesh: as for the class.

        Raises:
          UnusableCheckpoint: there is no whole checkpoint, or its parameters do not fit its card.
          ValueError, FileNotFoundError: an unknown template or dtype, a damaged tokenizer.
        """
        card = cards.read_card(directory)
        config = presets.config_from_json(dict(card.model))
        kind = _dtype(dtype)
        words = tokenizer.load(epath.Path(directory) / cards.TOKENIZER, legacy=card.prompt.legacy)
        chosen = templates.get(template or card.prompt.template)
        ending.check(chosen, words, str(directory), card.prompt.image_start_end)
        format = Format(
            chosen, words, config.vision.image_size, config.image_features,
            card.prompt.image_mode, card.prompt.image_start_end, config.vision.mean, config.vision.resample,
        )  # fmt: skip
        places = store.places(directory, step)
        specs = {name: leaves.spec(name) for name, leaves in places.items() if not name.startswith(NEVER_RUN)}
        shapes = _names(lora.add_found(abstract_params(config), specs))
        store.check_specs(specs, shapes, str(directory))
        model = Llava(config, kind)
        held = {name: jax.ShapeDtypeStruct(x.shape, lora.running_dtype(name, specs[name].dtype, kind))
                for name, x in shapes.items()}  # fmt: skip
        mesh = mesh or _mesh(model, held, slots)
        return cls(model, _read(places, held, mesh), format, slots, mesh)

    def reply(
        self,
        conversation: Conversation,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        image_root: epath.PathLike | None = None,
        on_piece: Callable[[str], None] | None = None,
        repetition_penalty: float = 1.0,
    ) -> Reply:
        """The answer to a conversation that ends with the user's turn.

        Args:
          max_new_tokens: None is 512, or as many as the model's positions leave after the prompt.
          temperature: 0 is greedy; see `Sampling` for this, the three after it and `repetition_penalty`.
          image_root: the folder that image paths are relative to.
          on_piece: called with every piece of the text as soon as it is there; their sum is the text.

        Raises:
          ValueError: the conversation fits neither the template nor the model's positions, or a value is out of range.
        """
        sampling = Sampling(temperature, top_p, top_k, seed, repetition_penalty)
        if max_new_tokens is None:
            max_new_tokens = self._room(conversation)
        shape = self._shape(conversation, max_new_tokens)
        request = self._request(conversation, max_new_tokens, sampling, image_root)
        (reply,) = self._answer([request], shape, on_piece)
        return reply

    def replies(
        self,
        conversations: Sequence[Conversation],
        max_new_tokens: int = NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        image_root: epath.PathLike | None = None,
        repetition_penalty: float = 1.0,
    ) -> list[Reply]:
        """The answer to each conversation, in their order: exactly what `reply` gives for it alone.

        All are checked before the first is answered; images are opened batch by batch. Arguments as for `reply`.
        """
        sampling = Sampling(temperature, top_p, top_k, seed, repetition_penalty)
        answers: dict[int, Reply] = {}
        for shape, batch in self._batches([self._shape(one, max_new_tokens) for one in conversations]):
            requests = [self._request(conversations[i], max_new_tokens, sampling, image_root) for i in batch]
            answers.update(zip(batch, self._answer(requests, shape, None)))
        return [answers[i] for i in range(len(conversations))]

    def _batches(self, shapes: Sequence[Shape]) -> Iterator[tuple[Shape, list[int]]]:
        """Conversations of one compiled shape, `slots` at a time."""
        for shape in sorted(set(shapes)):
            members = [i for i, one in enumerate(shapes) if one == shape]
            for start in range(0, len(members), self.slots):
                yield shape, members[start : start + self.slots]

    def _room(self, conversation: Conversation) -> int:
        """At least 1, so that a prompt that leaves no room is refused where all are."""
        prompt = len(encode(conversation, self.format, reply=True, open_images=False).tokens)
        return max(1, min(NEW_TOKENS, self.model.config.llm.usable_positions - prompt))

    def _shape(self, conversation: Conversation, max_new_tokens: int) -> Shape:
        example = encode(conversation, self.format, reply=True, open_images=False)
        limit = self.model.config.llm.usable_positions
        try:
            return engine.shape_of(len(example.tokens), len(example.image_spans), max_new_tokens, limit)
        except ValueError as error:
            raise UsageError(f"conversation {conversation.id!r}: {error}") from None

    def _request(
        self, conversation: Conversation, max_new_tokens: int, sampling: Sampling, image_root: epath.PathLike | None
    ) -> Request:
        example = encode(conversation, self.format, image_root, reply=True)
        image_slots = np.full(len(example.tokens), -1, np.int32)
        for i, (start, length) in enumerate(example.image_spans):
            image_slots[start : start + length] = i * length + np.arange(length)
        side = self.format.image_size
        pixels = np.stack(example.images) if example.images else np.zeros((0, side, side, 3), np.uint8)
        return Request(example.tokens, image_slots, pixels, max_new_tokens, sampling)

    def _answer(
        self, requests: Sequence[Request], shape: Shape, on_piece: Callable[[str], None] | None
    ) -> list[Reply]:
        """Answers of one batch; `on_piece` hears the first one."""
        runner = self._engine()
        rows = [_Row(limit=request.max_new_tokens) for request in requests]
        state, made = runner.start(self.params, requests, shape)
        while True:
            for index, row in enumerate(rows):
                rows[index], piece = self._extended(row, made[index], runner.ends)
                if on_piece and piece and index == 0:
                    on_piece(piece)
            if all(row.ended_by for row in rows):
                return [Reply(row.text.said, row.ids, row.ended_by, len(r.tokens)) for row, r in zip(rows, requests)]
            ended = [bool(row.ended_by) for row in rows]
            state, made = runner.advance(self.params, state, ended, STREAM_STEPS if on_piece else engine.STEPS)

    def _extended(self, row: "_Row", made: np.ndarray, ends: tuple[int, ...]) -> tuple["_Row", str]:
        """A row with new ids, up to where it ends, and the text that can be shown now."""
        words, stops = self.format.tokenizer, self.format.template.stops
        text, ids, pieces = row.text, list(row.ids), [""]
        ended_by = row.ended_by
        for token in made.tolist():
            if ended_by or token == engine.NOTHING:
                break
            ids.append(token)
            if token not in ends:
                text, piece = stream.push(text, token, words, stops)
                pieces.append(piece)
            if token in ends or text.stopped:
                ended_by = "stop"
            elif len(ids) == row.limit:
                ended_by = "length"
        if ended_by and not row.ended_by:
            text, piece = stream.finish(text, words, stops)
            # The last piece may complete a stop string that the limit seemed to cut off.
            ended_by = "stop" if text.stopped else ended_by
            pieces.append(piece)
        return _Row(row.limit, text, tuple(ids), ended_by), "".join(pieces)

    def _engine(self) -> Engine:
        words = self.format.tokenizer
        return Engine(self.model, self.slots, words.size, ending.of(self.format.template, words).ids, self.mesh)


class _Row(NamedTuple):
    """One answer under way. limit: ids it may have; ended_by: "" while it goes on."""

    limit: int
    text: stream.Text = stream.Text()
    ids: tuple[int, ...] = ()
    ended_by: str = ""


def _mesh(model: Llava, tree: Any, slots: int) -> Mesh | None:
    """The mesh for parameters (arrays or shapes) that lie on none yet."""
    llm = model.config.llm
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    row = placement.row_bytes(llm, model.dtype, llm.usable_positions)
    devices = placement.choose_devices(weights)
    return placement.choose_mesh(weights, row, slots, devices, placement.memory_bytes(devices[0]))


def _read(places: Mapping[str, Leaves], held: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh | None) -> dict[str, Any]:
    """The parameters of a checkpoint, on the devices; of a mesh that spans processes each reads its own parts."""
    structs = {name: placement.abstract(name, x.shape, x.dtype, mesh) for name, x in held.items()}
    put = functools.partial(placement.put, mesh=mesh)
    if placement.spans_processes(mesh):
        return params.unflatten(sharded.load_checked(places, structs, put))
    return params.unflatten(sharded.load(places, structs, put, whole=tuple(structs))[0])


def _names(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: shape} of the parameters that generation needs."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {"/".join(key.key for key in path): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if not name.startswith(NEVER_RUN)}


def _dtype(name: str | None) -> Any:
    if name is None:  # no CPU multiplies bfloat16 faster than float32 in XLA (jaxlib 0.10.2)
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]
