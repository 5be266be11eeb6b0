"""What a record must be to be trained on. Training and `data validate` ask the same functions, in the same order.

The reasons follow what breaks the reference's trainer, or quietly spoils it; each check is a pure function of one
record and costs microseconds, but for the token counts and the pictures themselves.
"""

import functools
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from etils import epath

from llava_jax import files
from llava_jax.batch import Example
from llava_jax.data.packing import cut
from llava_jax.data.problems import Finding, Problem, brief
from llava_jax.data.records import Record, found, parse
from llava_jax.data.shown import resolved
from llava_jax.errors import Unreachable
from llava_jax.prompt import time_stamps, video
from llava_jax.prompt.conversation import IMAGE_MARKER, Conversation, Turn, Video
from llava_jax.prompt.encode import Format, encode
from llava_jax.prompt.images import open_image
from llava_jax.prompt.templates import Template
from llava_jax.prompt.tokenizer import Tokenizer

Listings = dict[epath.Path, frozenset[str]]
_SURROGATE = re.compile("[\ud800-\udfff]")
# Qwen-VL's, Phi-3's, InternLM-XComposer's, MiniGPT-4's and Video-LLaVA's signs.
_FOREIGN_MARKER = re.compile(r"<(?:video|audio|img|Img|ImageHere|\|image(?:_pad|_\d+)?\||\|vision_start\|)>")
_OTHER_ROOT = re.compile(r"[/\\]|[A-Za-z]:[/\\]|[A-Za-z][A-Za-z0-9+.-]*://")


class Rules(NamedTuple):
    """What the format of a run adds to the checks of words: see `rules`."""

    controls: tuple[str, ...]
    images_only: bool
    system_inside: bool
    videos: bool = False


def rules(template: Template, tokenizer: Tokenizer | None = None, videos: bool = False) -> Rules:
    """The checks' view of a template and a tokenizer, and whether videos are read.

    controls are the texts that a turn should not hold: what opens the assistant's turn, and special tokens written
    out. For v1 with LLaMA's tokenizer: "ASSISTANT:", "</s>", "<s>", "<unk>".
    """
    opener = "".join(part.text for part in (*template.user.after, *template.assistant.before))
    texts = {opener.strip(), *(stop.strip() for stop in template.stops if stop.strip().startswith("<"))}
    if tokenizer is not None:
        specials = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        texts |= {tokenizer.decode([token], skip_special=False).strip() for token in specials if token is not None}
    return Rules(tuple(sorted(texts - {""})), template.images_only, template.system_inside, videos)


def rules_of(format: Format) -> Rules:
    """The checks' view of a run's format."""
    return rules(format.template, format.tokenizer, format.video is not None)


@dataclass(frozen=True)
class Checks:
    """All that a run asks of a record.

    format: None where tokens are not counted. row_tokens: of a row. images_per_group: None takes any number.
    """

    rules: Rules
    format: Format | None = None
    row_tokens: int = 0
    images_per_group: int | None = None


class Reading(NamedTuple):
    """A record that was read.

    conversation: None where it has no such shape. unknown: a finding for each key that nothing reads, which is its
      detail.
    """

    conversation: Conversation | None
    problems: list[Problem]
    unknown: tuple[Finding, ...] = ()

    @property
    def fatal(self) -> Problem | None:
        """The first problem for which the record is refused."""
        return next((problem for problem in self.problems if problem.fatal), None)


def allowed_bad(skip_budget: float | int, records: int) -> int:
    """So many of the records may be refused."""
    return int(skip_budget * records + 1e-9)


class UnknownKeys:
    """Keys that nothing reads: how often each was met, and where first."""

    def __init__(self) -> None:
        self._first, self._counts = dict[str, Finding](), dict[str, int]()

    def note(self, findings: Iterable[Finding]) -> list[Finding]:
        """Counts the findings of a record, whose details are the keys; those whose key is new."""
        new = [finding for finding in findings if finding.detail not in self._first]
        self._first.update({finding.detail: finding for finding in new})
        for finding in findings:
            self._counts[finding.detail] = self._counts.get(finding.detail, 0) + 1
        return new

    @property
    def keys(self) -> list[str]:
        """All that were met."""
        return sorted(self._first)

    def findings(self) -> list[Finding]:
        """One for each key, at the record that had it first."""
        return [
            replace(first, detail=f"{brief(key)} is not read; {self._counts[key]:,} record(s) have it")
            for key, first in self._first.items()
        ]


