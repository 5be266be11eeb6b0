"""The page of `data look`, and `data show` of a config: tiles and features in `anyres.layout`'s order, all escaped."""

import html.parser
import json

import numpy as np
import pytest
from PIL import Image

from llava_jax.batch import NEWLINE
from llava_jax.data import inspection, page
from llava_jax.data.__main__ import main
from llava_jax.data.check import Checks, rules
from llava_jax.data.sources import open_source
from llava_jax.prompt import anyres, templates, tokenizer
from llava_jax.prompt.anyres import Tiling
from llava_jax.prompt.encode import Format
from tests.prompt import chat_models

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A thing."}]
HOSTILE = "</mark><script>alert(1)</script><img src=x onerror=alert(1)>\"'& &lt; \u202e"
TAGS = {"html", "head", "meta", "title", "style", "body", "svg", "defs", "pattern", "rect", "h1", "h2", "h3", "p",
        "mark", "del", "path", "section", "div", "span", "a", "figure", "image", "text", "figcaption"}  # fmt: skip


class Parsed(html.parser.HTMLParser):
    """Tags with their attributes, in order; of each the tags that it is inside of, and all text."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(content.decode())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def of_class(self, name):
        return [attributes for _, attributes in self.tags if attributes.get("class") == name]

    def tokens(self, *tags):
        return sum(int(attributes.get("data-tokens", 0)) for tag, attributes in self.tags if tag in tags)


@pytest.fixture(scope="module")
def words(golden):
    return tokenizer.load(golden / "tiny_llama.model", legacy=True)


@pytest.fixture
def drawn(words, tmp_path):
    """drawn(records, tiling, mode="anyres", row_tokens=900, of=("v1", words)) -> what was examined, and the page."""

    def made(records, tiling=None, mode="anyres", row_tokens=900, of=("v1", words)):
        (tmp_path / "r.json").write_text(json.dumps(records))
        format = Format(templates.get(of[0]), of[1], 28, 4, mode, tiling=tiling)
        source = open_source(tmp_path / "r.json", tmp_path)
        checks = Checks(rules(format.template, of[1]), format, row_tokens, 99)
        found = [inspection.examine(record, checks, source) for record in source]
        return found, Parsed(page.write(found, "r.json", format, row_tokens))

    return made


def picture(folder, *sizes):
    """The names of new pictures."""
    rng, names = np.random.default_rng(0), [f"{width}x{height}.png" for width, height in sizes]
    for name, (width, height) in zip(names, sizes):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
    return names


@pytest.mark.parametrize("merge, max_tiles", [("flat", 0), ("spatial", 0), ("spatial_unpad", 0), ("spatial_unpad", 1)])
@pytest.mark.parametrize("size", [(60, 20), (20, 90), (28, 28), (300, 310), (200, 30)])
def test_tiles_and_features_are_drawn_in_the_order_of_their_positions(drawn, tmp_path, merge, max_tiles, size):
    tiling = Tiling(GRIDS, merge, max_tiles)
    (name,) = picture(tmp_path, size)
    (one,), parsed = drawn([{"id": "1", "image": name, "conversations": TALK}], tiling)
    layout, (columns, rows) = anyres.layout(size, tiling, 28, 4), anyres.best_grid(size, GRIDS, 28)
    span = one.example.image_spans[0]
    assert len(parsed.of_class("tile")) == len(parsed.of_class("number")) == columns * rows == layout.tiles - 1
    numbers = "".join(str(tile + 1) for tile in range(columns * rows))
    assert numbers in "".join(parsed.text.split())
    assert len(parsed.of_class("newline")) == (layout.slots == NEWLINE).sum() + tiling.newline  # and the legend's
    lines = [(int(line["data-first"]), int(line["data-features"])) for line in parsed.of_class("line")]
    assert lines == [(line.first, line.features) for line in one.pictures[0].lines]
    at = span.start + 4
    for line in one.pictures[0].lines:  # the lines are all of the positions behind those of the whole
        here = layout.slots[line.first - span.start :][: line.features + line.newline]
        assert line.first == at and (here == NEWLINE).tolist() == [False] * line.features + [True] * line.newline
        at = line.end
        if layout.corners is None:  # and lie where their features lie
            left, top, width, height = (int(x) for x in line.box)
            y, x = np.mgrid[top : top + height, left : left + width]
            slots = (1 + y // 2 * columns + x // 2) * 4 + y % 2 * 2 + x % 2
            assert here[: line.features].tolist() == slots.ravel().tolist()
    assert at == span.start + span.length


def test_what_is_shaded_is_what_no_position_reads(drawn, tmp_path):
    (name,) = picture(tmp_path, (28, 14))  # in 1 x 2, 2 x 1, 2 x 2 tiles: the middle two of four lines of 2 x 2
    _, parsed = drawn([{"id": "1", "image": name, "conversations": TALK}], Tiling(((2, 2),)))
    shades = [{key: float(shade[key]) for key in ("x", "y", "width", "height")} for shade in parsed.of_class("shade")]
    assert shades == [{"x": 0, "y": 0, "width": 440, "height": 110}, {"x": 0, "y": 330, "width": 440, "height": 110}]
    _, parsed = drawn([{"id": "1", "image": name, "conversations": TALK}], Tiling(((2, 2),), "flat"))
    assert not parsed.of_class("shade")


@pytest.mark.parametrize("mode, shades", [
    ("pad", [(0, 0, 220, 55), (0, 165, 220, 55)]), ("square", [(0, 0, 55, 110), (165, 0, 55, 110)]), ("squash", []),
])  # fmt: skip
def test_padding_and_cut_ends_of_a_picture_without_tiles_are_shaded(drawn, tmp_path, mode, shades):
    (name,) = picture(tmp_path, (40, 20))
    _, parsed = drawn([{"id": "1", "image": name, "conversations": TALK}], mode=mode)
    found = [tuple(float(shade[key]) for key in ("x", "y", "width", "height")) for shade in parsed.of_class("shade")]
    assert found == shades and sum(tag == "image" for tag, _ in parsed.tags) == 2 and not parsed.of_class("tile")


def test_tokens_are_counted_supervised_ones_marked_and_cut_ones_struck_through(drawn, tmp_path):
    names = picture(tmp_path, (60, 20), (20, 60))
    both = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "The first. " * 9}]
    (one,), parsed = drawn([{"id": "1", "images": names, "conversations": both}], Tiling(GRIDS), row_tokens=120)
    spans, example = one.example.image_spans, one.example
    assert parsed.tokens("mark", "span") + sum(span.length for span in spans) == len(example.tokens)
    assert parsed.tokens("mark") == example.learned.sum() > 0
    assert 0 < one.lost and f"Cut behind 120 tokens: {len(example.tokens) - 120} are lost, {one.lost} of" in parsed.text
    struck = [after.get("data-tokens", 0) for (tag, _), (_, after) in zip(parsed.tags, parsed.tags[1:]) if tag == "del"]
    assert sum(map(int, struck)) == len(example.tokens) - 120
    links = [attributes["href"][1:] for tag, attributes in parsed.tags if tag == "a"]
    assert links == [attributes["id"] for tag, attributes in parsed.tags if tag == "h3"] and len(links) == 2
    assert "The first. The first." in parsed.text


@pytest.mark.parametrize("template", ["v1", "qwen_2"])
def test_a_conversation_reads_as_it_was_written_by_any_tokenizer(drawn, words, tmp_path, template):
    if template == "qwen_2":
        words = tokenizer.load(chat_models.write_qwen(tmp_path / "qwen"))
    (name,), answer = picture(tmp_path, (40, 20)), "答案 naïve 漢字 🌋 and\n  two  blanks."
    talk = [{"from": "human", "value": f"<image>\n{answer}?"}, {"from": "gpt", "value": answer}]
    _, parsed = drawn([{"id": "1", "image": name, "conversations": talk}], mode="pad", of=(template, words))
    assert parsed.text.count(f"picture 1: 4 features\n{answer}?") == 1 and parsed.text.count(answer) == 2


def test_what_a_record_says_runs_nowhere(drawn, words, tmp_path):
    (name,) = picture(tmp_path, (40, 20))
    talk = [{"from": "human", "value": f"<image>\n{HOSTILE}"}, {"from": "gpt", "value": HOSTILE}]
    records = [{"id": HOSTILE, "image": name, "conversations": talk, HOSTILE: 1}]
    _, parsed = drawn(records, mode="pad")
    bad = page.write([page.Refused(HOSTILE, HOSTILE)], HOSTILE, Format(templates.get("v1"), words, 28, 4, "pad"), 9)
    for each in (parsed, Parsed(bad)):
        assert {tag for tag, _ in each.tags} <= TAGS
        names = {name for _, attributes in each.tags for name in attributes}
        assert not {name for name in names if name.startswith("on")} | names & {"style", "src"}
        assert all(str(attributes.get("href", "#")).startswith(("#", "data:image/jpeg;base64,"))
                   for _, attributes in each.tags)  # fmt: skip
        policy = next(a["content"] for tag, a in each.tags if tag == "meta" and "http-equiv" in a)
        assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-") and "unsafe" not in policy
    assert HOSTILE in parsed.text and HOSTILE in Parsed(bad).text


def test_a_page_that_is_full_says_so(drawn, tmp_path, monkeypatch):
    (name,) = picture(tmp_path, (40, 20))
    monkeypatch.setattr(page, "MAX_BYTES", 9000)
    _, parsed = drawn([{"id": str(i), "image": name, "conversations": TALK} for i in range(9)], mode="pad")
    records = len(parsed.of_class("record"))
    assert 1 <= records < 9 and f"{records} records fill this page" in parsed.text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A config with its base, ten records and their pictures; the words that make tiles of them."""
    from tests.train import tiny  # here only: it brings jax

    config = tiny.write_run(tmp_path_factory.mktemp("run"))
    return ["--config", str(config), "--config.prompt.image_mode=anyres", "--config.prompt.grids=1x2 2x1 2x2",
            "--config.prompt.merge=spatial", "--config.data.images_per_group=5"]  # fmt: skip


