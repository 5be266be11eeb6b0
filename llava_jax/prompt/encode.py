"""A conversation in, an `Example` out: training records and chat messages take this one road.

Each piece of text knows whether it is learned at the moment it is written down, and its tokens inherit that through
their character ranges; nothing is recounted afterwards.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llava_jax.batch import Example, Layout, Span, plain
from llava_jax.errors import UsageError
from llava_jax.prompt import anyres, time_stamps, video
from llava_jax.prompt.anyres import Tiling
from llava_jax.prompt.conversation import IMAGE_MARKER, Conversation, Turn, Video, check_text
from llava_jax.prompt.images import CLIP_MEAN, Image, image_size, open_image, to_pixels, to_tiles
from llava_jax.prompt.templates import Frame, Template
from llava_jax.prompt.tokenizer import Tokenizer
from llava_jax.prompt.video import FrameRule

IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
IMAGE_LABEL = -200  # one of these stands for an image in LLaVA's input_ids
IGNORED_LABEL = -100  # a token that is not learned, in LLaVA's labels


@dataclass(frozen=True)
class Format:
    """How a model wants its words and pictures.

    image_size: pixels a side. image_features: N, the positions that one image (or tile) takes.
    image_mode: "square" (centre crop), "pad", "squash" or "anyres"; image_mean, resample: of the tower; see
      `images.to_pixels`.
    tiling: how pictures become tiles, of "anyres" alone.
    video: which frames of a video are shown, with or without their times; None: no video is read.
    image_start_end: each image stands between <im_start> and <im_end>.
    """

    template: Template
    tokenizer: Tokenizer
    image_size: int
    image_features: int
    image_mode: str
    image_start_end: bool = False
    image_mean: tuple[float, ...] = CLIP_MEAN
    resample: str = "bicubic"
    tiling: Tiling | None = None
    video: FrameRule | None = None

    @property
    def resizes(self) -> bool:
        """Whether features of large pictures, or of a video's frames, are resized (`ResizedBatch`)."""
        return self.video is not None or (self.tiling is not None and self.tiling.max_tiles > 0)

    @property
    def time_stamps(self) -> bool:
        """Whether a question says when a video's frames are; of a template of pictures alone no word is kept."""
        return self.video is not None and self.video.time_stamps and not self.template.images_only

    @property
    def frame_mode(self) -> str:
        """The image mode of a video's frames: with tiles each is squashed, as transformers' OneVision takes it."""
        return "squash" if self.tiling else self.image_mode


class Picture(NamedTuple):
    """A picture or video as the model takes it.

    tiles: or frames, uint8 [H, W, 3] each; none where it was not decoded.
    layout: of their features; None: of one picture, whose features stand in their own order.
    """

    tiles: tuple[np.ndarray, ...]
    layout: Layout | None


class Piece(NamedTuple):
    """A stretch of the prompt. typed: it comes from a message, so special tokens in it are only letters."""

    text: str
    learned: bool = False
    typed: bool = False


class Chunk(NamedTuple):
    """Pieces that are made into tokens together, and whether an image stands before them."""

    behind_image: bool
    pieces: list[Piece]


# Compared by identity. Text on the two sides of either is made into tokens apart.
_IMAGE = Piece(IMAGE_MARKER)  # here an image's features go
_CUT = Piece("")


