"""A conversation template as the Jinja text that Hugging Face readers render, to the ids of `prompt.encode`."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from llava_jax.prompt.templates import Part, Template
from llava_jax.prompt.tokenizer import Tokenizer

IMAGE = "<image>"


class Picture(NamedTuple):
    """How a reader shows a template that a part of a message is a picture.

    test: a Jinja test of `part`. text: the Jinja expression that stands in the prompt for it.
    prepare: lines of Jinja that make `turns` such messages first.
    """

    test: str
    text: str
    prepare: tuple[str, ...] = ()


HUB = Picture("part['type'] in ('image', 'image_url')", json.dumps(IMAGE))
# OneVision's, whose tokenizer has <video> too.
HUB_VIDEOS = Picture("part['type'] in ('image', 'image_url', 'video', 'video_url')",
                     "('<video>' if part['type'] in ('video', 'video_url') else '<image>')")  # fmt: skip
# llama.cpp writes "<__media__>", or with random letters "<__media_AbC__>", into the text of a message, which then has
# no parts. Source: llama.cpp of llama-cpp-python 0.3.36, common/chat.cpp, tools/server/server-common.cpp.
LLAMA_CPP = Picture("part['type'] == 'media_marker'", "part['text']", (
    "{%- set all = namespace(turns=[]) -%}",
    "{%- for turn in turns -%}",
    "  {%- set whole = turn['content'] if turn['content'] is string else '' -%}",
    "  {%- set cut = namespace(parts=[], text='') -%}",
    "  {%- for piece in whole.split('<__media') -%}",
    "    {%- set cut.text = piece -%}",
    "    {%- if not loop.first -%}",
    "      {%- set mark = piece.split('__>')[0] + '__>' -%}",
    "      {%- set cut.text = piece[mark | length:] -%}",
    "      {%- set cut.parts = cut.parts + [{'type': 'media_marker', 'text': '<__media' + mark}] -%}",
    "    {%- endif -%}",
    "    {%- if cut.text -%}{%- set cut.parts = cut.parts + [{'type': 'text', 'text': cut.text}] -%}{%- endif -%}",
    "  {%- endfor -%}",
    "  {%- set content = cut.parts if '<__media' in whole else turn['content'] -%}",
    "  {%- set all.turns = all.turns + [{'role': turn['role'], 'content': content}] -%}",
    "{%- endfor -%}",
    "{%- set turns = all.turns -%}",
))  # fmt: skip


def render(template: Template, tokenizer: Tokenizer, picture: Picture = HUB) -> str | None:
    """`chat_template.jinja`, or None for a template or a tokenizer with which such a text cannot give the same ids.

    The single picture of a conversation stands at the front of its turn, several stand where they are among the parts
    of a message, each on a line of its own: as a record with `image`, and one with typed parts, are read.

    <s> is in the text, because servers tokenise without adding it; `processor(text=...)` wants
    `add_special_tokens=False`.

    Args:
      tokenizer: has `<image>` among its special tokens.
    """
    after_image, after_bos = _gap(tokenizer, IMAGE, "\nA"), ""
    if tokenizer.adds_bos:
        after_bos = _gap(tokenizer, tokenizer.piece(tokenizer.bos_id), "A")
    fixed = template.examples or template.images_only or template.image_frame != ("", "")
    if fixed or after_image is None or after_bos is None:
        return None
    after_turn = _text(template.user.after)
    gap = "" if after_turn.startswith(tuple(filter(None, tokenizer.ids))) else after_image
    trim = " | trim" if template.trims else ""
    system = _say(f"{_quoted(template.system_frame[0])} + system{trim} + {_quoted(template.system_frame[1])}")
    lines = [
        "{%- if messages and messages[0]['role'] == 'system' -%}",
        "  {%- set first = messages[0]['content'] -%}",
        "  {%- set system = first if first is string else first[0]['text'] -%}",
        "  {%- set turns = messages[1:] -%}",
        "{%- else -%}",
        f"  {{%- set system = {_quoted(template.system)} -%}}",
        "  {%- set turns = messages -%}",
        "{%- endif -%}",
        *picture.prepare,
        "{%- set seen = namespace(images=0) -%}",
        "{%- for turn in turns if turn['content'] is not string -%}",
        f"  {{%- for part in turn['content'] if {picture.test} -%}}{{%- set seen.images = seen.images + 1 -%}}",
        "  {%- endfor -%}",
        "{%- endfor -%}",
        *([_say(f"bos_token + {_quoted(after_bos)}")] if tokenizer.adds_bos else []),
        *([] if template.system_inside else ["{%- if system -%}", "  " + system, "{%- endif -%}"]),
        "{%- for turn in turns -%}",
        "  {%- if turn['role'] == 'user' -%}",
        *_where("not loop.first", template.between),
        "    " + _say(_quoted(_text(template.user.before))),
        *(["    {%- if loop.first and system -%}" + system + "{%- endif -%}"] if template.system_inside else []),
        *_trimmed(trim, _question(picture, after_image, gap)),
        "    " + _say(_quoted(after_turn)),
        "  {%- elif turn['role'] == 'assistant' -%}",
        *_answer(template, trim),
        "  {%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}",
        "  " + _say(_quoted(template.assistant.before[0].text + template.reply_opening)),
        "{%- else -%}",
        "  " + _say(_quoted(_text(template.ending))),
        "{%- endif -%}",
    ]
    return "\n".join(lines)


def _answer(template: Template, trim: str) -> list[str]:
    """The assistant's message in its frame; what is supervised of that stands in the `generation` block."""
    before, after = template.assistant
    begin, end = sum(not part.learned for part in before), sum(part.learned for part in after)
    return [
        "    " + _say(_quoted(_text(before[:begin]))),
        *_where("loop.last", template.reply_opening),
        "    {%- generation -%}" + _say(_quoted(_text(before[begin:]))),
        *_trimmed(trim, [
            "    {%- if turn['content'] is string -%}{{- turn['content'] -}}{%- else -%}",
            "      {%- for part in turn['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}",
            "    {%- endif -%}",
        ]),
        "    " + _say(_quoted(_text(after[:end]))),
        "    {%- endgeneration -%}" + _say(_quoted(_text(after[end:]))),
    ]  # fmt: skip