def test_show_of_a_config_says_how_pictures_are_tiled(run, capsys):
    assert main(["show", *run, "--first", "2"]) == 0
    out = capsys.readouterr().out
    assert "records.json[1] id='r1': " in out and "r2" not in out and "⟦ ▁A" in out
    assert "picture 1: 28 x 28 pixels, 1 x 2 tiles and the whole: 12 features at positions 51 to 62" in out
    assert main(["show", *run, "--id", "r3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["id"] == "r3" and len(shown["input_ids"]) == len(shown["labels"])
    assert shown["pictures"] == [
        {"size": [28, 28], "grid": [1, 2], "tiles": 3, "features": 12, "newlines": 0, "start": 51}
    ]


def test_look_writes_one_page_and_counts_what_training_refuses(run, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    assert main(["look", *run, "--out", str(out)]) == 0
    assert "drew 8 records, 0 of which training refuses" in capsys.readouterr().out
    assert len(Parsed(out.read_bytes()).of_class("record")) == 8
    rows = [{"id": "a", "image": "no.jpg", "conversations": TALK}, {"id": "b", "conversations": TALK[:1]}]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    assert main(["look", str(tmp_path / "mine.json"), *run, "--images", str(tmp_path), "--out", str(out)]) == 65
    assert "drew 2 records, 2 of which training refuses" in capsys.readouterr().out
    text = Parsed(out.read_bytes()).text
    assert "no.jpg" in text and "Refused: unanswered" in text


@pytest.mark.parametrize(
    "words, said",
    [
        (["look", "RUN", "--out", "page.txt"], "--out page.txt: want a name that ends in .html"),
        (["look", "RUN", "--out", "page.html", "--id", "r99"], "--id r99: no record of"),
        (["look", "RUN", "--out", "page.html", "--id", "r99", "--first", "2"], "--id r99: no record of"),
        (["look", "r.json", "--out", "page.html"], "the following arguments are required: --config"),
        (["show", "r.json", "--images", "i", "--tokenizer", "t"], "--images i: pictures are opened with --config FILE"),
        (["show"], "the following arguments are required: RECORDS, or --config FILE"),
        (["show", "RUN", "--tokenizer", "t"], "--tokenizer: the config says it"),
        (["show", "RUN", "--first", "0"], "--first: 0: want 1 or more"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(run, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    at = words.index("RUN") if "RUN" in words else 0
    try:
        code = main([*words[:at], *run, *words[at + 1 :]] if at else words)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 64 and said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
