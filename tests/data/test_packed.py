"""What the padded pipeline shows, in fewer rows: each sample once, the same on all hosts and after every restart."""

import collections
import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

from llava_jax.data.pipeline import Pipeline
from llava_jax.distributed import Rows
from llava_jax.errors import DataError

BAD = {"id": "the bad one", "conversations": [{"from": "human", "value": "Hi"}]}


def part(number: int, of: int) -> Rows:
    """What one of `of` processes loads."""
    return Rows((number,), (number,), of)


def take(pipeline, steps):
    return list(itertools.islice(pipeline, steps))


def same(one, two):
    assert [ids for _, ids in one] == [ids for _, ids in two]
    for (a, _), (b, _) in zip(one, two, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def samples(batch, features=4):
    """What a batch holds, sample by sample: (tokens, targets, weights, positions, where images are, pictures)."""
    found = []
    for row, segments in enumerate(batch.segments):
        group = row // (len(batch.tokens) // len(batch.pixels))
        for number in range(1, segments.max(initial=0) + 1):
            at = np.flatnonzero(segments == number)
            assert (np.diff(at) == 1).all()
            slots = batch.image_slots[row, at]
            pictures = [batch.pixels[group, slot // features].tobytes() for slot in slots[slots >= 0][::features]]
            assert np.array_equal(slots[slots >= 0] % features, np.tile(np.arange(features), len(pictures)))
            fields = (batch.tokens, batch.targets, batch.weights, batch.positions)
            found.append((*(x[row, at].tobytes() for x in fields), (slots >= 0).tobytes(), *pictures))
    return found


def test_packed_rows_hold_exactly_what_padded_rows_hold(make, build, v1):
    records = make(30)
    shown = [sample for batch, _ in build(records, one_pass=True) for sample in samples(batch)]
    settings = {"format": v1, "batch_samples": 5, "row_tokens": 200, "threads": 0, "one_pass": True}
    padded = [sample for batch, _ in Pipeline(sources=[records], **settings) for sample in samples(batch)]
    assert len(shown) == 30 and collections.Counter(shown) == collections.Counter(padded)


def test_an_epoch_shows_every_sample_once_and_ends_with_padding(make, build):
    pipeline = build([make(30), make([record.raw | {"id": f"b{record.id}"} for record in make(10)], "b.json", 2.0)])
    steps = pipeline.steps_of(1)
    batches = take(pipeline, 2 * steps)
    shown = [collections.Counter(itertools.chain(*(ids for _, ids in part))) for part in
             (batches[:steps], batches[steps:])]  # fmt: skip
    assert shown[0] == shown[1] == {f"r{i}": 1 for i in range(30)} | {f"br{i}": 2 for i in range(10)}
    assert [ids for _, ids in batches[:steps]] != [ids for _, ids in batches[steps:]]
    assert (pipeline.records, pipeline.samples) == (40, 50) and steps < 50 / 4 < 50
    assert all(batch.weights.any() for batch, _ in batches)


def test_ids_come_in_the_order_of_the_samples_in_their_rows(make, build, v1):
    for batch, ids in take(build(make(20)), 4):
        assert len(ids) == len(samples(batch)) > 4


def test_resuming_at_every_step_equals_never_having_stopped(make, build):
    steps = 2 * build(make(30)).steps_of(1) + 1
    whole = take(build(make(30)), steps)
    for step in range(steps):
        before = build(make(30))
        take(before, step)
        state = json.loads(json.dumps(before.state()))
        assert state["step"] == step
        after = build(make(30), threads=0)
        after.restore(state)
        same(take(after, 2), whole[step : step + 2] if step + 2 <= steps else take(build(make(30)), step + 2)[step:])


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("one_pass", [False, True])
def test_the_parts_of_all_hosts_are_the_batch_of_one(make, build, hosts, one_pass):
    settings = {"rows": 8, "one_pass": one_pass}
    steps = build(make(40), **settings).steps_of(1)
    whole = take(build(make(40), **settings), steps)
    parts = [take(build(make(40), part=part(host, hosts), **settings), steps) for host in range(hosts)]
    for step, (batch, ids) in enumerate(whole):
        assert sum((part[step][1] for part in parts), ()) == ids
        for name, field in batch._asdict().items():
            joined = np.concatenate([part[step][0]._asdict()[name] for part in parts])
            assert np.array_equal(joined, field), name


def test_a_state_may_move_to_another_number_of_hosts(make, build):
    two = build(make(30), part=part(1, 2))
    take(two, 3)
    one = build(make(30))
    one.restore(two.state())
    same(take(one, 2), take(build(make(30)), 5)[3:])


def test_a_state_of_another_plan_is_refused_with_every_difference(make, build, v1):
    state = build(make(30)).state()
    with pytest.raises(ValueError, match="rows: saved 4, now 8; row_tokens: saved 200, now 160; rows_per_group: saved"):
        build(make(30), rows=8, row_tokens=160, rows_per_group=4).restore(state)
    with pytest.raises(ValueError, match="images_per_group: saved 4, now 3"):
        build(make(30), images_per_group=3).restore(state)
    with pytest.raises(ValueError, match=r"fit this run \(plan: saved '[^;]*\)"):
        build(make(30), format=dataclasses.replace(v1, image_features=5)).restore(state)
    padded = Pipeline(sources=[make(30)], format=v1, batch_samples=4, row_tokens=200, seed=5)
    with pytest.raises(ValueError, match="rows: saved 'nothing', now 4"):
        build(make(30)).restore(padded.state())
    with pytest.raises(ValueError, match="batch_samples: saved 'nothing'"):
        padded.restore(state)


def test_a_long_sample_is_cut_and_its_lost_targets_are_counted(make, build, v1):
    records = make(14)
    pipeline = build(records, row_tokens=80, images_per_group=2, one_pass=True)
    padded = Pipeline(sources=[records], format=v1, batch_samples=7, row_tokens=80, threads=0, one_pass=True)
    packed, rows = ([sample for batch, _ in feed for sample in samples(batch)] for feed in (pipeline, padded))
    assert collections.Counter(packed) == collections.Counter(rows)
    assert pipeline.lost_targets == padded.lost_targets > 0


def test_a_cut_never_falls_inside_an_image(make, build):
    """Rows end at every place around the last of three images; `samples` checks that every image is whole."""
    words = " word" * 55
    turns = [{"from": "human", "value": f"<image>{words} <image>?"}, {"from": "gpt", "value": "No."}]
    turns = [{"from": "human", "value": "<image> Hi"}, {"from": "gpt", "value": "Ho"}, *turns]
    rows = [{"id": f"m{i}", "image": ["0.png", "1.png", "2.png"], "conversations": turns} for i in range(3)]
    cut = []
    for row_tokens in range(110, 196):
        pipeline = build(make(rows), row_tokens=row_tokens, images_per_group=6, one_pass=True)
        cut.append([len(sample) - 5 for batch, _ in pipeline for sample in samples(batch)])
    assert {tuple(counts) for counts in cut} == {(2, 2, 2), (3, 3, 3)}


def test_a_bad_record_stops_a_strict_run_when_its_batch_is_reached(make, build):
    rows = [record.raw for record in make(20)]
    source = make([*rows[:9], BAD, *rows[9:]])
    shown = [ids for _, ids in build(source, skip_budget=0.1, one_pass=True)]
    step = next(step for step, ids in enumerate(shown) if "the bad one" in ids)
    pipeline = build(source, one_pass=True)
    with pytest.raises(DataError, match=r"a\.json\[9\] id='the bad one' unanswered: .*skip_budget=0.0 of 21 records"):
        list(pipeline)
    assert pipeline.state()["step"] == step


def test_within_the_budget_a_bad_record_leaves_a_hole_and_is_counted_once(make, build, folder, caplog):
    rows = [record.raw for record in make(20)]
    (folder / "half.png").write_bytes((folder / "1.png").read_bytes()[:40])
    rows[2]["image"], rows[4]["image"] = "half.png", "gone.png"
    pipeline = build(make(rows), skip_budget=0.1)
    steps = pipeline.steps_of(1)
    batches = take(pipeline, 2 * steps)
    assert {(finding.id, finding.reason) for finding in pipeline.bad} == {("r2", "bad_image"), ("r4", "missing_image")}
    assert len(caplog.records) == 2 and "(2 of 2 allowed)" in caplog.text
    assert sum(len(samples(batch)) for batch, _ in batches) == 36 and sum(len(ids) for _, ids in batches) == 40
    with pytest.raises(DataError, match=r"Bad records so far: 2; skip_budget=0.05 of 20 records allows 1"):
        take(build(make(rows), skip_budget=0.05), steps)


def test_more_images_than_a_pool_holds_are_a_bad_record(make, build):
    turns = [{"from": "human", "value": "<image> <image> <image> Same?"}, {"from": "gpt", "value": "No."}]
    row = {"id": "three", "image": ["0.png", "1.png", "2.png"], "conversations": turns}
    with pytest.raises(DataError, match="too_many_images: 3 images for images_per_group=2"):
        take(build(make([row]), images_per_group=2), 1)
    batch, _ = take(build(make([row]), images_per_group=3), 1)[0]
    assert batch.image_slots.max() == 11 and (batch.segments > 0).any(axis=1).sum() == 1


def test_lengths_are_measured_once_and_kept(make, build, tmp_path):
    source = make(20)
    whole = take(build(source, cache_dir=tmp_path / "kept"), 2)
    (kept,) = (tmp_path / "kept").iterdir()
    written = kept.stat().st_mtime_ns
    same(take(build(source, cache_dir=tmp_path / "kept"), 2), whole)
    assert kept.stat().st_mtime_ns == written


def test_contents_say_how_full_the_rows_are(make, build):
    pipeline = build(make(30))
    batches = take(pipeline, pipeline.steps_of(1))
    used = np.mean([(batch.segments > 0).mean() for batch, _ in batches])
    slots = np.mean([batch.pixels.any(axis=(2, 3, 4)).mean() for batch, _ in batches])
    assert 0.5 < used < 1 and f"{used:.1%} of positions" in pipeline.contents
    assert f"and {slots:.1%} of image slots" in pipeline.contents


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_tokens": 4}, "row_tokens=4 is too short for an image, whose features take 4 positions"),
        ({"rows": 6, "part": part(0, 2)},
         "rows=6: want a multiple of 4, which is mesh.data x mesh.fsdp=2 x rows_per_group=2"),
        ({"rows": 0}, "rows=0: want at least 1"),
        ({"images_per_group": 0}, "images_per_group=0: want at least 1"),
        ({"order": "modality_length"}, "order='modality_length': packed rows come in order shuffle or sequential"),
        ({"skip_budget": 1.0}, "skip_budget=1.0"),
        ({"sources": []}, "sources=() is empty"),
    ],
)
def test_arguments_that_do_not_fit_are_named(make, build, changes, message):
    sources = changes.pop("sources", [make(4)])
    with pytest.raises(ValueError, match=re.escape(message)):
        build(sources, **changes)
