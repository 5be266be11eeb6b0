"""One progress line every few seconds: done, speed, time left, and cost."""

import sys
import time
from collections.abc import Callable, Sequence

from llava_jax.openai_client import Spent

EVERY_SECS = 5.0
RETRY = 75  # exit code: the answers are saved, run the command again


def duration(secs: float | int) -> str:
    """Seconds as people say them: "42 s", "7 min", "3 h 20 min"."""
    if secs < 60:
        return f"{secs:.0f} s"
    minutes = round(secs / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def line(name: str, done: int, total: int, counts: dict[str, int], spent: Spent, secs: float | int) -> str:
    """The progress of `secs` seconds of work.

    The speed and the remaining cost count requests to the server alone; the cache is quick.
    """
    count_texts = [f"{count:,} {label}" for label, count in counts.items()]
    remaining = total - done
    speed = spent.asked / secs if secs > 0 else 0.0
    eta = f"{speed:.1f}/s, {duration(remaining / speed)} left" if speed and remaining else f"{duration(secs)}"
    money = f"${spent.usd:.2f}"
    if spent.asked and remaining and spent.usd > spent.earlier_usd:
        money += f" of about ${spent.usd + remaining * (spent.usd - spent.earlier_usd) / spent.asked:.2f}"
    tokens = f"{spent.tokens_in + spent.tokens_out:,} tokens"
    return f"{name}: {done:,} of {total:,}; {', '.join(count_texts)}; {eta}; {tokens}, {money}"


class Progress:
    """Prints the progress of some work to standard error, at most every EVERY_SECS."""

    def __init__(self, name: str, total: int, spent: Callable[[], Spent] = Spent) -> None:
        self._name, self._total, self._spent = name, total, spent
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, counts: dict[str, int]) -> None:
        now = time.monotonic()
        if now - self._last >= EVERY_SECS:
            self._last = now
            print(line(self._name, done, self._total, counts, self._spent(), now - self._start), file=sys.stderr)


def unanswered(reasons: Sequence[str]) -> int:
    """The exit code of a verb: 0, or RETRY with a message if requests have no answer."""
    if not reasons:
        return 0
    print(f"datagen: {len(reasons):,} without an answer, the last one: {reasons[-1]}", file=sys.stderr)
    print("datagen: what was answered is kept: run the same command again for the rest", file=sys.stderr)
    return RETRY
