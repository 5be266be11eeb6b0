"""The demo's results: a table for the terminal, numbers for programs, and one HTML page."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.demo import world
from llava_jax.demo.story import Outcome

CARDS = 12  # pictures on the page
BEST = "stage2"  # all other runs are expected to score less
CURVES = {"stage2": "#1f6feb", "stage2_without_stage1": "#d1242f", "stage2_last_layer": "#bf8700", "blind": "#57606a",
          "stage2_without_tiles": "#d1242f"}  # fmt: skip
FIRST_CURVES = {"stage1": "#1f6feb", "stage1_last_layer": "#bf8700"}
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 62em; margin: 2em auto }
table { border-collapse: collapse } th, td { padding: .25em .6em; border-bottom: 1px solid #d0d7de; text-align: right }
th:first-child, td:first-child { text-align: left } .cards { display: flex; flex-wrap: wrap; gap: 1em }
.card { width: 14em } .card img { width: 100%; border: 1px solid #d0d7de } .right { color: #1a7f37 }
.wrong { color: #d1242f } figure { margin: 0 0 1em 0; display: inline-block } figcaption { color: #57606a }"""


def numbers(outcome: Outcome) -> dict[str, Any]:
    """The table: each run's share of exact answers on held-out pictures, the compositional split, and by kind; secs."""
    names = [run.name for run in outcome.family.evaluated]
    heldout = {name: round(outcome.results[name]["heldout"].score, 4) for name in names}
    by_test_set = {
        test_set: {name: {kind: round(share, 4) for kind, share in outcome.results[name][test_set].by_kind.items()}
               for name in names}
        for test_set in outcome.test_sets
    }  # fmt: skip
    unseen = {name: round(outcome.results[name]["unseen"].score, 4) for name in names}
    questions = {name: len(test_set.questions) for name, test_set in outcome.test_sets.items()}
    return {**heldout, "unseen": unseen, "by_kind": by_test_set["heldout"], "unseen_by_kind": by_test_set["unseen"],
            "questions": questions, "secs": round(outcome.secs, 1)}  # fmt: skip


def table(outcome: Outcome) -> str:
    """Exact answers in percent, one line a run, and the comparisons that differ from the paper's."""
    head = ["exact answers in %", "all", *world.KINDS, "compositional split"]
    rows = _rows(outcome)
    width = max(len(label) for label, _ in rows)
    lines = [f"{head[0]:<{width}}  " + "  ".join(f"{column:>8}" for column in head[1:])]
    for label, cells in rows:
        lines.append(f"{label:<{width}}  " + "  ".join(
            f"{100 * cell:{max(8, len(column))}.1f}" for cell, column in zip(cells, head[1:])
        ))  # fmt: skip
    return "\n".join(["", *lines, "", *verdicts(outcome)])


def verdicts(outcome: Outcome) -> list[str]:
    """A line on the size of the test sets, and one for each comparison that came out other than the paper's."""
    test_set, unseen = outcome.test_sets["heldout"], outcome.test_sets["unseen"]
    lines = [f"{len(test_set.questions)} questions about {len(test_set.scenes)} pictures never seen; compositional "
             f"split: {len(unseen.questions)} about pictures with a thing whose colour and shape never came together"]
    best = outcome.results[BEST]["heldout"].score
    for run in outcome.family.evaluated:
        score = outcome.results[run.name]["heldout"].score
        if score >= best and run.name != BEST:
            lines.append(f"Not as in the paper: {run.label} reaches {100 * score:.1f}, stage 2 {100 * best:.1f}")
    return lines


def _rows(outcome: Outcome) -> list[tuple[str, list[float]]]:
    rows = []
    for run in outcome.family.evaluated:
        heldout, unseen = outcome.results[run.name]["heldout"], outcome.results[run.name]["unseen"]
        rows.append((run.label, [heldout.score, *heldout.by_kind.values(), unseen.score]))
    return rows


