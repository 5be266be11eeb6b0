"""Counters of a server, in the text format of Prometheus."""

from bisect import bisect_left
from collections import Counter

BUCKETS_SECS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # of the time to the first token
_HELP = {
    "requests_total": ("counter", "Responses by HTTP status."),
    "prompt_tokens_total": ("counter", "Tokens of prompts, image features included."),
    "reused_tokens_total": ("counter", "Tokens of prompts that were not computed again."),
    "generated_tokens_total": ("counter", "Tokens of answers."),
    "slots": ("gauge", "Answers at once at most."),
    "slots_active": ("gauge", "Slots that are taken."),
    "requests_open": ("gauge", "Requests that are read, wait or are answered."),
    "tokens_open": ("gauge", "Positions that open requests ask for."),
}


class Metrics:
    """Counts of one process."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first = [0] * (len(BUCKETS_SECS) + 1)
        self._first_secs = 0.0

    def response(self, status: int) -> None:
        self._counts[f'requests_total{{status="{status}"}}'] += 1

    def first_token(self, secs: float) -> None:
        """A request whose first token came so long after its arrival."""
        self._first[bisect_left(BUCKETS_SECS, secs)] += 1
        self._first_secs += secs

    def tokens(self, prompt: int, reused: int, generated: int) -> None:
        """An answer that has ended."""
        added = {"prompt_tokens_total": prompt, "reused_tokens_total": reused, "generated_tokens_total": generated}
        self._counts.update(added)

    def text(self, gauges: dict[str, int]) -> str:
        """All counts, and gauges by name."""
        values = dict.fromkeys(("prompt_tokens_total", "reused_tokens_total", "generated_tokens_total"), 0)
        values |= dict(self._counts) | gauges
        lines = []
        for name, (kind, description) in _HELP.items():
            lines += [f"# HELP llava_jax_{name} {description}", f"# TYPE llava_jax_{name} {kind}"]
            lines += [f"llava_jax_{key} {value}" for key, value in sorted(values.items()) if key.split("{")[0] == name]
        name = "llava_jax_first_token_seconds"
        lines += [f"# HELP {name} From a request's arrival to its first token.", f"# TYPE {name} histogram"]
        total = 0
        for limit, count in zip((*BUCKETS_SECS, "+Inf"), self._first):
            total += count
            lines.append(f'{name}_bucket{{le="{limit}"}} {total}')
        return "\n".join([*lines, f"{name}_sum {self._first_secs:.6f}", f"{name}_count {total}", ""])
