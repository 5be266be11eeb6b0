"""The same batches for every number of hosts and after every restart; bad records named, counted or refused."""

import itertools
import json
import re

import numpy as np
import pytest

from llava_jax import distributed
from llava_jax.data import check
from llava_jax.data.pipeline import Pipeline
from llava_jax.distributed import Rows
from llava_jax.errors import DataError


def part(number: int, of: int) -> Rows:
    """What one of `of` processes loads."""
    return Rows((number,), (number,), of)


@pytest.fixture
def build(v1):
    """build(source or sources, ...) -> a pipeline of batches of 4 in rows of 160."""

    def built(sources, **changes):
        sources = sources if isinstance(sources, list) else [sources]
        settings = {"format": v1, "batch_samples": 4, "row_tokens": 160, "threads": 2, "seed": 5}
        return Pipeline(sources=sources, **settings | changes)

    return built


def take(pipeline, steps):
    return list(itertools.islice(pipeline, steps))


def same(one, two):
    """Equal ids and equal arrays, bit for bit, batch after batch."""
    assert [ids for _, ids in one] == [ids for _, ids in two]
    for (a, _), (b, _) in zip(one, two, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_epoch_shows_every_record_once_and_the_last_batch_wraps_around(make, build):
    shown = [ids for _, ids in take(build(make(10)), 6)]
    first, second = sum(shown[:3], ()), sum(shown[3:], ())
    assert len(set(first[:10])) == len(set(second[:10])) == 10
    assert first[10:] == first[:2] and second[10:] == second[:2]
    assert first != second


def test_text_and_image_records_share_a_batch(make, build, v1):
    batch, ids = take(build(make(4), order="sequential"), 1)[0]
    assert ids == ("r0", "r1", "r2", "r3")
    assert ((batch.image_slots >= 0).sum(1)).tolist() == [0, 4, 4, 0]
    assert batch.pixels.shape == (4, 1, 8, 8, 3) and not batch.pixels[0].any() and batch.pixels[1].any()
    answer = batch.targets[0][batch.weights[0] > 0]
    assert v1.tokenizer.decode(answer.tolist()).strip() == "A cat."


@pytest.mark.parametrize("order", ["shuffle", "modality_length", "sequential"])
def test_resuming_at_every_step_equals_never_having_stopped(make, build, order):
    whole = take(build(make(9), order=order), 7)
    for step in range(7):
        before = build(make(9), order=order)
        take(before, step)
        state = json.loads(json.dumps(before.state()))
        assert state["step"] == step
        after = build(make(9), order=order, threads=0)
        after.restore(state)
        same(take(after, 7 - step), whole[step:])
    same(take(build(make(9), order=order, start_step=4), 3), whole[4:])


def test_the_state_is_that_of_the_last_batch_handed_out_whatever_runs_ahead(make, build):
    pipeline = build(make(9))
    batches = iter(pipeline)
    for step in range(1, 4):
        next(batches)
        assert pipeline.state()["step"] == step
    assert pipeline.state(step=2)["step"] == 2


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("changes", [{}, {"order": "modality_length", "lengths": (76, 80)}, {"one_pass": True}])
def test_the_parts_of_all_hosts_are_the_batch_of_one(make, build, hosts, changes):
    steps = 3
    whole = take(build(make(11), **changes), steps)
    parts = [take(build(make(11), part=part(host, hosts), **changes), steps) for host in range(hosts)]
    for step, (batch, ids) in enumerate(whole):
        assert sum((part[step][1] for part in parts), ()) == ids
        for name, field in batch._asdict().items():
            joined = np.concatenate([part[step][0]._asdict()[name] for part in parts])
            assert np.array_equal(joined, field), name


def test_a_state_may_move_to_another_number_of_hosts(make, build):
    two = build(make(11), part=part(1, 2))
    take(two, 2)
    one = build(make(11))
    one.restore(two.state())
    same(take(one, 1), take(build(make(11)), 3)[2:])


def test_a_state_of_other_data_or_settings_is_refused_with_every_difference(make, build):
    state = build(make(9)).state()
    with pytest.raises(ValueError, match=r"seed: saved 5, now 6; batch_samples: saved 4, now 2"):
        build(make(9), seed=6, batch_samples=2).restore(state)
    with pytest.raises(ValueError, match=r"fingerprint: saved .*; records: saved 9, now 8"):
        build(make(8)).restore(state)
    with pytest.raises(ValueError, match="fingerprint: saved"):
        build(make(9, weight=2.0)).restore(state)
    with pytest.raises(ValueError, match="order: saved 'shuffle', now 'sequential'"):
        build(make(9), order="sequential").restore(state)
    for broken in ({}, state | {"step": -1}, state | {"step": None}, state | {"version": 9}):
        with pytest.raises(ValueError, match="does not fit this run"):
            build(make(9)).restore(broken)


def test_two_sources_are_mixed_by_weight(make, build):
    rows = [{"id": f"b{i}", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
            for i in range(4)]  # fmt: skip
    pipeline = build([make(6, weight=0.5), make(rows, "b.jsonl", weight=2)])
    assert (pipeline.records, pipeline.samples) == (10, 11)
    shown = sum((ids for _, ids in take(pipeline, 6)), ())
    first, second = shown[:11], shown[12:23]
    for epoch in (first, second):
        assert sorted(id for id in epoch if id[0] == "b") == sorted([f"b{i}" for i in range(4)] * 2)
    assert {id for id in first + second if id[0] == "r"} == {f"r{i}" for i in range(6)}


def test_a_batch_takes_the_shortest_row_that_holds_its_longest_record(make, build):
    pipeline = build(make(8), order="sequential", batch_samples=1, lengths=(72, 80))
    widths = [batch.tokens.shape[1] for batch, _ in take(pipeline, 8)]
    whole = take(build(make(8), order="sequential", batch_samples=1), 8)
    plain = [int((batch.segments > 0).sum()) for batch, _ in whole]
    assert widths == [next(w for w in (72, 80, 160) if n <= w) for n in plain]
    assert len(set(widths)) == 3


def test_one_pass_ends_and_fills_its_last_batch_with_rows_of_no_weight(make, build):
    pipeline = build(make(6, weight=3), one_pass=True, order="modality_length")
    batches = list(pipeline)
    assert [ids for _, ids in batches] == [("r0", "r1", "r2", "r3"), ("r4", "r5")]
    last = batches[1][0]
    assert not last.weights[2:].any() and not last.segments[2:].any() and last.weights[:2].any()
    assert list(pipeline) == [] and pipeline.bad == ()


BAD = {"id": "the bad one", "conversations": [{"from": "human", "value": "Hi"}]}


def test_a_bad_record_stops_a_strict_run_when_its_batch_is_reached(make, build):
    rows = [r.raw for r in make(8)]
    source = make([*rows[:5], BAD, *rows[5:]])
    pipeline = build(source, order="sequential")
    batches = iter(pipeline)
    next(batches)
    with pytest.raises(DataError, match=r"a\.json\[5\] id='the bad one' unanswered: .*skip_budget=0.0 of 9 records"):
        next(batches)
    assert pipeline.state()["step"] == 1
    with pytest.raises(DataError, match="the bad one"):
        take(pipeline, 1)


def test_within_the_budget_bad_records_become_rows_without_weight_and_are_counted_once(make, build, folder, caplog):
    rows = [r.raw for r in make(8)]
    (folder / "half.png").write_bytes((folder / "1.png").read_bytes()[:40])
    rows[2]["image"] = "half.png"
    rows[4]["image"] = "gone.png"
    pipeline = build(make(rows), order="sequential", skip_budget=0.25)
    batches = take(pipeline, 4)
    assert [finding.reason for finding in pipeline.bad] == ["bad_image", "missing_image"]
    assert [finding.id for finding in pipeline.bad] == ["r2", "r4"]
    assert len(caplog.records) == 2 and "(2 of 2 allowed)" in caplog.text
    for step, row in [(0, 2), (1, 0), (2, 2), (3, 0)]:
        batch, ids = batches[step]
        assert ids[row] == f"r{2 if row else 4}" and not batch.weights[row].any() and batch.weights.any()
    with pytest.raises(DataError, match=r"Bad records so far: 2; skip_budget=0.2 of 8 records allows 1"):
        take(build(make(rows), order="sequential", skip_budget=0.2), 2)


def test_a_record_with_no_target_left_in_its_row_is_bad_and_other_losses_are_counted(make, build):
    pipeline = build(make(6), order="sequential", row_tokens=80)
    whole = sum(batch.weights.sum() for batch, _ in take(build(make(6), order="sequential"), 2))
    kept = sum(batch.weights.sum() for batch, _ in take(pipeline, 2))
    assert pipeline.lost_targets == whole - kept > 0
    with pytest.raises(DataError, match=r"no_learned_tokens: \d+ tokens for a row of 40"):
        take(build(make(6), row_tokens=40), 1)


def test_more_images_than_a_row_takes_are_a_bad_record(make, build):
    turns = [{"from": "human", "value": "<image> <image> Same?"}, {"from": "gpt", "value": "No."}]
    row = {"id": "two", "image": ["0.png", "1.png"], "conversations": turns}
    with pytest.raises(DataError, match="too_many_images: 2 images for images_per_group=1"):
        take(build(make([row])), 1)
    batch, _ = take(build(make([row]), images_per_group=2, batch_samples=1), 1)[0]
    assert batch.image_slots[batch.image_slots >= 0].tolist() == list(range(8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "shufle"}, "order='shufle' is unknown: did you mean 'shuffle'?"),
        ({"part": part(0, 3)}, "batch_samples=4: want a multiple of mesh.data x mesh.fsdp=3"),
        ({"group_samples": 3}, "group_samples=3"),
        ({"batch_samples": 0}, "batch_samples=0: want at least 1"),
        ({"lengths": (200,)}, "lengths=(200,): want rising row lengths up to row_tokens=160"),
        ({"skip_budget": 1.0}, "skip_budget=1.0"),
        ({"sources": []}, "sources=() is empty"),
    ],
)
def test_arguments_that_do_not_fit_are_named(make, build, changes, message):
    sources = changes.pop("sources", [make(4)])
    with pytest.raises(ValueError, match=re.escape(message)):
        build(sources, **changes)


