"""Names of parameters and the tables over them."""

import numpy as np
import pytest

from llava_jax import params

TREE = {
    "llm": {"blocks": {"q": {"kernel": np.zeros((2, 3, 4))}}, "norm": {"scale": np.zeros(3)}},
    "projector": {"0": {"bias": np.zeros(5)}},
}
NAMES = ["llm/blocks/q/kernel", "llm/norm/scale", "projector/0/bias"]


def test_flatten_and_unflatten_are_inverse():
    flat = params.flatten(TREE)
    assert list(flat) == NAMES
    assert params.unflatten(flat) == TREE
    assert params.flatten({}) == {} == params.unflatten({})


def test_the_first_matching_row_wins():
    table = (("llm/norm/.*", 1), ("llm/.*", 2), (".*", None))
    assert params.lookup(NAMES, table, "rates") == {NAMES[0]: 2, NAMES[1]: 1, NAMES[2]: None}


def test_a_pattern_matches_the_whole_name():
    with pytest.raises(ValueError, match="`rates` covers no row for llm/norm/scale"):
        params.lookup(["llm/norm/scale"], (("llm/norm", 1), ("scale", 2)), "rates")


def test_many_uncovered_names_are_counted():
    with pytest.raises(ValueError, match="a0, a1, a2, a3, a4 and 3 more"):
        params.lookup([f"a{i}" for i in range(8)], (), "decay")


def test_a_row_that_matches_nothing_is_refused_only_in_a_users_table():
    table = (("projektor/.*", 1), (".*", None))
    assert params.lookup(NAMES, table, "sharding")
    with pytest.raises(ValueError, match=r"'projektor/\.\*' matches no parameter; the names begin with llm, projector"):
        params.lookup(NAMES, table, "rates", every_row=True)


def test_a_row_behind_a_wider_one_is_not_idle():
    assert params.lookup(NAMES, ((".*", 1), ("llm/.*", 2)), "rates", every_row=True) == dict.fromkeys(NAMES, 1)


def test_a_broken_pattern_is_refused():
    with pytest.raises(ValueError, match=r"table `init`: '\(' is no regular expression"):
        params.lookup(NAMES, (("(", 1),), "init")


def test_split_and_merge_are_inverse():
    chosen, rest = params.split(TREE, ["projector/0/bias"])
    assert list(params.flatten(chosen)) == ["projector/0/bias"] and list(params.flatten(rest)) == NAMES[:2]
    assert params.merge(rest, chosen) == TREE
    assert params.split(TREE, []) == ({}, TREE)


def test_two_trees_that_share_a_leaf_do_not_merge():
    with pytest.raises(AssertionError):
        params.merge(TREE, TREE)


def test_count_counts_scalars():
    assert params.count(TREE) == 2 * 3 * 4 + 3 + 5 and params.count({}) == 0


def test_an_overview_has_a_line_for_each_name():
    rates = {NAMES[0]: (1e-3, None), NAMES[1]: None, NAMES[2]: 1e-3}
    lines = params.overview(TREE, rates).splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert lines[0].endswith("2x3x4  float64  rate (0.001, None)") and lines[1].endswith("frozen")