def encode(
    conversation: Conversation,
    format: Format,
    image_root: epath.PathLike | None = None,
    reply: bool = False,
    open_images: bool = True,
) -> Example:
    """The conversation's tokens, what of them is learned, where images go, and the images' pixels.

    image_root: folder that image paths are relative to and may not leave; None takes paths as they are.
    reply: end with an open assistant turn, as generation wants it, and what is `begun` of it.
    open_images: False leaves `images` empty and does not compare their number with the markers'; where the features
      depend on a picture's size or a video's length, its header is read nonetheless.

    Raises:
      ValueError: the turns do not fit the template, markers and images differ in number, or an image cannot be
        read; names the record.
    """
    name = f"record {conversation.id!r}"
    worded = time_stamps.stamped(conversation, format.video, image_root) if format.time_stamps else conversation
    chunks = _chunks(_pieces(worded, format, reply, name))
    markers = sum(chunk.behind_image for chunk in chunks)
    if (open_images or conversation.images_in_place) and markers != len(conversation.images):
        raise UsageError(
            f"{name}: {len(conversation.images)} image(s) but {markers} {IMAGE_MARKER} marker(s) in the text: "
            f"write one {IMAGE_MARKER} for each image"
        )
    shown = iter(_shown(conversation, format, image_root, open_images, name))
    tokenizer, images, layouts = format.tokenizer, list[np.ndarray](), list[Layout | None]()
    ids = [tokenizer.bos_id] if tokenizer.adds_bos else []
    learned, spans = [False] * len(ids), []
    for chunk in chunks:
        if chunk.behind_image:
            tiles, layout = next(shown, Picture((), None))
            images += tiles
            width = len(layout.slots) if layout else format.image_features
            spans.append(Span(len(ids), width))
            layouts.append(layout)
            ids += [0] * width
            learned += [False] * width
        chunk_ids, chunk_learned = _tokenized(chunk.pieces, tokenizer)
        ids += chunk_ids
        learned += chunk_learned
    tokens, targets = np.array(ids, np.int32), np.array(learned, bool)
    laid = tuple(layout or plain(span.length) for layout, span in zip(layouts, spans)) if any(layouts) else ()
    return Example(tokens, targets, tuple(spans), tuple(images), conversation.id, conversation.weight, laid)


def pictures(images: Sequence[Any], format: Format, root: epath.PathLike | None = None) -> Iterator[Picture]:
    """Each picture (path, encoded bytes or PIL image) or `Video` as the model takes it.

    Raises:
      ValueError, FileNotFoundError: one cannot be read; names it.
    """
    only = _only(images)
    for image in images:
        if isinstance(image, Video):
            yield _video(video.frames(image, _rule(format), root), format)
        else:
            yield _picture(open_image(image, root), format, only)


def opened(image: Any, format: Format, root: epath.PathLike | None = None) -> Image.Image | Video:
    """A picture decoded, a video as the frames that are shown. Raises as `pictures`."""
    if isinstance(image, Video):
        return video.opened(image, _rule(format), root)
    return open_image(image, root)


def _only(images: Sequence[Any]) -> bool:
    """Whether there is one picture, beside any videos. Source: transformers processing_llava_onevision.py."""
    return sum(not isinstance(image, Video) for image in images) == 1


def _rule(format: Format) -> FrameRule:
    if format.video is None:
        raise UsageError("a video, and no rule for its frames: set prompt.frames of the run (32 is OneVision's), or "
                         "ask a model that was trained with it")  # fmt: skip
    return format.video


def _video(frames: Iterable[Image.Image], format: Format) -> Picture:
    side, mode = format.image_size, format.frame_mode
    pixels = [to_pixels(frame, side, mode, format.image_mean, format.resample) for frame in frames]
    return Picture(tuple(pixels), _frames_layout(len(pixels), format))


def _frames_layout(frames: int, format: Format) -> Layout:
    return video.layout(frames, format.image_features, format.tiling is not None and format.tiling.newline)


def _picture(image: Image.Image, format: Format, only: bool) -> Picture:
    side, tiling = format.image_size, format.tiling
    if tiling is None:
        pixels = to_pixels(image, side, format.image_mode, format.image_mean, format.resample)
        return Picture((pixels,), None)
    layout = _layout(image.size, format, tiling, only)
    if layout.tiles == 1:
        return Picture((to_pixels(image, side, "pad", format.image_mean, format.resample),), layout)
    grid = anyres.best_grid(image.size, tiling.grids, side)
    within = anyres.resized(image.size, grid, side)
    return Picture(tuple(to_tiles(image, side, grid, within, format.resample)), layout)


def _layout(size: anyres.Size, format: Format, tiling: Tiling, only: bool) -> Layout:
    if only or tiling.several:
        return anyres.layout(size, tiling, format.image_size, format.image_features)
    return anyres.single(tiling, format.image_features)


