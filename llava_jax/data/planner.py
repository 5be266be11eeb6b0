"""Which samples share a row, and which rows share a pool of images: decided before anything is read.

A plan is a pure function of lengths, seed and epoch, the same on every host; nothing in it depends on the number of
hosts or devices.
"""

import bisect
import heapq
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llava_jax.data import trees
from llava_jax.data.orders import Schedule
from llava_jax.data.trees import Prefixes

_log = logging.getLogger(__name__)

# Samples that are packed among themselves. A sample is moved only within its window, so an order that was shuffled
# stays as random as it was. Twice the window fills 0.1 % more positions, a quarter of it 0.4 % fewer.
WINDOW = 8192


class Rule(NamedTuple):
    """How a row begins, and when it is finished.

    A row takes the shortest sample that is left while more than `finish` mean lengths of room stay behind it, and
    ends with the one or two that fill the room best.
    """

    longest_first: bool
    finish: float


# Which rule wins depends on how many samples a row holds: each is tried on the first window.
RULES = (Rule(False, 1.4), Rule(False, 1.8), Rule(True, 1.8), Rule(True, 2.0))


class Plan(NamedTuple):
    """Row r holds samples[starts[r] : starts[r + 1]]; R neighbouring rows, some perhaps empty, are a group."""

    samples: np.ndarray  # int64 [n]: each of 0 .. n - 1 once
    starts: np.ndarray  # int64 [rows + 1]


