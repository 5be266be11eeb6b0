"""Prompts in, ids out: a jitted prefill and a jitted loop of decode steps over a fixed number of slots.

What is compiled depends on the slots and on a request's own length and pictures, never on its neighbours; so an
answer is the same, bit for bit, alone or in any batch, in any slot, and whenever it comes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from llava_jax.batch import Corners, alone
from llava_jax.errors import UsageError
from llava_jax.generate import placement
from llava_jax.generate.sampling import Sampling, SamplingRows, next_ids, penalized, stack
from llava_jax.models.cache import LayerCache
from llava_jax.models.llava import Llava
from llava_jax.sharding import answering, constrain

NOTHING = -1  # in an output row: no id was made here
STEPS = 16  # decode steps of one dispatch at most: one wait for the device in 16 tokens
SCORED = 512  # positions of all rows whose logits exist at once: 512 x 32,000 float32 logits are 65 MB


@dataclass(frozen=True)
class Request:
    """One prompt and how to go on from it.

    tokens: int32 [n]; image_slots: int32 [n] and corners, as in a `Batch` whose groups hold the images of its `Shape`;
    pixels: uint8 [i, H, W, 3], i may be 0.
    max_new_tokens: ids to make at most.
    """

    tokens: np.ndarray
    image_slots: np.ndarray
    pixels: np.ndarray
    max_new_tokens: int
    sampling: Sampling = Sampling()
    corners: Corners | None = None


class Shape(NamedTuple):
    """What a request needs compiled: the padded prompt, the slots of its cache, the pictures (0 runs no tower)."""

    prompt_tokens: int
    cache_tokens: int
    images: int


class State(NamedTuple):
    """All that decoding carries from step to step; B is the number of slots."""

    cache: tuple[LayerCache, ...]
    token: Int[Array, "B"]  # the last id of each row, not yet in the cache
    position: Int[Array, "B"]  # its position
    last: Int[Array, "B"]  # the last position that may be filled
    done: Bool[Array, "B"]
    seen: Bool[Array, "B V"]  # the ids of each row's prompt and answer
    sampling: SamplingRows


@dataclass(frozen=True)
class Engine:
    """A model with its slots; parameters are arguments, so new ones of the same shapes compile nothing.

    slots: rows of every compiled batch.
    vocabulary: ids that may be said; rows of the head beyond the tokenizer's size never are.
    ends: ids that end an answer.
    mesh: of the devices that hold the parameters, in one process or in several, which then make the same calls.
    """

    model: Llava
    slots: int
    vocabulary: int
    ends: tuple[int, ...]
    mesh: Mesh | None = None

    def start(self, params: Any, requests: Sequence[Request], shape: Shape) -> tuple[State, np.ndarray]:
        """Reads the prompts of 1 to `slots` requests, all of one `shape`.

        Returns: the state, and the first id of every request, int32 [len(requests), 1].
        """
        state, first = _start(self, params, self._put(requests, shape), shape.cache_tokens)
        return state, np.asarray(first)[: len(requests), None]

    def _put(self, requests: Sequence[Request], shape: Shape) -> "_Prompts":
        assert 0 < len(requests) <= self.slots, (len(requests), self.slots)
        return jax.tree.map(lambda x: placement.put_rows(x, self.mesh), _padded(requests, shape, self.slots))

    def advance(
        self, params: Any, state: State, stopped: Sequence[bool], steps: int = STEPS
    ) -> tuple[State, np.ndarray]:
        """Up to `steps` <= STEPS more ids for every row that is neither done nor `stopped`; ends early if none is.

        The given state is used up (its cache is donated).

        Returns: the state, and int32 [len(stopped), steps] ids, `NOTHING` where a row made none.
        """
        assert 1 <= steps <= STEPS, steps
        stop = np.ones(self.slots, bool)
        stop[: len(stopped)] = stopped
        state, ids = _advance(self, params, state, stop, np.int32(steps))
        return state, np.asarray(ids)[: len(stopped), :steps]

    def logps(self, params: Any, requests: Sequence[Request], shape: Shape) -> np.ndarray:
        """float32 [len(requests), shape.prompt_tokens - 1]: of every token but the first its log-probability, given
        those before it. The softmax is over all rows of the head, as the training loss's; the values at images and
        at padding mean nothing."""
        return np.asarray(_logps(self, params, self._put(requests, shape)))[: len(requests)]

    def features(self, params: Any, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of n <= `slots` pictures (uint8 [n, H, W, 3]) what the connector makes of each, float32 [n, N, D], and the
        model's `image_newline` [1, D] ([0, D] without one)."""
        assert 0 < len(pixels) <= self.slots, (len(pixels), self.slots)
        rows = np.zeros((self.slots, 1, *pixels.shape[1:]), np.uint8)
        rows[: len(pixels), 0] = pixels
        found = np.asarray(_features(self, params, placement.put_rows(rows, self.mesh)))[: len(pixels)]
        last = found.shape[1] - self.model.config.image_newline
        return found[:, :last], found[0, last:]

    def compiled(self, params: Any, shape: Shape) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
        """The programs of `start` and `advance` for parameters that are shapes with shardings on the engine's mesh."""
        side = self.model.config.vision.image_size
        blank = Request(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros((1, side, side, 3), np.uint8), 1)
        prompts = jax.tree.map(lambda x: placement.abstract_rows(x, self.mesh), _padded([blank], shape, self.slots))
        lowered = _start.lower(self, params, prompts, shape.cache_tokens)
        start = lowered.compile()
        state = jax.tree.map(
            lambda x, cut: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut),
            lowered.out_info[0], start.output_shardings[0],
        )  # fmt: skip
        return start, _advance.lower(self, params, state, np.zeros(self.slots, bool), np.int32(STEPS)).compile()


