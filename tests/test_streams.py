import os

from llava_jax import files, streams
from tests import buckets


def test_a_file_is_read_in_any_order_in_blocks(place, request):
    content = bytes(range(256)) * 40
    files.write_whole(place / "f", content)
    proxy = request.getfixturevalue("bucket_proxy")
    with buckets.faults(proxy, lambda method, path: None), streams.open_read(place / "f", block_bytes=1024) as file:
        for start, size in ((0, 10), (5, 100), (9_000, 1000), (-3, 3), (10_240, 5), (20_000, 5)):
            file.seek(start, os.SEEK_END if start < 0 else os.SEEK_SET)
            assert file.read(size) == content[start:][:size]
        ranges = [one for one in proxy.requests if one.path.endswith("alt=media")]
    # The second part lies in the first block; beyond the end nothing is asked.
    assert [one.sent_bytes for one in ranges] == ([1024, 1024, 3] if files.is_bucket(place) else [])


def test_a_growing_file_begins_anew_and_a_damaged_one_is_set_aside(place):
    for content in (b"old", b"new "):
        file = streams.GrowingFile(place / "f", content)
        file.add(b"line")
        file.close()
    assert files.read(place / "f") == b"new line"
    assert [files.set_aside(place / "f").name, files.read(place / "f.damaged")] == ["f.damaged", b"new line"]
    assert [path.name for path in files.listed(place)] == ["f.damaged"]
