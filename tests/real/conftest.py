"""Real input for the tests of this folder: photographs in class folders, and a folder of videos with captions beside them."""

import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from data_pipelines.__main__ import main
from tests.processes import REPOSITORY

DATA = REPOSITORY.parent / "shared" / "data"
ARCHIVE = DATA / "cifar10_train_20k.tar.gz"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
EACH = 6
VIDEO_CAPTIONS = {"nasa_13013.mp4": "gold mirrors of a space telescope in a dark hall", "h265_video.mp4": "a frame counter on blue"}


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 60 CIFAR-10 images, 6 of each class, made from class folders."""
    if not ARCHIVE.is_file():
        pytest.skip(f"CIFAR-10 is not at {ARCHIVE}")
    folder = tmp_path_factory.mktemp("cifar10")
    _extract(folder / "files")
    ingest(folder / "files", folder / "shards", "--captions", "a photo of a {class}", "--shard-samples", 20)
    return folder / "shards"


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two real videos, 37 clips of 9 frames, captioned by the text files beside them."""
    if not all((DATA / "videos" / name).is_file() for name in VIDEO_CAPTIONS):
        pytest.skip(f"the videos are not at {DATA / 'videos'}")
    folder = tmp_path_factory.mktemp("videos")
    (folder / "files").mkdir()
    for name, caption in VIDEO_CAPTIONS.items():
        shutil.copy(DATA / "videos" / name, folder / "files" / name)
        (folder / "files" / name).with_suffix(".txt").write_text(caption + "\n")
    ingest(folder / "files", folder / "shards", "--shard-samples", 20, "--height", 36, "--width", 64)
    return folder / "shards"


def ingest(*arguments: object) -> None:
    """`python -m data_pipelines ingest ARGUMENTS`."""
    assert main(["ingest", *map(str, arguments)]) == 0


def _extract(folder: Path) -> None:
    taken: Counter[str] = Counter()
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            name = Path(member.name).parent.name
            if member.isfile() and taken[name] < EACH:
                taken[name] += 1
                file = archive.extractfile(member)
                assert file
                target = folder / name / Path(member.name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read())
    assert taken == dict.fromkeys(CLASSES, EACH)
