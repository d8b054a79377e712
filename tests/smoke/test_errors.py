"""A user's mistake costs one clear message: `error: ...` on stderr, the exit code of its kind, no traceback, and what to change."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Done, Forks, distill_config, metrics, python_m, train_config, wait_for

CONFIG, DATA, CHECKPOINTS = 2, 3, 4
PROMPT = "a large red disc moving right quickly near the top"


def assert_one_message(done: Done, code: int, *parts: str) -> None:
    """Exit code `code`, one message that says all `parts`, and nothing of Python's."""
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert done.err.startswith("error: "), done.err
    assert done.err.count("error: ") == 1, done.err
    missing = [part for part in parts if part not in done.err]
    assert not missing, f"{missing} not in:\n{done.err}"


@pytest.fixture
def train(forks: Forks, tmp_path: Path, latents: Path) -> Callable[..., Done]:
    """Train tmp_path/run with changes of the config; returns how it ended."""

    def train(*overrides: str, ranks: int = 1, **changes: Any) -> Done:
        config = train_config(tmp_path / "run.yaml", latents, **changes)
        return forks.run("train", str(config), *overrides, ranks=ranks)

    return train


# --- data -------------------------------------------------------------------------------------------------------


def test_data_path_missing(train: Callable[..., Done], tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    done = train(data__sources=[{"path": str(path)}])
    assert_one_message(done, CONFIG, "data.sources[0].path", str(path), "no such folder", "data_pipelines ingest")
    assert not (tmp_path / "run").exists(), "a run directory was made for a run that cannot begin"


def test_data_folder_empty(train: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = train(data__sources=[{"path": str(tmp_path / "empty")}])
    assert_one_message(done, CONFIG, "data.sources[0].path", "no .tar shard among its 0 files")


def test_data_folder_without_tars(train: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"not a shard")
    done = train(data__sources=[{"path": str(tmp_path / "photos")}])
    assert_one_message(done, CONFIG, "data.sources[0].path", "no .tar shard among its 1 files", "data_pipelines ingest")


def test_validation_source_missing(train: Callable[..., Done], tmp_path: Path) -> None:
    done = train(validation={"source": str(tmp_path / "nowhere")})
    assert_one_message(done, CONFIG, "validation.source", "no such folder")


def test_encode_source_missing(forks: Forks, encode_config: Path, tmp_path: Path) -> None:
    done = forks.run("encode", str(encode_config), f"sources=[{{path: {tmp_path}/nowhere}}]", f"out={tmp_path}/out")
    assert_one_message(done, CONFIG, "sources[0].path", "no such folder")
    assert "data.sources" not in done.err, "encode has no key data"


def test_ingest_of_an_unreadable_image(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"\xff\xd8 but no JPEG")
    done = python_m("dit", "data", "ingest", str(tmp_path / "photos"), str(tmp_path / "shards"))
    assert_one_message(Done(done.code, done.out, done.err[done.err.index("error: ") :]), CONFIG, "SRC", "none of its 1 images", "image")


def test_shards_that_are_all_damaged(forks: Forks, tmp_path: Path, latents: Path) -> None:
    shutil.copytree(latents, tmp_path / "damaged")
    for shard in (tmp_path / "damaged").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    config = train_config(tmp_path / "run.yaml", tmp_path / "damaged")
    done = forks.run("train", str(config))
    assert_one_message(done, DATA, "16 unusable samples", "data.max_bad_fraction", "bad_samples.jsonl")
    assert len((tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()) == 16


def test_encoding_of_damaged_shards(forks: Forks, encode_config: Path, clips: Path, tmp_path: Path) -> None:
    shutil.copytree(clips, tmp_path / "damaged")
    for shard in (tmp_path / "damaged").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    done = forks.run("encode", str(encode_config), f"sources=[{{path: {tmp_path}/damaged}}]", f"out={tmp_path}/out")
    assert_one_message(done, DATA, "16 of 16 samples", "max_bad_fraction")


def test_token_budget_too_small(train: Callable[..., Done]) -> None:
    assert_one_message(train(data__token_budget=40), CONFIG, "data.token_budget", "3 x 4 x 4 = 48 tokens", "at least 48")


def test_world_size_that_does_not_divide(train: Callable[..., Done]) -> None:
    done = train(data__packs_per_step=3, ranks=2)
    first, _, second = done.err.partition("\nerror: ")
    assert_one_message(Done(done.code, done.out, first), CONFIG, "data.packs_per_step", "3 % 2 = 1", "1 or 3 processes")
    assert second.strip() in ("", first.removeprefix("error: ").strip()), "the ranks disagree"


def test_size_that_does_not_fit_the_codec(train: Callable[..., Done], clips: Path) -> None:
    done = train(data__sources=[{"path": str(clips)}], data__sizes=[[8, 32, 32]])
    assert_one_message(done, CONFIG, "data.sizes", "8 frames", "1 + 4k")


def test_encode_size_that_does_not_fit_the_codec(forks: Forks, encode_config: Path, tmp_path: Path) -> None:
    done = forks.run("encode", str(encode_config), "sizes=[[8, 32, 32]]", f"out={tmp_path}/out")
    assert_one_message(done, CONFIG, "sizes", "8 frames", "1 + 4k")


def test_preview_size_that_does_not_fit_the_codec(train: Callable[..., Done]) -> None:
    done = train(preview={"prompts": [PROMPT], "size": [8, 32, 32]})
    assert_one_message(done, CONFIG, "preview.size", "8 frames", "1 + 4k")


def test_raw_clips_without_sizes(train: Callable[..., Done], clips: Path) -> None:
    assert_one_message(train(data__sources=[{"path": str(clips)}]), CONFIG, "data.sizes is empty")


def test_patch_that_does_not_fit(train: Callable[..., Done]) -> None:
    assert_one_message(train(backbone__patch_size=[2, 2, 2]), CONFIG, "patch_size", "2")


# --- configs ----------------------------------------------------------------------------------------------------


def test_config_typo(tmp_path: Path, latents: Path) -> None:
    config = train_config(tmp_path / "run.yaml", latents, backbone__hiden_size=32)
    done = python_m("dit", "train", str(config))
    assert_one_message(done, CONFIG, f"{config}:", "unknown key backbone.hiden_size", "did you mean hidden_size?")


def test_config_missing(tmp_path: Path, latents: Path) -> None:
    train_config(tmp_path / "cifar.yaml", latents)
    done = python_m("dit", "train", str(tmp_path / "cifra.yaml"))
    assert_one_message(done, CONFIG, "config file not found", str(tmp_path / "cifra.yaml"), "did you mean cifar.yaml?")


def test_config_that_is_a_folder(forks: Forks, tmp_path: Path) -> None:
    assert_one_message(forks.run("train", str(tmp_path)), CONFIG, str(tmp_path))


def test_override_without_value(forks: Forks, tmp_path: Path, latents: Path) -> None:
    done = forks.run("train", str(train_config(tmp_path / "run.yaml", latents)), "train.seed")
    assert_one_message(done, CONFIG, "train.seed", "key=value")


def test_out_that_is_a_file(train: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_one_message(train(out=str(tmp_path / "file")), CONFIG, "out", str(tmp_path / "file"))


# --- checkpoints ------------------------------------------------------------------------------------------------


def test_another_model_in_the_same_folder(forks: Forks, teacher: Path, latents: Path, tmp_path: Path) -> None:
    config = train_config(tmp_path / "other.yaml", latents, out=str(teacher), backbone__hidden_size=64)
    before = {path: path.read_bytes() for path in teacher.iterdir() if path.is_file() and path.name != ".lock"}
    done = forks.run("train", str(config))
    assert_one_message(done, CONFIG, str(teacher), "backbone.hidden_size: 48 there, 64 here", "another `out`")
    assert {path: path.read_bytes() for path in before} == before, "the refused command changed the run"


def test_every_checkpoint_damaged(forks: Forks, teacher: Path, latents: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    config = train_config(tmp_path / "other.yaml", latents, out=str(tmp_path / "run"))
    done = forks.run("train", str(config))
    assert_one_message(done, CHECKPOINTS, "none is valid", "step-00000006", "step-00000004", "another `out`")
    assert_one_message(sample(forks, tmp_path, tmp_path / "run"), CHECKPOINTS, "none is valid")


def test_teacher_missing(forks: Forks, tmp_path: Path) -> None:
    done = forks.run("distill", str(distill_config(tmp_path / "student.yaml", tmp_path / "nowhere")))
    assert_one_message(done, CONFIG, "teacher.run", str(tmp_path / "nowhere"), "not a run directory")


def test_teacher_without_that_checkpoint(forks: Forks, tmp_path: Path, teacher: Path) -> None:
    done = forks.run("distill", str(distill_config(tmp_path / "student.yaml", teacher)), "teacher.step=5")
    assert_one_message(done, CONFIG, "checkpoint 5", "[4, 6]")


def test_two_writers_of_one_folder(forks: Forks, latents: Path, tmp_path: Path) -> None:
    config = train_config(tmp_path / "run.yaml", latents, train__samples=16 * 500)
    first = forks.start("train", str(config))
    wait_for(lambda: len(metrics(tmp_path / "run")) >= 1)
    second = forks.run("train", str(config), ranks=2)
    first.send(signal.SIGKILL)
    assert_one_message(Done(second.code, second.out, second.err.splitlines()[0]), CONFIG, f"out={tmp_path}/run", f"process {first.pids[0]}")
    wait_for(lambda: first.poll() is not None)
    forks.run("train", str(config), "train.samples=16").ok()


# --- sampling ---------------------------------------------------------------------------------------------------


def sample(forks: Forks, folder: Path, run: Path, **changes: object) -> Done:
    values = {"contestants": [{"run": str(run)}], "prompts": [PROMPT], "size": [9, 32, 32], "out": str(folder / "drawn")}
    path = folder / "sample.yaml"
    path.write_text("\n".join(f"{key}: {value!r}" for key, value in (values | changes).items()))
    return forks.run("sample", str(path))


def test_sample_from_no_run(forks: Forks, tmp_path: Path) -> None:
    assert_one_message(sample(forks, tmp_path, tmp_path), CONFIG, "contestants.0.run", str(tmp_path), "not a run directory")


def test_sample_with_labels_of_another_number(forks: Forks, tmp_path: Path, teacher: Path) -> None:
    assert_one_message(sample(forks, tmp_path, teacher, labels=[1, 2]), CONFIG, "labels has 2 entries", "prompts has 1")


def test_sample_with_labels_of_a_model_without_classes(forks: Forks, tmp_path: Path, teacher: Path) -> None:
    assert_one_message(sample(forks, tmp_path, teacher, labels=[1]), CONFIG, "labels was given", "no classes", "backbone.num_classes")


def test_sample_of_a_size_that_does_not_fit(forks: Forks, tmp_path: Path, teacher: Path) -> None:
    assert_one_message(sample(forks, tmp_path, teacher, size=[8, 32, 32]), CONFIG, "size", "8 frames", "1 + 4k")


def test_evaluate_no_run(forks: Forks, tmp_path: Path) -> None:
    config = tmp_path / "evaluate.yaml"
    config.write_text(f"contestants: [{{run: {tmp_path}/nowhere}}]\nsamples: 8\nout: {tmp_path}/out\n")
    assert_one_message(forks.run("evaluate", str(config)), CONFIG, "contestants.0.run", "not a run directory")


def test_sample_of_a_class_model(forks: Forks, train: Callable[..., Done], tmp_path: Path, class_latents: Path) -> None:
    train(backbone__num_classes=3, train__samples=16, data__sources=[{"path": str(class_latents)}]).ok()
    run = tmp_path / "run"
    assert_one_message(sample(forks, tmp_path, run), CONFIG, "num_classes=3", "give labels")
    assert_one_message(sample(forks, tmp_path, run, labels=[3]), CONFIG, "labels has 3, expected 0 to 2")
    sample(forks, tmp_path, run, labels=[2]).ok()
    (tmp_path / "evaluate.yaml").write_text(f"contestants: [{{run: {run}}}]\nsamples: 2\nout: {tmp_path}/judged\n")
    assert_one_message(forks.run("evaluate", str(tmp_path / "evaluate.yaml")), CONFIG, "class-conditional", "clips.name=shapes")


def test_classes_and_labels_that_do_not_fit(train: Callable[..., Done], class_latents: Path) -> None:
    labelled = {"train__samples": 16, "data__sources": [{"path": str(class_latents)}]}
    assert_one_message(train(**labelled, backbone__num_classes=2), CONFIG, "class label 2", "backbone.num_classes")
    assert_one_message(train(train__samples=16, backbone__num_classes=3), CONFIG, "no class label", "backbone.num_classes")
    preview = {"prompts": [PROMPT], "size": [1, 32, 32]}
    assert_one_message(train(**labelled, backbone__num_classes=3, preview=preview), CONFIG, "give preview.labels")
    train(**labelled).ok()  # a model of captions alone; and a run that failed at its start is mended in the same folder


@pytest.fixture(scope="session")
def class_latents(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 noise pictures of three classes as latents."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("classes")
    random = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(4):
            picture = random.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(picture).save(folder / "photos" / name / f"{number}.png")
    forks.run("data", "ingest", str(folder / "photos"), str(folder / "shards")).ok()
    config = folder / "encode.yaml"
    config.write_text(f"sources: [{{path: {folder}/shards}}]\nsizes: [[1, 32, 32]]\nout: {folder}/latents\nnum_workers: 0\n")
    forks.run("encode", str(config)).ok()
    return folder / "latents"
