"""What the demo shows: numbers for programs, a table that owns up, a page without links."""

import json

import pytest

from llava_jax.demo import records, report, story, world
from llava_jax.demo.story import Outcome
from llava_jax.demo.test_set import Result

LLAVA = story.FAMILIES["llava"]
SCORES = {"blind": 0.25, "stage1": 0.4, "stage2": 0.9, "stage2_without_stage1": 0.7, "stage2_last_layer": 0.8}


def outcome(folder, scores: dict[str, float]) -> Outcome:
    test_sets = records.write(folder, seed=0, sizes=records.Sizes(4, 40, 40, 4, 2))
    results = {
        name: {part: Result(score, dict.fromkeys(world.KINDS, score), ("red <b>",) * len(test_set.questions))
               for part, test_set in test_sets.items()}
        for name, score in scores.items()
    }  # fmt: skip
    losses = {run.name: [2.0, 1.0, 0.5] for run in LLAVA.runs}
    chat = (test_sets["heldout"].pictures[0], [("user", "Describe the picture."), ("assistant", "a red circle")])
    return Outcome(LLAVA, test_sets, results, losses, chat, 100.04)


@pytest.fixture(scope="module")
def folder_and_outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, outcome(folder, SCORES)


def test_the_numbers_are_those_of_the_table_and_json(folder_and_outcome):
    numbers = json.loads(json.dumps(report.numbers(folder_and_outcome[1])))
    assert {name: numbers[name] for name in SCORES} == SCORES and numbers["secs"] == 100.0
    assert set(numbers["by_kind"]["stage2"]) == set(world.KINDS)
    assert set(numbers["unseen"]) == set(numbers["unseen_by_kind"]) == set(SCORES)


def test_the_table_has_a_line_for_each_run_and_no_complaint(folder_and_outcome):
    text = report.table(folder_and_outcome[1])
    assert all(run.label in text for run in LLAVA.evaluated) and "90.0" in text
    assert text.index("blind") < text.index("after stage 1")
    assert "Not as in the paper" not in text


def test_a_comparison_unlike_the_papers_is_reported(tmp_path):
    text = report.table(outcome(tmp_path, {**SCORES, "stage2_last_layer": 0.95}))
    assert "Not as in the paper: last layer instead of penultimate reaches 95.0, stage 2 90.0" in text


def test_the_page_stands_alone(folder_and_outcome):
    folder, result = folder_and_outcome
    page = report.page(result, folder)
    assert page.count("data:image/jpeg;base64,") == report.CARDS + 1 and page.count("<svg") == 2
    assert "http" not in page and "red &lt;b&gt;" in page and "red <b>" not in page


def test_a_loss_curve_begins_at_the_first_loss():
    assert list(report._smooth([2.0, 1.0])) == pytest.approx([2.0, 1.9])
