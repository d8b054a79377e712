"""From rendered clips to an evaluated few-step student by the commands that a user types, and what each leaves behind."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dit.config
from data_pipelines.__main__ import _parser as data_parser
from data_pipelines.config_file import load_run
from data_pipelines.index import index_path, read_index
from dit.cli import VERBS
from dit.config import DistillRun, TrainRun
from dit.demo import stages
from dit.engine.checkpoint import load_weights
from tests.processes import Forks, distill_config, metrics, python_m, train_config, wait_for

FRAMES, STEPS, STEP_SAMPLES = 9, 6, 16
PROMPTS = ["a large red disc moving right quickly near the top", "a small blue square moving down slowly near the left"]
PREVIEW = {"prompts": PROMPTS, "size": [FRAMES, 32, 32], "every_steps": 3}


def write_json_as_yaml(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every verb has run once."""
    root = tmp_path_factory.mktemp("whole")
    latents, teacher, student = root / "latents", root / "teacher", root / "student"
    encode = {"sources": [{"path": str(root / "clips")}], "sizes": [[FRAMES, 32, 32]], "out": str(latents), "batch_size": 8}
    validation = {"source": str(latents), "samples": 8, "times": [0.3, 0.7], "every_steps": 3}
    preview = {**PREVIEW, "sampling": {"steps": 2}}
    both = [{"run": str(teacher)}, {"run": str(student)}]
    sample = {"contestants": both, "prompts": PROMPTS, "size": [FRAMES, 32, 32], "out": str(root / "drawn")}
    random_conv = {"name": "random_conv"}
    wanted = [
        {"name": "adherence"},
        {"name": "positions"},
        *({"name": name, "features": random_conv} for name in ("diversity", "fidelity")),
    ]
    evaluate = {"contestants": both, "samples": 8, "per_caption": 2, "metrics": wanted, "out": str(root / "evaluation")}
    for command in (
        ("data_pipelines", "shapes", str(root / "clips"), "--clips", "48", "--shard-samples", "16", "--processes", "1"),
        ("dit", "encode", str(write_json_as_yaml(root / "encode.yaml", encode))),
        ("dit", "train", str(train_config(root / "teacher.yaml", latents, validation=validation, preview=preview))),
        ("dit", "distill", str(distill_config(root / "student.yaml", teacher, preview=PREVIEW))),
        ("dit", "sample", str(write_json_as_yaml(root / "sample.yaml", sample))),
        ("dit", "evaluate", str(write_json_as_yaml(root / "evaluate.yaml", evaluate))),
    ):
        done = python_m(*command).ok()
        assert "Traceback" not in done.err
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def assert_shows_something(picture: Image.Image) -> None:
    values = np.asarray(picture.convert("RGB"))
    assert values.std() > 2, "one colour"  # 6 steps of training: dark noise
    assert len(np.unique(values.reshape(-1, 3), axis=0)) > 100


def assert_sheet(file: Path, columns: int, rows: int, strip: int) -> None:
    """A PNG of `columns` x `rows` cells: a strip `strip` pixels wide, enlarged twice, with one or two lines of caption."""
    picture = Image.open(file)
    assert picture.format == "PNG"
    assert picture.width == columns * (2 * strip + 8) + 8
    assert picture.height in [16 + rows * (2 * 32 + 15 * lines + 8) for lines in (1, 2)]
    assert_shows_something(picture)


def frames_of(file: Path) -> list[np.ndarray]:
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


# --- what is left behind ----------------------------------------------------------------------------------------


def test_the_cache_says_what_it_holds(path: Path) -> None:
    assert json.loads((path / "latents" / "manifest.json").read_text()) == {"shards": 3, "samples": 48, "left_out": 0}
    entries = read_index(index_path(str(path / "latents" / "shard-000001.tar"))).entries
    assert len(entries) == 16
    assert {(e.facts.kind, e.facts.frames, e.facts.height, e.facts.width) for e in entries} == {("latents", 3, 8, 8)}
    assert json.loads((path / "latents" / "cache.json").read_text())["sizes"] == [[FRAMES, 32, 32]]


