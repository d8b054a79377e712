"""Real processes for tests of the whole system: `python -m dit`, torchrun, and quick forks of a process with its imports done."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES} | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": str(REPOSITORY),
}
TIMEOUT_SECONDS = 240.0


@dataclass(frozen=True)
class Done:
    """How a command ended. code: negative for a signal."""

    code: int
    out: str
    err: str

    def ok(self) -> "Done":
        """This, if the command succeeded."""
        assert self.code == 0, f"exit code {self.code}\n{self.out[-3000:]}\n{self.err[-6000:]}"
        return self


def python_m(*argv: str) -> Done:
    """`python -m ARGV`, to its end."""
    done = subprocess.run(
        [sys.executable, "-m", *argv], env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def torchrun(*argv: str, ranks: int = 2) -> "subprocess.Popen[bytes]":
    """Start `torchrun -m dit ARGV`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.Popen([*launcher, "-m", "dit", *argv], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def children(pid: int) -> list[int]:
    """Processes that `pid` started: torchrun's ranks have sessions of their own, so no signal to its group reaches them."""
    return [int(child) for tasks in Path(f"/proc/{pid}/task").glob("*/children") for child in tasks.read_text().split()]


class Forks:
    """`dit` commands as forks of one process that has imported everything."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.count = folder, 0
        command = [sys.executable, str(REPOSITORY / "tests" / "forked_dit.py")]
        self.parent = subprocess.Popen(
            command, env=ENVIRONMENT | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, request: Mapping[str, Any]) -> int | None:
        assert self.parent.stdin is not None
        assert self.parent.stdout is not None
        self.parent.stdin.write(json.dumps(request) + "\n")
        answer = self.parent.stdout.readline()
        assert answer, f"the forking process ended with {self.parent.wait()}"
        return json.loads(answer)

    def start(self, *argv: str, ranks: int = 1, fault: str = "", absent: int | None = None) -> "Ranks":
        """Start `dit ARGV`, or a script if ARGV begins with one, as `ranks` processes of one group.

        fault: `point:rank:n`, see dit/runtime/faults.py. absent: rank left out.
        """
        self.count += 1
        port = free_port()
        pids, files = [], []
        for rank in (rank for rank in range(ranks) if rank != absent):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
            env = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"} if ranks > 1 else {}
            env |= {"DIT_FAULT": fault} if fault else {}
            out, err = (self.folder / f"{self.count:03d}-{rank}.{stream}" for stream in ("out", "err"))
            pids.append(self.ask({"start": argv, "env": env, "out": str(out), "err": str(err)}))
            files.append((out, err))
        return Ranks(self, pids, files)

    def run(self, *argv: str, ranks: int = 1, fault: str = "") -> Done:
        """`dit ARGV`, to its end."""
        return self.start(*argv, ranks=ranks, fault=fault).wait()

    def close(self) -> None:
        self.parent.kill()
        self.parent.wait()


class Ranks:
    """The processes of one command. As under torchrun, the failure of one ends the others."""

    def __init__(self, forks: Forks, pids: list[int], files: list[tuple[Path, Path]]) -> None:
        self.forks, self.pids, self.files = forks, pids, files
        self.codes: dict[int, int] = {}

    def send(self, number: signal.Signals) -> None:
        """Signal every process that runs."""
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, number)

    def poll(self) -> int | None:
        """None while any runs, else the code of the first that failed, or 0."""
        for pid in self.pids:
            if pid not in self.codes and (code := self.forks.ask({"poll": pid})) is not None:
                self.codes[pid] = code
                if code:
                    self.send(signal.SIGKILL)
        failed = [code for code in self.codes.values() if code]
        return None if len(self.codes) < len(self.pids) else failed[0] if failed else 0

    def own_codes(self) -> list[int]:
        """How each ended by itself."""

        def is_over(pid: int) -> bool:
            if pid not in self.codes and (code := self.forks.ask({"poll": pid})) is not None:
                self.codes[pid] = code
            return pid in self.codes

        wait_for(lambda: all(is_over(pid) for pid in self.pids))
        return [self.codes[pid] for pid in self.pids]

    def wait(self) -> Done:
        """How it ended; the text of all ranks, one after another."""
        wait_for(lambda: self.poll() is not None)
        out, err = ("".join(files[i].read_text() for files in self.files if files[i].exists()) for i in (0, 1))
        code = self.poll()
        assert code is not None
        return Done(code, out, err)


def wait_for(condition: Callable[[], bool], seconds: float = TIMEOUT_SECONDS) -> None:
    """Return as soon as `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that are complete; none if there is no such file."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def train_config(path: Path, latents: Path, **changes: Any) -> Path:
    """Write a training run over `latents`, with `out` beside it: 6 steps of 4 packs of 4 clips; dotted `changes` as a__b=value."""
    values: dict[str, Any] = {
        "out": str(path.with_suffix("")),
        "data": {"sources": [{"path": str(latents)}], "token_budget": 192, "packs_per_step": 4, "num_workers": 0},
        "backbone": {"hidden_size": 48, "depth": 2, "num_heads": 4, "ffn_size": 96, "patch_size": [1, 2, 2]},
        "objective": {"name": "rectified_flow"},
        "optimizer": {"lr": 1e-3, "warmup_samples": 16},
        "ema": {"decay": 0.9},
        "train": {"samples": 96, "seed": 3, "log_every_steps": 2, "save_every_steps": 2},
    }
    return write_config(path, values, changes)


def distill_config(path: Path, teacher: Path, **changes: Any) -> Path:
    """Write a distillation of `teacher`, with `out` beside it: 6 steps."""
    values: dict[str, Any] = {
        "out": str(path.with_suffix("")),
        "teacher": {"run": str(teacher)},
        "method": {"name": "consistency", "guidance": {"s": 2.0}, "solver": "euler", "student_steps": 2},
        "optimizer": {"lr": 1e-3},
        "ema": {"decay": 0.9},
        "train": {"samples": 96, "seed": 4, "log_every_steps": 2, "save_every_steps": 2},
    }
    return write_config(path, values, changes)


def write_config(path: Path, values: dict[str, Any], changes: Mapping[str, Any]) -> Path:
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = values
        for name in sections:
            section = section[name]
        section[last] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path
