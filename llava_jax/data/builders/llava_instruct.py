"""Writes LLaVA-style instruction data as a TFDS data set: array_record files with the images inside, no TensorFlow.

One directory then holds all that a run reads, in few large files: what object stores and many hosts want.
"""

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from llava_jax import files
from llava_jax.data.sources import Record, Source
from llava_jax.data.validate import Listings, check_files, found
from llava_jax.errors import DataError, UsageError


class LlavaInstruct(tfds.core.GeneratorBasedBuilder):
    """Conversations with their images as encoded bytes, in the order of their source."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, source: Source, split: str, data_dir: epath.PathLike):
        self._source, self._split = source, split
        super().__init__(data_dir=data_dir, file_format=tfds.core.FileFormat.ARRAY_RECORD)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {
            "id": text,
            "conversations": tfds.features.Sequence({"from": text, "value": text}),
            "images": tfds.features.Sequence(tfds.features.Image()),
            "images_in_place": tfds.features.Scalar(np.bool_),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {self._split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        listings: Listings = {}
        for record in self._source:
            for problem in check_files(record, self._source.images, listings):
                raise DataError(str(found(record, problem)))
            yield record.index, _example(record, self._source.images or epath.Path())


def _example(record: Record, folder: epath.Path) -> dict[str, Any]:
    conversation = record.conversation
    return {
        "id": record.id,
        "conversations": [{"from": row["from"], "value": row["value"]} for row in record.raw["conversations"]],
        "images": [
            image if isinstance(image, bytes) else files.read(folder / image) for image in conversation.images
        ],
        "images_in_place": conversation.images_in_place,
    }


def write(source: Source, out: epath.PathLike, split: str = "train") -> epath.Path:
    """Writes a source below `out`; the directory that `open_source` reads.

    Raises:
      ValueError: the data set is already there, or `out` is in a bucket.
      DataError: a record that does not parse or has no image file; nothing is left behind.
    """
    files.want_disk(out, "--out", "array_record files are written there")
    place = epath.Path(out) / "llava_instruct" / str(LlavaInstruct.VERSION)
    if place.exists():
        raise UsageError(f"{place} exists already: remove it or choose another directory")
    with tempfile.TemporaryDirectory() as downloads:  # tfds wants one, and nothing is downloaded
        LlavaInstruct(source, split, out).download_and_prepare(download_dir=downloads)
    return place
