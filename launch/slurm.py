"""One run as a Slurm batch script. Pure: a site, a run and a command in, text out.

The batch process itself is the supervisor (launch/supervise.py), so the signals that Slurm sends to the batch script are its own.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from data_pipelines.config import Section

Word = Annotated[str, Field(pattern=r"^\S+$")]
Line = Annotated[str, Field(pattern=r"^[^\n\r]+$")]
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TORCH_EXTENSIONS_DIR": "extensions"}


class Site(Section):
    """A cluster, and how much of it a run takes. Keys are changed on the command line by `site.KEY=VALUE`."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time_limit: Annotated[str, Field(pattern=r"^\d+(:\d+){0,2}$|^\d+-\d+(:\d+){0,2}$")]
    """As sbatch takes it, "8:00:00" or "2-00:00:00" (quoted, since YAML reads 8:00:00 as a number). A run that is not done goes on in the
    next job of its own accord."""
    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0
    tasks_per_node: PositiveInt | None = None
    """Ranks of a node; None for one a GPU, or one."""
    cpus_per_task: PositiveInt = 1
    memory: Word | None = None
    """Of a node, as `--mem` takes it."""
    requeue: bool = True
    """Go back to the queue after a time limit, a preemption or the loss of a node."""
    grace_seconds: PositiveInt = 120
    """Warning before the time limit, for the last checkpoint, until the run has shown how long its steps and saves are."""
    setup: tuple[str, ...] = ()
    """Lines of shell before anything else: modules, the environment of the project."""
    python: Line = "python"
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str] = Field(default={})
    interface: Word | None = None
    """Network interface of NCCL and gloo between nodes."""
    local_cache: Line | None = "/tmp"
    """Folder of each node's own disk for compiled kernels; None leaves them where the libraries put them."""
    logs: Word = "logs"
    """Folder of job logs, from where the job is submitted. A requeued job appends to its log."""
    options: tuple[Line, ...] = ()
    """Further options of sbatch, such as "--reservation=video"."""

    @field_validator("options")
    @classmethod
    def _are_options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if not re.match(r"^--?\w", option):
                raise ValueError(f"got {option!r}, expected an option of sbatch such as --reservation=video")
        return options

    @property
    def tasks(self) -> int:
        """Ranks of a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


def script(site: Site, name: str, folder: Path, runs: Sequence[tuple[Path, Sequence[str]]], grace: int) -> str:
    """The batch script of `runs`, (run directory, dit's arguments) each; more than one make an array.

    folder: where it runs, as submitted. grace: seconds between SIGUSR1 and the time limit.
    """
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(site, name, len(runs), grace)), ""]
    lines += [f"cd {shlex.quote(str(folder))} || exit 2", *site.setup, "set -euo pipefail", *_environment(site), ""]
    if len(runs) > 1:
        lines += ["case $SLURM_ARRAY_TASK_ID in"]
        lines += [f"  {task}) run={shlex.quote(str(run))}; arguments=({shlex.join(dit)}) ;;" for task, (run, dit) in enumerate(runs)]
        lines += ["esac"]
    else:
        lines += [f"run={shlex.quote(str(runs[0][0]))}", f"arguments=({shlex.join(runs[0][1])})"]
    python = shlex.quote(site.python)
    resources = f"--nodes={site.nodes} --ntasks-per-node={site.tasks} --cpus-per-task={site.cpus_per_task}"
    lines += [
        f'exec {python} -m launch.supervise --run "$run" -- \\',
        f"  srun {resources} --kill-on-bad-exit=1 --label \\",
        f'  {python} -m dit "${{arguments[@]}}"',
    ]
    return "\n".join(lines) + "\n"


def _options(site: Site, name: str, tasks: int, grace: int) -> list[str]:
    options: dict[str, object] = {
        "job-name": re.sub(r"\s+", "-", name),
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "time": site.time_limit,
        "nodes": site.nodes,
        "ntasks-per-node": site.tasks,
        "cpus-per-task": site.cpus_per_task,
        "gpus-per-node": site.gpus_per_node or None,
        "mem": site.memory,
        "array": f"0-{tasks - 1}" if tasks > 1 else None,
        "output": f"{site.logs}/%x-{'%A_%a' if tasks > 1 else '%j'}.log",
        "open-mode": "append",
        "signal": f"B:USR1@{grace}",
    }
    flags = ["--requeue" if site.requeue else "--no-requeue", *site.options]
    return [f"--{key}={value}" for key, value in options.items() if value is not None] + flags


def _environment(site: Site) -> list[str]:
    values = dict(site.environment)
    if site.interface:
        values |= {"NCCL_SOCKET_IFNAME": site.interface, "GLOO_SOCKET_IFNAME": site.interface}
    lines = [f"export {key}={shlex.quote(value)}" for key, value in {"PYTHONUNBUFFERED": "1", **values}.items()]
    if site.local_cache:
        base = f'{shlex.quote(site.local_cache)}/"$SLURM_JOB_USER"/dit'
        lines += [f"export {key}={base}/{sub}" for key, sub in CACHES.items()]
    return lines
