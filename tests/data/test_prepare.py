"""Published raw files in, LLaVA JSON out, in the files' own layouts; and what is missing is named."""

import json

import pytest

from llava_jax.data.__main__ import main
from llava_jax.data.prepare import ALIGNMENT
from llava_jax.data.sources import open_source

PROBLEM = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None, "grade": "grade2",
           "subject": "natural science", "topic": "t", "lecture": "L.", "solution": "E.", "split": "train"}  # fmt: skip


def put(path, value=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def pair(identity, image):
    return {"id": identity, "image": image, "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                              {"from": "gpt", "value": "A cat."}]}  # fmt: skip


def prepare(name, raw, out, *words):
    return main(["prepare", name, "--from", str(raw), "--out", str(out), *words])


def valid(path, images):
    return main(["validate", str(path), "--images", str(images)]) == 0


def test_scienceqa_in_a_format_and_a_split_is_what_validate_accepts(tmp_path, capsys):
    raw = tmp_path / "raw"
    put(raw / "problems.json", {"3": PROBLEM, "5": PROBLEM | {"image": "image.png"}, "6": PROBLEM | {"split": "val"}})
    put(raw / "pid_splits.json", {"train": ["5", "3"], "minitrain": ["3"], "trainval": ["3", "5", "6"]})
    put(raw / "images" / "train" / "5" / "image.png")
    assert prepare("scienceqa", raw, tmp_path / "out", "--format", "QCM-LEPA") == 0
    path = tmp_path / "out" / "scienceqa_train_QCM-LEPA.json"
    assert "1 with a picture" in capsys.readouterr().out
    assert json.loads(path.read_text()) == [
        {"id": "5", "image": "5/image.png", "conversations": [
            {"from": "human", "value": "Which?\nContext: N/A\nOptions: (A) a (B) b\n<image>"},
            {"from": "gpt", "value": "LECTURE: L.\nSOLUTION: E.\n###\nANSWER: A."}]},
        {"id": "3", "conversations": [
            {"from": "human", "value": "Which?\nContext: N/A\nOptions: (A) a (B) b"},
            {"from": "gpt", "value": "LECTURE: L.\nSOLUTION: E.\n###\nANSWER: A."}]},
    ]  # fmt: skip
    assert valid(path, raw / "images" / "train")
    assert prepare("scienceqa", raw, tmp_path / "out", "--split", "trainval", "--format", "QCM-ALE") == 0
    rows = json.loads((tmp_path / "out" / "scienceqa_trainval_QCM-ALE.json").read_text())
    assert [row.get("image") for row in rows] == [None, "train/5/image.png", None]  # its problems lie in two folders


@pytest.mark.parametrize("name", ["chat.json", "blip_laion_cc_sbu_558k.json"])
def test_both_pretraining_sets_are_found_and_a_short_one_is_noticed(tmp_path, capsys, name):
    put(tmp_path / "raw" / name, [pair("1", "00/1.jpg")])
    put(tmp_path / "raw" / "images" / "00" / "1.jpg")
    assert prepare("llava-pretrain", tmp_path / "raw", tmp_path / "out") == 0
    assert "holds 1 records, the published file 5" in capsys.readouterr().out
    assert valid(tmp_path / "out" / name, tmp_path / "raw" / "images")


@pytest.mark.parametrize("folder, prefix", [("train2017", ""), ("train2014", "COCO_train2014_")])
def test_instructions_find_cocos_pictures_of_either_year(tmp_path, folder, prefix):
    text = {"id": "t", "conversations": pair("t", "x")["conversations"][1:]}
    put(tmp_path / "raw" / "detail_23k.json", [pair("1", "000000000001.jpg"), text])
    put(tmp_path / "raw" / folder / f"{prefix}000000000001.jpg")
    assert prepare("llava-instruct", tmp_path / "raw", tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / "detail_23k.json").read_text())
    assert [row.get("image") for row in rows] == [f"{prefix}000000000001.jpg", None]


def test_of_several_instruction_files_one_is_chosen(tmp_path, capsys):
    for name in ("detail_23k.json", "llava_v1_5_mix665k.json"):
        put(tmp_path / "raw" / name, [pair("1", "coco/train2017/1.jpg")])
    put(tmp_path / "raw" / "coco" / "train2017" / "1.jpg")
    assert prepare("llava-instruct", tmp_path / "raw", tmp_path / "out") == 64
    assert "choose one with --file" in capsys.readouterr().err
    assert prepare("llava-instruct", tmp_path / "raw", tmp_path / "out", "--file", "llava_v1_5_mix665k.json") == 0
    assert valid(tmp_path / "out" / "llava_v1_5_mix665k.json", tmp_path / "raw")


COCO = {"images": [{"id": 9, "file_name": "9.jpg"}, {"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}],
        "annotations": [{"image_id": 7, "caption": " A cat. "}, {"image_id": 9, "caption": "A dog."},
                        {"image_id": 9, "caption": "Two dogs."}]}  # fmt: skip


@pytest.mark.parametrize("captions, said", [
    ("first", {"000000000009": "A dog.", "000000000007": "A cat."}),
    ("all", {"000000000009-0": "A dog.", "000000000009-1": "Two dogs.", "000000000007-0": "A cat."}),
])  # fmt: skip
def test_coco_captions_become_pairs(tmp_path, capsys, captions, said):
    put(tmp_path / "raw" / "annotations" / "captions_val2017.json", COCO)
    for number in (7, 8, 9):
        put(tmp_path / "raw" / "val2017" / f"{number}.jpg")
    assert prepare("coco", tmp_path / "raw", tmp_path / "out", "--split", "val2017", "--captions", captions) == 0
    assert "1 pictures without a caption" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "coco_val2017.json").read_text())
    assert {row["id"]: row["conversations"][1]["value"] for row in rows} == said
    assert valid(tmp_path / "out" / "coco_val2017.json", tmp_path / "raw" / "val2017")


def test_random_captions_repeat_with_their_seed(tmp_path):
    put(tmp_path / "raw" / "captions_train2017.json", {
        "images": [{"id": i, "file_name": "1.jpg"} for i in range(30)],
        "annotations": [{"image_id": i, "caption": f"{n}."} for i in range(30) for n in range(5)]})  # fmt: skip
    put(tmp_path / "raw" / "train2017" / "1.jpg")
    texts = []
    for place, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert prepare("coco", tmp_path / "raw", tmp_path / place, "--seed", seed) == 0
        texts.append((tmp_path / place / "coco_train2017.json").read_text())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("name, files, code, said", [
    ("scienceqa", {}, 65, "problems.json does not exist"),
    ("llava-pretrain", {}, 65, "holds none of blip_laion_cc_sbu_558k.json, chat.json"),
    ("llava-pretrain", {"chat.json": [pair("1", "1.jpg")]}, 65, "1.jpg does not exist: want images.zip"),
    ("llava-pretrain", {"chat.json": '[{"id": "1"'}, 65, "no valid JSON"),
    ("llava-instruct", {"detail_23k.json": [pair("1", "1.jpg")]}, 65, "COCO_train2014_1.jpg"),
    ("coco", {"captions_train2017.json": {"images": []}}, 65, "annotations is missing: want list"),
    ("coco", {}, 65, "lacks captions_train2017.json"),
    ("cc-sbu-align", {"filter_cap.json": {"annotations": [{"image_id": 7, "caption": "A."}]}}, 65,
     "image/7.jpg does not exist: want image/ of the same archive, with ID.jpg, .jpeg, .png, .webp"),
])  # fmt: skip
def test_what_is_missing_or_damaged_is_named(tmp_path, capsys, name, files, code, said):
    (tmp_path / "raw").mkdir()
    for file, value in files.items():
        put(tmp_path / "raw" / file, value)
    assert prepare(name, tmp_path / "raw", tmp_path / "out") == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (("scienceqa", "--out", "x"), "wants --from DIR"),
    (("my.json", "--out", "x", "--to", "json"), "want one of scienceqa"),
])  # fmt: skip
def test_wrong_usage_is_refused(capsys, words, said):
    assert main(["prepare", *words]) == 64
    assert said in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path, capsys):
    put(tmp_path / "raw" / "chat.json", [pair("1", "1.jpg")])
    put(tmp_path / "raw" / "1.jpg")
    assert prepare("llava-pretrain", tmp_path / "raw", tmp_path / "out") == 0
    assert prepare("llava-pretrain", tmp_path / "raw", tmp_path / "out") == 64
    assert "exists already" in capsys.readouterr().err
    assert len(open_source(tmp_path / "out" / "chat.json")) == 1


