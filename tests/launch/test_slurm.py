"""Jobs that `launch.submit` sends to a real Slurm: preempted, out of time, cancelled, refused, with a rank that dies or freezes."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from launch.attempts import Attempt, recorded
from tests.launch.slurm import WHY_NOT, Cluster
from tests.processes import Forks, metrics, train_config, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
STEPS = 600
LENGTH = {"train__samples": 16 * STEPS, "train__save_every_steps": 1000}
SITE = """
partition: main
time_limit: "20:00"
nodes: 2
grace_seconds: 50
environment: {MASTER_ADDR: 127.0.0.1, OMP_NUM_THREADS: "1", CUDA_VISIBLE_DEVICES: ""}
interface: lo
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def submit(cluster: Cluster, config: Path, *more: str) -> str:
    """Submit as a user would; the number of the job."""
    (config.parent / "site.yaml").write_text(f"{SITE}python: {sys.executable}\nlogs: {config.parent}/logs\n")
    command = [sys.executable, "-m", "launch.submit", str(config), "--site", str(config.parent / "site.yaml"), *more]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return re.fullmatch(r"Submitted batch job (\d+)\n", done.stdout)[1]  # type: ignore[index]


def ended(cluster: Cluster, job: str) -> str:
    """The state that the job ends in."""
    wait_for(lambda: cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 400)
    return cluster.job(job)["JobState"]


def log(config: Path) -> str:
    return "".join(path.read_text() for path in (config.parent / "logs").glob("*.log"))


def test_preempted_and_out_of_time_without_a_lost_step(cluster: Cluster, forks: Forks, tmp_path: Path, latents: Path) -> None:
    config = train_config(tmp_path / "run.yaml", latents, **LENGTH)
    run = config.with_suffix("")
    job = submit(cluster, config)

    wait_for(lambda: len(metrics(run)) >= 50)
    cluster.tell("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    wait_for(lambda: len(recorded(run)) == 1)

    first = recorded(run)[0].reached
    assert first is not None
    wait_for(lambda: len(metrics(run)) >= first + 50)
    minutes = 1 + int(cluster.job(job)["RunTime"].split(":")[1])
    cluster.tell("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    wait_for(lambda: len(recorded(run)) == 2)
    cluster.tell("scontrol", "update", f"JobId={job}", "TimeLimit=20")

    assert ended(cluster, job) == "COMPLETED", log(config)
    attempts = recorded(run)
    assert [attempt.code for attempt in attempts] == [0] * len(attempts)
    for before, after in pairwise(attempts):
        assert before.reached is not None
        assert after.began == before.reached, "it goes on behind the last step that was done"
    assert int(cluster.job(job)["Restarts"]) == len(attempts) - 1 >= 2
    assert log(config).count("requeue: interrupted after SIGUSR1") == len(attempts) - 1

    whole = train_config(tmp_path / "whole.yaml", latents, **LENGTH)
    forks.run("train", str(whole), ranks=2).ok()
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert metrics(run) == metrics(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_is_lost_costs_a_restart_within_the_job(
    cluster: Cluster, tmp_path: Path, latents: Path, number: signal.Signals
) -> None:
    config = train_config(tmp_path / "run.yaml", latents, train__samples=16 * 300, train__save_every_steps=20)
    run = config.with_suffix("")
    job = submit(cluster, config)
    wait_for(lambda: len(metrics(run)) >= 50)
    os.kill(json.loads((run / "heartbeats" / f"slurm-{job}" / "rank-00001.json").read_text())["pid"], number)
    assert ended(cluster, job) == "COMPLETED", log(config)
    first, second = recorded(run)
    assert first.code in (137, 143), log(config)  # srun tells of the rank, or of those that it ended for it
    assert second.code == 0, log(config)
    assert second.began
    assert second.began % 20 == 0
    assert ("rank 1 (process" in log(config)) == (number == signal.SIGSTOP)
    assert int(cluster.job(job)["Restarts"]) == 0
    assert [line["step"] for line in metrics(run)] == list(range(1, 301))


def test_what_starting_again_cannot_help_fails_with_its_code(cluster: Cluster, tmp_path: Path, latents: Path) -> None:
    config = train_config(tmp_path / "run.yaml", tmp_path / "nowhere")
    job = submit(cluster, config)
    assert ended(cluster, job) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "2:0", log(config)
    assert [attempt.code for attempt in recorded(tmp_path / "run")] == [2]


def test_a_cancelled_job_does_not_come_back_and_the_same_command_goes_on(cluster: Cluster, tmp_path: Path, latents: Path) -> None:
    config = train_config(tmp_path / "run.yaml", latents, train__samples=16 * 200, train__save_every_steps=1000)
    run = config.with_suffix("")
    job = submit(cluster, config)
    wait_for(lambda: len(metrics(run)) >= 20)
    cluster.tell("scancel", job)
    assert ended(cluster, job) == "CANCELLED"
    job = submit(cluster, config)
    assert ended(cluster, job) == "COMPLETED", log(config)
    last: Attempt = recorded(run)[-1]
    assert (last.job, last.code) == (f"slurm-{job}", 0)


def test_a_sweep_is_an_array_of_runs(cluster: Cluster, tmp_path: Path, latents: Path) -> None:
    config = train_config(tmp_path / "run.yaml", latents)
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("".join(f"out={tmp_path}/lr{lr} optimizer.lr={lr}\n" for lr in (0.001, 0.002)))
    job = submit(cluster, config, "--sweep", str(sweep), "site.nodes=1")
    assert {ended(cluster, f"{job}_{task}") for task in (0, 1)} == {"COMPLETED"}, log(config)
    assert [metrics(tmp_path / f"lr{lr}")[-1]["lr"] for lr in (0.001, 0.002)] == [0.001, 0.002]