def plan(
    tokens: np.ndarray, images: np.ndarray, row_tokens: int, rows_per_group: int, images_per_group: int,
    generator: np.random.RandomState,
) -> Plan:  # fmt: skip
    """Groups of rows for samples 0 .. n - 1, which come in the order that they are wanted in.

    No row is longer than `row_tokens` and no group holds more than `images_per_group` images. Samples stay within
    their window of at most `WINDOW`; the groups of a window come in random order, so what a group holds says
    nothing about when it comes.

        row_tokens=10, rows_per_group=2, images_per_group=3
        tokens  6  4  9  3  7         row 0: 6 4    row 1: 9     a group of 2 images
        images  1  0  1  1  1         row 2: 3 7    row 3: -     a group of 2 images

    Args:
      tokens: int [n]; 0 to row_tokens. 0 takes no room: a record known to be bad, which is to be met nonetheless.
      images: int [n]; 0 to images_per_group.
      generator: drives the order within windows.
    """
    # An image counts as so many tokens that a row has no room for one more than its group may hold.
    least = row_tokens // (images_per_group + 1) + 1
    lengths = np.maximum(tokens, np.minimum(images * least, row_tokens))
    windows = np.array_split(np.arange(len(lengths)), max(1, -(-len(lengths) // WINDOW)))

    def rows_of(window: np.ndarray, rule: Rule) -> list[np.ndarray]:
        return [window[row] for row in _rows(lengths[window].tolist(), row_tokens, rule)]

    def groups_of(rows: Sequence[np.ndarray]) -> list[list[int]]:
        return _groups([int(images[row].sum()) for row in rows], rows_per_group, images_per_group)

    rule = min(RULES, key=lambda rule: len(groups_of(rows_of(windows[0], rule))))
    samples: list[int] = []
    ends = [0]
    for window in _watched(windows):
        rows = rows_of(window, rule)
        rows = [rows[i] for i in generator.permutation(len(rows))]
        groups = groups_of(rows)
        for number in generator.permutation(len(groups)):
            for row in groups[number]:
                samples += rows[row].tolist()
                ends.append(len(samples))
            ends += [len(samples)] * (rows_per_group - len(groups[number]))
    return Plan(np.asarray(samples, np.int64), np.asarray(ends, np.int64))


def plan_trees(
    tokens: np.ndarray, images: np.ndarray, prefixes: Prefixes, records: np.ndarray, row_tokens: int,
    rows_per_group: int, images_per_group: int, generator: np.random.RandomState,
) -> Plan:  # fmt: skip
    """As `plan`, of samples of these records that share prefixes: neighbours of a row with an equal key are a tree.

    A tree is one sample to `plan`, at the place that `trees.together` gives it. All samples of a picture then
    come in one step, or in a few if they fill more than a row, wherever the order had them; which pictures a step
    holds is as random as the order. A step's gradient is the mean over fewer pictures than it has samples.
    """
    samples, starts = trees.together(tokens, prefixes, records, row_tokens)
    again = trees.repeated(prefixes.keys[samples], starts)
    lengths = np.add.reduceat(tokens[samples] - again * prefixes.tokens[samples], starts[:-1])
    found = plan(lengths, images[samples[starts[:-1]]], row_tokens, rows_per_group, images_per_group, generator)
    sizes = np.diff(starts)[found.samples]
    order = trees.ranges(starts[found.samples], sizes)
    return Plan(samples[order], np.append(0, np.cumsum(sizes))[found.starts])


def _rows(lengths: Sequence[int], row_tokens: int, rule: Rule) -> list[list[int]]:
    """Rows of samples, no row longer than row_tokens."""
    bag, rows = _Bag(lengths, row_tokens), []
    while bag.count:
        rows.append(_row(bag, row_tokens, rule))
    return rows


def _row(bag: "_Bag", room: int, rule: Rule) -> list[int]:
    first = bag.longest(room) if rule.longest_first else bag.shortest()
    row, room = [bag.take(first)], room - first
    while bag.count and (least := bag.shortest()) <= room:
        whole = bag.longest(room)
        if whole == room:
            chosen: tuple[int, ...] = (whole,)
        elif room - least >= rule.finish * bag.tokens / bag.count:
            chosen = (least,)
        else:
            chosen = bag.pair(room, whole) or (whole,)
        row += [bag.take(length) for length in chosen]
        room -= sum(chosen)
    return row


class _Bag:
    """Samples by length. Which lengths are there is one number's bits, so a question about all is one operation."""

    def __init__(self, lengths: Sequence[int], top: int):
        self.top, self.count, self.tokens = top, len(lengths), sum(lengths)
        self.samples: list[list[int]] = [[] for _ in range(top + 1)]
        for number in reversed(range(len(lengths))):
            self.samples[lengths[number]].append(number)
        self.here = sum(1 << length for length in set(lengths))
        self.mirror = sum(1 << (top - length) for length in set(lengths))  # bit top - n is bit n of `here`

    def take(self, length: int) -> int:
        """One sample of that length, the first of them."""
        sample = self.samples[length].pop()
        self.count, self.tokens = self.count - 1, self.tokens - length
        if not self.samples[length]:
            self.here ^= 1 << length
            self.mirror ^= 1 << (self.top - length)
        return sample

    def shortest(self) -> int:
        return (self.here & -self.here).bit_length() - 1

    def longest(self, room: int) -> int:
        """The greatest length within the room; -1 if there is none."""
        return (self.here & ((2 << room) - 1)).bit_length() - 1

    def pair(self, room: int, above: int) -> tuple[int, int] | None:
        """The two lengths, as alike as can be, whose sum is the greatest within the room; None if not above `above`."""
        for total in range(min(room, 2 * self.longest(room)), max(above, 2 * self.shortest() - 1), -1):
            both = self.here & (self.mirror >> (self.top - total))  # lengths n for which total - n is there too
            half = total // 2
            if not both:
                continue
            if total % 2 == 0 and len(self.samples[half]) == 1:
                both &= ~(1 << half)
            smaller = (both & ((2 << half) - 1)).bit_length() - 1
            if smaller >= 0:
                return smaller, total - smaller
        return None


def _groups(images: Sequence[int], rows_per_group: int, images_per_group: int) -> list[list[int]]:
    """Rows dealt to groups within both limits: the fullest first, each to the group with the fewest images."""
    wanted = max(-(-len(images) // rows_per_group), -(-sum(images) // images_per_group))
    groups: list[list[int]] = [[] for _ in range(wanted)]
    lightest = [(0, number) for number in range(wanted)]
    for row in sorted(range(len(images)), key=lambda row: -images[row]):
        if not lightest or lightest[0][0] + images[row] > images_per_group:
            heapq.heappush(lightest, (0, len(groups)))
            groups.append([])
        held, number = heapq.heappop(lightest)
        groups[number].append(row)
        if len(groups[number]) < rows_per_group:
            heapq.heappush(lightest, (held + images[row], number))
    return groups


def _watched(windows: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """The windows, with a line of progress every ten seconds."""
    start = last = time.monotonic()
    for done, window in enumerate(windows):
        yield window
        now = time.monotonic()
        if now - last > 10:
            last = now
            _log.info("packs: %d of %d windows of %d samples, ETA %.0f s", done + 1, len(windows), len(window),
                      (now - start) / (done + 1) * (len(windows) - done - 1))  # fmt: skip


class Fill(NamedTuple):
    """How full the rows of an epoch are, the padding at its end included."""

    samples_a_row: float
    positions: float  # share of all positions that hold a token
    slots: float  # share of all places for images that hold one
    trees_a_row: float  # and samples that share nothing


@dataclass(frozen=True, eq=False)
class Plans:
    """Group number -> records of its rows, epoch after epoch; group g is of step g // groups.

    An epoch shows each of its samples once and ends with rows of padding where they do not fill its last step.

    schedule: which record each sample of an epoch is.
    tokens, images: int [records], as `plan` wants them.
    groups: of one global step.
    prefixes: of the records, for trees; None: nothing is shared.
    """

    schedule: Schedule
    tokens: np.ndarray
    images: np.ndarray
    row_tokens: int
    rows_per_group: int
    images_per_group: int
    groups: int
    prefixes: Prefixes | None = None
    _plans: dict[int, Plan] = field(default_factory=dict)
    _ends: list[int] = field(default_factory=list)  # steps up to the end of each epoch that was planned
    _lock: Any = field(default_factory=threading.RLock)

    def epoch(self, epoch: int) -> Plan:
        """The plan of one epoch, of record numbers; the last two asked for are kept."""
        with self._lock:  # many threads ask at an epoch's start: one computes
            if epoch not in self._plans:
                self._plans[epoch] = self._planned(epoch)
                for old in list(self._plans)[:-2]:
                    del self._plans[old]
            return self._plans[epoch]

    def steps_until(self, epoch: int) -> int:
        """Steps of all epochs before this one. An epoch's steps are known only when it is planned."""
        with self._lock:
            while len(self._ends) < epoch:
                rows = len(self.epoch(len(self._ends)).starts) - 1
                steps = -(-rows // (self.rows_per_group * self.groups))
                self._ends.append(steps + (self._ends[-1] if self._ends else 0))
            return self._ends[epoch - 1] if epoch else 0

    def steps_of(self, epochs: float | int) -> int:
        """Steps of the first `epochs` epochs, a part of a step counted whole."""
        whole = int(epochs)
        before = self.steps_until(whole)
        if epochs == whole:
            return before
        return before + int(np.ceil((epochs - whole) * (self.steps_until(whole + 1) - before)))

    def rows(self, group: int) -> list[list[int]]:
        """The record numbers in each row of a group."""
        step, place = divmod(group, self.groups)
        epoch = self._epoch_of(step)
        samples, starts = self.epoch(epoch)
        first = ((step - self.steps_until(epoch)) * self.groups + place) * self.rows_per_group
        ends = [starts[min(row, len(starts) - 1)] for row in range(first, first + self.rows_per_group + 1)]
        return [samples[start:end].tolist() for start, end in zip(ends, ends[1:])]

    def fill(self) -> Fill:
        """How full the rows of the first epoch are."""
        records, starts = self.epoch(0)
        tokens, images = self.tokens[records], self.images[records]
        first = np.ones(len(records), bool)
        if self.prefixes is not None:
            first = ~trees.repeated(self.prefixes.keys[records], starts)
            tokens, images = tokens - ~first * self.prefixes.tokens[records], images * first
        groups = self.steps_until(1) * self.groups
        rows = groups * self.rows_per_group
        return Fill(
            len(records) / rows, float(tokens.sum()) / (rows * self.row_tokens),
            float(images.sum()) / (groups * self.images_per_group), float(first.sum()) / rows,
        )  # fmt: skip

    def _epoch_of(self, step: int) -> int:
        with self._lock:
            while not self._ends or self._ends[-1] <= step:
                self.steps_until(len(self._ends) + 1)
            return bisect.bisect_right(self._ends, step)

    def _planned(self, epoch: int) -> Plan:
        records = self.schedule.epoch(epoch)
        seed = np.random.SeedSequence([self.schedule.seed & 0xFFFFFFFF, epoch])
        sizes, generator = (self.tokens[records], self.images[records]), np.random.RandomState(np.random.MT19937(seed))
        limits = self.row_tokens, self.rows_per_group, self.images_per_group, generator
        if self.prefixes is None:
            found = plan(*sizes, *limits)
        else:
            found = plan_trees(*sizes, Prefixes(*(x[records] for x in self.prefixes)), records, *limits)
        return Plan(records[found.samples], found.starts)