def _where(condition: str, text: str) -> list[str]:
    """Writes a text, if there is one, where a condition holds."""
    return [f"    {{%- if {condition} -%}}{_say(_quoted(text))}{{%- endif -%}}"] if text else []


def _trimmed(trim: str, lines: list[str]) -> list[str]:
    """What the lines write, through a filter if there is one."""
    return ["    {%- set said -%}", *lines, "    {%- endset -%}", "    " + _say("said" + trim)] if trim else lines


def _question(picture: Picture, after_image: str, gap: str) -> list[str]:
    """The user's message, a text or parts."""
    return [
        "    {%- if turn['content'] is string -%}{{- turn['content'] -}}",
        "    {%- elif seen.images < 2 -%}",
        f"      {{%- for part in turn['content'] if {picture.test} -%}}",
        "        " + _say(picture.text + " + " + _quoted(after_image + "\n")),
        "      {%- endfor -%}",
        "      {%- for part in turn['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}",
        "    {%- else -%}",
        *_in_place(picture, after_image, gap),
        "    {%- endif -%}",
    ]


def _in_place(picture: Picture, after_image: str, gap: str) -> list[str]:
    """The parts of one message in their order, a picture on a line of its own.

    Args:
      after_image: see `_gap`; gap: the same for what follows the message.
    """
    return [
        "      {%- set last = namespace(text='') -%}",
        "      {%- for part in turn['content'] -%}",
        f"        {{%- set piece = {_quoted(IMAGE)} if {picture.test} else part['text'] -%}}",
        "        {%- if piece -%}",
        f"          {{%- if last.text == {_quoted(IMAGE)} -%}}" + _say(_quoted(after_image)) + "{%- endif -%}",
        f"          {{%- if last.text and {_quoted(IMAGE)} in (last.text, piece) and not last.text.endswith('\\n')"
        " and not piece.startswith('\\n') -%}" + _say(_quoted("\n")) + "{%- endif -%}",
        "          " + _say(f"{picture.text} if {picture.test} else piece") + "{%- set last.text = piece -%}",
        "        {%- endif -%}",
        "      {%- endfor -%}",
        f"      {{%- if last.text == {_quoted(IMAGE)} -%}}" + _say(_quoted(gap)) + "{%- endif -%}",
    ]


def _gap(tokenizer: Tokenizer, special: str, text: str) -> str | None:
    """What stands after a special token so that `text` after it gives the ids that it gives by itself.

    The original code tokenises what follows an image alone, so it begins with a "▁"; in one text a tokenizer gives
    it that only where a space is written, or (`legacy`) without.
    """
    wanted = tokenizer.encode(text, bos=False)
    for gap in ("", " "):
        ids, word = tokenizer.encode("A" + special + gap + text, bos=False), tokenizer.ids[special]
        if word in ids and ids[ids.index(word) + 1 :] == wanted:
            return gap
    return None


def _say(expression: str) -> str:
    return "{{- " + expression + " -}}"


def _quoted(text: str) -> str:
    return json.dumps(text)


def _text(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts)
