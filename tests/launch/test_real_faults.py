"""Real training under the supervisor: a frozen and a killed rank cost a restart, and the run is the uninterrupted one to the last bit.

Prints the seconds from the fault to the next step that was not done before: `pytest -m slow -s tests/launch/test_real_faults.py`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.attempts import recorded
from tests.processes import ENVIRONMENT, REPOSITORY, Forks, free_port, metrics, train_config, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 120
LENGTH = {"train__samples": 16 * STEPS, "train__save_every_steps": 10}


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory, latents: Path) -> Path:
    config = train_config(tmp_path_factory.mktemp("whole") / "whole.yaml", latents, **LENGTH)
    forks.run("train", str(config), ranks=2).ok()
    return config.with_suffix("")


@pytest.mark.parametrize("launcher", ["processes", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_rank(tmp_path: Path, latents: Path, whole: Path, launcher: str, number: signal.Signals) -> None:
    config = train_config(tmp_path / "run.yaml", latents, **LENGTH)
    run = tmp_path / "run"
    command, environment = [sys.executable, "-m", "launch.supervise", "--run", str(run), "--processes", "2", "--"], ENVIRONMENT
    command += [sys.executable, "-m", "dit", "train", str(config)]
    if launcher == "torchrun":
        command = ["bash", str(REPOSITORY / "launch" / "torchrun.sh"), "train", str(config)]
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = environment | {"RUN": str(run), "NPROC": "2", "MASTER_PORT": str(free_port()), "PATH": programs}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    started = time.monotonic()
    wait_for(lambda: bool(metrics(run)))
    start = time.monotonic() - started
    wait_for(lambda: len(metrics(run)) >= 25)
    victim = next(run.glob("heartbeats/*/rank-00001.json"))
    os.kill(json.loads(victim.read_text())["pid"], number)
    fault, reached = time.monotonic(), len(metrics(run))
    wait_for(lambda: bool(recorded(run)))
    noticed = time.monotonic() - fault
    wait_for(lambda: len(metrics(run)) > reached + 2)
    seconds = time.monotonic() - fault
    said = process.communicate()[1]
    assert process.returncode == 0, said[-6000:]
    assert ("rank 1 (process" in said and "is frozen" in said) == (number == signal.SIGSTOP)
    print(
        f"\n{launcher}: {number.name} to all ranks ended {noticed:.1f} s, to the next new step {seconds:.1f} s; a start takes {start:.1f} s"
    )
    assert metrics(run) == metrics(whole)
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
