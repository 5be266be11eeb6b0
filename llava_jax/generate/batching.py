"""The programs of continuous batching: three compiled shapes serve requests of any length, at any time.

`read` takes a chunk of the prompts of a few rows, `advance` makes ids for all rows, `features` runs the tower. Every
row is computed by itself, in tiles of one size, so its ids and log-probabilities are the same, bit for bit, whoever its
neighbours are, whenever they come, and whether the pages of its beginning were computed for it or for another row.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from llava_jax import distributed, sharding
from llava_jax.errors import UsageError
from llava_jax.generate import placement
from llava_jax.generate.engine import NOTHING, Engine, is_end
from llava_jax.generate.sampling import SamplingRows, next_ids
from llava_jax.models.llava import Llava
from llava_jax.models.paged import PAGE, TILE_PAGES, PagedCache
from llava_jax.models.parts import DecoderConfig
from llava_jax.sharding import answering

STEPS = 4  # ids of one dispatch at most: what a new request, or one that is cancelled, waits for
TOP = 20  # likeliest ids whose log-probabilities can be had: OpenAI's limit
Pool = tuple[tuple[Array, Array], ...]  # keys and values of each layer


class Chunk(NamedTuple):
    """So many tokens of the prompts of `lanes` rows; the table of an idle lane is all 0."""

    tokens: Int[np.ndarray | Array, "R C"]
    features: Float[np.ndarray | Array, "R C D"]
    is_feature: Bool[np.ndarray | Array, "R C"]
    start: Int[np.ndarray | Array, "R"]  # position of its first token
    end: Int[np.ndarray | Array, "R"]  # the place in it whose next id is chosen: the prompt's last, if it is there
    table: Int[np.ndarray | Array, "R P"]
    top: Bool[np.ndarray | Array, ""]  # whether the likeliest ids of some row are wanted
    sampling: SamplingRows


class Rows(NamedTuple):
    """All slots between two dispatches."""

    token: Int[np.ndarray | Array, "B"]  # the last id of each, not yet in the cache
    position: Int[np.ndarray | Array, "B"]  # its position
    last: Int[np.ndarray | Array, "B"]  # the last position that may be filled
    done: Bool[np.ndarray | Array, "B"]
    table: Int[np.ndarray | Array, "B P"]
    top: Bool[np.ndarray | Array, ""]
    sampling: SamplingRows


class Ids(NamedTuple):
    """Ids of rows, `NOTHING` where a row made none, with log-probabilities over the tokenizer's vocabulary, before any
    temperature; of the likeliest only where a row wants them."""

    ids: Int[np.ndarray | Array, "..."]
    logps: Float[np.ndarray | Array, "..."]
    top_ids: Int[np.ndarray | Array, "... Top"]
    top_logps: Float[np.ndarray | Array, "... Top"]


@dataclass(frozen=True)
class Batching:
    """A model with its slots and pages; parameters are arguments.

    slots: rows that answer at once. lanes: rows whose prompts are read at once, and pictures that the tower sees.
    chunk: tokens of each that are read at once, a multiple of PAGE.
    pages: of the pool, page 0 included. row_pages: of a row's table, as `row_pages` has them.
    vocabulary: ids that an answer may hold. ends: ids that end an answer. mesh: of the devices of the parameters.
    """

    model: Llava
    slots: int
    lanes: int
    chunk: int
    pages: int
    row_pages: int
    vocabulary: int
    ends: tuple[int, ...]
    mesh: Mesh | None = None

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.model.dtype)

    def empty(self) -> Pool:
        """A pool that holds nothing."""
        return _empty(self)

    def read(self, params: Any, pool: Pool, chunk: Chunk) -> tuple[Pool, Ids]:
        """The pool with a chunk of some prompts in it, and the id that follows place `end` of each, [R]. The given pool
        is used up. What is returned is not waited for."""
        return _read(self, params, pool, chunk)

    def advance(self, params: Any, pool: Pool, rows: Rows, steps: int) -> tuple[Pool, Ids]:
        """Up to `steps` <= STEPS more ids of every row that is not done, [B, STEPS]; the rest as `read`."""
        return _advance(self, params, pool, rows, np.int32(steps))

    def features(self, params: Any, tiles: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """As `Engine.features`, of n <= lanes tiles."""
        return self._tower.features(params, np.stack(tiles))

    @functools.cached_property
    def _tower(self) -> Engine:
        return Engine(self.model, self.lanes, self.vocabulary, self.ends, self.mesh)


def one_copy() -> Mesh | None:
    """The mesh of one model over all devices of this process; None for a single device.

    Raises:
      UsageError: this process is one of several.
    """
    if distributed.joins() or distributed.count() > 1:
        raise UsageError("several processes: a server answers from one; start one on each host, without "
                         "LLAVA_JAX_MULTIHOST=1, and a load balancer before them (README, Serve)")  # fmt: skip
    devices = jax.local_devices()
    return None if len(devices) == 1 else sharding.mesh_of_copies(1, devices)


def positions(model: Llava, most: int, chunk: int) -> int:
    """Positions of a row whose prompt is read in chunks: the model's, at most `most`.

    Raises:
      UsageError: a decoder that looks at pictures from between its layers.
    """
    llm = model.config.llm
    if model.config.cross is not None:
        raise UsageError('a model whose decoder looks at pictures between its layers ("flamingo_xattn") cannot be '
                         "served: pages hold no pictures; use chat or evaluate")  # fmt: skip
    if llm.rope_scaling is not None and llm.rope_scaling.kind == "dynamic":
        # Beyond `max_positions` the rotation depends on the row's length; a last chunk may be padded to beyond its end.
        return min(most, (llm.max_positions + PAGE - chunk) // PAGE * PAGE)
    return min(most, llm.usable_positions)


def row_pages(limit: int, chunk: int) -> int:
    """Pages in the table of a row of so many positions, a multiple of TILE_PAGES: the last chunk of its prompt may
    begin at any page, and be padded to beyond its end."""
    return -(-(limit + chunk - PAGE) // (PAGE * TILE_PAGES)) * TILE_PAGES


def page_bytes(llm: DecoderConfig, dtype: Any) -> int:
    return placement.row_bytes(llm, dtype, PAGE)


def check_memory(model: Llava, params: Any, pages: int, mesh: Mesh | None) -> None:
    """Raises UsageError where weights and pages do not fit on the devices, which a CPU does not say."""
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
    memory = sum(placement.memory_bytes(device) for device in devices)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    cache = pages * page_bytes(model.config.llm, model.dtype)
    if math.isfinite(memory) and weights + cache > placement.FULL * memory:
        raise UsageError(
            f"weights of {weights / 2**30:.1f} GiB and {pages:,} pages of {PAGE} positions ({cache / 2**30:.1f} GiB) "
            f"are more than {placement.FULL:.0%} of {memory / 2**30:.1f} GiB: lower --slots or --positions"
        )


@partial(jax.jit, static_argnames=("batching",))
def _empty(batching: Batching) -> Pool:
    llm = batching.model.config.llm
    with answering(batching.mesh):
        zeros = jnp.zeros((batching.pages, PAGE, llm.kv_heads, llm.head_width), batching.model.dtype)
        return tuple((sharding.constrain(zeros, None, None, "heads"),) * 2 for _ in range(llm.layers))


def _layers(pool: Pool, table: Array) -> tuple[PagedCache, ...]:
    return tuple(PagedCache(k, v, table) for k, v in pool)


def _pool(layers: tuple[PagedCache, ...]) -> Pool:
    return tuple((layer.k, layer.v) for layer in layers)


@partial(jax.jit, static_argnames=("batching",), donate_argnames=("pool",))
def _read(batching: Batching, params: Any, pool: Pool, chunk: Chunk) -> tuple[Pool, Ids]:
    places = chunk.start[:, None] + jnp.arange(batching.chunk)
    with answering(batching.mesh):
        hidden, layers = batching.model.apply(
            {"params": params}, chunk.tokens, chunk.features, chunk.is_feature, places, _layers(pool, chunk.table),
            method="extend",
        )  # fmt: skip
        last = jnp.take_along_axis(hidden, chunk.end[:, None, None], axis=1)[:, 0]
        ids = _choose(batching, params, last, chunk.start + chunk.end + 1, chunk.top, chunk.sampling)
        return _pool(layers), jax.tree.map(sharding.constrain, ids)


@partial(jax.jit, static_argnames=("batching",), donate_argnames=("pool",))
def _advance(batching: Batching, params: Any, pool: Pool, rows: Rows, steps: Int[Any, ""]) -> tuple[Pool, Ids]:
    def goes_on(carry: tuple[Array, Pool, Rows, Ids]) -> Array:
        step, _, rows, _ = carry
        return (step < steps) & ~jnp.all(rows.done)

    def body(carry: tuple[Array, Pool, Rows, Ids]) -> tuple[Array, Pool, Rows, Ids]:
        step, pool, rows, ids = carry
        pool, rows, new = _step(batching, params, pool, rows)
        return step + 1, pool, rows, jax.tree.map(lambda whole, one: whole.at[:, step].set(one), ids, new)

    with answering(batching.mesh):
        rows = jax.tree.map(jnp.asarray, rows)
        _, pool, _, ids = jax.lax.while_loop(goes_on, body, (jnp.int32(0), pool, rows, _no_ids(batching)))
        return pool, jax.tree.map(sharding.constrain, ids)


def _no_ids(batching: Batching) -> Ids:
    shape, top = (batching.slots, STEPS), min(TOP, batching.vocabulary)
    return Ids(
        jnp.full(shape, NOTHING, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, top), jnp.int32),
        jnp.zeros((*shape, top), jnp.float32),
    )  # fmt: skip


def _step(batching: Batching, params: Any, pool: Pool, rows: Rows) -> tuple[Pool, Rows, Ids]:
    """One more id for every row; a row that is done repeats its last step and makes `NOTHING`."""
    hidden, layers = batching.model.apply(
        {"params": params}, rows.token[:, None], rows.position[:, None], _layers(pool, rows.table), method="decode"
    )
    position = rows.position + 1
    new = _choose(batching, params, hidden[:, 0], position, rows.top, rows.sampling)
    after = rows._replace(
        token=jnp.where(rows.done, rows.token, new.ids),
        position=jnp.where(rows.done, rows.position, position),
        done=rows.done | is_end(batching.ends, new.ids) | (position >= rows.last),
    )
    return _pool(layers), after, new._replace(ids=jnp.where(rows.done, NOTHING, new.ids))


def _choose(
    batching: Batching, params: Any, hidden: Array, position: Array, top: Array, sampling: SamplingRows
) -> Ids:
    logits = batching.model.apply({"params": params}, hidden, method="head")[:, : batching.vocabulary]
    ids, logps = next_ids(logits, position, sampling), jax.nn.log_softmax(logits)
    most = min(TOP, batching.vocabulary)

    def likeliest() -> tuple[Array, Array]:
        values, at = jax.lax.top_k(logps, most)
        return values, at.astype(jnp.int32)

    def none() -> tuple[Array, Array]:
        return jnp.zeros((len(ids), most), jnp.float32), jnp.zeros((len(ids), most), jnp.int32)

    top_logps, top_ids = jax.lax.cond(top, likeliest, none)
    return Ids(ids, jnp.take_along_axis(logps, ids[:, None], axis=1)[:, 0], top_ids, top_logps)