def shares(weights: np.ndarray, group: int) -> np.ndarray:
    """Each target's share of the mean over groups of rows of their token means."""
    groups = weights.reshape(-1, group * weights.shape[1]) > 0
    means = groups / np.maximum(1, groups.sum(axis=1, keepdims=True))
    return means.reshape(weights.shape) / groups.any(axis=1).sum()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_mean_of_groups_means_is_in_the_weights_whoever_loads_the_rows(make, build, hosts):
    plain = take(build(make(11), batch_samples=8, group_samples=4), 3)
    settings = {"batch_samples": 8, "group_samples": 4, "group_mean": True}
    parts = [take(build(make(11), part=part(host, hosts), **settings), 3) for host in range(hosts)]
    for step, (batch, ids) in enumerate(plain):
        joined = np.concatenate([part[step][0].weights for part in parts])
        assert sum((part[step][1] for part in parts), ()) == ids
        assert len({len(group) for group in np.split(batch.weights > 0, 2)}) == 1
        np.testing.assert_allclose(joined / joined.sum(), shares(batch.weights, 4), rtol=1e-6)


def test_what_is_cut_off_is_told_once_with_its_record_and_at_the_end_for_all_processes(make, build, caplog):
    rows = [record.raw for record in make(12)]
    rows[7]["mood"] = rows[9]["mood"] = "glad"
    settings = {"order": "sequential", "row_tokens": 80, "one_pass": True}
    whole = build(make(rows), **settings | {"row_tokens": 160})
    kept = sum(int((batch.weights > 0).sum()) for batch, _ in build(make(rows), **settings))
    caplog.clear()
    total = sum(int((batch.weights > 0).sum()) for batch, _ in whole)
    assert whole.tally.lines() == ["keys of records that were not read: mood"] and len(caplog.records) == 1
    caplog.clear()
    parts = [build(make(rows), part=part(number, 2), **settings) for number in range(2)]
    for feed in parts:
        list(feed)
    told = [record.message for record in caplog.records if "cuts record" in record.message]
    assert len(told) == 2 and all("Raise data.row_tokens" in line for line in told)
    assert sum(feed.lost_targets for feed in parts) == total - kept > 0
    samples = sum(int(feed.tally.targets[:, 2].sum()) for feed in parts)
    one = build(make(rows), **settings)
    list(one)
    (line, keys) = one.tally.lines()
    share = f"{total - kept:,} of {total:,} supervised tokens ({(total - kept) / total:.1%})"
    assert line.startswith(f"{share} were cut off in {samples:,} samples: rows hold 80 tokens. Raise data.row_tokens")
    assert keys == "keys of records that were not read: mood"


