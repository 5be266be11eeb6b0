"""Tables and plots of several runs' scores in the papers' layout: a row a run, a column a number, and published rows.

Tables are Markdown, CSV and LaTeX. matplotlib is imported here alone, and only for plots: `pip install ".[report]"`.
"""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from etils import epath

from llava_jax import files
from llava_jax.errors import UsageError
from llava_jax.evaluate import score as scores
from llava_jax.evaluate.score import Result, Value


class Published(NamedTuple):
    """A row of a paper: its name and {column: value}."""

    name: str
    numbers: Mapping[str, float]


_SQA = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")
_BENCH = ("conv", "detail", "complex", "all")
# Source: Visual Instruction Tuning, arXiv 2304.08485, section 5 (ScienceQA; LLaVA-Bench COCO by training data, and
# In-the-Wild, as relative scores). LLaVA-1.5: haotian-liu/LLaVA docs/MODEL_ZOO.md @ c121f04.
PUBLISHED: dict[str, tuple[Published, ...]] = {
    "scienceqa": tuple(Published(name, dict(zip(_SQA, row))) for name, row in (
        ("GPT-4 (published)", (84.06, 73.45, 87.36, 81.87, 70.75, 90.73, 84.69, 79.10, 82.69)),
        ("LLaVA (published)", (90.36, 95.95, 88.00, 89.49, 88.00, 90.66, 90.93, 90.90, 90.92)),
        ("LLaVA + GPT-4, complement (published)", (90.36, 95.50, 88.55, 89.05, 87.80, 91.08, 92.22, 88.73, 90.97)),
        ("LLaVA + GPT-4, judge (published)", (91.56, 96.74, 91.09, 90.62, 88.99, 93.52, 92.73, 92.16, 92.53)),
    )),
    "llava_bench_coco": tuple(Published(f"{name} (published)", dict(zip(_BENCH, row))) for name, row in (
        ("Full data", (83.1, 75.3, 96.5, 85.1)),
        ("Detail + Complex", (81.5, 73.3, 90.8, 81.9)),
        ("Conv + 5% Detail + 10% Complex", (81.0, 68.4, 91.5, 80.5)),
        ("Conversation", (76.5, 59.8, 84.9, 73.8)),
        ("No instruction tuning", (22.0, 24.0, 18.5, 21.5)),
    )),
    "llava_bench_wild": tuple(Published(f"{name} (published)", dict(zip(_BENCH, row))) for name, row in (
        ("OpenFlamingo", (19.3, 19.0, 19.1, 19.1)),
        ("BLIP-2", (54.6, 29.1, 32.9, 38.1)),
        ("LLaVA", (57.3, 52.5, 81.7, 67.3)),
    )),
    **{name: tuple(Published(f"LLaVA-1.5-{size} (published)", {column: value})
                   for size, value in (("7B", small), ("13B", large)))
       for name, column, small, large in (
           ("vqav2", "accuracy", 78.5, 80.0), ("gqa", "accuracy", 62.0, 63.3), ("vizwiz", "accuracy", 50.0, 53.6),
           ("textvqa", "accuracy", 58.2, 61.3), ("pope", "F1", 85.9, 85.9), ("mme", "perception", 1510.7, 1531.3),
           ("mmbench", "circular", 64.3, 67.7), ("mmbench_cn", "circular", 58.3, 63.6), ("seed", "all", 58.6, 61.6),
       )},
}  # fmt: skip
FILE, CSV, LATEX = "report.md", "report.csv", "report.tex"
BAR_INCHES = (0.35, 1.6)  # a bar's height in the plot, and what stands around all of them
_TEX = re.compile(r"[&%$#_{}~^\\]")
_TEX_NAMES = {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}


