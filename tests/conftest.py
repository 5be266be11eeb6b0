"""Fixtures that the tests of several packages use."""

import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath
from PIL import Image

from tests import buckets

os.environ.update(buckets.QUIET)  # read when gcsfs is imported


def pytest_configure(config: pytest.Config) -> None:
    """Sets what pytest-xdist's workers, and the processes that tests start, inherit: one cache of compiled programs.

    Most of the suite's time is LLVM's for programs that run once: it optimises little, as in JAX's own tests.
    """
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="llava_jax-compiled-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` next to the checkout: recordings too large to commit."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"{path} is not there: it holds recordings of the reference that are too large to commit")
    return path


@pytest.fixture(scope="session")
def bucket_proxy() -> Iterator[buckets.Proxy]:
    """A bucket server that this process, and those that it starts, take for Google's; `buckets.faults` plants errors.

    The environment keeps it: libraries make one client of a process and never ask again.
    """
    with buckets.serve() as url, buckets.proxy(url) as proxy:
        os.environ.update(buckets.environment(proxy.url))
        yield proxy


@pytest.fixture(scope="session")
def bucket_server(bucket_proxy: buckets.Proxy) -> str:
    """The address of that server."""
    return bucket_proxy.url


@pytest.fixture
def bucket(bucket_server: str) -> str:
    """A new, empty bucket: "gs://NAME"."""
    return buckets.make(bucket_server, f"bucket-{next(_numbers)}")


@pytest.fixture(params=["disk", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> epath.Path:
    """An empty directory, once on a disk and once in a bucket."""
    return epath.Path(tmp_path if request.param == "disk" else request.getfixturevalue("bucket"))


@pytest.fixture
def rows_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets other code resize as Pillow up to 12 does (but for stripes), whatever is installed."""
    resize = Image.Image.resize

    def in_order(self, size, resample, *rest, **named):
        return resize(resize(self, (size[0], self.height), resample), size, resample, *rest, **named)

    monkeypatch.setattr(Image.Image, "resize", in_order)


_numbers = itertools.count()


@pytest.fixture(autouse=True)
def progress_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command run by a test sets for its lines of progress ends with the test."""
    logger = logging.getLogger("llava_jax")
    for name, value in {"handlers": [], "propagate": True, "level": logging.NOTSET}.items():
        monkeypatch.setattr(logger, name, value)