def read(record: Record, rules: Rules, root: epath.Path | None = None) -> Reading:
    """Everything wrong with a record's keys, words and paths, without tokenising and without reading a file.

    root: the image folder, which paths are relative to.
    """
    parsed = parse(record, root)
    if isinstance(parsed, Problem):
        return Reading(None, [parsed])
    conversation, place, first, key, unknown = parsed
    roles = [turn.role for turn in conversation.turns]
    texts = [turn.text for turn in conversation.turns]
    paths = _paths(conversation)
    problems = list(_videos(conversation, key, rules)) or [
        *_roles(conversation.turns, place, first),
        *_frames(texts, len(conversation.images), rules),
        *_text([*texts, *paths, *([conversation.system] if conversation.system else [])], rules.controls),
        *_markers(roles, texts, len(conversation.images), (place, first, key)),
        *(Problem("unsafe_path", _outside(path, root)) for path in paths if _escapes(path)),
    ]
    return Reading(conversation, problems, tuple([found(record, Problem("unknown_key", key)) for key in unknown]))


def _paths(conversation: Conversation) -> list[str]:
    """Of pictures and videos that are named by one."""
    sources = (one.source if isinstance(one, Video) else one for one in conversation.images)
    return [source for source in sources if isinstance(source, str)]


def _videos(conversation: Conversation, key: str, rules: Rules) -> Iterator[Problem]:
    shown = next((one for one in conversation.images if isinstance(one, Video)), None)
    if shown and not rules.videos:
        yield Problem("unread_key", f"{key}={brief(shown.source)}: video is not read without a rule for its frames: "
                      "set prompt.frames (OneVision: 32; `validate --config` knows it), or drop the record")


def _roles(turns: Sequence[Turn], place: str, first: int) -> Iterator[Problem]:
    roles = [turn.role for turn in turns]
    if roles[0] == "assistant":
        yield Problem("assistant_first", f"{place}[{first}] is the assistant's: want a human turn first")
    for i in range(1, len(roles)):
        if roles[i] == roles[i - 1]:
            yield Problem("wrong_order", f"{place}[{first + i}] is the {roles[i]}'s, and so is the one before")
            break
    if roles[-1] == "user":
        yield Problem("unanswered", f"{place}[{first + len(roles) - 1}], the last, is the user's: want an answer")
    elif not any(turn.supervised for turn in turns if turn.role == "assistant"):
        yield Problem("no_learned_tokens", "the marks of all answers say that none of them is learned")
    for i, turn in enumerate(turns, first):
        if turn.role == "assistant" and not turn.text.strip():
            yield Problem("empty_answer", f"{place}[{i}], an answer, has no text: {brief(turn.text)}")


def _frames(texts: list[str], images: int, rules: Rules) -> Iterator[Problem]:
    """What single templates want."""
    if rules.images_only and (len(texts) != 2 or not images or IMAGE_MARKER not in texts[0]):
        yield Problem("not_a_caption", f"{len(texts)} turns, {images} image(s): want one question with {IMAGE_MARKER} "
                      "and its image, and one caption")  # fmt: skip
    if rules.system_inside and not texts[0]:
        yield Problem("empty_question", "the first turn has no text: want a question there")


def _text(texts: list[str], controls: Sequence[str]) -> Iterator[Problem]:
    joined = "\n".join(texts)
    surrogate = None if joined.isascii() else _SURROGATE.search(joined)
    if surrogate:
        yield Problem("lone_surrogate", f"{surrogate.group()!r}: half a character; repair the \\u escapes")
    foreign = _FOREIGN_MARKER.search(joined)
    if foreign:
        yield Problem("foreign_marker", f"{foreign.group()!r} is read as letters: a picture is shown by {IMAGE_MARKER} "
                      "and named under `image`")  # fmt: skip
    for control in controls:
        if control in joined:
            place = joined.index(control)
            shown = brief(joined[max(place - 20, 0) : place + len(control) + 20])
            yield Problem("control_text", f"{control!r} in {shown}: the model would read it as a separator")


