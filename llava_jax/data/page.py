"""The page of `data look`: one HTML file with records as a model sees them, without links and without scripts.

What a record says is untrusted: it is escaped, and the page's policy lets a browser load and run nothing.
"""

import base64
import hashlib
import html
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from llava_jax.data.drawing import frames, views
from llava_jax.data.inspection import Inspection, shape_of
from llava_jax.data.problems import brief
from llava_jax.prompt.encode import Format
from llava_jax.prompt.images import open_image

MAX_BYTES = 8_000_000  # of the records on a page; the rest is left out
MAX_PICTURES = 12  # drawn of a record
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 0 auto; padding: 1rem; color: #1f2328;
  background: #fff; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; margin: 0 0 .5rem } h2 { font-size: 1.1rem; margin: 0 } h3 { font-size: 1rem; margin: 1rem 0 0 }
section { border-top: 2px solid #d0d7de; margin-top: 1.5rem; padding-top: 1rem } p { margin: .3rem 0 }
.views { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start }
figure { margin: .5rem 0 0; max-width: 100% }
figcaption { font-size: .875rem; color: #57606a; max-width: 32rem }
figure:not(.tiles) { max-width: min(100%, 236px) }
svg { max-width: 100%; height: auto } figure svg { display: block }
.tile { fill: none; stroke: #0550ae; stroke-width: 2 }
.number { font: bold 16px system-ui, sans-serif; fill: #fff; stroke: #0550ae; stroke-width: 4;
  paint-order: stroke }
.start { font: 12px system-ui, sans-serif; text-anchor: end; fill: #1f2328 }
.line { fill: #0550ae; fill-opacity: 0 } .line:hover { fill-opacity: .5 }
.shade { fill: url(#hatch) } .newline { fill: none; stroke: #953800; stroke-width: 1.2 }
.talk { white-space: pre-wrap; background: #f6f8fa; padding: .6rem .8rem; margin: .8rem 0 0;
  max-height: 24rem; overflow: auto }
mark { background: #dafbe1; color: #0f5323; text-decoration: underline; text-decoration-thickness: 2px }
.picture { background: #0550ae; color: #fff; padding: 0 .4em; border-radius: .3em; text-decoration: none }
del { opacity: .7; text-decoration: line-through } .cut, .problem { color: #a40e26; font-weight: bold }
"""
_HATCH = """<svg width="0" height="0"><defs><pattern id="hatch" width="8" height="8" patternUnits="userSpaceOnUse"
patternTransform="rotate(45)"><rect width="8" height="8" fill="#bf8700" fill-opacity=".35"/><rect width="3" height="8"
fill="#bf8700" fill-opacity=".8"/></pattern></defs></svg>"""
_NEWLINE = """ <svg width="14" height="10"><path class="newline" d="M12 2v5h-9"/></svg> is the newline that ends a
line."""


class Refused(NamedTuple):
    """A record that cannot be encoded, and why."""

    where: str
    reason: str


def write(records: Iterable[Inspection | Refused], title: str, format: Format, row_tokens: int) -> bytes:
    """The page.

    title: what is drawn, such as the name of the file. row_tokens: at which records are cut.
    """
    style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    newline = format.tiling is not None and format.tiling.newline
    body = "".join(_sections(records, format))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>
<style>{_STYLE}</style></head><body>{_HATCH}
<h1>{html.escape(title)}</h1>
<p>Template {html.escape(format.template.name)}; {html.escape(shape_of(format))}. A row takes {row_tokens:,} tokens.
<p><mark>Underlined</mark> tokens are supervised. <del>Struck through</del> is what the end of the row cuts off.
Positions count from 0; the mouse shows those of a line of tiles.{_NEWLINE * newline}
{body}</body></html>
"""
    return page.encode("utf-8", "backslashreplace")


def _sections(records: Iterable[Inspection | Refused], format: Format) -> Iterator[str]:
    size = 0
    for number, record in enumerate(records):
        section = _refused(record) if isinstance(record, Refused) else _section(record, number, format)
        size += len(section)
        if size > MAX_BYTES:
            yield (f'<section><p class="problem">{number} records fill this page ({MAX_BYTES / 1e6:.0f} MB); name '
                   "others with --id.</section>")  # fmt: skip
            return
        yield section


def _refused(record: Refused) -> str:
    return (f'<section class="record"><h2>{html.escape(record.where)}</h2><p class="problem">Refused: '
            f"{html.escape(record.reason)}</section>\n")  # fmt: skip


def _section(one: Inspection, number: int, format: Format) -> str:
    tokens, name = len(one.example.tokens), f"{one.record.where}: id={brief(one.record.id)}"
    parts = [f'<section class="record"><h2>{html.escape(name)}</h2><p>{html.escape(str(one))}.']
    if one.kept < tokens:
        parts.append(f'<p class="cut">Cut behind {one.kept:,} tokens: {tokens - one.kept:,} are lost, {one.lost:,} of '
                     "them supervised.")  # fmt: skip
    parts += [f'<p class="problem">{"Refused: " * problem.fatal}{html.escape(f"{problem.reason}: {problem.detail}")}'
              for problem in one.problems if problem.reason != "cut"]  # fmt: skip
    parts += ['<div class="talk" tabindex="0">', *_runs(one, number, format), "</div>"]
    return "".join([*parts, *_pictures(one, number, format), "</section>\n"])


def _runs(one: Inspection, number: int, format: Format) -> Iterator[str]:
    """The conversation: runs of tokens that are alike, and a sign for each picture."""
    example, ids = one.example, one.example.tokens.tolist()
    start = 0  # of the stretch of text: behind the last picture
    spans = {span.start: span for span in example.image_spans}
    ends = {one.kept, len(example.tokens), *spans, *(span.start + span.length for span in spans.values())}
    ends |= set((np.flatnonzero(np.diff(example.learned)) + 1).tolist())
    borders = sorted(ends | {0})
    for first, end in zip(borders, borders[1:]):
        cut = first >= one.kept
        if first in spans:
            which = list(spans).index(first) + 1
            noun = one.pictures[which - 1].noun if which <= len(one.pictures) else "picture"
            text = f'<a class="picture" href="#r{number}p{which}">{noun} {which}: {end - first:,} features</a>'
            start = end
        else:
            before, text = (format.tokenizer.decode(ids[start:n], skip_special=False) for n in (first, end))
            name = "mark" if example.learned[first] else "span"
            text = f'<{name} data-tokens="{end - first}">{html.escape(text[len(before):])}</{name}>'
        yield f"<del>{text}</del>" if cut else text


def _pictures(one: Inspection, number: int, format: Format) -> Iterator[str]:
    tile = 0
    for which, (picture, reference) in enumerate(zip(one.pictures, one.conversation.images), 1):
        if which > MAX_PICTURES:
            yield f"<p>{len(one.pictures) - MAX_PICTURES} more pictures are not drawn."
            return
        tiles = one.example.images[tile : tile + picture.layout.tiles]
        tile += picture.layout.tiles
        title = f"{picture.noun.capitalize()} {which}: {html.escape(str(picture))}"
        yield f'<h3 id="r{number}p{which}">{title}</h3><div class="views">'
        drawings = frames(picture, tiles) if picture.frames else views(picture, open_image(reference, one.root), tiles,
                                                                    format)  # fmt: skip
        for view in drawings:
            kind = ' class="tiles"' if view.tiles else ""
            yield f"<figure{kind}>{view.svg}<figcaption>{html.escape(view.caption)}</figcaption></figure>"
        yield "</div>"
