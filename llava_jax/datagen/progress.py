"""One line a few seconds: how far, how fast, how long still, and what it cost."""

import sys
import time
from collections.abc import Callable, Sequence

from llava_jax.openai_client import Spent

EVERY_SECS = 5.0
AGAIN = 75  # exit code: what there is is saved, run me again


def duration(secs: float | int) -> str:
    """Seconds as people say them: "42 s", "7 min", "3 h 20 min"."""
    if secs < 60:
        return f"{secs:.0f} s"
    minutes = round(secs / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def line(name: str, done: int, total: int, counts: dict[str, int], spent: Spent, secs: float | int) -> str:
    """The progress of `secs` seconds of work.

    Only what was asked of the server counts for the speed and for the money still to come; the cache is quick.
    """
    told = [f"{count:,} {what}" for what, count in counts.items()]
    left = total - done
    speed = spent.asked / secs if secs > 0 else 0.0
    eta = f"{speed:.1f}/s, {duration(left / speed)} left" if speed and left else f"{duration(secs)}"
    money = f"${spent.usd:.2f}"
    if spent.asked and left and spent.usd > spent.earlier_usd:
        money += f" of about ${spent.usd + left * (spent.usd - spent.earlier_usd) / spent.asked:.2f}"
    tokens = f"{spent.tokens_in + spent.tokens_out:,} tokens"
    return f"{name}: {done:,} of {total:,}; {', '.join(told)}; {eta}; {tokens}, {money}"


class Progress:
    """Says where the work is, at most every EVERY_SECS, to standard error."""

    def __init__(self, name: str, total: int, spent: Callable[[], Spent] = Spent) -> None:
        self._name, self._total, self._spent = name, total, spent
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, counts: dict[str, int]) -> None:
        now = time.monotonic()
        if now - self._last >= EVERY_SECS:
            self._last = now
            print(line(self._name, done, self._total, counts, self._spent(), now - self._start), file=sys.stderr)


def unanswered(reasons: Sequence[str]) -> int:
    """The exit code of a verb: 0, or AGAIN if requests are without an answer, which it says."""
    if not reasons:
        return 0
    print(f"datagen: {len(reasons):,} without an answer, the last one: {reasons[-1]}", file=sys.stderr)
    print("datagen: what was answered is kept: run the same command again for the rest", file=sys.stderr)
    return AGAIN
