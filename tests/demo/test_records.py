"""The world on disk: what the training reads, and that no test set shows or asks what training showed."""

import json

import numpy as np
import pytest

from llava_jax.data.sources import open_source
from llava_jax.demo import bases, records, world
from llava_jax.prompt import templates, tokenizer
from llava_jax.prompt.encode import Format, encode
from llava_jax.prompt.images import image_size

SIZES = records.Sizes(train=40, heldout=40, unseen=40, heldout_per_kind=12, unseen_per_kind=6)


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, records.write(folder, seed=0, sizes=SIZES)


@pytest.mark.parametrize("name, template, row_tokens", [("pretrain.json", "plain", 48), ("finetune.json", "v1", 128)])
def test_every_record_fits_into_the_rows_of_its_stage(world_folder, name, template, row_tokens):
    folder, _ = world_folder
    text_tokenizer = tokenizer.load(bases.ASSETS / "llama")
    format = Format(templates.get(template), text_tokenizer, image_size=48, image_features=16, image_mode="pad")
    for record in open_source(folder / name, folder):
        example = encode(record.conversation, format, image_root=folder)
        assert len(example.tokens) <= row_tokens and len(example.images) == 1 and example.learned.any()


def test_the_blind_records_differ_in_nothing_but_the_picture(world_folder):
    folder, _ = world_folder
    sighted, blind = (json.loads((folder / name).read_text()) for name in (records.FINETUNE, records.FINETUNE_BLIND))
    assert len(sighted) == records.DIALOGUES * SIZES.train
    assert {record["image"] for record in blind} == {records.BLANK}
    assert [{**record, "image": ""} for record in blind] == [{**record, "image": ""} for record in sighted]


def test_no_test_set_is_about_a_scene_or_a_picture_of_training(world_folder):
    folder, test_sets = world_folder
    captions = {record["conversations"][1]["value"] for record in json.loads((folder / records.PRETRAIN).read_text())}
    files = {record["image"] for record in json.loads((folder / records.FINETUNE).read_text())}
    for name, test_set in test_sets.items():
        assert {world.split_of(scene) for scene in test_set.scenes} == {name}
        assert not captions & {world.caption(scene) for scene in test_set.scenes}
        assert not files & set(test_set.pictures)


def test_no_training_text_names_an_unseen_pair_that_it_shows(world_folder):
    folder, _ = world_folder
    for record in json.loads((folder / records.FINETUNE).read_text()):
        text = " ".join(turn["value"] for turn in record["conversations"])
        assert not any(str(pair) in text for pair in world.UNSEEN_PAIRS)


def test_a_test_set_asks_each_kind_equally_often_about_its_own_pictures(world_folder):
    _, test_sets = world_folder
    for name, per_kind in (("heldout", SIZES.heldout_per_kind), ("unseen", SIZES.unseen_per_kind)):
        kinds = [question.turn.kind for question in test_sets[name].questions]
        assert all(per_kind <= kinds.count(kind) < per_kind + 5 for kind in world.KINDS)
        rng = np.random.default_rng(0)
        for picture, turn in test_sets[name].questions:
            scene = test_sets[name].scenes[picture]
            if turn.kind in ("count", "describe"):
                assert turn == world.ask(turn.kind, scene, rng)


def test_a_wide_world_has_wide_pictures_in_dialogues_and_questions_alone(world_folder, tmp_path):
    folder, test_sets = world_folder
    wide_sets = records.write(tmp_path, seed=0, sizes=SIZES, wide=4)
    sizes = {name: {image_size(str(path)) for path in (tmp_path / name).glob("*.jpg")}
             for name in ("train", "wide", "heldout", "unseen")}  # fmt: skip
    assert sizes == {"train": {(96, 96)}, "wide": {(384, 96)}, "heldout": {(384, 96)}, "unseen": {(384, 96)}}
    assert (tmp_path / records.PRETRAIN).read_bytes() == (folder / records.PRETRAIN).read_bytes()
    square, wide = (json.loads((place / records.FINETUNE).read_text()) for place in (folder, tmp_path))
    assert {record["image"].split("/")[0] for record in wide} == {"wide"} and len(wide) == len(square)
    assert all({world.split_of(scene) for scene in one.scenes} == {name} for name, one in wide_sets.items())


def test_the_same_seed_writes_the_same_files(world_folder, tmp_path):
    folder, _ = world_folder
    records.write(tmp_path, seed=0, sizes=SIZES)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