def page(outcome: Outcome, pictures: Path) -> str:
    """The whole report as one HTML file without links to others."""
    head = "".join(f"<th>{column}" for column in ("exact answers in %", "all", *world.KINDS, "compositional split"))
    body = "".join(
        f"<tr><td>{label}" + "".join(f"<td>{100 * cell:.1f}" for cell in cells) for label, cells in _rows(outcome)
    )
    curves = _figure("Stage 1: loss on captions", outcome.losses, FIRST_CURVES)
    curves += _figure("Stage 2: loss on instructions", outcome.losses, CURVES)
    picture, turns = outcome.chat
    conversation = "".join(f"<p><b>{role}</b> {html.escape(text)}" for role, text in turns)
    notes = "".join(f"<p>{html.escape(line)}." for line in verdicts(outcome))
    return f"""<!doctype html><meta charset="utf-8"><title>llava_jax demo</title><style>{STYLE}</style>
<h1>A model learns to see</h1>
<p>{outcome.family.summary}, in {outcome.secs:.0f} s.
<table><tr>{head}{body}</table>{notes}
<h2>Learning</h2>{curves}
<h2>Questions about pictures never seen, answered after stage 2</h2><div class="cards">{_cards(outcome, pictures)}</div>
<h2>A conversation</h2><div class="card"><img src="{_data(pictures / picture)}"></div>{conversation}
"""


def _cards(outcome: Outcome, pictures: Path) -> str:
    """The first questions of the test set about different pictures, kinds in turn: chosen before any answer."""
    test_set, answers = outcome.test_sets["heldout"], outcome.results["stage2"]["heldout"].answers
    by_kind = {kind: [i for i, q in enumerate(test_set.questions) if q.turn.kind == kind] for kind in world.KINDS}
    cards, pictures_shown = [], set[int]()
    for number in range(CARDS):
        kind = world.KINDS[number % len(world.KINDS)]
        candidates = [i for i in by_kind[kind] if test_set.questions[i].picture not in pictures_shown]
        index = (candidates or by_kind[kind])[0]
        pictures_shown.add(test_set.questions[index].picture)
        turn, answer = test_set.questions[index].turn, answers[index]
        mark = "right" if answer == turn.answer else "wrong"
        cards.append(
            f'<div class="card"><img src="{_data(pictures / test_set.pictures[test_set.questions[index].picture])}">'
            f"<br>{html.escape(turn.question)}<br>truth: {html.escape(turn.answer)}"
            f'<br><span class="{mark}">answer: {html.escape(answer)}</span></div>'
        )
    return "".join(cards)


def _data(path: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()


def _figure(title: str, losses: dict[str, list[float]], colours: dict[str, str]) -> str:
    """Smoothed loss curves of those runs that there are, as inline SVG, on a logarithmic scale."""
    width, height, margin = 460, 260, 40
    smooth = {name: _smooth(losses[name]) for name in colours if name in losses}
    low = np.log10(min(curve.min() for curve in smooth.values()))
    high = np.log10(max(curve.max() for curve in smooth.values()))
    steps = max(len(curve) for curve in smooth.values())

    def point(step: int, loss: float) -> tuple[float, float]:
        down = (high - np.log10(loss)) / max(1e-9, high - low)
        return margin + (width - margin) * step / max(1, steps - 1), 10 + (height - 40) * down

    parts = []
    for value in np.logspace(low, high, 5):
        _, y = point(0, value)
        parts.append(f'<line x1="{margin}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d0d7de"/>'
                     f'<text x="{margin - 4}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>')  # fmt: skip
    for row, (name, curve) in enumerate(smooth.items()):
        colour = colours[name]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (point(i, value) for i, value in enumerate(curve)))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                     f'<text x="{width - 4}" y="{22 + 15 * row}" text-anchor="end" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{width}" y="{height - 8}" text-anchor="end">{steps} steps</text>')
    return (f'<figure><svg width="{width}" height="{height}" font-size="11" fill="#57606a">{"".join(parts)}</svg>'
            f"<figcaption>{title}</figcaption></figure>")  # fmt: skip


def _smooth(losses: Sequence[float], share: float = 0.9) -> np.ndarray:
    """Exponential mean that starts at the first loss."""
    mean, out = losses[0], []
    for loss in losses:
        mean = share * mean + (1 - share) * loss
        out.append(mean)
    return np.array(out)