def test_minigpt4s_second_stage_is_asked_for_in_its_four_ways(tmp_path):
    raw = tmp_path / "raw"
    rows = [{"image_id": str(i), "caption": f"Caption {i}."} for i in range(40)]
    put(raw / "filter_cap.json", {"annotations": rows})
    put(raw / "image" / "0.jpg")
    assert prepare("cc-sbu-align", raw, tmp_path / "out") == 0
    records = json.loads((tmp_path / "out" / "cc_sbu_align.json").read_text())
    assert [(record["image"], record["conversations"][1]["value"]) for record in records[:2]] == [
        ("0.jpg", "Caption 0."), ("1.jpg", "Caption 1."),
    ]  # fmt: skip
    asked = {record["conversations"][0]["value"] for record in records}
    assert asked == {f"<image>\n{question}" for question in ALIGNMENT} and len(asked) == 4


def test_minigpt4s_pictures_may_have_any_ending(tmp_path):
    rows = [{"image_id": i, "caption": "A red square."} for i in range(3)]
    put(tmp_path / "raw" / "filter_cap.json", {"annotations": rows})
    for name in ("0.png", "1.webp", "2.jpg", "2.png"):
        put(tmp_path / "raw" / "image" / name)
    assert prepare("cc-sbu-align", tmp_path / "raw", tmp_path / "out") == 0
    records = json.loads((tmp_path / "out" / "cc_sbu_align.json").read_text())
    assert [record["image"] for record in records] == ["0.png", "1.webp", "2.jpg"]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("cc-sbu-align", "filter_cap.json", [{"image_id": "1", "caption": "A."}], "want an object with annotations"),
        ("cc-sbu-align", "filter_cap.json", {"annotations": [{"image_id": "1", "caption": None}]}, "caption='None'"),
        ("coco", "captions_train2017.json", {"annotations": [], "images": [{"id": 1}]}, "images[0]: file_name is"),
        ("coco", "captions_train2017.json", {"annotations": [{"image_id": 1}]}, "images is missing"),
        ("coco", "captions_train2017.json", {"annotations": [{"id": 1}], "images": []}, "annotations[0]: image_id is"),
    ],
)
def test_a_raw_file_of_another_shape_is_refused_by_row_and_field(tmp_path, capsys, name, file, content, message):
    put(tmp_path / file, content)
    assert prepare(name, tmp_path, tmp_path / "out") == 65
    assert message in capsys.readouterr().err
