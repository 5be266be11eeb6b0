"""A data set that is a Python object, as one more source of records."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from etils import epath

from llava_jax.data.records import Record
from llava_jax.data.sources import Source
from llava_jax.errors import DataError, UsageError
from llava_jax.prompt.conversation import Conversation, Video


@runtime_checkable
class Dataset(Protocol):
    """Conversations by number, from 0; any class with these three will do, and need not name this one.

    Several threads read at once (`data.threads`), in any order, and a conversation may be read again.

        class Cats:
            fingerprint = "cats, version 3"

            def __len__(self):
                return 1000

            def __getitem__(self, index):
                turns = (Turn("user", "<image>\\nWhat is it?"), Turn("assistant", "A cat."))
                return Conversation(turns, (f"cats/{index}.jpg",))

    Attributes:
      fingerprint: changes whenever a conversation does. A run that is resumed, and the processes of one run, compare
        it; lengths that were measured for it are kept.
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


@dataclass(frozen=True)
class DatasetSource(Source):
    """The conversations of a `Dataset`. Each path of an image is relative to the current directory, or absolute."""

    dataset: Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Record:
        found: Any = self.dataset[index]
        if not isinstance(found, Conversation):
            fault = f"a {type(found).__name__}: want a llava_jax.Conversation"
            return Record(self.path, index, None, None, fault)
        # A path in a file may not leave the image folder. The user's own code may name any: not a str, but a path.
        images = tuple(map(_own, found.images))
        return Record(self.path, index, None, dataclasses.replace(found, turns=tuple(found.turns), images=images))

    @property
    def repair(self) -> str:
        return f"Mend what {self.path}[NUMBER] gives, or leave it out"


def _own(image: Any) -> Any:
    if isinstance(image, Video):
        return Video(_own(image.source))
    return epath.Path(image) if isinstance(image, str) else image


def of_dataset(dataset: Any) -> DatasetSource:
    """The source of a `Dataset`, which is called by the name of its class.

    Raises:
      UsageError: it lacks a length, conversations by number, or a fingerprint.
      DataError: it is empty.
    """
    name = type(dataset).__name__
    if not isinstance(dataset, Dataset):
        raise UsageError(
            f"dataset of type {name}: want `len(dataset)`, `dataset[i]` (a llava_jax.Conversation) and "
            "`dataset.fingerprint`, a text that changes whenever a conversation does"
        )
    fingerprint: Any = dataset.fingerprint
    if not isinstance(fingerprint, str) or not fingerprint:
        raise UsageError(f"{name}.fingerprint={fingerprint!r}: want a text that changes whenever a conversation does")
    if not len(dataset):
        raise DataError(f"dataset of type {name}: it holds no conversations")
    return DatasetSource(name, name, None, 1.0, fingerprint, dataset)
