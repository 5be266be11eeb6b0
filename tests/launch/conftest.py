"""The clone, the workplace and the cloud that the scripts of launch/ are run in."""

import shutil
import subprocess

import pytest

from tests.launch.stand_ins import GCLOUD, LAUNCH, PYTHON3, TAIL, TRAIN, Workplace, program


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """A clone with a space in its path; the scripts only read it."""
    for tool in ("git", "perl"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed; the stand-ins need it")
    path = tmp_path_factory.mktemp("home") / "my clone"
    shutil.copytree(LAUNCH, path / "launch")
    (path / "configs").mkdir()
    (path / "configs" / "x.py").touch()
    for words in ("init --quiet", "add .", "-c user.name=n -c user.email=e commit --quiet --message=m"):
        subprocess.run(["git", "-C", str(path), *words.split()], check=True)
    return path


@pytest.fixture
def workplace(repository, tmp_path):
    return Workplace(repository, tmp_path)


@pytest.fixture
def cloud(workplace, tmp_path):
    if not shutil.which("flock"):
        pytest.skip("flock (util-linux) is not installed; the hosts of a slice have it")
    for name, text in (("gcloud", GCLOUD), ("python3", PYTHON3), ("train", TRAIN), ("tail", TAIL)):
        program(workplace.fake, name, text)
    workplace.environ["TMPDIR"] = str(tmp_path)
    return workplace
