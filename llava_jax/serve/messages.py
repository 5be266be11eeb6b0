"""OpenAI's messages to a `Conversation`, and to the prompt that the model reads; pictures are data: URLs, or addresses
where the server fetches some."""

import base64
import binascii
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from llava_jax.errors import UsageError
from llava_jax.generate.pages import Prompt, prompt_of
from llava_jax.prompt.conversation import IMAGE_MARKER, Conversation, Turn, Video, check_text
from llava_jax.prompt.encode import Format, encode, pictures
from llava_jax.prompt.images import image_size
from llava_jax.serve import videos
from llava_jax.serve.fetcher import Fetcher
from llava_jax.serve.fields import Refused, refuse

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MAX_MESSAGES = 1000
MAX_TOKEN_CHARACTERS = 32  # of text for each position: a longer text cannot fit, and is not even cut into tokens
MAX_PIXELS, MAX_ALL_PIXELS = 16_000_000, 100_000_000  # of a picture, and of a request's pictures together
MAX_WEBP_PIXELS = 8_000_000  # PIL's WebP reader holds a picture three times: 12 bytes a pixel
LARGE_PIXELS = 4_000_000  # pictures above are decoded one after the other
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.ASCII | re.IGNORECASE)
_RECORD = "record 'request': "  # how `encode` begins what it says of the conversation
_large = threading.Lock()


class Picture(NamedTuple):
    """A picture or video of the messages and where it stands in them, for errors. url: where it is, if not here yet."""

    content: bytes | Video
    field: str
    url: str = ""


@dataclass(frozen=True)
class Chat:
    """A conversation that has been read and not yet opened."""

    conversation: Conversation
    pictures: tuple[Picture, ...]

    @property
    def has_video(self) -> bool:
        return any(isinstance(picture.content, Video) for picture in self.pictures)

    def urls(self) -> dict[str, str]:
        """The addresses of pictures that are to be fetched, and the field of each."""
        return {picture.url: picture.field for picture in reversed(self.pictures) if picture.url}

    def with_fetched(self, contents: Mapping[str, bytes]) -> "Chat":
        """The same with the content of each address."""
        pictures = tuple(Picture(contents.get(one.url, one.content), one.field) for one in self.pictures)
        return Chat(replace(self.conversation, images=tuple(one.content for one in pictures)), pictures)


def read(messages: list[Any], fetcher: Fetcher | None = None) -> Chat:
    """The conversation of a list of messages.

    A message's parts are joined by line ends, a picture standing as the marker where it is. A conversation of one
    picture shows it before its message's text, as LLaVA does; several stand in place.

    fetcher: decides which addresses may be fetched; None: no address.

    Raises:
      Refused: names the message.
    """
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise Refused(f"messages: {len(messages)} of them, want 1 to {MAX_MESSAGES}", "messages")
    system, turns, pictures = None, list[Turn](), list[Picture]()
    marked: list[str] = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if type(message) is not dict:
            refuse(name, message, 'an object such as {"role": "user", "content": "Hello"}')
        role = ROLES.get(message.get("role")) if isinstance(message.get("role"), str) else None
        if role is None:
            refuse(f"{name}.role", message.get("role"), f"one of {', '.join(ROLES)}")
        words, shown = _content(message, role, name, fetcher)
        pictures += shown
        if any(IMAGE_MARKER in word for word in words if word is not None):
            marked.append(f"{name}.content")
        joined = "\n".join(IMAGE_MARKER if word is None else word for word in words)
        if role != "system":
            turns.append(Turn(role, joined))
        elif index:
            refuse(f"{name}.role", message["role"], "it in the first message only")
        else:
            system = joined
    if marked and pictures:
        raise Refused(f"{marked[0]}: holds {IMAGE_MARKER}, which stands for a picture: leave it out; a picture is "
                      "shown where its part stands", marked[0])  # fmt: skip
    images = tuple(picture.content for picture in pictures)
    conversation = Conversation(tuple(turns), images, "request", system, images_in_place=len(images) > 1)
    return Chat(conversation, tuple(pictures))


def _content(
    message: dict[str, Any], role: str, name: str, fetcher: Fetcher | None
) -> tuple[list[str | None], list[Picture]]:
    """The texts of a message, None where a picture stands, and its pictures."""
    content, name = message.get("content"), f"{name}.content"
    if content is None and role == "assistant":
        return [], []
    if isinstance(content, str):
        return [_checked(content, name)], []
    if type(content) is not list:
        refuse(name, content, "a text or a list of parts")
    words, pictures = list[str | None](), list[Picture]()
    for index, part in enumerate(content):
        place = f"{name}[{index}]"
        kind = part.get("type") if type(part) is dict else None
        if kind == "text" and type(part.get("text")) is str:
            words.append(_checked(part["text"], f"{place}.text"))
        elif kind == "image_url" and role == "user":
            words.append(None)
            pictures.append(_picture(part.get("image_url"), f"{place}.image_url", fetcher))
        elif kind == "video_url" and role == "user":
            words.append(None)
            pictures.append(Picture(videos.read(part.get("video_url"), f"{place}.video_url"), f"{place}.video_url.url"))
        else:
            kinds = "a part of type text" + ", image_url or video_url" * (role == "user")
            refuse(f"{place}.text" if kind == "text" else place, part, kinds)
    return words, pictures


