"""Files that grow, and files that are read in parts, on a disk and in a bucket (gs://).

An object in a bucket is whole from the start and never changes: it grows by being written anew, and is read in ranges.
"""

import io
import os
from typing import Any

from etils import epath

from llava_jax import files


class GrowingFile:
    """A file to which content is added. On a disk what was added is there at once.

    An object cannot grow: `flush` writes it anew, whole, so call it where its cost is small beside what was done since.
    """

    def __init__(self, path: epath.PathLike, content: bytes = b"") -> None:
        """Begins the file anew with `content`. Raises as `files.write_whole`."""
        self._path, self._flushed = epath.Path(path), True
        files.write_whole(path, content)
        self._file = None if files.is_bucket(path) else open(path, "ab")
        self._content = bytearray() if self._file else bytearray(content)

    def add(self, content: bytes) -> None:
        """Adds content at the end."""
        if self._file is None:
            self._content += content
            self._flushed = False
        else:
            self._file.write(content)
            self._file.flush()

    def flush(self) -> None:
        """Returns when everything is in the bucket. Raises as `files.write_whole`."""
        if not self._flushed:
            files.write_whole(self._path, bytes(self._content))
            self._flushed = True

    def close(self) -> None:
        """Flushes, and frees the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


def open_read(path: epath.PathLike, block_bytes: int = 2**20) -> io.BufferedReader:
    """The file, open to be read in any order; a bucket's comes in ranges of at least `block_bytes`."""
    if not files.is_bucket(path):
        return open(path, "rb")
    return io.BufferedReader(_ObjectReader(os.fspath(path), files.size_bytes(path)), block_bytes)


class _ObjectReader(io.RawIOBase):
    """An object of a bucket as a file: each read is one request."""

    def __init__(self, name: str, size: int) -> None:
        self._name, self._size, self._place = name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        content = files.read_range(self._name, self._place, min(len(buffer), max(0, self._size - self._place)))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)
