"""Rules that drop a description: a table of names, each with its predicate.

MiniGPT-4's paper says that hard-coded rules removed frequent errors, but publishes neither the rules nor a driver:
these are ours.
"""

import collections
import re
from collections.abc import Callable

LEAST_WORDS, MOST_WORDS = 20, 300
REPEATS = 3  # of one run of four words
FOREIGN_SHARE = 0.05  # of characters outside ASCII
DRIFT = (0.4, 1.6)  # words after the correction, as a share of those before

_APOLOGY = re.compile(r"\b(sorry|apologi[sz]e|apolog(y|ies)|my mistake|as an ai|language model)\b", re.IGNORECASE)
_PROTOCOL = re.compile(r"###|\b(human|assistant|user) ?:|</?(img|image|s)>|ImageFeature|ImageHere", re.IGNORECASE)
_REMARK = re.compile(
    r"\b(corrected|revised|mended|rewritten|original|edited) (paragraph|text|version|description)|\b(no|without) "
    r"(errors?|mistakes|changes|corrections)\b|here is the|nothing (needs|to)|remains unchanged",
    re.IGNORECASE,
)
_REFUSAL = re.compile(r"\bI('m| am)? (cannot|can't|can not|unable to|not able to|won't)|\bas a text", re.IGNORECASE)
_ENDS = (".", "!", "?", '."', '!"', '?"', ".”", ".)", "。")
_SENTENCE = re.compile(r"[.!?]+\s+")


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'’-]+", text.lower())


def _repeats(text: str) -> bool:
    words = _words(text)
    runs = collections.Counter(tuple(words[i : i + 4]) for i in range(len(words) - 3))
    sentences = [sentence.strip().lower() for sentence in _SENTENCE.split(text.rstrip(".!? ")) if sentence.strip()]
    return max(runs.values(), default=0) >= REPEATS or len(set(sentences)) < len(sentences)


def _changes_length(before: str, after: str) -> bool:
    old, new = len(_words(before)), len(_words(after))
    return not DRIFT[0] * old <= new <= DRIFT[1] * old


# name -> whether the corrected description is refused, given (before, after); the first that holds is the reason.
RULES: dict[str, Callable[[str, str], bool]] = {
    "empty": lambda before, after: not after.strip(),
    "refusal": lambda before, after: bool(_REFUSAL.search(after)),
    "apology": lambda before, after: bool(_APOLOGY.search(after)),
    "protocol": lambda before, after: bool(_PROTOCOL.search(after)),
    "remark": lambda before, after: bool(_REMARK.search(after)),
    "too_short": lambda before, after: len(_words(after)) < LEAST_WORDS,
    "too_long": lambda before, after: len(_words(after)) > MOST_WORDS,
    "unfinished": lambda before, after: not after.rstrip().endswith(_ENDS),
    "loop": lambda before, after: _repeats(after),
    "foreign": lambda before, after: sum(not c.isascii() for c in after) > FOREIGN_SHARE * len(after),
    "drift": _changes_length,
}
DUPLICATE = "duplicate"  # the same text for an earlier picture; needs all of them, so `curate` checks it


def refusal(before: str, after: str) -> str | None:
    """The name of the first rule that refuses a description, or None. before: as it was sent to be corrected."""
    return next((name for name, rule in RULES.items() if rule(before, after)), None)