def test_processes_that_hold_the_same_rows_count_them_once(make, build, monkeypatch):
    """Where the tensor axis spans processes, several load one part."""
    settings = {"order": "sequential", "row_tokens": 80, "one_pass": True}
    feeds = [build(make(12), part=part(number, 2), **settings) for number in (0, 1, 1)]
    for feed in feeds:
        list(feed)
    said = []
    monkeypatch.setattr(distributed, "exchange", lambda name, value: said.append(json.loads(json.dumps(value))) or said)
    lines = [feed.tally.lines() for feed in feeds][-1]
    whole = build(make(12), **settings)
    list(whole)
    said.clear()
    assert lines == whole.tally.lines() != []


def test_the_weight_of_a_record_is_that_of_its_tokens(make, build):
    rows = [record.raw | {"weight": 0.5 * (1 + i)} for i, record in enumerate(make(4))]
    batch, _ = take(build(make(rows), order="sequential"), 1)[0]
    for i, row in enumerate(batch.weights):
        assert set(row.tolist()) == {0.0, 0.5 * (1 + i)}


def test_a_fault_of_a_library_gets_through_with_the_record_s_name(make, build, monkeypatch):
    """Not as a bad record: nobody knows what it spoils."""

    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(check, "encode", broken)
    for threads in (0, 2):
        with pytest.raises(RuntimeError, match="a bug") as error:
            take(build(make(4), order="sequential", threads=threads), 1)
        assert any(re.fullmatch(r"while reading .*a\.json\[\d\]", note) for note in error.value.__notes__)
