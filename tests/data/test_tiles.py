"""Records with tiled pictures: measured from headers, planned, and refused, on a disk and in a bucket."""

import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from llava_jax.data import index
from llava_jax.data.check import Checks, rules
from llava_jax.data.packed import Packed
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.sources import open_source
from llava_jax.data.validate import validate
from llava_jax.errors import DataError
from llava_jax.prompt import templates, tokenizer
from llava_jax.prompt.anyres import Tiling
from llava_jax.prompt.encode import Format
from llava_jax.prompt.images import image_size

WORDS = tokenizer.load(Path(__file__).parent.parent / "golden" / "tiny_llama.model", legacy=True)
FORMAT = Format(templates.get("v1"), WORDS, 28, 4, "anyres", tiling=Tiling(((1, 2), (2, 1), (2, 2))))
SIZES = [(60, 20), (50, 52), (20, 60)]  # 2, 4 and 2 tiles beside the whole


def write(folder, sizes=SIZES):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    records = [{"id": str(i), "image": f"{i}.png", "conversations": turns} for i in range(len(SIZES))]
    (folder / "records.json").write_text(json.dumps(records))
    for i, size in enumerate(sizes):
        Image.new("RGB", size, "red").save(folder / f"{i}.png")
    return open_source(folder / "records.json", folder)


def feed(source, cache=None, images=11, skip_budget=0.0):
    return Packed(sources=[source], format=FORMAT, rows=1, row_tokens=400, images_per_group=images, order="sequential",
                  threads=1, cache_dir=cache, skip_budget=skip_budget)  # fmt: skip


def test_tiles_are_counted_from_headers_and_kept_only_where_every_picture_was_there(tmp_path):
    source = write(tmp_path, SIZES[:2])
    assert index.sizes(source, FORMAT, tmp_path / "kept")[:, 1].tolist() == [3, 5, 0]
    write(tmp_path)
    assert index.sizes(source, FORMAT, tmp_path / "kept")[:, 1].tolist() == [3, 5, 3]
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert index.sizes(source, FORMAT, tmp_path / "kept")[:, 1].tolist() == [3, 5, 3]  # from the cache


def test_hosts_whose_pictures_differ_have_other_plans(tmp_path):
    (tmp_path / "other").mkdir()
    one, other = write(tmp_path), write(tmp_path / "other", [SIZES[1]] * 3)
    assert feed(one).state()["plan"] != feed(other).state()["plan"]  # compared before anything is compiled


def padded(source, cache, skip_budget):
    return Pipeline(sources=[source], format=FORMAT, batch_samples=3, row_tokens=200, images_per_group=5, threads=1,
                    order="sequential", lengths=(150,), cache_dir=cache, skip_budget=skip_budget)  # fmt: skip


@pytest.mark.parametrize("number, size", [("1", (20, 60)), ("0", (900, 900))])
def test_a_picture_that_was_replaced_after_rows_were_planned_costs_itself_alone(tmp_path, number, size):
    """Of fewer or more tiles than its row and its pool have room for; the others train as if nothing had happened."""
    source, cache, counts = write(tmp_path), tmp_path / "kept", {}
    for name, made in (("packed", feed), ("padded", padded)):
        write(tmp_path)
        before, _ = next(iter(made(source, cache, skip_budget=0.4)))
        Image.new("RGB", size, "red").save(tmp_path / f"{number}.png")
        again = made(source, cache, skip_budget=0.4)
        after, _ = next(iter(again))
        assert [finding.reason for finding in again.bad] == ["replaced_image"] and again.bad[0].id == number
        assert before.tokens.shape == after.tokens.shape and before.weights.sum() > after.weights.sum() > 0
        counts[name] = before.weights.sum(), after.weights.sum()
        with pytest.raises(DataError, match=rf"id='{number}' replaced_image: .* delete WORKDIR/lengths"):
            next(iter(made(source, cache, skip_budget=0.0)))
    assert counts["packed"] == counts["padded"]


def test_validate_refuses_the_tiles_that_training_refuses(tmp_path):
    source = write(tmp_path)
    checks = Checks(rules(FORMAT.template, WORDS), FORMAT, 400, 4)
    refused = [[finding.reason for finding in verdict.findings if finding.fatal]
               for verdict in validate(source, checks)]  # fmt: skip
    assert refused == [[], ["too_many_images"], []]


def refusals(source, row_tokens, images):
    """The first record's problem by `validate`, which training raises with the same words."""
    checks = Checks(rules(FORMAT.template, WORDS), FORMAT, row_tokens, images)
    found = next(finding for finding in next(validate(source, checks, open_images=True)).findings if finding.fatal)
    for made in (Packed(rows=1, skip_budget=0.0, **_settings(source, row_tokens, images)),
                 Pipeline(batch_samples=3, skip_budget=0.0, **_settings(source, row_tokens, images))):  # fmt: skip
        with pytest.raises(DataError) as error:
            list(made)
        assert "id='0'" in str(error.value) and found.reason in str(error.value), error.value
    feeds = [Packed(rows=1, skip_budget=0.4, **_settings(source, row_tokens, images)),
             Pipeline(batch_samples=3, skip_budget=0.4, **_settings(source, row_tokens, images))]  # fmt: skip
    for made in feeds:
        seen = [id for _, ids in made for id in ids]
        assert {"1", "2"} <= set(seen) and {one.id for one in made.bad} == {"0"}
    return found


def _settings(source, row_tokens, images):
    return {"sources": [source], "format": FORMAT, "row_tokens": row_tokens, "images_per_group": images,
            "order": "sequential", "threads": 0, "one_pass": True}  # fmt: skip


def test_a_picture_of_an_absurd_aspect_is_refused_by_id(tmp_path):
    source = write(tmp_path, [(1, 5000), *SIZES[1:]])
    assert index.sizes(source, FORMAT)[:, 1].tolist() == [0, 5, 3]
    found = refusals(source, 400, 11)
    assert found.reason == "bad_image"
    assert "1 x 5000 pixels, one side more than 200 times the other: cut it" in found.detail


def test_more_tiles_than_a_pool_or_a_row_holds_name_the_key_to_raise(tmp_path):
    source = write(tmp_path, [(50, 52), (60, 20), (20, 60)])
    tokens = index.sizes(source, FORMAT)[:, 0]
    found = refusals(source, 400, 4)
    assert found.reason == "too_many_images"
    assert found.detail == "5 images for images_per_group=4: set data.images_per_group=5, or drop the record"
    assert tokens[0] > tokens[1:].max()
    found = refusals(source, int(tokens[1:].max()), 11)
    assert found.reason == "no_learned_tokens"
    assert found.detail.endswith("raise data.row_tokens (and data.sample_tokens where it is set), or drop the record")


def test_the_size_of_a_picture_in_a_bucket_is_read(bucket):
    place = epath.Path(bucket) / "a.png"
    with place.open("wb") as file:
        Image.fromarray(np.zeros((40, 90, 3), np.uint8)).save(file, "PNG")
    assert image_size(str(place)) == (90, 40)
