"""One progress line every few seconds: done, speed, time left, and cost."""

import sys
import time
from collections.abc import Callable, Sequence

from llava_jax.openai_client import Usage

EVERY_SECS = 5.0
RETRY = 75  # exit code: the answers are saved, run the command again


def duration(secs: float | int) -> str:
    """Seconds as people say them: "42 s", "7 min", "3 h 20 min"."""
    if secs < 60:
        return f"{secs:.0f} s"
    minutes = round(secs / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def line(name: str, done: int, total: int, counts: dict[str, int], usage: Usage, secs: float | int) -> str:
    """The progress of `secs` seconds of work.

    The speed and the remaining cost count requests to the server alone; the cache is quick.
    """
    count_texts = [f"{count:,} {label}" for label, count in counts.items()]
    remaining = total - done
    speed = usage.asked / secs if secs > 0 else 0.0
    eta = f"{speed:.1f}/s, {duration(remaining / speed)} left" if speed and remaining else f"{duration(secs)}"
    money = f"${usage.usd:.2f}"
    if usage.asked and remaining and usage.usd > usage.earlier_usd:
        money += f" of about ${usage.usd + remaining * (usage.usd - usage.earlier_usd) / usage.asked:.2f}"
    tokens = f"{usage.tokens_in + usage.tokens_out:,} tokens"
    return f"{name}: {done:,} of {total:,}; {', '.join(count_texts)}; {eta}; {tokens}, {money}"


class Progress:
    """Prints the progress of some work to standard error, at most every EVERY_SECS."""

    def __init__(self, name: str, total: int, usage: Callable[[], Usage] = Usage) -> None:
        self._name, self._total, self._usage = name, total, usage
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, counts: dict[str, int]) -> None:
        now = time.monotonic()
        if now - self._last >= EVERY_SECS:
            self._last = now
            print(line(self._name, done, self._total, counts, self._usage(), now - self._start), file=sys.stderr)


def unanswered(reasons: Sequence[str]) -> int:
    """The exit code of a verb: 0, or RETRY with a message if requests have no answer."""
    if not reasons:
        return 0
    print(f"datagen: {len(reasons):,} without an answer, the last one: {reasons[-1]}", file=sys.stderr)
    print("datagen: the answers are saved: run the same command again for the rest", file=sys.stderr)
    return RETRY
