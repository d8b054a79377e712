"""Forks `dit` processes from one that has the imports done: `python tests/forked_dit.py`, commanded by lines of JSON.

Each child is a process of its own with its own exit code and its own process group of ranks, as `python -m dit` would be, in a
tenth of the time; or it is a run of a script. {"start": argv, "env": {...}, "out": path, "err": path} answers a process id;
{"poll": id} its exit code or null.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from typing import Any

MODULES = ("train", "distill", "encode", "sample", "evaluate", "engine.metrics", "demo", "ckpt", "replay")
SLOW_IMPORTS = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "data_pipelines.__main__",
)


def child(request: dict[str, Any]) -> None:
    """Become `dit ARGV`, or `python ARGV` if that is a script: never returns."""
    code = 1
    try:
        os.environ.update(request["env"])
        for descriptor, path in ((1, request["out"]), (2, request["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if request["start"][0].endswith(".py"):
            sys.argv = request["start"]
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        else:
            sys.argv = ["dit", *request["start"]]
            code = importlib.import_module("dit.cli").main(request["start"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # as the interpreter does at its top
        traceback.print_exc()
    finally:
        importlib.import_module("dit.runtime.distributed").shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def poll(pid: int) -> int | None:
    """Exit code of a child, negative for a signal; None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in (*SLOW_IMPORTS, *(f"dit.{module}" for module in MODULES)):
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of several threads would copy their locks"
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer: int | None = poll(request["poll"])
        elif (answer := os.fork()) == 0:
            child(request)
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
