"""Executors: the same bytes from processes, a real Slurm and a real Ray; kills, failures and what is said of them."""

import hashlib
import importlib.util
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import executors
from data_pipelines.__main__ import main
from data_pipelines.config import ExecutorConfig
from data_pipelines.errors import AccessDenied, UserError
from data_pipelines.executors import LOGS, Executor, WorkFailed
from tests.launch.slurm import WHY_NOT, Cluster
from tests.processes import ENVIRONMENT, wait_for

CLIPS = ("--clips", "320", "--shard-samples", "20")
no_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no ray: the extra ray is not installed")


def command(*arguments: object) -> "subprocess.Popen[str]":
    """Start `python -m ARGUMENTS`."""
    argv = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.Popen(
        argv,
        env=ENVIRONMENT | {k: os.environ[k] for k in ("SLURM_CONF",) if k in os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def say(*arguments: object, code: int = 0) -> str:
    """Output and errors of a command that ends with `code`; its workers are real processes, it is this one."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        ended = main(list(map(str, arguments)))
    assert ended == code, out.getvalue()
    return out.getvalue()


def digests(folder: Path) -> dict[str, str]:
    """A digest of every file, logs apart."""
    files = [path for path in folder.rglob("*") if path.is_file() and LOGS not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 photographs in two class folders."""
    folder = tmp_path_factory.mktemp("src") / "photos"
    pictures = np.random.default_rng(0).integers(0, 256, (30, 24, 32, 3), np.uint8)
    for number, picture in enumerate(pictures):
        place = folder / ("cat" if number % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> dict[str, Path]:
    """What one process makes of each command."""
    folder = tmp_path_factory.mktemp("whole")
    say("shapes", folder / "shapes", *CLIPS, "--processes", 1)
    say("ingest", photos, folder / "ingest", "--shard-samples", 4, "--processes", 1)
    return {"shapes": folder / "shapes", "ingest": folder / "ingest"}


@pytest.fixture
def listed(tmp_path: Path, photos: Path) -> Path:
    """A manifest of copies of the photographs: a file that goes does not make it another source."""
    shutil.copytree(photos, tmp_path / "photos")
    manifest = tmp_path / "photos.jsonl"
    manifest.write_text("".join(json.dumps({"path": str(path)}) + "\n" for path in sorted((tmp_path / "photos").rglob("*.png"))))
    return manifest


def lose_a_file(out: Path) -> Path:
    """Remove the shards, and a file that shard 2 needs; returns where it was. A copy of it lies beside the manifest."""
    for path in out.glob("*.tar*"):
        path.unlink()
    lost = Path(json.loads((out / "plan" / "samples.jsonl").read_text().splitlines()[9])["file"]["place"]["address"])
    lost.rename(out.parent / "away.png")
    return lost


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        patch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
        yield cluster


# --- the work ---------------------------------------------------------------------------------------------------


def make(folder: Path, number: int) -> None:
    """Write the file `number`, in one of the ways that a piece of work can end."""
    match number:
        case 2:
            raise UserError("the disk is not mounted")
        case 3:
            os.kill(os.getpid(), signal.SIGKILL)
        case 4:
            raise ZeroDivisionError("a bug")
        case 5:
            raise AccessDenied("bucket b refuses profile p")
    (folder / str(number)).write_text(str(os.getpid()))


def is_made(folder: Path, number: int) -> bool:
    return (folder / str(number)).exists()


def run(folder: Path, numbers: list[int], **config: object) -> tuple[list[int], WorkFailed | None]:
    made = []
    try:
        for number in Executor(ExecutorConfig(**config)).run(partial(make, folder), numbers, partial(is_made, folder), folder):
            made.append(number)
    except WorkFailed as error:
        return sorted(made), error
    return sorted(made), None


def test_a_failure_costs_its_item_alone_and_is_reported_with_reason_and_code(tmp_path):
    made, error = run(tmp_path, [0, 1, 2, 3, 4, 6, 7, 8], processes=2)
    assert made == [0, 1, 6, 7, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == list("01678")
    assert len({path.read_text() for path in tmp_path.iterdir()} - {str(os.getpid())}) > 1, "not in processes of their own"
    lines = sorted(str(error).split("\n")[1:])
    assert str(error).startswith("3 of 8 were not made")
    assert lines[0] == "  2 (exit code 2): the disk is not mounted"
    assert lines[1] == "  3 (exit code 1): its process ended with SIGKILL"
    assert lines[2] == "  4 (exit code 1): ZeroDivisionError: a bug"


def test_what_would_befall_every_item_ends_the_work_at_once(tmp_path):
    made, error = run(tmp_path, [0, 5, 6, 7], processes=1)
    assert made == [0]
    assert error.exit_code == AccessDenied.exit_code
    assert not is_made(tmp_path, 6)


def test_a_failure_at_what_another_process_has_made_is_none(tmp_path):
    (tmp_path / "2").write_text("")
    assert run(tmp_path, [0, 2], processes=1) == ([0, 2], None)


# --- commands ---------------------------------------------------------------------------------------------------


def test_several_processes_write_the_bytes_of_one(tmp_path, photos, whole):
    say("ingest", photos, tmp_path / "ingest", "--shard-samples", 4, "--processes", 2)
    assert digests(tmp_path / "ingest") == digests(whole["ingest"])


def test_a_killed_run_leaves_no_worker_and_goes_on_in_shares(tmp_path, whole):
    """SIGKILL in the middle; then three shares, as the tasks of an array are; the last one writes the record."""
    out = tmp_path / "shapes"
    process = command("data_pipelines", "shapes", out, *CLIPS, "--processes", 2)
    wait_for(lambda: any(out.glob("*.index.json")))
    group = [int(pid) for pid in children_of(process.pid)]
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not any(is_running(pid) for pid in group), 20)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.index.json")}
    assert 0 < len(kept) < 16
    for share in (2, 0):
        assert "others are not" in say("shapes", out, *CLIPS, "--share", f"{share}/3")
        assert not (out / "manifest.json").exists()
    assert "320 clips in" in say("shapes", out, *CLIPS, "--share", "1/3")
    assert digests(out) == digests(whole["shapes"]), "partial files are left, or other bytes"
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept


def children_of(pid: int) -> list[int]:
    """All that descend from a process."""
    found = [int(child) for tasks in Path(f"/proc/{pid}/task").glob("*/children") for child in tasks.read_text().split()]
    return found + [below for child in found for below in children_of(child)]


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_shard_whose_files_are_missing_fails_alone(tmp_path, listed):
    source, out = listed, tmp_path / "out"
    say("ingest", source, out, "--shard-samples", 4)
    before = digests(out)
    lost = lose_a_file(out)
    for executor in (("--processes", 1), ("--processes", 2)):
        said = say("ingest", source, out, "--shard-samples", 4, *executor, code=2)
        assert "were not made" in said
        assert f"2 (exit code 2): {lost} was there when" in said
        assert sorted(path.name for path in out.glob("*.tar")) == [f"shard-{n:06d}.tar" for n in range(8) if n != 2]
    (tmp_path / "away.png").rename(lost)
    say("ingest", source, out, "--shard-samples", 4)
    assert digests(out) == before


def test_tars_of_others_are_indexed_in_shares(tmp_path, whole):
    for path in whole["shapes"].glob("*.tar"):
        shutil.copy(path, tmp_path)
    assert "others are not" in say("index", tmp_path, "--share", "1/2")
    assert sorted(path.name[:12] for path in tmp_path.glob("*.json")) == [f"shard-{n:06d}" for n in range(1, 16, 2)]
    assert "320 samples in 16 shards" in say("index", tmp_path)


def test_each_folder_of_tars_has_its_own_array(tmp_path, whole, monkeypatch):
    """Two folders are indexed from one place; a Slurm that does at once what it is given."""
    monkeypatch.chdir(tmp_path)
    submitted = []

    def slurm(*command: str, given: str = "") -> str:
        if command[0] == "squeue":
            return ""
        submitted.append({option.partition("=")[0]: option.partition("=")[2] for option in command})
        assert main([*shlex.split(given.splitlines()[1])[4:-1], "--share=0/1"]) == 0
        return "1"

    monkeypatch.setattr(executors, "_slurm", slurm)
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(whole["shapes"] / "shard-000000.tar", tmp_path / name)
        index = tmp_path / name / "shard-000000.tar.index.json"
        index.unlink(missing_ok=True)
        assert "submitted array job" in say("index", name, "--executor", "slurm-array", "--tasks", 1)
        assert index.exists()
    first, second, again = ((options["--job-name"], Path(options["--output"]).parent) for options in submitted)
    assert first == again
    assert first[0] != second[0], "who indexes b would watch the array of a"
    assert first[1] != second[1], "failures of the one would be those of the other"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--executor", "slurm"), "Allowed: local, slurm-array, ray"),
        (("--share", "3/3"), "expected I/N"),
        (("--tasks", "0"), "tasks is 0"),
    ],
)
def test_mistakes_in_the_options_are_named(tmp_path, arguments, said, capsys):
    assert main(["shapes", str(tmp_path / "out"), "--clips", "3", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_share_needs_the_plan(tmp_path, photos, capsys):
    assert main(["ingest", str(photos), str(tmp_path / "out"), "--share", "0/2"]) == 2
    assert "without --share" in capsys.readouterr().err


# --- real schedulers --------------------------------------------------------------------------------------------


@pytest.mark.slow
@no_ray
def test_ray_goes_on_after_a_kill_and_writes_the_same_bytes(tmp_path, photos, whole):
    out = tmp_path / "shapes"
    process = command("data_pipelines", "shapes", out, *CLIPS, "--processes", 2)
    wait_for(lambda: any(out.glob("*.index.json")))
    process.kill()
    process.communicate(timeout=60)
    assert not (out / "manifest.json").exists()
    say("shapes", out, *CLIPS, "--executor", "ray", "--tasks", 2)
    assert digests(out) == digests(whole["shapes"])
    say("ingest", photos, tmp_path / "ingest", "--shard-samples", 4, "--executor", "ray", "--tasks", 2)
    assert digests(tmp_path / "ingest") == digests(whole["ingest"])


@pytest.mark.slow
@no_ray
def test_ray_reports_what_failed_and_keeps_the_rest(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    made, error = run(tmp_path, [0, 1, 2, 4, 6], name="ray", tasks=2)
    assert made == [0, 1, 6]
    assert "2 (exit code 2): the disk is not mounted" in str(error)
    assert "4 (exit code 1): ZeroDivisionError" in str(error)


@pytest.mark.slow
def test_an_array_of_slurm_writes_the_same_bytes(tmp_path, photos, whole, slurm):
    """A local run is killed, the array goes on; its watcher is killed, the same command watches the same array."""
    array = ("--executor", "slurm-array", "--tasks", 3, "--slurm-options=--cpus-per-task=1")
    out = tmp_path / "shapes"
    local = command("data_pipelines", "shapes", out, *CLIPS, "--processes", 1)
    wait_for(lambda: any(out.glob("*.index.json")))
    local.kill()
    local.communicate(timeout=60)
    watcher = command("data_pipelines", "shapes", out, *CLIPS, *array)
    wait_for(lambda: bool(slurm.tell("squeue", "--noheader")), 30)
    watcher.kill()
    watcher.communicate(timeout=60)
    said = say("shapes", out, *CLIPS, *array)
    assert "watching it" in said
    assert "320 clips in" in said
    assert digests(out) == digests(whole["shapes"])
    assert "submitted array job" in say("ingest", photos, tmp_path / "ingest", "--shard-samples", 4, *array)
    assert digests(tmp_path / "ingest") == digests(whole["ingest"])


@pytest.mark.slow
def test_an_array_without_a_watcher_writes_the_record(tmp_path, whole, slurm):
    out = tmp_path / "shapes"
    watcher = command("data_pipelines", "shapes", out, *CLIPS, "--executor", "slurm-array", "--tasks", 2)
    wait_for(lambda: bool(slurm.tell("squeue", "--noheader")), 30)
    watcher.kill()
    watcher.communicate(timeout=60)
    wait_for((out / "manifest.json").exists, 120)
    wait_for(lambda: not slurm.tell("squeue", "--noheader"), 60)
    assert digests(out) == digests(whole["shapes"])


@pytest.mark.slow
def test_an_array_reports_what_failed_and_keeps_the_rest(tmp_path, listed, slurm):
    source, out = listed, tmp_path / "out"
    say("ingest", source, out, "--shard-samples", 4)
    lost = lose_a_file(out)
    said = say("ingest", source, out, "--shard-samples", 4, "--executor", "slurm-array", "--tasks", 2, code=2)
    assert f"2 (exit code 2): {lost} was there when" in said
    assert len(list(out.glob("*.tar"))) == 7
    options = ("--executor", "slurm-array", "--slurm-options=--partition=none")
    assert "sbatch refused: " in say("shapes", tmp_path / "s", *CLIPS, *options, code=2)
