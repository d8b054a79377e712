"""Small shards that the tests of the data path share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.decode import encode_png
from data_pipelines.rendered import ShapesSet, render
from data_pipelines.samples import Facts
from data_pipelines.shards import ShardWriter, shard_name

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real images and videos are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 rendered clips in five shards."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    render(folder, ShapesSet(45, 3, "train", 10))
    return folder


@pytest.fixture
def write_shard(write_shards: Callable[..., Path]) -> Callable[..., Path]:
    """Write a shard of small noise pictures with captions and labels; returns its path."""
    return write_shards


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., Path]:
    """`write_shard`, for fixtures of wider scope."""

    def write(folder: Path, number: int = 0, samples: int = 10, side: int = 8) -> Path:
        folder.mkdir(exist_ok=True)
        path = folder / shard_name(number)
        pictures = np.random.default_rng(number).integers(0, 256, (samples, side, side, 3), np.uint8)
        with ShardWriter(path) as shard:
            for i, picture in enumerate(pictures):
                members = {"png": encode_png(picture), "txt": f"picture {i}".encode(), "cls": str(i % 3).encode()}
                shard.add(f"{number}-{i:03d}", members, Facts("image", 1, side, side, None), {"label": i % 3})
        return path

    return write
