"""Worker processes: they live exactly as long as the stream, whatever happens to the process that reads it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipelines.config import DataConfig
from data_pipelines.errors import UserError
from data_pipelines.loader import StepStream
from data_pipelines.plan import Plan, open_plan


def grid_of(facts):
    return (facts.frames + 3) // 4, facts.height // 16, facts.width // 16


def plan_of(folder, seed=0, **changes):
    values = {"sources": [{"path": str(folder)}], "token_budget": 40, "packs_per_step": 4, "sizes": [(9, 32, 32)], "num_workers": 0}
    return open_plan(DataConfig(**{**values, "window_shards": 2, **changes}), grid_of, seed)


def test_closing_ends_the_workers_and_the_stream(shapes):
    before = set(multiprocessing.active_children())
    stream = StepStream(plan_of(shapes, num_workers=2), 0, 1)
    next(stream)
    assert len(set(multiprocessing.active_children()) - before) == 2
    stream.close()
    assert set(multiprocessing.active_children()) <= before
    with pytest.raises(StopIteration):
        next(stream)


def test_an_error_for_the_user_comes_out_of_a_worker_as_it_is(shapes):
    plan = plan_of(shapes, num_workers=1)
    elsewhere = [replace(shard, address=f"ftp://host/{shard.name}.tar") for shard in plan.sources[0].shards]
    plan = Plan(plan.config, [replace(plan.sources[0], shards=tuple(elsewhere))], grid_of, 0)
    with StepStream(plan, 0, 1) as stream, pytest.raises(UserError, match=r"address 'ftp://host") as raised:
        next(stream)
    assert "Traceback" not in str(raised.value)


_ENDLESS = """
import multiprocessing, os, sys
from data_pipelines.config import DataConfig
from data_pipelines.loader import StepStream
from data_pipelines.plan import open_plan
def grid_of(facts): return (3, 2, 2)
if __name__ == "__main__":
    config = DataConfig(sources=[{"path": sys.argv[1]}], token_budget=40, packs_per_step=4, sizes=[(9, 32, 32)], num_workers=2)
    stream = StepStream(open_plan(config, grid_of, 0), 0, 1)
    next(stream)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "leave":
        sys.exit(0)
    while True:
        next(stream)
"""


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", ["leave", "kill"])
def test_workers_do_not_outlive_their_process_but_outlive_its_sigterm(shapes, tmp_path, how):
    script = tmp_path / "endless.py"
    script.write_text(_ENDLESS)
    process = subprocess.Popen(
        [sys.executable, str(script), str(shapes), how], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    if how == "kill":
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        assert all(map(_alive, workers))
        process.kill()
    assert process.wait(30) == (0 if how == "leave" else -signal.SIGKILL)
    process.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_alive, workers))