def shape_of(prompt_tokens: int, images: int, max_new_tokens: int, max_positions: int) -> Shape:
    """The compiled shape that serves a request, from its own sizes alone.

    Raises:
      ValueError: the prompt and the answer do not fit in the model's positions, or nothing is asked for.
    """
    total = prompt_tokens + max_new_tokens
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens}: want at least 1")
    if total > max_positions:
        # Differs from LLaVA: there such a prompt is cut without a word (llava_arch.py, tokenizer_model_max_length).
        raise UsageError(
            f"the prompt's {prompt_tokens} tokens and max_new_tokens={max_new_tokens} need {total} positions, the "
            f"model has {max_positions}: shorten the conversation or lower max_new_tokens"
        )
    return Shape(bucket(prompt_tokens, max_positions), bucket(total, max_positions), pictures(images))


def shape_to_read(tokens: int, images: int, max_positions: int) -> Shape:
    """The compiled shape that scores a request, which is not answered. Raises ValueError as `shape_of`."""
    if tokens > max_positions:
        raise UsageError(f"its {tokens} tokens are more than the model's {max_positions} positions: shorten it")
    size = bucket(tokens, max_positions)
    return Shape(size, size, pictures(images))


def pictures(images: int) -> int:
    """Images of the compiled shape that holds so many."""
    return 2 ** (images - 1).bit_length() if images else 0


