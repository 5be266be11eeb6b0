"""The published raw files, as they are downloaded, into LLaVA JSON: `python -m llava_jax.data prepare NAME --from DIR`.

    scienceqa        problems.json, pid_splits.json, images/SPLIT/ID/image.png; every format of LLaVA's converter
    llava-pretrain   chat.json (CC3M, 595K) or blip_laion_cc_sbu_558k.json, with their pictures
    llava-instruct   any of LLaVA-Instruct-150K's files, with COCO's pictures of 2014 or 2017
    coco             captions_SPLIT.json and the split's pictures: image and caption pairs
    cc-sbu-align     filter_cap.json and image/ID.jpg (or .png ...): MiniGPT-4's second stage

`image` in what is written is relative to the folder that is printed with it.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llava_jax import files
from llava_jax.data import scienceqa
from llava_jax.data.files import field, read_json
from llava_jax.data.shards import PICTURES
from llava_jax.data.sources import open_source
from llava_jax.errors import DataError, UsageError

# Records of a whole download. Source: the dataset cards of liuhaotian/LLaVA-CC3M-Pretrain-595K, LLaVA-Pretrain and
# LLaVA-Instruct-150K; haotian-liu/LLaVA README @ c121f04 for the mixture.
PRETRAIN = {"blip_laion_cc_sbu_558k.json": 558_128, "chat.json": 595_375}
INSTRUCT = {
    "llava_v1_5_mix665k.json": 665_298, "llava_instruct_150k.json": 157_712, "llava_instruct_80k.json": None,
    "conversation_58k.json": None, "detail_23k.json": None, "complex_reasoning_77k.json": None,
}  # fmt: skip
COCO_2014 = "COCO_train2014_"  # of the pictures' names in 2014's archive; LLaVA's records lack it
CAPTION_QUESTION = "Describe the picture in one sentence."  # ours; stage 1's template leaves it out
# What MiniGPT-4's second stage asks. Source: arXiv:2304.10592, section 3.3; prompts/alignment.txt @ d94738a (BSD-3).
ALIGNMENT = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)


class Options(NamedTuple):
    """split: of ScienceQA or COCO. format: of ScienceQA. file: which of several raw files; "": the first there is.

    captions: of a COCO picture, "first", "random" (by seed) or "all" (a record each).
    """

    split: str = ""
    format: str = "QCM-LEA"
    file: str = ""
    captions: str = "random"
    seed: int = 0


class Made(NamedTuple):
    """What came of the raw files. images: the folder that records' pictures are relative to; notes: for people."""

    records: list[dict[str, Any]]
    images: epath.Path
    name: str
    notes: tuple[str, ...] = ()


def make(name: str, directory: epath.PathLike, options: Options) -> Made:
    """The records of a published data set whose raw files lie in `directory` (local or gs://).

    Raises:
      DataError: a file is missing (names it and where it comes from) or damaged. ValueError: an unknown option.
    """
    root = epath.Path(directory)
    if not files.is_dir(root):
        raise DataError(f"--from {directory} is no directory")
    made = NAMES[name](root, options)
    if not made.records:
        raise DataError(f"{directory}: no record came of {name}")
    return made


def write(made: Made, out: epath.PathLike) -> epath.Path:
    """Writes OUT/NAME.json, one list; its path.

    Raises:
      ValueError: it is there already.
    """
    path = epath.Path(out) / f"{made.name}.json"
    if files.exists(path):
        raise UsageError(f"{path} exists already: remove it or choose another --out")
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in made.records)
    files.write_whole(path, f"[\n{rows}\n]\n".encode())
    return path


def _scienceqa(root: epath.Path, options: Options) -> Made:
    """The mini splits' problems lie in the folders of the whole ones; trainval's in two."""
    scienceqa.check_format(options.format)
    split = options.split or "train"
    problems = scienceqa.read_split(root, split, scienceqa.read(root))
    folders = {problem.split for problem in problems}
    images = root / "images" / folders.pop() if len(folders) == 1 else root / "images"
    records = [scienceqa.record(problem, options.format) for problem in problems]
    if images.name == "images":
        for record, problem in zip(records, problems):
            if "image" in record:
                record["image"] = f"{problem.split}/{record['image']}"
    shown = sum("image" in record for record in records)
    return Made(records, images, f"scienceqa_{split}_{options.format}", (f"{shown:,} with a picture",))


def _llava_pretrain(root: epath.Path, options: Options) -> Made:
    path = _raw(root, PRETRAIN, options, "huggingface.co/liuhaotian: LLaVA-Pretrain or LLaVA-CC3M-Pretrain-595K")
    records = [record.raw for record in open_source(path)]
    images = root / "images" if files.is_dir(root / "images") else root
    _want(images, records, "images.zip of the same data set, unpacked")
    return Made(records, images, path.stem, _counted(path, PRETRAIN, records))


