"""CC3M's balancing by noun phrases, as the paper describes it: rare phrases first, frequent ones subsampled."""

import collections
import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from llava_jax.datagen.phrases import normalised
from llava_jax.errors import UsageError

# Source: arXiv:2304.08485, appendix (CC3M): phrases rarer than 3 are skipped, those above 100 give 100 captions.
LEAST, MOST = 3, 100


class Selection(NamedTuple):
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
) -> Selection:
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
    indices_by_phrase: dict[str, list[int]] = collections.defaultdict(list)
    for index, caption_phrases in enumerate(phrases):
        for phrase in sorted({normalised(phrase) for phrase in caption_phrases} - {""}):
            indices_by_phrase[phrase].append(index)
    common = {phrase: indices for phrase, indices in indices_by_phrase.items() if len(indices) >= least}
    pool: set[int] = set()
    for phrase in sorted(common, key=lambda phrase: (len(common[phrase]), phrase)):
        pool.update(_sample(phrase, common[phrase], pool, most, top_up, seed))
    covered = {index for indices in common.values() for index in indices}
    thinned = sum(len(indices) > most for indices in common.values())
    rare = len(indices_by_phrase) - len(common)
    return Selection(sorted(pool), len(indices_by_phrase), rare, thinned, len(phrases) - len(covered))


def _sample(phrase: str, indices: list[int], pool: set[int], most: int, top_up: bool, seed: int) -> list[int]:
    if len(indices) <= most:
        return indices
    # One generator a phrase: its choice does not depend on which other phrases there are.
    generator = random.Random(hashlib.sha256(f"{seed}|{phrase}".encode()).digest())
    if not top_up:
        return generator.sample(indices, most)
    new = [index for index in indices if index not in pool]
    return generator.sample(new, min(len(new), max(0, most - (len(indices) - len(new)))))