def bucket(tokens: int, largest: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, 192, ... that holds `tokens` (at most `largest`, which always does)."""
    size = 32
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, largest)


class _Prompts(NamedTuple):
    """A batch of requests as the device reads it: every row padded, free slots filled with a one-token prompt."""

    tokens: Int[np.ndarray | Array, "B T"]
    image_slots: Int[np.ndarray | Array, "B T"]
    pixels: UInt8[np.ndarray | Array, "B I Side Side 3"] | None
    corners: Corners | None
    length: Int[np.ndarray | Array, "B"]
    new: Int[np.ndarray | Array, "B"]  # ids to make at most; 0 in a free slot
    sampling: SamplingRows


def _padded(requests: Sequence[Request], shape: Shape, slots: int) -> _Prompts:
    tokens = np.zeros((slots, shape.prompt_tokens), np.int32)
    image_slots = np.full((slots, shape.prompt_tokens), -1, np.int32)
    pixels = None
    if shape.images:
        pixels = np.zeros((slots, shape.images, *requests[0].pixels.shape[1:]), np.uint8)
    corners = None if requests[0].corners is None else alone(image_slots)
    for row, request in enumerate(requests):
        tokens[row, : len(request.tokens)] = request.tokens
        image_slots[row, : len(request.tokens)] = request.image_slots
        if pixels is not None:
            pixels[row, : len(request.pixels)] = request.pixels
        if corners is not None:
            for whole, own in zip(corners, request.corners):
                whole[row, : len(request.tokens)] = own
    free = slots - len(requests)
    length = np.array([len(request.tokens) for request in requests] + [1] * free, np.int32)
    new = np.array([request.max_new_tokens for request in requests] + [0] * free, np.int32)
    sampling = stack([request.sampling for request in requests] + [Sampling()] * free)
    return _Prompts(tokens, image_slots, pixels, corners, length, new, sampling)


@partial(jax.jit, static_argnames=("engine", "cache_tokens"))
def _start(engine: Engine, params: Any, prompts: _Prompts, cache_tokens: int) -> tuple[State, Int[Array, "B"]]:
    with answering(engine.mesh):
        return _read(engine, params, prompts, cache_tokens)


def _read(engine: Engine, params: Any, prompts: _Prompts, cache_tokens: int) -> tuple[State, Int[Array, "B"]]:
    hidden, cache = _prefill(engine, params, prompts, cache_tokens)
    end = jnp.take_along_axis(hidden, (prompts.length - 1)[:, None, None], axis=1)[:, 0]
    position = prompts.length
    last = position + prompts.new - 1
    seen = _seen(prompts, engine.vocabulary)
    token = _choose(engine, params, end, position, seen, prompts.sampling)
    done = is_end(engine.ends, token) | (position >= last)
    return _cut(State(cache, token, position, last, done, seen, prompts.sampling)), constrain(token, None)


def _seen(prompts: _Prompts, vocabulary: int) -> Bool[Array, "B V"]:
    """Which ids a prompt holds; positions of image features and padding hold none."""
    tokens = jnp.asarray(prompts.tokens)
    is_text = (jnp.arange(tokens.shape[1]) < prompts.length[:, None]) & (prompts.image_slots < 0)
    rows = jnp.arange(tokens.shape[0])[:, None]
    seen = jnp.zeros((tokens.shape[0], vocabulary), bool)
    return seen.at[rows, jnp.where(is_text, tokens, vocabulary)].set(True, mode="drop")


def _prefill(engine: Engine, params: Any, prompts: _Prompts, cache_tokens: int) -> tuple[Array, Any]:
    # Padding repeats the last position: a rope that stretches with the row's length must not see the padded one.
    positions = jnp.minimum(jnp.arange(prompts.tokens.shape[1]), prompts.length[:, None] - 1)
    return engine.model.apply(
        {"params": params}, prompts.tokens, positions, prompts.image_slots, prompts.pixels, cache_tokens,
        prompts.corners, method="prefill",
    )  # fmt: skip


@partial(jax.jit, static_argnames=("engine",))
def _logps(engine: Engine, params: Any, prompts: _Prompts) -> Float[Array, "B T2"]:
    def of_column(column: tuple[Array, Array]) -> Float[Array, "B"]:
        hidden, targets = column
        logits = engine.model.apply({"params": params}, hidden, method="head")
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]

    with answering(engine.mesh):
        hidden, _ = _prefill(engine, params, prompts, prompts.tokens.shape[1])
        columns = (jnp.moveaxis(hidden[:, :-1], 1, 0), prompts.tokens[:, 1:].T)
        found = jax.lax.map(of_column, columns, batch_size=max(1, SCORED // engine.slots))
        return constrain(found.T, None, None)


@partial(jax.jit, static_argnames=("engine",))
def _features(engine: Engine, params: Any, pixels: Any) -> Float[Array, "B Slots D"]:
    with answering(engine.mesh):
        found = engine.model.apply({"params": params}, pixels, method="encode_images")
        return constrain(found.astype(jnp.float32), None, None, None)


@partial(jax.jit, static_argnames=("engine",), donate_argnames=("state",))
def _advance(
    engine: Engine, params: Any, state: State, stopped: Bool[np.ndarray | Array, "B"], steps: Int[Any, ""]
) -> tuple[State, Int[Array, "B Steps"]]:
    def wanted(carry: tuple[Array, State, Array]) -> Array:
        step, state, _ = carry
        return (step < steps) & ~jnp.all(state.done)

    def body(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        step, state, ids = carry
        state, new = _step(engine, params, state)
        return step + 1, state, ids.at[:, step].set(new)

    state = state._replace(done=state.done | stopped)
    ids = jnp.full((engine.slots, STEPS), NOTHING, jnp.int32)
    with answering(engine.mesh):
        _, state, ids = jax.lax.while_loop(wanted, body, (jnp.int32(0), state, ids))
        return state, constrain(ids, None, None)  # whole on every process, which all read it


def _step(engine: Engine, params: Any, state: State) -> tuple[State, Int[Array, "B"]]:
    """One more id for every row; a row that is done repeats its last step and makes `NOTHING`."""
    hidden, cache = engine.model.apply(
        {"params": params}, state.token[:, None], state.position[:, None], state.cache, method="decode"
    )
    position = state.position + 1
    seen = state.seen | (jnp.arange(engine.vocabulary) == state.token[:, None])
    token = _choose(engine, params, hidden[:, 0], position, seen, state.sampling)
    done = state.done | is_end(engine.ends, token) | (position >= state.last)
    after = state._replace(
        cache=cache,
        token=jnp.where(state.done, state.token, token),
        position=jnp.where(state.done, state.position, position),
        done=done,
        seen=seen,
    )
    return _cut(after), jnp.where(state.done, NOTHING, token)


def _cut(state: State) -> State:
    """Each copy of the model holds the rows that it answers, each of its devices the keys and values of its heads."""
    return jax.tree.map(lambda x: constrain(x, *("copies", None, "heads")[: x.ndim]), state)


def _choose(
    engine: Engine, params: Any, hidden: Array, position: Int[Array, "B"], seen: Bool[Array, "B V"],
    sampling: SamplingRows,
) -> Int[Array, "B"]:  # fmt: skip
    logits = engine.model.apply({"params": params}, hidden, method="head")[:, : engine.vocabulary]
    return next_ids(penalized(logits, seen, sampling.repetition_penalty), position, sampling)


def is_end(ends: tuple[int, ...], token: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Which of the ids end an answer."""
    return jnp.isin(token, jnp.array(ends, jnp.int32))
