"""How long records are, in words and in tokens, measured once and kept by fingerprint for all hosts and later runs.

Packing and row lengths are planned from these numbers, so they count exactly what `encode` makes of a record.
"""

import functools
import hashlib
import importlib.resources
import io
import logging
import time
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath

from llava_jax import files
from llava_jax.data import trees
from llava_jax.data.check import read, rules_of
from llava_jax.data.problems import Problem
from llava_jax.data.records import Record, parse
from llava_jax.data.sources import Source
from llava_jax.prompt.encode import Format, encode

_log = logging.getLogger(__name__)
_DIGEST_BYTES = hashlib.sha256().digest_size


def word_lengths(source: Source, cache_dir: epath.PathLike | None = None) -> np.ndarray:
    """int32 [n]: words of all turns of each record, positive with an image, negative without; never 0.

    Words are what blanks separate, headers and image features not counted, as the reference's sampler counts.
    Source: haotian-liu/LLaVA llava/train/train.py:683-690@c121f04 (`modality_lengths`).
    """
    return _kept(source, "words", 1, lambda record: (_words(record),), cache_dir)[:, 0]


def token_lengths(source: Source, format: Format, cache_dir: epath.PathLike | None = None) -> np.ndarray:
    """int32 [n]: tokens of each record in this format, image features counted; 0 for a record that is refused."""
    return sizes(source, format, cache_dir)[:, 0]


def sizes(source: Source, format: Format, cache_dir: epath.PathLike | None = None) -> np.ndarray:
    """int32 [n, 2]: tokens of each record in this format, image features counted, and images; 0 0 if it is refused."""
    return measures(source, format, cache_dir)[:, :2]


def measures(source: Source, format: Format, cache_dir: epath.PathLike | None = None) -> np.ndarray:
    """int32 [n, 5]: `sizes`, and what rows of one picture are planned by (`trees.column`)."""
    fit, unread = rules_of(format), list[int]()

    def measured(record: Record) -> tuple[int, ...]:
        reading = read(record, fit)
        # The image folder may change between two starts, so what is wrong with paths does not count.
        if any(problem.fatal and problem.reason != "unsafe_path" for problem in reading.problems):
            return (0,) * 5
        try:
            example = encode(reading.conversation, format, source.images or None, open_images=False)
        except ValueError as error:
            unread.extend([0] * (error.__cause__ is not None))  # a picture, which may be there the next time
            return (0,) * 5  # what is wrong is said when the record is read for training
        return len(example.tokens), example.tiles, *trees.column(example, reading.conversation.images)

    kind, fetch = f"tokens-{_fingerprint(format)}", source.__getitem__ if format.tiling or format.video else source.text
    return _kept(source, kind, 5, measured, cache_dir, fetch, lambda: not unread)


def _words(record: Record) -> int:
    parsed = parse(record)
    if isinstance(parsed, Problem):
        return -1  # Differs from LLaVA: it asserts that no record is empty; a bad one must not stop the others' order
    conversation = parsed.conversation
    count = sum(len(text.split()) for text in (conversation.system or "", *(turn.text for turn in conversation.turns)))
    return max(count, 1) * (1 if conversation.images else -1)


def _fingerprint(format: Format) -> str:
    parts = [repr(format.template), repr(format.tokenizer.legacy), repr(format.tokenizer.size),
             repr(format.image_features), repr(format.image_start_end),
             *(repr(one) for one in (format.tiling, format.video) if one)]  # fmt: skip
    files = [part for name, data in sorted(format.tokenizer.files().items()) for part in (name.encode(), data)]
    digest = hashlib.sha256()
    for part in [*(part.encode() for part in parts), *files]:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _kept(
    source: Source, kind: str, numbers: int, measure: Callable[[Record], tuple[int, ...]],
    cache_dir: epath.PathLike | None, fetch: Callable[[int], Record] | None = None,
    lasts: Callable[[], bool] = lambda: True,
) -> np.ndarray:  # fmt: skip
    """int32 [n, numbers]: the measure of every record, from the cache if it holds it.

    A file of the cache is a .npy file and then the SHA-256 of it. Its name is of the data, the measure and the code
    that measures: another release measures anew.

    fetch: by number; None: without pictures. lasts: whether what was measured may be kept.
    """
    fetch = fetch or source.text
    if not cache_dir:
        return _measured(source, kind, numbers, measure, fetch)
    key = hashlib.sha256(f"{source.fingerprint} {kind} {_code()}".encode()).hexdigest()[:32]
    place = epath.Path(cache_dir) / f"lengths-{key}.npy"
    found = _load(place, (len(source), numbers))
    if found is None:
        found = _measured(source, kind, numbers, measure, fetch)
        if not lasts():
            return found
        buffer = io.BytesIO()
        np.save(buffer, found, allow_pickle=False)
        files.write_whole(place, buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
    return found


def _load(place: epath.Path, shape: tuple[int, int]) -> np.ndarray | None:
    """What the cache holds, or None where it holds nothing whole: it is then measured again."""
    try:
        content = files.read(place)
    except FileNotFoundError:
        return None
    array, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(array).digest() == digest:
        found = np.load(io.BytesIO(array), allow_pickle=False)
        if found.dtype == np.int32 and found.shape == shape:
            return found
    _log.warning("%s is damaged: its records are measured again", place)
    return None


@functools.cache
def _code() -> str:
    """A hash of all that decides what a record is and how many tokens it has."""
    digest = hashlib.sha256()
    for package in ("data", "prompt"):
        folder = importlib.resources.files("llava_jax") / package
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py"):
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _measured(
    source: Source, kind: str, numbers: int, measure: Callable[[Record], tuple[int, ...]],
    fetch: Callable[[int], Record],
) -> np.ndarray:  # fmt: skip
    rows = (number for record in _watched(source, kind, fetch) for number in measure(record))
    return np.fromiter(rows, np.int32, len(source) * numbers).reshape(-1, numbers)


def _watched(source: Source, kind: str, fetch: Callable[[int], Record]) -> Iterator[Record]:
    """The records, with a line of progress every ten seconds."""
    start = last = time.monotonic()
    for done in range(len(source)):
        yield fetch(done)
        now = time.monotonic()
        if now - last > 10:
            last, rate = now, done / (now - start)
            _log.info("counts %s of %s: %d of %d records, %.0f/s, ETA %.0f s", kind.split("-")[0], source.name, done,
                      len(source), rate, (len(source) - done) / rate)  # fmt: skip
