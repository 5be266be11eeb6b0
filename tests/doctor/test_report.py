"""Lines of several processes become one table."""

import json

from llava_jax.doctor import report
from llava_jax.doctor.report import FAIL, OK, SKIPPED, WARN, Line


def test_the_worst_verdict_of_all_processes_is_shown_and_its_process_named():
    fine = [Line("disk", OK, "fine")]
    [line] = report.merge([fine, [Line("disk", FAIL, "full", remedy="free some")], fine])
    assert (line.verdict, line.figure, line.remedy) == (FAIL, "process 1 of 3: full", "free some")


def test_of_several_numbers_the_lowest_is_shown():
    processes = [[Line("speed", OK, f"{value} GB/s", value=value)] for value in (7.0, 5.0, 6.0)]
    assert report.merge(processes)[0].figure == "5.0 GB/s (process 1, the lowest of 3)"


def test_where_all_processes_say_the_same_none_is_named():
    assert report.merge([[Line("rows", OK, "all")], [Line("rows", OK, "all")]]) == [Line("rows", OK, "all")]


def test_a_line_that_only_some_processes_have_names_the_first_of_them():
    assert report.merge([[], [Line("a", FAIL, "x")], [Line("a", FAIL, "y")]])[0].figure == "process 1 of 3, 1 more: x"


def test_a_number_below_what_is_expected_is_a_warning_with_a_remedy():
    lines = [report.threshold_line("memory", value, "GB/s", 2.0, "at least 2", "another chip") for value in (2.0, 1.9)]
    good, bad = lines
    assert (good.verdict, good.remedy, bad.verdict, bad.remedy) == (OK, "", WARN, "another chip")
    unknown = report.threshold_line("memory", 0.1, "GB/s", None, "", "another chip")
    assert (unknown.verdict, unknown.expectation) == (OK, "")


def test_a_remedy_stands_below_its_line_and_a_long_cell_breaks_no_column():
    lines = [Line("a", OK, "x" * 200, "much"), Line("memory", WARN, "slow", "fast", "another chip")]
    rows = report.table(lines).splitlines()
    assert rows[0].split() == ["verdict", "check", "figure", "expectation"]
    assert rows[2].split() == ["warn", "memory", "slow", "fast"] and rows[3].strip() == "remedy: another chip"
    assert report.summary(lines, 12.4) == "2 lines: 1 ok, 1 warn; 12 s"


def test_the_file_holds_every_line_of_every_process_and_the_worst_verdict():
    lines = [report.as_json([Line("a", OK, "1")]), report.as_json([report.skipped_line("a", "there is none")])]
    processes = [{"process": number, "lines": own} for number, own in enumerate(lines)]
    content = json.loads(report.document({"chip": "v5e"}, processes, 3.14))
    assert (content["verdict"], content["chip"], content["secs"]) == (SKIPPED, "v5e", 3.1)
    assert content["processes"][1]["lines"][0]["figure"] == "because there is none"
