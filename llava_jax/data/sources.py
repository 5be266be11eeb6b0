"""Where records come from: JSON, JSON lines, parquet, a TFDS directory or tar shards, read by record number."""

import abc
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath

from llava_jax import files
from llava_jax.data.orders import mixed, randperm, twister
from llava_jax.data.records import Record
from llava_jax.errors import DataError, MissingFile, UsageError

_KINDS = (".json (one list), .jsonl (a record a line), .parquet, a directory of parquet files or of Hugging Face "
          "`datasets`, a TFDS directory, .tar or a directory of .tar")  # fmt: skip
_HELD_OUT = 2**31  # its stream of random numbers: no epoch has this number


@dataclass(frozen=True)
class Source(abc.ABC):
    """Records of one file or directory. One that is damaged is a record with a fault: it costs the others nothing.

    name: for messages. images: the folder that image paths are relative to, or None.
    weight: how often each record is seen in an epoch, on average.
    fingerprint: sha256 of the content; what it was called or where it lay does not count.
    """

    name: str
    path: str
    images: epath.Path | None
    weight: float | int
    fingerprint: str

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    def text(self, index: int) -> Record:
        """The record with empty bytes for each picture that comes with it, where that spares reading the picture."""
        return self[index]

    @property
    def unreadable(self) -> Sequence[int]:
        """The records that are known to have a fault since the source was opened."""
        return ()

    @property
    def repair(self) -> str:
        """What to do about records that have a fault, for messages."""
        return (f"Repair the data (python -m llava_jax.data validate {self.path} lists all, and writes the others with "
                "--out)")  # fmt: skip

    def written(self, index: int) -> str:
        """The record's JSON as it was written, on one line.

        Raises:
          UsageError: it was not written as JSON.
        """
        raise UsageError(f"{self.path} holds no JSON: want a .json or .jsonl file")

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


def open_source(
    path: epath.PathLike, images: epath.PathLike | None = None, name: str = "", weight: float | int = 1.0,
    split: str = "train",
) -> Source:  # fmt: skip
    """Records of a `.json` list, a `.jsonl` file (one record a line), parquet files, or (a directory of) tar shards;
    or of a directory of Hugging Face `datasets` or of TFDS.

    Args:
      path: local or gs://.
      images: folder of the image files; not for what holds its images.
      name: for messages; the file's name if empty.
      weight: 2 shows each record twice an epoch, 0.5 another half of the records each epoch.
      split: of a directory.

    Raises:
      FileNotFoundError: the path or the image folder does not exist.
      DataError: the file is no JSON (names line and column), has no records, or the directory is no data set.
      ValueError: a suffix that is not known, or a weight at which no record is shown.
    """
    place, folder = epath.Path(path), epath.Path(images) if images else None
    if not files.exists(place):
        raise MissingFile(f"data source {str(path)!r} does not exist: want {_KINDS}")
    if folder is not None and not files.is_dir(folder):
        raise MissingFile(f"image folder {str(images)!r} of {str(path)!r} is no directory")
    source = _opened(place, folder, name or place.name, weight, split)
    if not len(source):
        raise DataError(f"{place}: holds no records")
    if weight <= 0 or round(len(source) * weight) < 1:
        raise UsageError(
            f"data source {source.name!r}: weight={weight} shows none of its {len(source)} records an epoch"
        )
    return source


def _opened(place: epath.Path, folder: epath.Path | None, name: str, weight: float | int, split: str) -> Source:
    # Imported here only: they build upon this module, and none needs to wait for the others' libraries.
    if place.suffix in (".json", ".jsonl"):
        from llava_jax.data import json_files

        return json_files.open_json(place, folder, name, weight)
    members = [] if place.suffix in (".tar", ".parquet", ".arrow") else _members(place)
    tars = tuple(member for member in members if member.suffix == ".tar")
    if place.suffix == ".tar" or tars:
        from llava_jax.data import shards

        return shards.open_shards(place, tars or (place,), name, weight)
    from llava_jax.data import parquet

    if tables := parquet.find(place, members, split):
        return parquet.open_tables(place, tables, folder, name, weight)
    if members:
        from llava_jax.data import tfds

        return tfds.open_tfds(place, name, weight, split)
    raise UsageError(f"data source {str(place)!r}: want {_KINDS}")


def _members(place: epath.Path) -> list[epath.Path]:
    """What lies in a directory; none in a file, which a bucket cannot tell from an empty directory."""
    try:
        return files.listed(place)
    except NotADirectoryError:
        return []


@dataclass(frozen=True)
class Part(Source):
    """Some records of another source. chosen: their numbers there, ascending."""

    whole: Source
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Record:
        return self.whole[int(self.chosen[index])]

    def text(self, index: int) -> Record:
        return self.whole.text(int(self.chosen[index]))

    def written(self, index: int) -> str:
        return self.whole.written(int(self.chosen[index]))

    @property
    def repair(self) -> str:
        return self.whole.repair

    @property
    def unreadable(self) -> Sequence[int]:
        return np.flatnonzero(np.isin(self.chosen, self.whole.unreadable)).tolist()


def hold_out(source: Source, share: float, seed: int) -> tuple[Part, Part]:
    """(the records to train on, those held out for validation): the same for a source and a seed, whenever it is asked.

    Raises:
      UsageError: the share leaves no record on one of the sides.
    """
    count = round(share * len(source))
    if not 0 < count < len(source):
        raise UsageError(f"data.hold_out={share} of the {len(source)} records of {source.name!r} holds {count} out: "
                         "want at least one on each side")  # fmt: skip
    order = randperm(len(source), twister(mixed(seed, _HELD_OUT)))
    return _part(source, np.sort(order[count:])), _part(source, np.sort(order[:count]))


def _part(source: Source, chosen: np.ndarray) -> Part:
    digest = hashlib.sha256(source.fingerprint.encode() + chosen.astype("<i8").tobytes()).hexdigest()
    return Part(source.name, source.path, source.images, source.weight, digest, source, chosen)
