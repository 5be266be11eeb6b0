"""TensorBoard's event files of scalars, written as their format has it: tensorboardX would import torch, and
TensorFlow is large.

    file    records of (length: uint64, CRC of it: uint32, data, CRC of it: uint32), little-endian
    CRC     CRC-32C, rotated right by 15 bits, plus 0xa282ead8
    data    an `Event` of protocol buffers: a version first, then scalars

Source: TensorFlow's tensorflow/core/lib/io/record_writer.h, util/event.proto and framework/summary.proto.
"""

import functools
import os
import socket
import struct
import time
from collections.abc import Mapping

from etils import epath

from llava_jax.streams import GrowingFile

# Numbers of the fields of Event, Summary, Summary.Value and SessionLog.
_WALL_TIME, _STEP, _VERSION, _SUMMARY, _SESSION = 1, 2, 3, 5, 7
_VALUE = 1
_TAG, _SIMPLE_VALUE = 1, 2
_STATUS, _START = 1, 1


class EventFile:
    """One file of scalars, of one start of a run."""

    def __init__(self, directory: epath.PathLike, step: int) -> None:
        """step: the updates so far; TensorBoard forgets what earlier files say of later ones."""
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        session = _field(_SESSION, _number(_STATUS, _START))
        first = _record(_event(0, _field(_VERSION, b"brain.Event:2"))) + _record(_event(step + 1, session))
        self._file = GrowingFile(epath.Path(directory) / name, first)

    def add(self, step: int, scalars: Mapping[str, float | int]) -> None:
        """Adds {tag: value} of an update."""
        values = b"".join(
            _field(_VALUE, _field(_TAG, tag.encode()) + _key(_SIMPLE_VALUE, 5) + struct.pack("<f", value))
            for tag, value in scalars.items()
        )
        self._file.add(_record(_event(step, _field(_SUMMARY, values))))

    def flush(self) -> None:
        """Brings everything into the bucket, where it is one."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._file.close()


def _event(step: int, content: bytes) -> bytes:
    return _key(_WALL_TIME, 1) + struct.pack("<d", time.time()) + _number(_STEP, step) + content


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _field(number: int, content: bytes) -> bytes:
    return _key(number, 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _key(number, 0) + _varint(value)


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    groups = [value & 0x7F]
    while value := value >> 7:
        groups[-1] |= 0x80
        groups.append(value & 0x7F)
    return bytes(groups)


def _checksum(data: bytes) -> bytes:
    crc, table = 0xFFFFFFFF, _crc_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@functools.cache
def _crc_table() -> tuple[int, ...]:
    """Of CRC-32C (Castagnoli), reflected."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)
