"""`Assistant`: conversations in, answers out, for chat, evaluation, training's samples and the demo.

It is opened from a checkpoint's own model.json, or made from parameters in memory; either way a conversation is encoded
as in training, by `prompt.encode`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from llava_jax.batch import Example, alone, laid_out, lay_images, plain
from llava_jax.checkpoint import model_json, reader
from llava_jax.errors import UsageError
from llava_jax.generate import engine, placement
from llava_jax.generate import weights as stored
from llava_jax.generate.engine import Engine, Request, Shape
from llava_jax.generate.sampling import Sampling
from llava_jax.generate.stream import Row, extended
from llava_jax.models import lora, presets
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.models.names import NEVER_RUN
from llava_jax.prompt import anyres, ending, templates, tokenizer, video
from llava_jax.prompt import conversation as questions
from llava_jax.prompt.conversation import Conversation
from llava_jax.prompt.encode import Format, encode, pictures

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

    Attributes:
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
            object.__setattr__(self, "mesh", placement.mesh_for(self.model, self.params, self.slots))
        if self.mesh is not None:
            object.__setattr__(self, "params", placement.place(self.params, self.mesh))

    @classmethod
    def open(
        cls, directory: epath.PathLike, slots: int = 1, dtype: str | None = None, step: reader.Step = None,
        template: str | None = None, mesh: Mesh | None = None, weights: str | None = None,
    ) -> "Assistant":  # fmt: skip
        """The assistant of a checkpoint; its model.json alone says what it is.

        Args:
          dtype: of weights and matrix products; None is float32 on a CPU, bfloat16 elsewhere.
          step: None is the latest, "best" that of the lowest validation loss.
          template: to be asked in the words of another one; None is the checkpoint's own.
          mesh: as for the class.
          weights: "int8" holds the decoder's matrices in int8 (`generate.weights`), on accelerators; None in `dtype`.

        Raises:
          UnusableCheckpoint: there is no whole checkpoint, or its parameters do not fit its metadata.
          ValueError, FileNotFoundError: an unknown template, dtype or kind of weights, a damaged tokenizer; tiles or
            videos that the model cannot read.
        """
        stored.check(weights)
        metadata = model_json.read(directory)
        config = presets.config_from_json(dict(metadata.model))
        kind = _dtype(dtype)
        words = tokenizer.load(epath.Path(directory) / model_json.TOKENIZER, legacy=metadata.prompt.legacy)
        chosen = templates.get(template or metadata.prompt.template)
        ending.check(chosen, words, str(directory), metadata.prompt.image_start_end)
        tiling = anyres.from_json(metadata.prompt.image_mode, metadata.prompt.tiling)
        of_videos = video.from_json(metadata.prompt.video)
        anyres.check(tiling, config.image_newline, config.image_features)
        video.check(of_videos, config.image_features, config.cross is None)
        format = Format(
            chosen, words, config.vision.image_size, config.image_features, metadata.prompt.image_mode,
            metadata.prompt.image_start_end, config.vision.mean, config.vision.resample, tiling, of_videos,
        )  # fmt: skip
        sources = reader.sources(directory, step)
        specs = {name: leaves.spec(name) for name, leaves in sources.items() if not name.startswith(NEVER_RUN)}
        shapes = _names(lora.add_found(abstract_params(config), specs))
        reader.check_specs(specs, shapes, str(directory))
        model = Llava(config, kind)
        held = {name: jax.ShapeDtypeStruct(x.shape, lora.running_dtype(name, specs[name].dtype, kind))
                for name, x in shapes.items()}  # fmt: skip
        held = stored.int8_shapes(held) if weights else held
        mesh = mesh or placement.mesh_for(model, held, slots)
        return cls(model, stored.read(sources, held, mesh), format, slots, mesh)

    def generate(
        self, prompt: str | Conversation, images: Sequence[Any] = (), max_new_tokens: int | None = None,
        temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0,
        image_root: epath.PathLike | None = None, repetition_penalty: float = 1.0,
    ) -> Reply:  # fmt: skip
        """The answer to a question about pictures, or to a whole conversation; `replies` answers many.

        Args:
          prompt: a question, whose pictures are shown before it unless `<image>` stands where each is shown; or a
            conversation, which has its own.
          images: paths, encoded bytes, PIL images or `Video`s, in the order in which they are shown.
          max_new_tokens and the others: as for `reply`, which is this for a conversation.

        Raises:
          ValueError: as `reply`; markers that differ from the pictures in number.
        """
        return self.reply(
            _conversation(prompt, images), max_new_tokens, temperature, top_p, top_k, seed, image_root,
            repetition_penalty=repetition_penalty,
        )  # fmt: skip

    def stream(
        self, prompt: str | Conversation, images: Sequence[Any] = (), max_new_tokens: int | None = None,
        temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0,
        image_root: epath.PathLike | None = None, repetition_penalty: float = 1.0,
    ) -> Iterator[str]:  # fmt: skip
        """The pieces of what `generate` answers, each as soon as it is there; their sum is the text.

        Arguments and errors are those of `generate`; what does not fit is refused before the first piece.
        """
        sampling = Sampling(temperature, top_p, top_k, seed, repetition_penalty)
        request, shape = self._asked(_conversation(prompt, images), max_new_tokens, sampling, image_root)
        return (rows[0][1] for rows in self._rows([request], shape, STREAM_STEPS) if rows[0][1])

    def logps(
        self, conversations: Sequence[Conversation], image_root: epath.PathLike | None = None
    ) -> list[np.ndarray]:
        """The log-probabilities of answers that are given: of each conversation float32 [n], in the order of its n
        supervised tokens, each given all tokens before it.

        The tokens are `example.tokens[example.learned]` of `encode`, the end of each turn among them. The softmax is
        over the whole vocabulary, as in the training loss; a conversation's weight does not count.

        Raises:
          ValueError: a conversation has no supervised token, does not fit the template, or is longer than the model's
            positions; names it. All are checked before the first is scored.
        """
        shapes = [self._shape_to_read(one, image_root) for one in conversations]
        found: dict[int, np.ndarray] = {}
        for shape, batch in self._batches(shapes):
            examples = [encode(conversations[i], self.format, image_root) for i in batch]
            requests = [self._request(example, 0, Sampling()) for example in examples]
            scored = self._engine().logps(self.params, requests, shape)
            for i, example, row in zip(batch, examples, scored):
                found[i] = row[: len(example.tokens) - 1][example.learned[1:]]
        return [found[i] for i in range(len(conversations))]

    def encode(
        self, conversation: Conversation, image_root: epath.PathLike | None = None, reply: bool = False
    ) -> Example:
        """The conversation as the model reads it: int32 `tokens` [T], bool `learned` [T] (supervised tokens), the
        positions of image features (`image_spans`), and `images` as uint8 [H, W, 3].

        Args:
          image_root: the folder that image paths are relative to.
          reply: end with the open turn of the assistant, as `generate` asks.

        Raises:
          ValueError: the turns do not fit the template, or a picture cannot be read.
        """
        return encode(conversation, self.format, image_root, reply)

    def image_features(
        self, images: Sequence[Any], image_root: epath.PathLike | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """float32 [n, N, D]: the features of each picture as the decoder takes them, behind the connector.

        N features an image (`format.image_features`) of the decoder's width D; of "flamingo_xattn", whose decoder looks
        at features that have no position, the resampler's number and the tower's width. Of a model with tiles, or where
        there are videos, a list of [features, D], laid out as in a prompt that shows these pictures: lines, their
        newlines, and resized features.

        Args:
          images: paths, encoded bytes, PIL images or `Video`s.

        Raises:
          ValueError, FileNotFoundError: there is none, or one cannot be read.
        """
        if not len(images):
            raise UsageError("images=(): want at least one picture")
        shown, usual = list(pictures(images, self.format, image_root)), plain(self.format.image_features)
        pixels = np.stack([tile for picture in shown for tile in picture.tiles])
        runner, starts = self._engine(), range(0, len(pixels), self.slots)
        found = [runner.features(self.params, pixels[i : i + self.slots]) for i in starts]
        features = np.concatenate([features for features, _ in found])
        if not any(picture.layout for picture in shown):
            return features
        tiles = np.split(features, np.cumsum([len(picture.tiles) for picture in shown]))
        return [laid_out(own, found[0][1], picture.layout or usual) for own, picture in zip(tiles, shown)]

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
        request, shape = self._asked(conversation, max_new_tokens, sampling, image_root)
        return self._answer([request], shape, on_piece)[0]

    def replies(
        self, conversations: Sequence[Conversation], max_new_tokens: int = NEW_TOKENS, temperature: float = 0.0,
        top_p: float = 1.0, top_k: int = 0, seed: int = 0, image_root: epath.PathLike | None = None,
        repetition_penalty: float = 1.0,
    ) -> list[Reply]:  # fmt: skip
        """The answer to each conversation, in their order: exactly what `reply` gives for it alone.

        All are checked before the first is answered; images are opened batch by batch. Arguments as for `reply`.
        """
        sampling = Sampling(temperature, top_p, top_k, seed, repetition_penalty)
        answers: dict[int, Reply] = {}
        for shape, batch in self._batches([self._shape(one, max_new_tokens, image_root) for one in conversations]):
            examples = [encode(conversations[i], self.format, image_root, reply=True) for i in batch]
            requests = [self._request(example, max_new_tokens, sampling) for example in examples]
            answers.update(zip(batch, self._answer(requests, shape)))
        return [answers[i] for i in range(len(conversations))]

    def _batches(self, shapes: Sequence[Shape]) -> Iterator[tuple[Shape, list[int]]]:
        """Conversations of one compiled shape, `slots` at a time."""
        for shape in sorted(set(shapes)):
            members = [i for i, one in enumerate(shapes) if one == shape]
            for start in range(0, len(members), self.slots):
                yield shape, members[start : start + self.slots]

    def _asked(
        self, conversation: Conversation, max_new_tokens: int | None, sampling: Sampling,
        image_root: epath.PathLike | None,
    ) -> tuple[Request, Shape]:  # fmt: skip
        if max_new_tokens is None:
            max_new_tokens = self._room(conversation, image_root)
        shape = self._shape(conversation, max_new_tokens, image_root)
        example = encode(conversation, self.format, image_root, reply=True)
        return self._request(example, max_new_tokens, sampling), shape

    def _room(self, conversation: Conversation, image_root: epath.PathLike | None) -> int:
        """At least 1, so that a prompt that leaves no room is refused where all are."""
        prompt = len(encode(conversation, self.format, image_root, reply=True, open_images=False).tokens)
        return max(1, min(NEW_TOKENS, self.model.config.llm.usable_positions - prompt))

    def _shape(
        self, conversation: Conversation, max_new_tokens: int, image_root: epath.PathLike | None
    ) -> Shape:
        example = encode(conversation, self.format, image_root, reply=True, open_images=False)
        limit = self.model.config.llm.usable_positions
        try:
            return engine.shape_of(len(example.tokens), example.tiles, max_new_tokens, limit)
        except ValueError as error:
            raise UsageError(f"conversation {conversation.id!r}: {error}") from None

    def _shape_to_read(self, conversation: Conversation, image_root: epath.PathLike | None) -> Shape:
        example = encode(conversation, self.format, image_root, open_images=False)
        if not example.learned[1:].any():
            raise UsageError(f"conversation {conversation.id!r}: no supervised token; want an assistant's turn")
        try:
            limit = self.model.config.llm.usable_positions
            return engine.shape_to_read(len(example.tokens), example.tiles, limit)
        except ValueError as error:
            raise UsageError(f"conversation {conversation.id!r}: {error}") from None

    def _request(self, example: Example, max_new_tokens: int, sampling: Sampling) -> Request:
        image_slots = np.full(len(example.tokens), -1, np.int32)
        corners = alone(image_slots) if self.format.resizes else None
        lay_images(example, image_slots, corners, 0, engine.pictures(example.tiles))
        side = self.format.image_size
        pixels = np.stack(example.images) if example.images else np.zeros((0, side, side, 3), np.uint8)
        return Request(example.tokens, image_slots, pixels, max_new_tokens, sampling, corners)

    def _answer(
        self, requests: Sequence[Request], shape: Shape, on_piece: Callable[[str], None] | None = None
    ) -> list[Reply]:
        """Answers of one batch; `on_piece` hears the first one."""
        rows: list[tuple[Row, str]] = []
        for rows in self._rows(requests, shape, STREAM_STEPS if on_piece else engine.STEPS):
            if on_piece and rows[0][1]:
                on_piece(rows[0][1])
        return [Reply(row.text.said, row.ids, row.ended_by, len(request.tokens))
                for (row, _), request in zip(rows, requests)]  # fmt: skip

    def _rows(
        self, requests: Sequence[Request], shape: Shape, steps: int
    ) -> Iterator[list[tuple[Row, str]]]:
        """After every `steps` ids each row, and the piece of text that they add to it, until all rows have ended."""
        runner, words, stops = self._engine(), self.format.tokenizer, self.format.template.stops
        rows = [Row(limit=request.max_new_tokens) for request in requests]
        state, made = runner.start(self.params, requests, shape)
        while True:
            found = [extended(row, ids.tolist(), runner.ends, words, stops) for row, ids in zip(rows, made)]
            yield found
            rows = [row for row, _ in found]
            ended = [bool(row.ended_by) for row in rows]
            if all(ended):
                return
            state, made = runner.advance(self.params, state, ended, steps)

    def _engine(self) -> Engine:
        words = self.format.tokenizer
        return Engine(self.model, self.slots, words.size, ending.of(self.format.template, words).ids, self.mesh)


def load(
    directory: epath.PathLike, mesh: Mesh | None = None, slots: int = 1, dtype: str | None = None,
    step: int | None = None, template: str | None = None, weights: str | None = None,
) -> Assistant:  # fmt: skip
    """The model of a checkpoint directory, to be asked: what `train` or `convert` wrote, on a disk or in a bucket.

        model = llava_jax.load("runs/task")
        print(model.generate("What is unusual here?", ["photo.jpg"]).text)

    Arguments and errors are those of `Assistant.open`; `slots` is how many conversations are answered at once.
    """
    return Assistant.open(directory, slots, dtype, step, template, mesh, weights)


def _conversation(prompt: str | Conversation, images: Sequence[Any]) -> Conversation:
    if isinstance(prompt, str):
        return questions.question(prompt, images)
    if len(images):
        raise UsageError(f"{len(images)} image(s) beside a Conversation: put them into it (Conversation.images)")
    return prompt


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
