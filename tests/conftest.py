"""What tests of the whole system share: a few moving shapes, their latents, a trained teacher, and quick `dit` processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines.rendered import ShapesSet, render
from tests.processes import Forks, train_config


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rendered clips in three shards."""
    folder = tmp_path_factory.mktemp("clips") / "clips"
    render(folder, ShapesSet(48, 0, "train", 16))
    return folder


@pytest.fixture(scope="session")
def encode_config(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    path = tmp_path_factory.mktemp("encode") / "encode.yaml"
    path.write_text(f"sources: [{{path: {clips}}}]\nsizes: [[9, 32, 32]]\nout: {path.parent}/latents\nbatch_size: 8\nnum_workers: 0\n")
    return path


@pytest.fixture(scope="session")
def latents(forks: Forks, encode_config: Path) -> Path:
    """The clips as a cache of latents and text embeddings, 3 x 8 x 8 latents each."""
    forks.run("encode", str(encode_config)).ok()
    return encode_config.parent / "latents"


@pytest.fixture(scope="session")
def teacher(forks: Forks, tmp_path_factory: pytest.TempPathFactory, latents: Path) -> Path:
    """A run directory of 6 training steps."""
    config = train_config(tmp_path_factory.mktemp("teacher") / "teacher.yaml", latents)
    forks.run("train", str(config)).ok()
    return config.with_suffix("")
