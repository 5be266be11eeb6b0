"""Continuous batching on the host: requests take slots and pages as these become free, read their prompts page by page
beside others that answer already, and give all back when they end.

One thread owns a `Scheduler` and calls `step` as long as it is busy.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from llava_jax.generate import batching as programs
from llava_jax.generate.assistant import Assistant
from llava_jax.generate.batching import STEPS, Batching, Chunk, Ids, Rows
from llava_jax.generate.engine import NOTHING
from llava_jax.generate.features import Features
from llava_jax.generate.pages import Pages, Prompt, PromptImage
from llava_jax.generate.sampling import Sampling, stack
from llava_jax.generate.stream import Row, Text, extended
from llava_jax.models.paged import PAGE
from llava_jax.prompt import ending
from llava_jax.prompt.tokenizer import Tokenizer

# Backend -> rows whose prompts are read at once, and tokens of each. A CPU's time is that of the products, padding
# included; an accelerator reads all weights for a chunk, which 256 tokens make worth it, and one prompt should fill.
READING = {"cpu": (2, 32)}
READING_ELSEWHERE = (2, 128)


@dataclass(frozen=True)
class Job:
    """A prompt and how to go on from it.

    limit: ids to make at most; prompt and limit fit in a row. stops: strings that end the answer and are no part of it.
    top: likeliest ids at each position whose log-probabilities are wanted, at most TOP.
    continues: the text goes on from the prompt's, with the white space that it begins and ends with.
    """

    prompt: Prompt
    limit: int
    sampling: Sampling = Sampling()
    stops: tuple[str, ...] = ()
    top: int = 0
    continues: bool = False


class Token(NamedTuple):
    """One id of an answer; likeliest: the `top` (id, log-probability) at its position."""

    id: int
    logp: float
    likeliest: tuple[tuple[int, float], ...]


class Update(NamedTuple):
    """What a step added to an answer.

    piece: text that can be shown. ended_by: "" while it goes on, then "stop" or "length". reused: tokens of the
    prompt that were not computed again.
    """

    piece: str
    tokens: tuple[Token, ...]
    ended_by: str
    reused: int


@dataclass
class _Slot:
    """A request that has a slot. at: tokens of its prompt that are read; token, position: as in `Rows`."""

    number: int
    job: Job
    pages: list[int]
    reused: int
    table: np.ndarray
    at: int
    row: Row
    features: list[np.ndarray | None] = field(default_factory=list)
    token: int = 0
    position: int = 0

    @property
    def reads(self) -> bool:
        return self.at < len(self.job.prompt.tokens)

    @property
    def unread(self) -> int:
        return len(self.job.prompt.tokens) - self.at


class Scheduler:
    """The requests of one model.

    feature_bytes: of pictures' features that are kept.
    """

    def __init__(
        self, batching: Batching, params: Any, tokenizer: Tokenizer, feature_bytes: int = 2**30
    ) -> None:
        assert batching.pages > batching.row_pages, "a request would wait for ever"
        self.batching, self._params, self._tokenizer = batching, params, tokenizer
        self._pool, self.pages = batching.empty(), Pages(batching.pages)
        self._features = Features(feature_bytes, batching.dtype)
        self._slots: list[_Slot | None] = [None] * batching.slots
        self._waiting: deque[tuple[int, Job]] = deque()
        self._numbers = itertools.count()
        width = batching.model.config.llm.width
        self._no_features = np.zeros((batching.lanes, batching.chunk, width), batching.dtype)

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or self.active > 0

    @property
    def active(self) -> int:
        """Slots that are taken."""
        return sum(slot is not None for slot in self._slots)

    def submit(self, job: Job) -> int:
        """Puts a request at the end of the queue; returns its number.

        It must fit: len(job.prompt.tokens) + job.limit is at most the positions that `row_pages` was made for.
        """
        number = next(self._numbers)
        self._waiting.append((number, job))
        return number

    def cancel(self, number: int) -> None:
        """Ends a request, wherever it is, and frees what it has."""
        self._waiting = deque(one for one in self._waiting if one[0] != number)
        for index, slot in enumerate(self._slots):
            if slot is not None and slot.number == number:
                self._free(index)
        self._features.forget_unseen({image.key for slot in self._slots if slot for image in slot.job.prompt.images})

    def compile(self) -> Iterator[str]:
        """Compiles all that will ever run; yields the name of each program before it does."""
        side = self.batching.model.config.vision.image_size
        yield "vision tower"
        self.batching.features(self._params, [np.zeros((side, side, 3), np.uint8)])
        yield "prompts"
        _host(self._read([]))
        yield "answers"
        _host(self._advance([False] * self.batching.slots, STEPS))

    def step(self) -> list[tuple[int, Update]]:
        """At most one dispatch of each program; what it added to which requests.

        Prompts come before answers where a chunk ends them: an `advance` costs the same for one row and for all, and
        no more rows than there are slots can hold it up. A chunk that ends none shares the step with an `advance`.
        """
        self._admit()
        self._see()
        lanes = self._lanes()
        answering = [slot is not None and not slot.reads for slot in self._slots]
        first = self._read(lanes) if lanes else None
        more = None
        if any(answering) and not any(map(self._soon, self._slots)):
            reading = any(slot is not None and slot.reads for slot in self._slots)
            more = self._advance(answering, 1 if reading or lanes else STEPS)
        updates = []
        if first is not None:
            ids = Ids(*(x[:, None] for x in _host(first)))
            updates += [self._add(index, ids, lane) for lane, index in enumerate(lanes) if not self._slots[index].reads]
        if more is not None:
            ids = _host(more)
            updates += [self._add(index, ids, index) for index, is_on in enumerate(answering) if is_on]
        return updates

    def _admit(self) -> None:
        """Requests enter in the order of their arrival."""
        while self._waiting and None in self._slots:
            number, job = self._waiting[0]
            tokens = len(job.prompt.tokens)
            reservation = self.pages.reserve(job.prompt, -(-(tokens + job.limit) // PAGE))
            if reservation is None:
                return
            self._waiting.popleft()
            pages, known = reservation
            table = np.zeros(self.batching.row_pages, np.int32)
            table[: len(pages)] = pages
            text = Text()
            if job.continues:
                window = tuple(job.prompt.tokens[-8:].tolist())
                text = Text(window=window, read=len(window), trims=False)
            slot = _Slot(number, job, pages, known * PAGE, table, known * PAGE, Row(job.limit, text))
            slot.features = [None] * len(job.prompt.images)
            self._slots[self._slots.index(None)] = slot

    def _see(self) -> None:
        """Features for the pictures that come next, of as many tiles as the tower takes at once."""
        self._find_features()
        tiles = self._tiles()
        if tiles:
            rows, newline = self.batching.features(self._params, [pixels for _, _, pixels in tiles])
            for (image, index, _), features in zip(tiles, rows):
                self._features.add(image, index, features, newline)
            self._find_features()

    def _tiles(self) -> list[tuple[PromptImage, int, np.ndarray]]:
        """Tiles for the tower: one of the oldest request, then those of the requests that want fewest."""
        wanted = [
            [tile for image, features in zip(slot.job.prompt.images, slot.features) if features is None
             for tile in self._features.pending(image)]
            for slot in sorted(filter(None, self._slots), key=lambda slot: slot.number)
        ]  # fmt: skip
        oldest, *others = list(filter(None, wanted)) or [[]]
        order = oldest[:1] + sum(sorted(others, key=len), []) + oldest[1:]
        once = {(image.key, index): (image, index, pixels) for image, index, pixels in order}
        return list(once.values())[: self.batching.lanes]

    def _find_features(self) -> None:
        for slot in filter(None, self._slots):
            for index, image in enumerate(slot.job.prompt.images):
                if slot.features[index] is None and image.start + image.length > slot.at:
                    slot.features[index] = self._features.find(image)

    def _lanes(self) -> list[int]:
        """Slots whose next chunk can be read: the oldest, then those that are nearly through."""
        ready = [index for index, slot in enumerate(self._slots) if self._ready(slot)]
        oldest = sorted(ready, key=lambda index: self._slots[index].number)[:1]
        others = sorted(set(ready) - set(oldest), key=lambda i: (self._slots[i].unread, self._slots[i].number))
        return (oldest + others)[: self.batching.lanes]

    def _soon(self, slot: _Slot | None) -> bool:
        """Whether the next chunk ends its prompt, and the tower need not run often before it."""
        if slot is None or not slot.reads or slot.unread > self.batching.chunk:
            return False
        return sum(map(len, map(self._features.pending, slot.job.prompt.images))) <= self.batching.lanes

    def _ready(self, slot: _Slot | None) -> bool:
        """Whether it has a next chunk, and the features of that are there."""
        if slot is None or not slot.reads:
            return False
        end = slot.at + self.batching.chunk
        return all(features is not None or image.start >= end or image.start + image.length <= slot.at
                   for image, features in zip(slot.job.prompt.images, slot.features))  # fmt: skip

    def _read(self, lanes: list[int]) -> Ids:
        batching, count, size = self.batching, self.batching.lanes, self.batching.chunk
        chunk = Chunk(
            np.zeros((count, size), np.int32), self._no_features, np.zeros((count, size), bool),
            np.zeros(count, np.int32), np.zeros(count, np.int32), np.zeros((count, batching.row_pages), np.int32),
            np.bool_(any(self._slots[index].job.top for index in lanes)),
            stack([self._slots[index].job.sampling for index in lanes] + [Sampling()] * (count - len(lanes))),
        )  # fmt: skip
        for lane, index in enumerate(lanes):
            slot = self._slots[index]
            tokens = slot.job.prompt.tokens[slot.at : slot.at + size]
            chunk.tokens[lane, : len(tokens)] = tokens
            chunk.start[lane], chunk.end[lane], chunk.table[lane] = slot.at, len(tokens) - 1, slot.table
            for image, features in zip(slot.job.prompt.images, slot.features):
                first, last = max(image.start, slot.at), min(image.start + image.length, slot.at + size)
                if first < last:
                    if chunk.features is self._no_features:
                        chunk = chunk._replace(features=np.zeros_like(self._no_features))
                    here = slice(first - slot.at, last - slot.at)
                    chunk.features[lane, here] = features[first - image.start : last - image.start]
                    chunk.is_feature[lane, here] = True
        self._pool, ids = batching.read(self._params, self._pool, chunk)
        for index in lanes:
            self._passed(self._slots[index])
        return ids

    def _passed(self, slot: _Slot) -> None:
        first, prompt = slot.at // PAGE, slot.job.prompt
        slot.at = slot.position = min(slot.at + self.batching.chunk, len(prompt.tokens))
        for page in range(first, slot.at // PAGE):
            self.pages.publish(slot.pages[page], prompt.digests[page])

    def _advance(self, answering: list[bool], steps: int) -> Ids:
        on = [slot if is_on else None for slot, is_on in zip(self._slots, answering)]
        table = np.zeros((len(on), self.batching.row_pages), np.int32)
        for index, slot in enumerate(on):
            if slot is not None:
                table[index] = slot.table
        rows = Rows(
            np.array([slot.token if slot else 0 for slot in on], np.int32),
            np.array([slot.position if slot else 0 for slot in on], np.int32),
            np.array([len(slot.job.prompt.tokens) + slot.job.limit - 1 if slot else 0 for slot in on], np.int32),
            ~np.array(answering), table, np.bool_(any(slot.job.top for slot in on if slot)),
            stack([slot.job.sampling if slot else Sampling() for slot in on]),
        )  # fmt: skip
        self._pool, ids = self.batching.advance(self._params, self._pool, rows, steps)
        return ids

    def _add(self, index: int, ids: Ids, row: int) -> tuple[int, Update]:
        """New ids of a slot, those of a row of `ids`; what ends is freed."""
        slot = self._slots[index]
        new = [token for token in ids.ids[row].tolist() if token != NOTHING]
        before = len(slot.row.ids)
        slot.row, piece = extended(slot.row, new, self.batching.ends, self._tokenizer, slot.job.stops)
        count, top = len(slot.row.ids) - before, slot.job.top
        tokens = tuple(
            Token(new[i], float(ids.logps[row, i]),
                 tuple(zip(ids.top_ids[row, i, :top].tolist(), ids.top_logps[row, i, :top].tolist())))
            for i in range(count)
        )  # fmt: skip
        slot.token = slot.row.ids[-1]
        slot.position = len(slot.job.prompt.tokens) + len(slot.row.ids) - 1
        if slot.row.ended_by:
            self._free(index)
        return slot.number, Update(piece, tokens, slot.row.ended_by, slot.reused)

    def _free(self, index: int) -> None:
        self.pages.release(self._slots[index].pages)
        self._slots[index] = None


def reading() -> tuple[int, int]:
    """Rows whose prompts are read at once on this backend, and tokens of each."""
    return READING.get(jax.default_backend(), READING_ELSEWHERE)


def of_assistant(assistant: Assistant, slots: int, positions: int) -> Callable[[], Scheduler]:
    """What makes a scheduler, with its pages, for the model of an assistant, whose parameters it shares.

    Raises:
      UsageError: the pages do not fit on the devices.
    """
    model, words = assistant.model, assistant.format.tokenizer
    lanes, chunk = reading()
    row_pages = programs.row_pages(positions, chunk)
    pages = slots * row_pages + 1
    programs.check_memory(model, assistant.params, pages, assistant.mesh)
    ends = ending.of(assistant.format.template, words).ids
    batching = Batching(model, slots, min(lanes, slots), chunk, pages, row_pages, words.size, ends, assistant.mesh)
    return lambda: Scheduler(batching, assistant.params, words)


def _host(ids: Ids) -> Ids:
    return Ids(*(np.asarray(x) for x in ids))
