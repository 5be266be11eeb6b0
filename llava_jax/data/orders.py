"""Which record comes when: pure functions of (seed, epoch), the same on every host and after every restart.

The named orders repeat the reference's: `shuffle` is torch's `randperm`, `modality_length` its sampler that groups
records of one modality and of like length. Everything is numpy, so nothing here needs torch.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llava_jax.errors import UsageError

ORDERS = ("shuffle", "modality_length", "sequential")


def twister(seed: int) -> np.random.RandomState:
    """The generator behind `torch.manual_seed(seed)`: MT19937 seeded with the low 32 bits, as torch does."""
    return np.random.RandomState(seed & 0xFFFFFFFF)


def randperm(n: int, generator: np.random.RandomState) -> np.ndarray:
    """`torch.randperm(n)` on CPU, bit for bit: int64 [n], for n below 2**32 / 20 (torch draws 64 bits above).

    A forward Fisher-Yates shuffle: i swaps with i + (raw_i mod (n - i)), raw_i the next 32-bit output of the twister.
    Source: aten/src/ATen/native/TensorFactories.cpp, `randperm_cpu`.
    """
    raw = generator.randint(0, 2**32, size=max(n - 1, 0), dtype=np.uint32).astype(np.int64)
    partner = (np.arange(n - 1) + raw % (n - np.arange(n - 1)) if n > 1 else raw).tolist()
    order = list(range(n))  # a list: 665,298 swaps take 0.1 s, on an array ten times as long
    for i, j in enumerate(partner):
        order[i], order[j] = order[j], order[i]
    return np.asarray(order, np.int64)


def length_grouped(lengths: np.ndarray, batch: int, world: int, generator: np.random.RandomState) -> np.ndarray:
    """Records in random groups of batch * world, each sorted by length and dealt to `world` chunks of like sum.

    Source: haotian-liu/LLaVA llava/train/llava_trainer.py:38-96@c121f04 (`get_length_grouped_indices`).
    """
    order, size = randperm(len(lengths), generator), batch * world
    chosen: list[int] = []
    for start in range(0, len(order), size):
        group = order[start : start + size]
        group = group[np.argsort(-lengths[group], kind="stable")]  # longest first, ties as they come
        chosen += _even_chunks(group.tolist(), lengths, world)
    return np.asarray(chosen, np.int64)


def _even_chunks(group: list[int], lengths: np.ndarray, world: int) -> list[int]:
    """The group's records chunk after chunk: each goes to the lightest chunk that still has room."""
    if world == 1:
        return group
    if len(group) % world:
        return [index for chunk in range(world) for index in group[chunk::world]]
    chunks: list[list[int]] = [[] for _ in range(world)]
    weights: list[float | int] = [0] * world
    for index in group:
        lightest = weights.index(min(weights))
        chunks[lightest].append(index)
        weights[lightest] += int(lengths[index])
        if len(chunks[lightest]) == len(group) // world:
            weights[lightest] = float("inf")
    return [index for chunk in chunks for index in chunk]


def modality_length(
    lengths: np.ndarray, batch: int, world: int, generator: np.random.RandomState,
    group_generator: np.random.RandomState | None = None,
) -> np.ndarray:  # fmt: skip
    """Groups of batch * world records of one modality and like length, the groups in random order.

    What is left over of both modalities comes last, as one mixed tail sorted by record.

    Args:
      lengths: int [n], words of a record; positive with an image, negative without; never 0.
      batch, world: records a device takes and number of devices (times accumulation) in the reference.
      generator: drives the shuffles inside a modality.
      group_generator: drives the order of the groups; the same generator if None. The reference under accelerate
        uses a fresh torch.Generator here (seed 67280421310721), whatever --seed says.

    Source: haotian-liu/LLaVA llava/train/llava_trainer.py:60-85@c121f04 (`get_modality_length_grouped_indices`).
    """
    group_generator = group_generator or generator
    if (lengths > 0).all() or (lengths < 0).all():
        return length_grouped(lengths, batch, world, group_generator)
    groups, tail = [], []
    for mask in (lengths > 0, lengths < 0):
        members = np.flatnonzero(mask)
        members = members[length_grouped(np.abs(lengths[members]), batch, world, generator)]
        pieces = [members[i : i + batch * world] for i in range(0, len(members), batch * world)]
        groups += pieces[:-1]
        tail.append(pieces[-1])  # full or not: the reference always takes the last one away
    groups = [groups[i] for i in randperm(len(groups), group_generator)]
    return np.concatenate([*groups, np.sort(np.concatenate(tail))])