def _llava_instruct(root: epath.Path, options: Options) -> Made:
    """The mixture names its folders; the others' pictures are looked for where COCO's archives unpack."""
    path = _raw(root, INSTRUCT, options, "huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K")
    records = [record.raw for record in open_source(path)]
    first = next((record["image"] for record in records if isinstance(record.get("image"), str)), None)
    notes = _counted(path, INSTRUCT, records)
    if first is None or "/" in first:
        _want(root, records, "the picture folders of LLaVA's README (coco/, gqa/, ocr_vqa/, textvqa/, vg/)")
        return Made(records, root, path.stem, notes)
    for folder, prefix in (("train2017", ""), ("train2014", COCO_2014), ("", "")):
        if (root / folder / (prefix + first)).exists():
            if prefix:
                records = [row | {"image": prefix + row["image"]} if "image" in row else row for row in records]
            return Made(records, root / folder, path.stem, notes)
    raise DataError(f"{root}: no picture {first} in train2017/, train2014/ ({COCO_2014}{first}) or beside {path.name}: "
                    "get train2017.zip or train2014.zip of cocodataset.org")  # fmt: skip


def _coco(root: epath.Path, options: Options) -> Made:
    split = options.split or "train2017"
    name = f"captions_{split}.json"
    path = next((one for one in (root / name, root / "annotations" / name) if files.exists(one)), None)
    if path is None:
        raise DataError(f"{root} lacks {name} and annotations/{name}: cocodataset.org, annotations_trainval")
    told = read_json(path)
    annotations, pictures = (field(told, key, list, str(path)) for key in ("annotations", "images"))
    if options.captions not in ("first", "random", "all"):
        raise UsageError(f"--captions {options.captions}: want first, random or all")
    captions: dict[int, list[str]] = {}
    for number, row in enumerate(annotations):
        where = f"{path}: annotations[{number}]"
        captions.setdefault(field(row, "image_id", int, where), []).append(field(row, "caption", str, where).strip())
    rng, records, bare = np.random.default_rng(options.seed), [], 0
    for place, image in enumerate(pictures):
        where = f"{path}: images[{place}]"
        name, identity = field(image, "file_name", str, where), field(image, "id", int, where)
        said = captions.get(identity, [])
        bare += not said
        chosen = said if options.captions == "all" else said[:1]
        if options.captions == "random" and said:
            chosen = [said[int(rng.integers(len(said)))]]
        for number, caption in enumerate(chosen):
            apart = f"-{number}" if options.captions == "all" else ""
            records.append(_pair(f"{identity:012}{apart}", name, caption))
    images = root / split if files.is_dir(root / split) else root
    _want(images, records, f"{split}.zip of cocodataset.org, unpacked")
    notes = (f"{bare:,} pictures without a caption are left out",) if bare else ()
    return Made(records, images, f"coco_{split}", notes)


def _cc_sbu_align(root: epath.Path, options: Options) -> Made:
    path = root / "filter_cap.json"
    if not files.exists(path):
        raise DataError(f"{root} lacks filter_cap.json: MiniGPT-4's dataset/README_2_STAGE.md says where it is, and "
                        "`python -m llava_jax.datagen curate` makes one of your own pictures")  # fmt: skip
    rng, records = np.random.default_rng(options.seed), []
    names = {picture.name for picture in files.listed(root / "image")}
    for number, row in enumerate(field(read_json(path), "annotations", list, str(path))):
        where = f"{path}: annotations[{number}]"
        identity, caption = str(field(row, "image_id", (str, int), where)), field(row, "caption", str, where)
        spellings = [f"{identity}.{kind}" for kind in PICTURES]
        name = next((name for name in spellings if name in names), spellings[0])
        records.append(_pair(identity, name, caption, ALIGNMENT[int(rng.integers(len(ALIGNMENT)))]))
    _want(root / "image", records, f"image/ of the same archive, with ID.{', .'.join(PICTURES)}")
    return Made(records, root / "image", "cc_sbu_align")


def _pair(identity: str, image: str, caption: str, question: str = CAPTION_QUESTION) -> dict[str, Any]:
    said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": caption}]
    return {"id": identity, "image": image, "conversations": said}


def _raw(root: epath.Path, names: Sequence[str] | dict[str, int | None], options: Options, source: str) -> epath.Path:
    wanted = [options.file] if options.file else list(names)
    if options.file and options.file not in names:
        raise UsageError(f"--file {options.file}: want one of {', '.join(names)}")
    found = [root / name for name in wanted if files.exists(root / name)]
    if not found:
        raise DataError(f"{root} holds none of {', '.join(wanted)}; they come from {source}")
    if len(found) > 1:
        raise UsageError(f"{root} holds {', '.join(path.name for path in found)}: choose one with --file")
    return found[0]


def _want(folder: epath.Path, records: Sequence[dict[str, Any]], source: str) -> None:
    """Looks for the first picture: a folder too deep or an archive still packed shows at once."""
    first = next((record["image"] for record in records if isinstance(record.get("image"), str)), None)
    if first is not None and not files.exists(folder / first):
        raise DataError(f"{folder / first} does not exist: want {source}")


def _counted(path: epath.Path, names: dict[str, int | None], records: Sequence[Any]) -> tuple[str, ...]:
    published = names[path.name]
    if published is None or published == len(records):
        return ()
    return (f"{path.name} holds {len(records):,} records, the published file {published:,}: is it whole?",)


NAMES: dict[str, Callable[[epath.Path, Options], Made]] = {
    "scienceqa": _scienceqa, "llava-pretrain": _llava_pretrain, "llava-instruct": _llava_instruct, "coco": _coco,
    "cc-sbu-align": _cc_sbu_align,
}  # fmt: skip
