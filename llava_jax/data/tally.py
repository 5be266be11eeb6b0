"""What a run does not learn of its data, counted while it reads, and the steps that suit an amount of it.

Each process counts what it reads; at the end they add it up.
"""

import logging
import math
from collections.abc import Sequence

import numpy as np

from llava_jax import distributed
from llava_jax.batch import Example
from llava_jax.data.check import UnknownKeys
from llava_jax.data.packing import cut
from llava_jax.data.problems import Finding, brief

_log = logging.getLogger(__name__)
_STEPS, _LARGEST = 50, 128


class Tally:
    """Counts of one process.

    targets: int64 [groups, 3]: of each group of a step that it holds, supervised tokens learned from, those that the
      row's end cut off, and samples that lost some.
    """

    def __init__(self, groups: Sequence[int], row_tokens: int):
        """groups: the numbers of these groups within a step."""
        self._groups, self._row_tokens = tuple(groups), row_tokens
        self.targets, self._unknown = np.zeros((len(self._groups), 3), np.int64), UnknownKeys()

    def note_keys(self, findings: Sequence[Finding]) -> None:
        """Counts keys that nothing reads (the findings' details), and tells of each once."""
        for finding in self._unknown.note(findings):
            _log.warning("does not read the key %s, which %s[%d] has; more of them are counted", brief(finding.detail),
                         finding.path, finding.index)  # fmt: skip

    def note_targets(self, groups: Sequence[Sequence[Sequence[Example]]], weights: np.ndarray) -> None:
        """Counts the supervised tokens of a batch; tells of the first that are cut off.

        groups: the examples of the batch, whole; weights: float32 [B, T], of what is left of them.
        """
        self.targets[:, 0] += (weights.reshape(len(self._groups), -1) > 0).sum(axis=1)
        for place, group in enumerate(groups):
            for example in (example for row in group for example in row if len(example.tokens) > self._row_tokens):
                lost = cut(example, self._row_tokens)[1]
                if lost and not self.targets[:, 1].any():
                    _log.warning(
                        "cuts record %s: of its %d tokens a row holds %d, and %d of %d supervised ones are lost. Raise "
                        "data.row_tokens, or shorten such records (`data validate` lists them as `cut`); more of them "
                        "are counted", brief(example.id), len(example.tokens), self._row_tokens, lost,
                        example.learned.sum(),
                    )  # fmt: skip
                self.targets[place, 1:] += (lost, lost > 0)

    def lines(self) -> list[str]:
        """What was left out by all processes since this start, a line each; the same on all, and all must call it."""
        counts = {number: row for number, row in zip(self._groups, self.targets.tolist())}
        everywhere = distributed.exchange("tally", [list(counts.items()), self._unknown.keys])
        # Processes that hold the same rows count the same.
        learned, lost, samples = np.sum(list(dict(pair for one, _ in everywhere for pair in one).values()), axis=0)
        lines = []
        if lost:
            lines.append(
                f"{lost:,} of {learned + lost:,} supervised tokens ({lost / (learned + lost):.1%}) were cut off in "
                f"{samples:,} samples: rows hold {self._row_tokens:,} tokens. Raise data.row_tokens, or shorten the "
                "records that `python -m llava_jax.data validate --config FILE` lists as `cut`"
            )
        unread = sorted({key for _, keys in everywhere for key in keys})
        if unread:
            lines.append(f"keys of records that were not read: {', '.join(unread)}")
        return lines


def fitting(samples: int, multiple: int) -> tuple[int, int]:
    """(samples of a step, epochs) that suit a fine-tune on so many samples; the first is a multiple of a number.

    A rule of thumb: a step of about the root of the samples, LLaVA's 128 at most, and 50 steps at least.

        fitting(50, 1) -> (8, 8)       fitting(1000, 1) -> (32, 2)       fitting(50_000, 1) -> (128, 1)
    """
    near = 2 ** round(math.log2(max(1.0, math.sqrt(samples) / multiple)))
    batch = multiple * max(1, min(near, _LARGEST // multiple))
    return batch, math.ceil(_STEPS / math.ceil(samples / batch))