def _checked(text: str, name: str) -> str:
    try:
        check_text(text, name)
    except UsageError as error:
        raise Refused(str(error), name) from None
    return text


def _picture(value: Any, name: str, fetcher: Fetcher | None) -> Picture:
    url = value.get("url") if type(value) is dict else None
    if type(url) is not str:
        refuse(name, value, 'an object such as {"url": "data:image/png;base64,..."}')
    name = f"{name}.url"
    if url.lower().startswith(("http:", "https:")):
        if fetcher is None:
            refuse(name, url, "a data: URL (data:image/png;base64,...): this server fetches no pictures")
        fetcher.check(url, name)
        return Picture(b"", name, url)
    match = _DATA_URL.match(url)
    if match is None:
        refuse(name, url, "a data: URL of a picture in base64 (data:image/png;base64,...)")
    try:
        return Picture(base64.b64decode(url[match.end() :], validate=True), name)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"{name}: its base64 is damaged ({error})", name) from None


def opened(chat: Chat, format: Format) -> Chat:
    """The same with its videos decoded. Raises Refused where one cannot be."""
    until = time.monotonic() + videos.DECODE_SECS
    found = tuple(picture._replace(content=videos.opened(picture.content, format, picture.field, until))
                  if isinstance(picture.content, Video) else picture for picture in chat.pictures)  # fmt: skip
    return Chat(replace(chat.conversation, images=tuple(picture.content for picture in found)), found)


def length(chat: Chat, format: Format, positions: int) -> int:
    """Positions of the prompt; no picture is decoded.

    Raises:
      Refused: the turns do not fit the template, a picture is none or too large, or the prompt leaves no position for
        an answer.
    """
    conversation = chat.conversation
    characters = sum(len(turn.text) for turn in conversation.turns) + len(conversation.system or "")
    if characters > MAX_TOKEN_CHARACTERS * positions:
        raise _too_long(f"a text of {characters:,} characters", positions)
    if len(chat.pictures) > positions:
        raise _too_long(f"{len(chat.pictures)} pictures", positions)
    _check_pixels(chat)
    try:
        tokens = len(encode(conversation, format, reply=True, open_images=False).tokens)
    except ValueError as error:
        raise Refused(f"messages: {str(error).removeprefix(_RECORD)}", "messages") from None
    if tokens >= positions:
        raise _too_long(f"a prompt of {tokens:,} tokens", positions)
    return tokens


def _too_long(what: str, positions: int) -> Refused:
    return Refused(f"messages: {what} leaves none of {positions:,} positions for an answer: shorten it or show "
                   "fewer pictures", "messages", code="context_length_exceeded")  # fmt: skip


def _check_pixels(chat: Chat) -> None:
    total = 0
    for content, field in _stills(chat):
        try:
            width, height = image_size(content)
        except ValueError as error:
            raise Refused(f"{field}: {error}", field) from None
        total += width * height
        most = MAX_WEBP_PIXELS if content[8:12] == b"WEBP" else MAX_PIXELS
        if width * height > most or total > MAX_ALL_PIXELS:
            raise Refused(f"{field}: {width} x {height} pixels, want at most {most:,} a picture and "
                          f"{MAX_ALL_PIXELS:,} in all: resize it", field)  # fmt: skip


def _stills(chat: Chat) -> Iterator[tuple[bytes, str]]:
    """Pictures, and the frames of videos that came as pictures, each with its field."""
    for picture in chat.pictures:
        source = picture.content.source if isinstance(picture.content, Video) else (picture.content,)
        yield from ((still, picture.field) for still in source if isinstance(still, bytes))


def prompt(chat: Chat, format: Format) -> Prompt:
    """The prompt with its pictures decoded. Raises Refused where one is damaged."""
    try:
        if any(np.prod(image_size(content)) > LARGE_PIXELS for content, _ in _stills(chat)):
            with _large:
                return prompt_of(encode(chat.conversation, format, reply=True))
        return prompt_of(encode(chat.conversation, format, reply=True))
    except ValueError as error:
        field = next((one.field for one in chat.pictures if not _opens(one.content, format)), "messages")
        raise Refused(f"{field}: {str(error).removeprefix(_RECORD)}", field) from None


def _opens(content: bytes | Video, format: Format) -> bool:
    try:
        return bool(list(pictures((content,), format)))
    except ValueError:
        return False


def raw_prompt(text: str, format: Format, positions: int) -> Prompt:
    """The prompt of a text without a template. Raises Refused where it is empty or too long."""
    words = format.tokenizer
    if not text:
        refuse("prompt", text, "a text")
    _checked(text, "prompt")
    if len(text) > MAX_TOKEN_CHARACTERS * positions:
        raise Refused(f"prompt: {len(text):,} characters are too many for {positions:,} positions", "prompt",
                      code="context_length_exceeded")  # fmt: skip
    tokens = np.array([words.bos_id] * words.adds_bos + words.encode(text, False), np.int32)
    if len(tokens) >= positions:
        raise Refused(f"prompt: {len(tokens):,} tokens leave none of {positions:,} positions for an answer",
                      "prompt", code="context_length_exceeded")  # fmt: skip
    return Prompt(tokens)