def _markers(roles: list[str], texts: list[str], images: int, names: tuple[str, int, str]) -> Iterator[Problem]:
    """names: the key of the turns, the row of the first, and the key of the pictures."""
    place, first, key = names
    counts = [text.count(IMAGE_MARKER) for text in texts]
    total = sum(counts)
    if not total and not images:
        return
    for i, (role, count) in enumerate(zip(roles, counts), first):
        if count and role == "assistant":
            yield Problem("marker_in_answer", f"{place}[{i}] is an answer and holds {IMAGE_MARKER}")
    if not total:
        yield Problem("image_without_marker", f"{images} image(s) under {key!r} and no {IMAGE_MARKER} in the text: "
                      f"write {IMAGE_MARKER} where the model shall see it")  # fmt: skip
    elif not images:
        yield Problem("marker_without_image", f"{total} {IMAGE_MARKER} and no image: name it under `image`")
    elif max(counts) > images:
        yield Problem("several_markers", f"{place}[{first + counts.index(max(counts))}] holds {max(counts)} "
                      f"{IMAGE_MARKER} for {images} image(s)")  # fmt: skip
    elif total != images:
        yield Problem("marker_count", f"{total} {IMAGE_MARKER} in all turns for {images} image(s)")


def _escapes(path: str) -> bool:
    return bool(_OTHER_ROOT.match(path)) or "\0" in path or ".." in path.replace("\\", "/").split("/")


def _outside(path: str, root: epath.Path | None) -> str:
    if path.startswith(("http://", "https://")):
        return f"image={brief(path)} is a URL: download it, and write its path"
    folder = f"folder {str(root)!r}" if root else "folder, and none is named"
    return (f"image={brief(path)}: want a path inside the image {folder}: write paths relative to it (--images, "
            "data.sources.0.images), or name a folder above them")  # fmt: skip


def check_files(conversation: Conversation, root: epath.Path | None, listings: Listings) -> list[Problem]:
    """Images of a sound record that are not files below `root`, and videos that are neither files nor folders there;
    nothing is opened.

    root: None: paths are relative to the current directory.
    listings: of a bucket's folders, as far as records before this one were in them; those of this one are added.
    """
    problems = []
    for one in conversation.images:
        path, what = (one.source, "file or folder") if isinstance(one, Video) else (one, "file")
        if not isinstance(path, str):
            continue
        shown, place = brief(path, 200), located(path, root, listings, isinstance(one, Video))
        if place is None:
            problems.append(Problem("missing_image", f"{shown}: no such {what} in {root or 'the current directory'}"))
        elif root is not None and not files.is_bucket(place) and not _is_below(place, root):
            problems.append(Problem("unsafe_path", f"{shown}: a link that leaves {root}"))
    return problems


def located(path: str, root: epath.Path | None, listings: Listings, folders: bool = False) -> str | None:
    """Where the file of an image is, or the folder where there may be one; None: there is none."""
    places = _spellings(root, path)
    return next((one for one in places if _is_file(one, listings) or (folders and files.is_dir(one))), None)


def _is_file(place: str, listings: Listings) -> bool:
    """In a bucket three requests answer this of one file, and one that of a thousand."""
    if not files.is_bucket(place):
        return os.path.isfile(place)
    path = epath.Path(place)
    if not path.suffix:  # a listing does not tell a folder from a file
        return files.is_file(place)
    if path.parent not in listings:
        listings[path.parent] = frozenset(entry.name for entry in files.listed(path.parent))
    return path.name in listings[path.parent]


def _is_below(place: str, root: epath.Path) -> bool:
    folder, _, name = place.rpartition("/")
    real = os.path.realpath(place) if os.path.islink(place) else f"{_real_folder(folder or '.')}/{name}"
    return real.startswith(resolved(root).rstrip("/") + "/")


@functools.lru_cache(4096)
def _real_folder(folder: str) -> str:
    """A folder without links; records come by the thousand from the same ones."""
    return os.path.realpath(folder)


def _spellings(root: epath.Path | None, path: str) -> Iterator[str]:
    """The path as written, then with é as one character and as two: what `images.open_image` tries."""
    folder = _prefix(root)
    yield folder + path
    if not path.isascii():
        yield from (folder + unicodedata.normalize(form, path) for form in ("NFC", "NFD"))


@functools.cache
def _prefix(root: epath.Path | None) -> str:
    """What stands before a path; epath takes longer to say it than a file takes to be found."""
    return "" if root is None else os.fspath(root).rstrip("/") + "/"


