"""Writes LLaVA-style instruction data as a TFDS data set: array_record files with the images inside, no TensorFlow.

One directory then holds all that a run reads, in few large files: what object stores and many hosts want.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from llava_jax import files
from llava_jax.data.check import Listings, UnknownKeys, check_files, located
from llava_jax.data.problems import Problem
from llava_jax.data.records import found, parse
from llava_jax.data.sources import Source
from llava_jax.errors import DataError, UsageError
from llava_jax.prompt.conversation import Conversation, Turn, Video

_log = logging.getLogger(__name__)


class LlavaInstruct(tfds.core.GeneratorBasedBuilder):
    """Conversations with their images as encoded bytes, in the order of their source."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, source: Source, split: str, data_dir: epath.PathLike):
        self._source, self._split, self.unknown = source, split, UnknownKeys()
        super().__init__(data_dir=data_dir, file_format=tfds.core.FileFormat.ARRAY_RECORD)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {
            "id": text,
            "conversations": tfds.features.Sequence({"from": text, "value": text, "loss": np.bool_}),
            "images": tfds.features.Sequence(tfds.features.Image()),
            "images_in_place": tfds.features.Scalar(np.bool_),
            "weight": tfds.features.Scalar(np.float64),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {self._split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        listings: Listings = {}
        for index, record in enumerate(self._source):
            parsed = parse(record, self._source.images)
            if isinstance(parsed, Problem):
                raise DataError(str(found(record, parsed)))
            for problem in check_files(parsed.conversation, self._source.images, listings):
                raise DataError(str(found(record, problem)))
            self.unknown.note([found(record, Problem("unknown_key", key)) for key in parsed.unknown])
            if any(isinstance(one, Video) for one in parsed.conversation.images):
                where = f"{record.where} id={record.id!r}"
                raise DataError(f"{where}: a video, which this data set cannot hold: train on the records as they are")
            places = [
                image if isinstance(image, bytes) else located(image, self._source.images, listings)
                for image in parsed.conversation.images
            ]
            yield index, _example(record.id, parsed.conversation, places)


def _example(id: str, conversation: Conversation, places: Sequence[str | bytes]) -> dict[str, Any]:
    said = [Turn("system", conversation.system, False)] if conversation.system is not None else []
    rows = [
        {"from": turn.role, "value": turn.text, "loss": turn.supervised and turn.role == "assistant"}
        for turn in (*said, *conversation.turns)
    ]
    images = [place if isinstance(place, bytes) else files.read(place) for place in places]
    return {
        "id": id, "conversations": rows, "images": images, "images_in_place": conversation.images_in_place,
        "weight": float(conversation.weight),
    }  # fmt: skip


def write(source: Source, out: epath.PathLike, split: str = "train") -> epath.Path:
    """Writes a source below `out`; the directory that `open_source` reads. Keys that nothing reads are told.

    Raises:
      ValueError: the data set is already there, or `out` is in a bucket.
      DataError: a record that does not parse or has no image file; nothing is left behind.
    """
    files.want_disk(out, "--out", "array_record files are written there")
    place = epath.Path(out) / "llava_instruct" / str(LlavaInstruct.VERSION)
    if place.exists():
        raise UsageError(f"{place} exists already: remove it or choose another directory")
    with tempfile.TemporaryDirectory() as downloads:  # tfds wants one, and nothing is downloaded
        builder = LlavaInstruct(source, split, out)
        builder.download_and_prepare(download_dir=downloads)
    for finding in builder.unknown.findings():
        _log.warning("%s", finding)
    return place