def with_labels(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, labels) as LLaVA writes them: one -200 for each image, -100 for a token that is not learned."""
    ids, labels = example.tokens.copy(), np.where(example.learned, example.tokens, IGNORED_LABEL)
    keep = np.ones(len(ids), bool)
    for span in example.image_spans:
        ids[span.start] = IMAGE_LABEL
        keep[span.start + 1 : span.start + span.length] = False
    return ids[keep], labels[keep]


def marked(example: Example, tokenizer: Tokenizer, markers: Iterable[str] = ()) -> str:
    """The tokens for people to read, learned runs between ⟦ and ⟧, images as <image>, or as their `markers`.

    <s> ▁A ▁chat ... ▁US ER : ▁ <image> ▁ <0x0A> What ▁is ▁it ? ▁A SS IST ANT : ⟦ ▁A ▁cat . </s> ⟧
    """
    words, inside, signs = [], False, iter(markers)
    for token, label in zip(*with_labels(example), strict=True):
        if (label != IGNORED_LABEL) != inside:
            inside = not inside
            words.append("⟦" if inside else "⟧")
        words.append(next(signs, IMAGE_MARKER) if token == IMAGE_LABEL else tokenizer.piece(int(token)))
    return " ".join(words + ["⟧"] * inside)


def _pieces(conversation: Conversation, format: Format, reply: bool, name: str) -> Iterable[Piece]:
    """The whole prompt, in order."""
    template = format.template
    system = _system(conversation, template, name)
    if not template.system_inside:
        yield from system
    for turn in template.examples:
        yield from (piece._replace(learned=False) for piece in _turn(turn, template, [Piece(turn.text)]))
    first = supervised = True  # supervised: the last answer, which ends where a "###" of the next turn is learned
    turns = _arranged(conversation, template, reply, name)
    for index, turn in enumerate(turns):
        message = list(_message(turn, conversation, format))
        if turn.role == "user" and (message or not template.open_when_empty):
            if first and template.system_inside:
                message = system + message
            if not first:
                yield Piece(template.between)
            first = False
        if turn.role == "assistant":
            supervised = turn.supervised
        pieces = _turn(turn, template, message, template.reply_opening if index == len(turns) - 1 else "")
        yield from pieces if supervised else _unlearned(pieces)
    if reply:
        yield Piece(template.assistant.before[0].text + template.reply_opening)
        if conversation.begun:
            check_text(conversation.begun, f"{name}: begun")
            yield from (Piece(part.text) for part in template.assistant.before[1:])
            if template.reply_apart:
                yield _CUT
            yield Piece(conversation.begun, typed=True)
    else:
        ending = [Piece(*part) for part in template.ending]
        yield from ending if supervised else _unlearned(ending)


def _system(conversation: Conversation, template: Template, name: str) -> list[Piece]:
    text = template.system if conversation.system is None else conversation.system
    check_text(text, f"{name}: system")
    if not text and not template.system_kept:
        return []
    before, after = template.system_frame
    text = text.strip() if template.trims else text
    return [Piece(before), Piece(text, typed=conversation.system is not None), Piece(after)]


def _arranged(conversation: Conversation, template: Template, reply: bool, name: str) -> list[Turn]:
    """The turns that the template writes down, checked against what it can write."""
    turns = list(conversation.turns)
    for index, turn in enumerate(turns):
        check_text(turn.text, f"{name}: turn {index}")
    if template.alternates and turns and turns[0].role == "assistant":
        turns = turns[1:]  # as LLaVA does: a greeting before the first question is not part of these formats
    roles = [turn.role for turn in turns]
    wanted = ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2)
    if template.alternates and (not turns or roles != wanted):
        raise UsageError(
            f"{name}: roles {roles} do not fit template {template.name!r}: want user, assistant, user, ... in turn"
        )
    if reply and (not turns or roles[-1] != "user"):
        raise UsageError(f"{name}: roles {roles}: a reply wants the last turn to be the user's; drop what follows it")
    if template.images_only:
        _check_images_only(conversation, turns, reply, name)
    if template.system_inside and not turns[0].text:
        raise UsageError(f"{name}: the first turn is empty: template {template.name!r} wants a question there")
    return turns


def _check_images_only(conversation: Conversation, turns: list[Turn], reply: bool, name: str) -> None:
    wanted = 1 if reply else 2
    if len(turns) != wanted or not conversation.images or IMAGE_MARKER not in turns[0].text:
        raise UsageError(
            f"{name}: {len(turns)} turn(s), {len(conversation.images)} image(s): template 'plain' wants one "
            f"question with {IMAGE_MARKER} and its image, and one caption"
        )


def _turn(turn: Turn, template: Template, message: list[Piece], opening: str = "") -> list[Piece]:
    """A message in its frame; opening: what stands before it where it is the assistant's."""
    frame: Frame = template.user if turn.role == "user" else template.assistant
    if not message and template.open_when_empty:
        return [Piece(frame.before[0].text)]
    before = [Piece(*part) for part in frame.before]
    if turn.role == "assistant":
        before += [Piece(opening)] + [_CUT] * template.reply_apart
    return before + message + [Piece(*part) for part in frame.after]