def picks(sizes: Sequence[int], weights: Sequence[float | int], seed: int, epoch: int) -> np.ndarray:
    """Record numbers (counted through all sources) that one epoch visits, source after source, before any shuffle.

    A source of n records and weight w gives round(n * w) of them an epoch: weight 1 is each record once, 2 is each
    twice, 0.5 a half. A part is drawn without replacement over successive epochs, so no record is left out.

        picks([3, 2], [1.0, 2.0], seed=0, epoch=0) -> [0 1 2  3 4 3 4]
    """
    chosen, first = [], 0
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        count = round(size * weight)
        visits = np.arange(epoch * count, (epoch + 1) * count)
        if count % size:
            visits = np.concatenate([
                randperm(size, twister(mixed(seed, number, int(turn))))[visits[visits // size == turn] % size]
                for turn in np.unique(visits // size)
            ])  # fmt: skip
        chosen.append(first + visits % size)
        first += size
    return np.concatenate(chosen)


def mixed(*numbers: int) -> int:
    """A seed of its own for each sequence of numbers."""
    return int(np.random.SeedSequence([number & 0xFFFFFFFF for number in numbers]).generate_state(1)[0])


def resolve_steps(records: int, batch_samples: int, epochs: float | int) -> int:
    """Steps of `epochs` passes: ceil(records / batch) an epoch, as its last batch is completed by wrapping around.

    LLaVA-1.5 fine-tuning: resolve_steps(665298, 128, 1) -> 5198.

    Raises:
      ValueError: a number below 1 record, 1 sample or above 0 epochs is wanted.
    """
    if records < 1 or batch_samples < 1 or epochs <= 0:
        raise UsageError(
            f"cannot resolve steps of epochs={epochs} over {records} records in batches of {batch_samples}: "
            "each must be above 0"
        )
    return int(np.ceil(epochs * -(-records // batch_samples)))


@dataclass(frozen=True, eq=False)
class Schedule:
    """Sample number -> record number. Sample s is row s % batch_samples of step s // batch_samples.

    sizes, weights: records and weight of each source.
    order: one of `ORDERS`.
    batch_samples: samples of one global step; an epoch is padded to whole batches with its own first samples.
    group_samples: records of one chunk of like length sum (`modality_length`; a device's share in the reference).
    word_lengths: for `modality_length`, int [records]: the signed word counts; else None.

        5 records, batches of 2, sequential:   0 1 | 2 3 | 4 0     epoch 0; the last batch wraps around
    """

    sizes: tuple[int, ...]
    weights: tuple[float | int, ...]
    order: str
    seed: int
    batch_samples: int
    group_samples: int
    word_lengths: np.ndarray | None
    _epochs: dict[int, np.ndarray] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    @property
    def samples(self) -> int:
        """Samples of one epoch, before it is completed to whole batches."""
        return sum(round(size * weight) for size, weight in zip(self.sizes, self.weights))

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return -(-self.samples // self.batch_samples)

    def record(self, sample: int) -> int:
        """Record number of a sample number, which may lie in any epoch."""
        epoch, place = divmod(sample, self.steps * self.batch_samples)
        return int(self.epoch(epoch)[place % self.samples])

    def epoch(self, epoch: int) -> np.ndarray:
        """Record numbers of one epoch in order, int64 [samples]; the last two asked for are kept."""
        with self._lock:  # many threads ask at an epoch's start: one computes
            if epoch not in self._epochs:
                self._epochs[epoch] = self._ordered(epoch)
                for old in list(self._epochs)[:-2]:
                    del self._epochs[old]
            return self._epochs[epoch]

    def _ordered(self, epoch: int) -> np.ndarray:
        chosen = picks(self.sizes, self.weights, self.seed, epoch)
        # Differs from LLaVA: each epoch has its own seed instead of going on with one stream, so that any epoch can
        # be entered directly. The first epoch is the reference's.
        generator = twister(mixed(self.seed, epoch) if epoch else self.seed)
        if self.order == "shuffle":
            return chosen[randperm(len(chosen), generator)]
        if self.order == "modality_length":
            lengths, world = self.word_lengths[chosen], self.batch_samples // self.group_samples
            return chosen[modality_length(lengths, self.group_samples, world, generator)]
        return chosen
