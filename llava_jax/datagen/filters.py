"""CC3M's balancing by noun phrases, as the paper tells it: rare phrases go first and frequent ones are thinned out."""

import collections
import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from llava_jax.datagen.phrases import normalised
from llava_jax.errors import UsageError

# Source: arXiv:2304.08485, appendix (CC3M): phrases rarer than 3 are skipped, those above 100 give 100 captions.
LEAST, MOST = 3, 100


class Balanced(NamedTuple):
    """kept: indices, ascending. phrases: distinct ones; rare: those below `least`; thinned: those above `most`.

    without: captions that no phrase of at least `least` names.
    """

    kept: list[int]
    phrases: int
    rare: int
    thinned: int
    without: int


def balance(
    phrases: Sequence[Iterable[str]], least: int = LEAST, most: int = MOST, top_up: bool = True, seed: int = 0
) -> Balanced:
    """Which captions to keep.

    Phrases are visited from the rarest to the most frequent (equal ones by name); each adds its captions to the pool,
    or a random `most` of them if it has more.

    Args:
      phrases: of each caption; lower-cased here, without leading determiners, each counted once a caption.
      top_up: captions of a phrase that are in the pool already count towards its `most`. False is the literal reading,
        by which users report about 1.7 million pairs where LLaVA published 595 thousand (haotian-liu/LLaVA issue
        1176): the authors' script is not public, and neither setting is known to give their selection.

    Raises:
      ValueError: the limits are out of order.
    """
    if not 1 <= least <= most:
        raise UsageError(f"least={least}, most={most}: want 1 <= least <= most")
    holders: dict[str, list[int]] = collections.defaultdict(list)
    for index, found in enumerate(phrases):
        for phrase in sorted({normalised(phrase) for phrase in found} - {""}):
            holders[phrase].append(index)
    common = {phrase: indices for phrase, indices in holders.items() if len(indices) >= least}
    pool: set[int] = set()
    for phrase in sorted(common, key=lambda phrase: (len(common[phrase]), phrase)):
        pool.update(_chosen(phrase, common[phrase], pool, most, top_up, seed))
    named = {index for indices in common.values() for index in indices}
    thinned = sum(len(indices) > most for indices in common.values())
    return Balanced(sorted(pool), len(holders), len(holders) - len(common), thinned, len(phrases) - len(named))


def _chosen(phrase: str, indices: list[int], pool: set[int], most: int, top_up: bool, seed: int) -> list[int]:
    if len(indices) <= most:
        return indices
    # The phrase's own numbers: the choice for one does not hang on which others there are.
    generator = random.Random(hashlib.sha256(f"{seed}|{phrase}".encode()).digest())
    if not top_up:
        return generator.sample(indices, most)
    new = [index for index in indices if index not in pool]
    return generator.sample(new, min(len(new), max(0, most - (len(indices) - len(new)))))
