"""The shell scripts, the Kubernetes example and the commands of the guide say what they should to the programs that they call."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from data_pipelines.config_file import load_run
from dit.config import TrainRun
from launch.attempts import FINAL
from launch.submit import main

ROOT = Path(__file__).resolve().parents[2]


def argv(tmp_path: Path, script: str, *arguments: str, **environment: str) -> list[str]:
    """What `launch/SCRIPT` calls, with the environment variables of networks first."""
    for name in ("torchrun", "deepspeed", "python"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "${{GLOO_SOCKET_IFNAME:-}}" {name} "$@"\n')
        program.chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, env=path | environment, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def test_torchrun(tmp_path: Path) -> None:
    alone = ["--nnodes", "1", "--node-rank", "0", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", "29500"]
    assert argv(tmp_path, "torchrun.sh", "train", "a b.yaml") == ["", "torchrun", *alone, "-m", "dit", "train", "a b.yaml"]
    place = {"NNODES": "4", "NODE_RANK": "3", "NPROC": "8", "MASTER_ADDR": "host0", "MASTER_PORT": "1", "INTERFACE": "ib0", "RUN": "runs/a"}
    several = ["--nnodes", "4", "--node-rank", "3", "--nproc-per-node", "8", "--master-addr", "host0", "--master-port", "1"]
    supervised = ["python", "-m", "launch.supervise", "--run", "runs/a", "--", "torchrun"]
    assert argv(tmp_path, "torchrun.sh", "train", **place) == ["ib0", *supervised, *several, "-m", "dit", "train"]


def test_deepspeed(tmp_path: Path) -> None:
    assert argv(tmp_path, "deepspeed.sh", "train", NPROC="2")[1:] == shlex.split(
        "deepspeed --master_port 29500 --num_gpus 2 --module dit train"
    )
    place = {"HOSTFILE": "hosts", "NODE_RANK": "1", "MASTER_ADDR": "host0", "INTERFACE": "ib0"}
    expected = "ib0 deepspeed --master_port 29500 --hostfile hosts --no_ssh --node_rank 1 --master_addr host0 --module dit train"
    assert argv(tmp_path, "deepspeed.sh", "train", **place) == shlex.split(expected)


def test_the_kubernetes_job() -> None:
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert tuple(job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]) == FINAL
    assert container["command"][:3] == ["python", "-m", "launch.supervise"]
    verb, config, *overrides = container["args"][container["args"].index("dit") + 1 :]
    run = load_run(TrainRun, str(ROOT / config), overrides)
    assert [run.data.packs_per_step % (8 * nodes) for nodes in (1, 2, 3, 4)] == [0] * 4
    assert (verb, run.out) == ("train", container["command"][4])
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{service['metadata']['name']}:29500" in container["args"]
    assert container["command"][container["command"].index("--interrupted") + 1] == "75", "0 of an evicted pod would be the end of it"
    assert pod["subdomain"] == service["metadata"]["name"]


def commands() -> list[str]:
    lines = (ROOT / "docs" / "guides" / "cluster.md").read_text().splitlines()
    return [line for line in lines if line.startswith("python -m launch.submit")]


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_guide(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "sweep.txt").write_text("out=runs/a\nout=runs/b\n")
    places = {"site.yaml": "launch/site.yaml", "sweep.txt": os.fspath(tmp_path / "sweep.txt")}
    assert main([places.get(word, word) for word in shlex.split(command)[3:]] + ["--dry-run"]) == 0
