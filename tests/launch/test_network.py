"""Two hosts as network namespaces: a supervised torchrun job across them, the link cut in the middle. No split brain."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import ENVIRONMENT, Forks, metrics, train_config, wait_for

WHY_NOT = "needs root" if os.geteuid() else "no ip: apt-get install iproute2" if shutil.which("ip") is None else ""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
STEPS = 240
LENGTH = {"train__samples": 16 * STEPS, "train__save_every_steps": 20}
HOSTS = ("10.77.0.1", "10.77.0.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces, joined by one link between `wire` of each."""
    names = (f"dit{os.getpid()}a", f"dit{os.getpid()}b")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for name, address in zip(names, HOSTS):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "wire", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, timeout=20)


def start(host: str, rank: int, config: Path) -> "subprocess.Popen[str]":
    environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "wire"}
    run = str(config.with_suffix(""))
    supervise = [sys.executable, "-m", "launch.supervise", "--run", run, "--frozen", "20", "--stalled", "12", "--attempts", "6", "--"]
    place = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank), "--master-addr", HOSTS[0], "--master-port", "29411"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *place, "-m", "dit", "train", str(config)]
    command = ["ip", "netns", "exec", host, *supervise, *torchrun]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_cut_link_costs_a_restart_and_never_makes_two_writers(
    hosts: tuple[str, str], forks: Forks, tmp_path: Path, latents: Path
) -> None:
    config = train_config(tmp_path / "run.yaml", latents, **LENGTH)
    run = config.with_suffix("")
    sides = [start(host, rank, config) for rank, host in enumerate(hosts)]
    wait_for(lambda: len(metrics(run)) >= 50)

    ip("-n", hosts[1], "link", "set", "wire", "down")
    cut = time.monotonic()
    standing = -1
    while standing != len(metrics(run)):  # a side that trained alone would never rest
        standing = len(metrics(run))
        time.sleep(3)
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    time.sleep(15)
    assert len(metrics(run)) <= standing, "no side trains alone"
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == saved
    ip("-n", hosts[1], "link", "set", "wire", "up")
    healed = time.monotonic()
    wait_for(lambda: len(metrics(run)) > standing + 1)
    print(f"\nlink cut for {healed - cut:.0f} s, next new step {time.monotonic() - healed:.0f} s after it was mended")

    said = [side.communicate(timeout=300)[1] for side in sides]
    assert [side.returncode for side in sides] == [0, 0], "\n".join(text[-3000:] for text in said)
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert sum(attempt["code"] != 0 for attempt in attempts) >= 2, "both sides had to start again"
    whole = train_config(tmp_path / "whole.yaml", latents, **LENGTH)
    forks.run("train", str(whole), ranks=2).ok()
    assert metrics(run) == metrics(tmp_path / "whole")


def test_the_doctor_names_a_host_that_cannot_be_reached(hosts: tuple[str, str]) -> None:
    """The ranks meet over one link, but the one that they are to work over is cut."""
    ip("link", "add", "data", "netns", hosts[0], "type", "veth", "peer", "name", "data", "netns", hosts[1])
    for name, address in zip(hosts, ("10.78.0.1", "10.78.0.2")):
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "data")
    ip("-n", hosts[0], "link", "set", "data", "up")
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": HOSTS[0], "MASTER_PORT": "29412"}
    ranks = []
    for rank, host in enumerate(hosts):
        environment = ENVIRONMENT | place | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "data"}
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "dit", "doctor", "--patience", "100"]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [rank.communicate(timeout=400) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], said
    for rank, other in ((0, 1), (1, 0)):
        assert re.search(
            rf"^BAD meeting: rank {rank} on \S+ cannot reach rank {other} on \S+ \(10.78.0.{other + 1}\): ", said[rank][0], re.M
        )
        assert "Traceback" not in said[rank][1]