class Table(NamedTuple):
    """One benchmark's runs below the published rows. rows: (name, a text for each column); main: the headline's column.

    published: how many of the rows come from papers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    main: str
    published: int


def write(paths: Sequence[epath.PathLike], directory: epath.PathLike, plots: str = "none") -> tuple[str, ...]:
    """Writes report.md, report.csv, report.tex, and a plot for each benchmark where plots is "png" or "svg"; the paths.

    Raises:
      DataError: a path is no file of scores. UsageError: plots are wanted and matplotlib is not there.
    """
    results = [scores.from_json(path) for path in paths]
    tables = {FILE: page(results), CSV: comma_separated(results), LATEX: latex(results)}
    content = {name: text.encode("utf-8", "backslashreplace") for name, text in tables.items()}
    for name in _benchmarks(results) if plots != "none" else ():
        content[f"{name}.{plots}"] = plot(_results_of(results, name), PUBLISHED.get(name, ()), plots)
    folder = epath.Path(directory)
    for name, data in content.items():
        files.write_whole(folder / name, data)
    return tuple(str(folder / name) for name in content)


def page(results: Sequence[tuple[str, Result]]) -> str:
    """All runs in Markdown: one line each over all benchmarks, then a table and the failings for each benchmark."""
    names = _benchmarks(results)
    parts = ["# Scores", ""]
    if len(names) > 1:
        parts += [_overview(results, names), ""]
    for name in names:
        members = _results_of(results, name)
        summary = table(members, PUBLISHED.get(name, ()))
        rows = _bold_rows(summary, str, lambda cell: f"**{cell}**")
        parts += [f"## {summary.title}", "", markdown(["", *summary.columns], rows), ""]
        parts += [f"- {run}: {line}" for run, result in members for line in _remarks(result)] + [""]
    return "\n".join(parts).rstrip() + "\n"


def comma_separated(results: Sequence[tuple[str, Result]]) -> str:
    """A line for each number of each run, published ones included; empty groups have an empty mean."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(("benchmark", "run", "published", "column", "mean", "sd", "repeats"))
    for name in _benchmarks(results):
        for row in PUBLISHED.get(name, ()):
            lines.writerows((name, row.name, 1, column, value, "", "") for column, value in row.numbers.items())
        for run, result in _results_of(results, name):
            for column, value in result.numbers.items():
                empty = scores.cell_text(result, column) == "-"
                cells = ("", "") if empty else (f"{value.mean:.4f}", f"{value.sd:.4f}")
                lines.writerow((name, run, 0, column, *cells, result.repeats))
    return out.getvalue()


def latex(results: Sequence[tuple[str, Result]]) -> str:
    """A tabular for each benchmark, with the rules of the package booktabs; the headline's column is bold."""
    parts = ["% needs \\usepackage{booktabs}"]
    for name in _benchmarks(results):
        summary = table(_results_of(results, name), PUBLISHED.get(name, ()))
        rows = [_tex_row(row) for row in _bold_rows(summary, _tex, lambda cell: rf"\textbf{{{cell}}}")]
        if summary.published:
            rows.insert(summary.published, r"\midrule")
        columns = "l" + "r" * len(summary.columns)
        parts += ["", f"% {_tex(summary.title)}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
                  _tex_row(["", *map(_tex, summary.columns)]), r"\midrule", *rows, r"\bottomrule",
                  r"\end{tabular}"]  # fmt: skip
    return "\n".join(parts) + "\n"


def _bold_rows(summary: Table, escape: Callable[[str], str], bold: Callable[[str], str]) -> list[list[str]]:
    """The table's rows, escaped; the headline's column is bold in the rows that are not published ones."""
    rows = []
    for number, (run, cells) in enumerate(summary.rows):
        ours = number >= summary.published
        rows.append([escape(run), *(bold(escape(cell)) if ours and column == summary.main and cell else escape(cell)
                                    for column, cell in zip(summary.columns, cells))])  # fmt: skip
    return rows


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _tex(text: str) -> str:
    escaped = _TEX.sub(lambda match: _TEX_NAMES.get(match[0], "\\" + match[0]), " ".join(text.split()))
    return escaped.replace("±", r"$\pm$")