def check_pictures(conversation: Conversation, root: epath.Path | None, format: Format | None = None) -> list[Problem]:
    """Images and videos of a sound record that do not open. format: which frames of the videos it wants."""
    problems = []
    for i, reference in enumerate(conversation.images):
        try:
            if isinstance(reference, Video):
                for _ in video.frames(reference, format.video, root):
                    pass
                if format.time_stamps:
                    time_stamps.sentence(reference, format.video, root)
            else:
                open_image(reference, root)
        except Unreachable:  # no fault of the picture's
            raise
        except (ValueError, OSError) as error:
            problems.append(Problem("bad_image", f"image {i}: {brief(str(error), 400)[1:-1]}"))
    return problems


def check_tokens(conversation: Conversation, checks: Checks, root: epath.Path | None = None) -> list[Problem]:
    """Whether a sound record can be encoded and fits into a row, image features counted."""
    if checks.format is None or _surely_fits(conversation, checks):
        return []
    try:
        return _limits(encode(conversation, checks.format, root, open_images=False), checks)
    except ValueError as error:
        if error.__cause__ is not None:  # a picture whose size is wanted: `check_files` and `check_pictures` name it
            return []
        return [Problem("bad_text", str(error))]


def example(reading: Reading, checks: Checks, root: epath.Path | None) -> Example | Problem:
    """What is trained on of a record that was read, its pictures opened; or why it is refused, in `validate`'s order.

    Raises:
      Unreachable: a store does not answer.
    """
    conversation = reading.conversation
    if reading.fatal or conversation is None:
        return reading.fatal
    try:
        made = encode(conversation, checks.format, root)
    except Unreachable:
        raise
    except (ValueError, OSError) as error:
        return _refused(conversation, checks, root, error)
    problem = next((problem for problem in _limits(made, checks) if problem.fatal), None)
    return problem or made


def _refused(conversation: Conversation, checks: Checks, root: epath.Path | None, error: Exception) -> Problem:
    """The reason behind an exception: a missing file, then what is wrong with the text, then a picture."""
    if isinstance(error.__cause__, FileNotFoundError):
        return Problem("missing_image", str(error.__cause__))
    missing = [] if root is not None and files.is_bucket(root) else check_files(conversation, root, {})
    problems = [problem for problem in missing + check_tokens(conversation, checks, root) if problem.fatal]
    return problems[0] if problems else Problem("bad_image", str(error))


def _limits(example: Example, checks: Checks) -> list[Problem]:
    """What of an example does not fit into its row."""
    kept, lost = cut(example, checks.row_tokens)
    length = f"{len(example.tokens)} tokens for a row of {checks.row_tokens}"
    images, room = kept.tiles, checks.images_per_group
    if room is not None and images > room:
        return [Problem("too_many_images", f"{images} images for images_per_group={room}: set data.images_per_group="
                        f"{images}, or drop the record")]  # fmt: skip
    if not kept.learned[1:].any():
        remedy = ": raise data.row_tokens (and data.sample_tokens where it is set), or drop the record" if lost else ""
        return [Problem("no_learned_tokens", f"{length}: no target is left of {int(example.learned.sum())}{remedy}")]
    return [Problem("cut", f"{length}: {lost} of {int(example.learned.sum())} targets are lost")] if lost else []


def _surely_fits(conversation: Conversation, checks: Checks) -> bool:
    """True if even one token a character would fit: most records are spared the tokenizer (30 times as fast)."""
    images, texts = len(conversation.images), [turn.text for turn in conversation.turns]
    if checks.format.tiling or any(isinstance(one, Video) for one in conversation.images):
        return False
    if checks.images_per_group is not None and images > checks.images_per_group:
        return False
    text = "".join([conversation.system or "", *texts])
    fixed, each = _frame_characters(checks.format.template)
    room = checks.row_tokens - images * checks.format.image_features
    return text.isascii() and len(text) + fixed + len(texts) * each <= room


@functools.cache
def _frame_characters(template: Template) -> tuple[int, int]:
    """At least as many tokens as the template adds to a conversation, and to each turn of it."""
    frames = [part.text for frame in (template.user, template.assistant) for part in (*frame.before, *frame.after)]
    # 8 more a turn for begin-of-sequence and the blanks SentencePiece puts before pieces; the image marker's own 7
    # characters make room for image start, image end and the blanks around an image.
    each = sum(map(len, [*frames, template.between, *template.image_frame])) + 8
    ending = (part.text for part in template.ending)
    fixed = [template.system, *template.system_frame, template.reply_opening, *ending]
    examples = sum(len(turn.text) + each for turn in template.examples)
    return sum(map(len, fixed)) + examples + 8, each
