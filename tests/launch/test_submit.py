"""Batch scripts: what Slurm reads of them, that bash can, and what is refused before anything waits in a queue."""

import subprocess
from pathlib import Path

import pytest
import yaml

from launch.attempts import Attempt, record
from launch.submit import main, seconds
from tests.processes import train_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return train_config(tmp_path / "a run.yaml", tmp_path / "latents")


def site(folder: Path, **values: object) -> str:
    (folder / "site.yaml").write_text(yaml.safe_dump({"time_limit": "2:00:00", "nodes": 2, "tasks_per_node": 2, **values}))
    return str(folder / "site.yaml")


def dry_run(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    """What a dry run prints: a script that bash accepts, or an error."""
    assert main([*argv, "--dry-run"]) == code
    out, err = capsys.readouterr()
    if code:
        return err
    assert subprocess.run(["bash", "-n"], input=out, text=True, check=False).returncode == 0
    return out


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return dict((*line.split("=", 1), "")[:2] for line in lines)  # type: ignore[misc]


def test_the_batch_process_supervises_srun(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"environment": {"A": "it's $HOME"}, "interface": "ib0", "setup": ["module load cuda"], "options": ["--reservation=video"]}
    text = dry_run(capsys, str(config), "--site", site(tmp_path, **more), "site.gpus_per_node=2", "train.seed=5")
    found = options(text)
    expected = {
        "nodes": "2",
        "ntasks-per-node": "2",
        "gpus-per-node": "2",
        "time": "2:00:00",
        "open-mode": "append",
        "signal": "B:USR1@120",
    }
    assert expected.items() <= found.items()
    assert {"requeue", "reservation"} <= found.keys()
    assert "array" not in found
    words = tmp_path / "words.sh"  # what bash makes of the last command
    words.write_text(text.replace("exec python", 'printf \'%s\\n\' "$A" "$NCCL_SOCKET_IFNAME" python').replace("module load cuda", "true"))
    said = subprocess.run(
        ["bash", str(words)], capture_output=True, text=True, check=True, env={"SLURM_JOB_USER": "me"}
    ).stdout.splitlines()
    assert said[:2] == ["it's $HOME", "ib0"]
    assert said[2:7] == ["python", "-m", "launch.supervise", "--run", str(config.with_suffix(""))]
    assert said[-6:] == ["python", "-m", "dit", "train", str(config), "train.seed=5"]


def test_the_grace_comes_from_the_steps_of_the_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config.with_suffix("")
    run.mkdir()
    for slowest in (2.5, 100.0, 7.0):
        record(run, Attempt("before", 0, 9, 0, slowest))
    assert options(dry_run(capsys, str(config), "--site", site(tmp_path)))["signal"] == "B:USR1@230"
    assert "leaves no time to train" in dry_run(capsys, str(config), "--site", site(tmp_path), "site.time_limit='3:00'", code=2)


def test_a_sweep_is_an_array(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("out=runs/a optimizer.lr=1e-3  # as before\n\nout='runs/b c' optimizer.lr=2e-3\n")
    text = dry_run(capsys, str(config), "--site", site(tmp_path), "--sweep", str(sweep))
    assert options(text)["array"] == "0-1"
    words = tmp_path / "words.sh"
    words.write_text(text.replace("exec python", "printf '%s\\n' python"))
    environment = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_USER": "me"}
    said = subprocess.run(["bash", str(words)], capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    assert said[4] == "runs/b c"
    assert said[-4:] == ["train", str(config), "out=runs/b c", "optimizer.lr=2e-3"]
    sweep.write_text("optimizer.lr=1e-3\noptimizer.lr=2e-3\n")
    assert "have one `out`" in dry_run(capsys, str(config), "--site", site(tmp_path), "--sweep", str(sweep), code=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["train.samplse=1"], "did you mean samples"),
        (["site.nodes=3"], "data.packs_per_step=4 cannot be shared by site.nodes=3 x 2 ranks = 6"),
        (["site.nodes=3", "engine.sequence_parallel=2"], "packs_per_step=4 cannot be shared by site.nodes=3 x 2 ranks = 6, 2 to a pack"),
        (["site.nodes=3", "engine.sequence_parallel=4"], "cannot be shared by site.nodes=3 x 2 ranks = 6, 4 to a pack"),
        (["site.node=3"], "did you mean nodes"),
        (["site.time_limit=soon"], "time_limit"),
        (["site.partition='a\n#SBATCH --uid=0'"], "partition"),
        (["site.options=[rm]"], "expected an option of sbatch"),
    ],
)
def test_mistakes_are_told_before_the_queue(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], words: str
) -> None:
    assert words in dry_run(capsys, str(config), "--site", site(tmp_path), *changes, code=2)


def test_without_slurm(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    assert main([str(config), "--site", site(tmp_path)]) == 2
    assert "there is no sbatch on this machine" in capsys.readouterr().err


def test_the_example_site(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "demo" / "train.yaml")
    text = dry_run(capsys, config, "--site", str(ROOT / "launch" / "site.yaml"), "site.nodes=1", "site.gpus_per_node=2")
    assert "--ntasks-per-node=2" in text


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("90", 5400), ("1:30", 90), ("8:00:00", 28_800), ("2-00", 172_800), ("1-12:30", 131_400), ("1-00:00:10", 86_410)],
)
def test_time_limits(limit: str, expected: int) -> None:
    assert seconds(limit) == expected