@pytest.mark.parametrize("run", ["teacher", "student"])
def test_records_of_a_run(path: Path, run: str) -> None:
    folder = path / run
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["samples_seen"] for line in lines] == [STEP_SAMPLES * step for step in range(1, STEPS + 1)]
    for line in lines:
        assert np.isfinite([line["loss"], line["grad_norm"], line["lr"]]).all()
        assert line["grad_norm"] > 0
        assert line["bad"] == 0
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"], status["samples_seen"]) == ("done", STEPS, STEPS * STEP_SAMPLES)
    assert sorted(p.name for p in (folder / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000006"]
    assert json.loads((folder / "env.json").read_text())["packages"]["torch"] == torch.__version__
    assert run in (folder / "command.txt").read_text()
    assert "48 samples" in (folder / "data.txt").read_text()


def test_validations_are_recorded_sample_by_sample_and_compared(forks: Forks, path: Path, tmp_path: Path) -> None:
    first, second = (line["held_out"] for line in metrics(path / "teacher") if "held_out" in line)
    assert list(first["cells"]) == ["all", "t=0.3", "t=0.7"]
    losses = [np.array(record["losses"]) for record in (first, second)]
    assert losses[0].shape == losses[1].shape
    assert second["cells"]["t=0.7"]["change"] == pytest.approx((losses[1] - losses[0])[1].mean())
    assert "change" not in first["cells"]["all"]
    # cut off after the first validation and taken up again, the run compares with what it recorded before
    shutil.copytree(path / "teacher", tmp_path / "teacher")
    shutil.rmtree(tmp_path / "teacher" / "checkpoints" / "step-00000006")
    done = forks.run("train", str(path / "teacher.yaml"), f"out={tmp_path / 'teacher'}").ok()
    assert metrics(tmp_path / "teacher") == metrics(path / "teacher")
    assert "held-out loss" in done.out + done.err


def test_the_resolved_config_is_the_same_run(path: Path) -> None:
    resolved = {name: str(path / name / "config.resolved.yaml") for name in ("teacher", "student")}
    assert load_run(TrainRun, resolved["teacher"]) == load_run(TrainRun, str(path / "teacher.yaml"))
    steps = [int(folder.name[5:]) for folder in (path / "teacher" / "checkpoints").glob("step-*")]
    assert load_run(DistillRun, resolved["student"]) == load_run(DistillRun, str(path / "student.yaml"), [f"teacher.step={max(steps)}"])
    assert load_run(TrainRun, str(path / "student" / "teacher.resolved.yaml")) == load_run(TrainRun, str(path / "teacher.yaml"))


def test_tensorboard_can_be_read(path: Path) -> None:
    board = EventAccumulator(str(path / "teacher" / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    tags = board.Tags()
    assert {"train/loss", "train/grad_norm", "train/lr", "val/loss", "val/loss_t/0.3", "perf/samples_per_sec"} <= set(tags["scalars"])
    losses = {line["step"]: line["loss"] for line in metrics(path / "teacher")}
    assert {point.step: point.value for point in board.Scalars("train/loss")} == pytest.approx({s: losses[s] for s in (2, 4, 6)})
    assert [point.step for point in board.Scalars("val/loss")] == [3, 6]
    assert [point.step for point in board.Scalars("val/change_t/0.3")] == [6]
    assert any(tag.startswith("samples/") for tag in tags["images"])


@pytest.mark.parametrize("run", ["teacher", "student"])
@pytest.mark.parametrize("step", [0, 3, 6])
def test_previews(path: Path, run: str, step: int) -> None:
    stem = path / run / "samples" / f"step-{step:08d}"
    assert_sheet(stem.with_suffix(".png"), columns=2, rows=1, strip=5 * 33 - 1)
    animation = Image.open(stem.with_suffix(".gif"))
    assert (animation.format, animation.n_frames) == ("GIF", FRAMES)
    assert_shows_something(animation)


def test_the_student_starts_as_its_teacher_and_moves(path: Path) -> None:
    teacher, student = (load_weights(path / run, None, "ema") for run in ("teacher", "student"))
    assert teacher.keys() == student.keys()
    distance = sum(float((student[name] - teacher[name]).square().sum()) for name in teacher)
    size = sum(float(tensor.square().sum()) for tensor in teacher.values())
    assert 0 < distance < 0.1 * size  # 6 small steps away; another initialisation would be about 2 away


def test_drawn_videos(path: Path) -> None:
    drawn = path / "drawn"
    assert json.loads((drawn / "prompts.json").read_text()) == PROMPTS
    assert_sheet(drawn / "contact_sheet.png", columns=2, rows=2, strip=6 * 33 - 1)
    assert Image.open(drawn / "grid.gif").n_frames == FRAMES
    assert len(frames_of(drawn / "grid.mp4")) == FRAMES
    folders = sorted(folder.name for folder in drawn.iterdir() if folder.is_dir())
    assert folders == ["student_2_steps", "teacher_2_steps"]
    for folder in folders:
        for number in range(len(PROMPTS)):
            frames = frames_of(drawn / folder / f"{number:04d}.mp4")
            assert len(frames) == FRAMES
            assert frames[0].shape == (256, 256, 3)
            assert_shows_something(Image.fromarray(frames[-1]))


def test_evaluation(path: Path) -> None:
    results = json.loads((path / "evaluation" / "results.json").read_text())
    *judged, floor = results["rows"]
    assert [Path(row["subject"]["run"]).name for row in judged] == ["teacher", "student"]
    assert [row["subject"]["sampling"]["sampler"] for row in judged] == ["euler", "consistency"]
    for row in results["rows"]:
        for split in ("train", "held_out"):
            figures = row["figures"][split]
            assert 0 <= figures["adherence/all"]["value"] <= figures["adherence/mean"]["value"] <= 1
            assert figures["adherence/all"]["low"] <= figures["adherence/all"]["value"] <= figures["adherence/all"]["high"]
    assert floor["figures"]["held_out"]["adherence/all"]["value"] == 1
    assert floor["figures"]["held_out"]["positions/spread"]["value"] > 0.3
    assert "fidelity/random_conv/psnr" not in judged[0]["figures"]["train"]
    assert 0 < judged[1]["figures"]["train"]["fidelity/random_conv/psnr"]["value"] < 100
    assert judged[0]["subject"]["checkpoint"] != judged[1]["subject"]["checkpoint"]
    assert results["protocol"]["metrics"]["fidelity/random_conv"]["features"]["weights"]
    table = (path / "evaluation" / "table.md").read_text()
    assert "| adherence/shape | " in table
    assert table.splitlines()[0].endswith("| reference |")
    for file in (path / "evaluation").glob("*.png"):
        assert_shows_something(Image.open(file))
    assert len(list((path / "evaluation").glob("*.png"))) == 4


# --- again, interrupted, changed --------------------------------------------------------------------------------


@pytest.mark.parametrize(("verb", "out"), [("encode", "latents"), ("train", "teacher"), ("distill", "student")])
def test_the_same_command_again_does_nothing(forks: Forks, path: Path, verb: str, out: str) -> None:
    kept = ("checkpoints", "samples", "metrics.jsonl", "config.resolved.yaml", "shard-", "cache.json", "manifest.json")
    before = {name: data for name, data in contents(path / out).items() if name.startswith(kept)}
    times = {name: (path / out / name).stat().st_mtime_ns for name in before if name.startswith(("checkpoints", "samples", "shard-"))}
    done = forks.run(verb, str(path / ("encode.yaml" if verb == "encode" else f"{out}.yaml"))).ok()
    assert {name: data for name, data in contents(path / out).items() if name.startswith(kept)} == before
    assert {name: (path / out / name).stat().st_mtime_ns for name in times} == times
    assert "step " not in done.out
    if verb != "encode":
        assert json.loads((path / out / "status.json").read_text())["state"] == "done"


def test_sampling_again_draws_the_same(forks: Forks, path: Path, tmp_path: Path) -> None:
    forks.run("sample", str(path / "sample.yaml"), f"out={tmp_path}").ok()
    first, second = contents(path / "drawn"), contents(tmp_path)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    forks.run("sample", str(path / "sample.yaml"), f"out={tmp_path}", "seed=1").ok()
    assert contents(tmp_path)["contact_sheet.png"] != contents(path / "drawn")["contact_sheet.png"]


def test_encoding_killed_and_taken_up_again_gives_the_same_bytes(forks: Forks, path: Path, tmp_path: Path) -> None:
    command = ("encode", str(path / "encode.yaml"), f"out={tmp_path}/latents", "num_workers=0")
    process = forks.start(*command)
    wait_for(lambda: any((tmp_path / "latents").glob("*.index.json")))
    process.send(signal.SIGKILL)
    wait_for(lambda: process.poll() is not None)
    assert not (tmp_path / "latents" / "manifest.json").exists()
    assert len(list((tmp_path / "latents").glob("*.tar"))) < 3
    again = forks.run(*command).ok().out
    assert any(f"{kept} of 3 shards are complete" in again for kept in (1, 2)), "the first shard was made again"
    whole = contents(path / "latents")
    assert len(whole) == 8  # three shards, an index of each, cache.json, manifest.json
    assert {name: data for name, data in contents(tmp_path / "latents").items() if name in whole} == whole


def test_a_stale_cache_is_refused_by_field(forks: Forks, path: Path, tmp_path: Path) -> None:
    shutil.copytree(path / "latents", tmp_path / "latents")
    cache = tmp_path / "latents" / "cache.json"
    made = json.loads(cache.read_text())
    made["latents"]["weights"] = "0" * 32
    cache.write_text(json.dumps(made))
    trained = forks.run("train", str(train_config(tmp_path / "run.yaml", tmp_path / "latents")))
    encoded = forks.run("encode", str(path / "encode.yaml"), f"out={tmp_path}/latents")
    for done, words in ((trained, "data.sources.0.path"), (encoded, f"out={tmp_path}/latents")):
        assert done.code == 2
        assert done.err.startswith("error: ")
        assert "Traceback" not in done.err
        assert words in done.err
        assert "0" * 32 in done.err
    assert "latents.weights" in trained.err
    assert "latents: " in encoded.err


def test_sigterm_saves_and_the_same_command_goes_on(forks: Forks, path: Path, tmp_path: Path) -> None:
    config = train_config(tmp_path / "run.yaml", path / "latents", train__samples=16 * 40, train__save_every_steps=1000)
    process = forks.start("train", str(config))
    wait_for(lambda: len(metrics(tmp_path / "run")) >= 3)
    process.send(signal.SIGTERM)
    process.wait().ok()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("interrupted", "SIGTERM")
    assert 3 <= status["step"] < 40
    before = metrics(tmp_path / "run")
    assert len(before) == status["step"]
    forks.run("train", str(config), f"train.samples={16 * (status['step'] + 2)}").ok()
    assert metrics(tmp_path / "run")[: len(before)] == before
    assert len(metrics(tmp_path / "run")) == status["step"] + 2
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


# --- the demo ---------------------------------------------------------------------------------------------------


def test_the_demo_is_made_of_valid_commands(tmp_path: Path) -> None:
    plan = stages(tmp_path / "a folder", 2)
    verbs = [stage.command[3] for stage in plan]
    assert verbs == ["shapes", "shapes", "encode", "train", "distill", "sample", "evaluate"]
    for stage in plan:
        _, _, module, verb, *arguments = stage.command
        if module == "data_pipelines":
            assert str(data_parser().parse_args([verb, *arguments]).out).startswith(str(tmp_path))
        else:
            run = load_run(getattr(dit.config, VERBS[verb].root), arguments[0], arguments[1:])
            assert run.out.startswith(str(tmp_path))
        assert stage.marker.is_relative_to(tmp_path)


def test_a_stage_of_the_demo_is_finished_when_its_marker_says_so(tmp_path: Path) -> None:
    plan = {stage.command[3]: stage for stage in stages(tmp_path, 1)}
    assert not any(stage.finished() for stage in plan.values())
    for stage in plan.values():
        stage.marker.parent.mkdir(parents=True, exist_ok=True)
        stage.marker.write_text(json.dumps({"state": "interrupted"}))
    assert [verb for verb, stage in plan.items() if not stage.finished()] == ["train", "distill"]
    plan["train"].marker.write_text(json.dumps({"state": "done"}))
    assert plan["train"].finished()