def table(members: Sequence[tuple[str, Result]], published: Sequence[Published] = ()) -> Table:
    """One benchmark's runs, a row each, below the published rows."""
    columns = tuple(dict.fromkeys(column for _, result in members for column in result.numbers))
    rows = [(row.name, tuple(f"{row.numbers[column]:.2f}" if column in row.numbers else "" for column in columns))
            for row in published]  # fmt: skip
    rows += [(run, tuple(scores.cell_text(result, column) for column in columns)) for run, result in members]
    result = members[0][1]
    return Table(result.title, columns, tuple(rows), result.main, len(published))


def differences(members: Sequence[tuple[str, Result]], columns: Sequence[str] = ()) -> str:
    """As `table`, with each row's difference from the first row in brackets: the shape of an ablation."""
    columns = columns or list(members[0][1].numbers)
    base = members[0][1].numbers
    rows = []
    for number, (run, result) in enumerate(members):
        cells = []
        for column in columns:
            mean = result.numbers[column].mean
            cells.append(f"{mean:.2f}" if not number else f"{mean:.2f} ({mean - base[column].mean:+.2f})")
        rows.append([run, *cells])
    return markdown(["", *columns], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned for reading as text too."""
    cells = [[" ".join(text.split()).replace("|", "\\|") for text in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *rest = row
        return "| " + " | ".join([first.ljust(widths[0]), *(t.rjust(w) for t, w in zip(rest, widths[1:]))]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def plot(members: Sequence[tuple[str, Result]], published: Sequence[Published], kind: str) -> bytes:
    """A bar for each run's headline, with its spread over repeats, and for each published row; kind: "png", "svg".

    Raises:
      UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # here only: no number needs it
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError('plots need matplotlib: run `pip install ".[report]"`, or give --plots none') from None

    main = members[0][1].main
    bars = [(row.name, Value(row.numbers[main], 0.0), "0.75") for row in published if main in row.numbers]
    bars += [(run, result.numbers[main], "tab:blue") for run, result in members]
    figure = Figure(figsize=(8, BAR_INCHES[0] * len(bars) + BAR_INCHES[1]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names, values, colours = zip(*bars)
    axes.barh(range(len(bars)), [value.mean for value in values], xerr=[value.sd for value in values], color=colours)
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    for number, value in enumerate(values):
        axes.annotate(f"{value.mean:.2f}", (value.mean, number), (4, 0), textcoords="offset points", va="center")
    axes.set_title(f"{members[0][1].title}: {main}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _overview(results: Sequence[tuple[str, Result]], names: Sequence[str]) -> str:
    runs = list(dict.fromkeys(run for run, _ in results))
    by_run = {(run, result.benchmark): result for run, result in results}
    titles = {name: _results_of(results, name)[0][1].title for name in names}
    rows = []
    for run in runs:
        cells = [by_run.get((run, name)) for name in names]
        rows.append([run, *(scores.cell_text(cell, cell.main) if cell else "" for cell in cells)])
    return markdown(["", *titles.values()], rows)


def _remarks(result: Result) -> list[str]:
    """The counts of a run: its questions, repeats and failings."""
    kinds: dict[str, int] = {}
    for finding in result.findings:
        kinds[finding.kind] = kinds.get(finding.kind, 0) + 1
    line = f"{result.questions:,} questions"
    line += f", mean and sample standard deviation of {result.repeats} repeats" if result.repeats > 1 else ""
    line += "".join(f", {count:,} {kind}" for kind, count in sorted(kinds.items()))
    line += f", {result.lacking}" if kinds else ""
    options = ", ".join(f"{name}={value}" for name, value in result.options.items() if value)
    return [line + (f" ({options})" if options else "")]


def _benchmarks(results: Sequence[tuple[str, Result]]) -> list[str]:
    return list(dict.fromkeys(result.benchmark for _, result in results))


def _results_of(results: Sequence[tuple[str, Result]], name: str) -> list[tuple[str, Result]]:
    return [(run, result) for run, result in results if result.benchmark == name]