def _unlearned(pieces: Iterable[Piece]) -> Iterable[Piece]:
    return (piece._replace(learned=False) if piece.learned else piece for piece in pieces)


def _message(turn: Turn, conversation: Conversation, format: Format) -> Iterable[Piece]:
    """The turn's own text, cut at its images; nothing if it is empty."""
    template, learned = format.template, turn.role == "assistant"
    text = turn.text.strip() if template.trims else turn.text
    if conversation.images and not conversation.images_in_place:
        text = _collapsed(text, template.image_joint)
    # Without an image the marker's letters are letters.
    parts = text.split(IMAGE_MARKER) if conversation.images or conversation.images_in_place else [text]
    bare = template.images_only and turn.role == "user"
    before, after = template.image_frame
    if format.image_start_end and not template.images_only:
        before, after = before + IMAGE_START, IMAGE_END + after
    for index, part in enumerate(parts):
        if index:
            yield from (Piece(before, learned), _IMAGE, Piece(after, learned))
        if part and not bare:
            yield Piece(part, learned, typed=True)


def _collapsed(text: str, joint: str) -> str:
    """LLaVA's rule for one image: all markers of a turn become one at its front."""
    if IMAGE_MARKER not in text:
        return text
    return f"{IMAGE_MARKER}{joint}{text.replace(IMAGE_MARKER, '').strip()}".strip()


def _chunks(pieces: Iterable[Piece]) -> list[Chunk]:
    """The pieces between images and cuts."""
    chunks = [Chunk(False, [])]
    for piece in pieces:
        if piece is _IMAGE or piece is _CUT:
            chunks.append(Chunk(piece is _IMAGE, []))
        else:
            chunks[-1].pieces.append(piece)
    return chunks


def _tokenized(chunk: list[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Ids of one chunk, tokenised as a whole like LLaVA does, and which of them hold a learned character."""
    text = "".join(piece.text for piece in chunk)
    learned_before = np.zeros(len(text) + 1, np.int64)  # [c]: learned characters before character c
    fixed, at = [], 0
    for piece in chunk:
        end = at + len(piece.text)
        learned_before[at + 1 : end + 1] = piece.learned
        if not piece.typed:
            fixed.append((at, end))
        at = end
    learned_before = np.cumsum(learned_before)
    tokens = tokenizer.tokenize(text, fixed)
    starts = np.array([token.start for token in tokens], np.int64)
    ends = np.array([token.end for token in tokens], np.int64)
    # A token without a character of its own (a dummy "▁", the first bytes of a character) belongs to the next one.
    ends = np.minimum(np.maximum(ends, starts + 1), len(text))
    return [token.id for token in tokens], (learned_before[ends] > learned_before[starts]).tolist()


def _shown(
    conversation: Conversation, format: Format, root: epath.PathLike | None, decode: bool, name: str
) -> Sequence[Picture]:
    """The conversation's pictures; decoded, or laid out by their sizes alone."""
    images, only = conversation.images, _only(conversation.images)
    try:
        if decode:
            return list(pictures(images, format, root))
        return [Picture((), _unopened(image, format, root, only)) for image in images]
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"{name}: {error}") from error


def _unopened(image: Any, format: Format, root: epath.PathLike | None, only: bool) -> Layout | None:
    """The layout of a picture or video by its header alone."""
    if isinstance(image, Video):
        return _frames_layout(video.count(image, _rule(format), root), format)
    return format.tiling and _layout(image_size(image, root), format, format.tiling, only)
