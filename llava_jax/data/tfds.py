"""Reads LLaVA-style instruction data from a TFDS directory (array_record), without TensorFlow.

    features   conversations: Sequence({from: Text, value: Text, optional loss: bool}); optional: id: Text,
               image: Image or images: Sequence(Image), images_in_place: bool (see `Conversation`), weight: float
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from llava_jax import files
from llava_jax.data.records import Record
from llava_jax.data.sources import Source
from llava_jax.errors import DataError, UsageError

_KNOWN = {"id", "conversations", "image", "images", "images_in_place", "weight"}


class _Encoded(tfds.decode.SkipDecoding):
    """Leaves images as encoded bytes; tfds has this for a single image only."""

    def decode_batch_example_np(self, example: Any) -> Any:
        return example


@dataclass(frozen=True)
class TfdsSource(Source):
    """examples: tfds' random-access view of the split, images still encoded."""

    examples: Any

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Record:
        try:
            example = self.examples[index]
            raw = _texts(example)
        except (RuntimeError, IndexError, ValueError) as error:  # what array_record raises for damaged shards
            fault = f"the data set is damaged here ({error}): write it again"
            return Record(self.path, index, None, None, fault)
        pictures = (*example.get("images", ()), *([example["image"]] if example.get("image") else ()))
        if pictures:
            images = [bytes(picture) for picture in pictures]
            raw["image"] = images if example.get("images_in_place", len(images) > 1) else images[0]
        return Record(self.path, index, None, raw)


def _texts(example: Any) -> dict[str, Any]:
    """All but the pictures, as JSON has it."""
    turns = example["conversations"]
    said = zip(turns["from"], turns["value"], strict=True)
    rows: list[dict[str, Any]] = [{"from": one.decode(), "value": text.decode()} for one, text in said]
    if "loss" in turns:
        rows = [row | {"loss": bool(loss)} for row, loss in zip(rows, turns["loss"], strict=True)]
    raw: dict[str, Any] = {"conversations": rows}
    if "weight" in example:
        raw["weight"] = float(example["weight"])
    return raw | ({"id": example["id"].decode()} if "id" in example else {})


def open_tfds(place: epath.Path, name: str, weight: float | int, split: str) -> TfdsSource:
    """The records of one split.

    place: a version's directory (with features.json), or the one above it if it holds a single version.

    The fingerprint covers the data set's description and the names and sizes of its shards, not their content.

    Raises:
      DataError: no TFDS data set, another file format than array_record, or other features.
      ValueError: the split does not exist, or there are several versions.
    """
    place = _version(place)
    builder = tfds.builder_from_directory(place)
    features, splits = builder.info.features, builder.info.splits
    if split not in splits:
        raise UsageError(f"{place}: split {split!r} does not exist: choose one of {', '.join(sorted(splits))}")
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise DataError(f"{place}: file format is {builder.info.file_format}, want array_record: write it again with "
                        "`python -m llava_jax.data prepare`")  # fmt: skip
    keys = set(features.keys())
    if "conversations" not in keys or keys - _KNOWN:
        raise DataError(f"{place}: features are {', '.join(sorted(keys))}: want conversations (Sequence of from and "
                        f"value) and of {', '.join(sorted(_KNOWN))} what applies")  # fmt: skip
    decoders = {key: _Encoded() for key in ("image", "images") if key in keys}
    examples = builder.as_data_source(split=split, decoders=decoders)
    digest = hashlib.sha256(files.read(place / "dataset_info.json") + split.encode())
    for shard in sorted(splits[split].filepaths, key=str):
        digest.update(f"{shard.name} {files.size_bytes(shard)}\n".encode())
    return TfdsSource(name, str(place), None, weight, digest.hexdigest(), examples)


def _version(place: epath.Path) -> epath.Path:
    if files.exists(place / "features.json"):
        return place
    versions = [child for child in files.listed(place) if files.exists(child / "features.json")]
    if not versions:
        raise DataError(f"{place}: no TFDS data set (no features.json, here or one level down)")
    if len(versions) > 1:
        raise UsageError(f"{place}: holds several versions ({', '.join(v.name for v in versions)}): name one of them")
    return versions[0]
