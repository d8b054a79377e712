"""Worker processes: they live exactly as long as the stream, whatever happens to the process that reads it."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.config import DataConfig
from data_pipelines.deadline import deadline, limit_memory
from data_pipelines.errors import UserError
from data_pipelines.loader import StepStream
from data_pipelines.packed import InStep
from data_pipelines.parcels import Task
from data_pipelines.plan import START, Plan, open_plan
from data_pipelines.readers import _Readers
from data_pipelines.samples import BadSample
from data_pipelines.workers import InOrder, WorkerLost


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


# --- workers that hang or die -----------------------------------------------------------------------------------


@pytest.fixture
def stuck(tmp_path, write_shard):
    """A plan of two shards, of which the first became a pipe: whoever opens it waits for ever."""
    folder = tmp_path / "s"
    first = write_shard(folder, 0, 1, 16)
    write_shard(folder, 1, 3, 16)

    def plan(**changes):
        options = {"token_budget": 2, "packs_per_step": 2, "sizes": [(1, 16, 16)], **changes}
        made = plan_of(folder, **options)
        first.unlink(missing_ok=True)
        if not first.exists():
            os.mkfifo(first)
        return made

    return plan


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_takes_too_long_is_a_hole(stuck, workers):
    with StepStream(stuck(num_workers=workers, sample_seconds=0.2), 0, 1) as stream:
        step = next(stream)
    assert step.bad == [("s/shard-000000/0-000", "took longer than 0.2 s")]
    good = [sample for pack in step.packs for sample in pack.samples if sample.error is None]
    assert [sample.pixels.shape for sample in good] == [(1, 16, 16, 3)] * 3


def test_a_worker_that_dies_is_replaced_and_its_sample_is_a_hole(stuck):
    plan = stuck(num_workers=2, sample_seconds=60)
    before = set(multiprocessing.active_children())
    with StepStream(plan, 0, 1) as stream:
        deaths, ended = set(), threading.Event()
        workers = set(multiprocessing.active_children()) - before

        def kill_whoever_waits():
            while not ended.wait(0.05):
                for worker in workers - deaths:
                    if Path(f"/proc/{worker.pid}/wchan").read_text() in ("wait_for_partner", "fifo_open"):
                        deaths.add(worker)
                        worker.kill()

        killer = threading.Thread(target=kill_whoever_waits)
        killer.start()
        step = next(stream)
        ended.set()
        killer.join()
        assert step.bad == [("s/shard-000000/0-000", "ended its reader (SIGKILL)")]
        assert sum(len(pack.samples) for pack in step.packs) == 4
    assert set(multiprocessing.active_children()) <= before


def test_only_the_sample_that_the_lost_process_was_at_is_left_out(shapes):
    task = Task(4, plan_of(shapes).step(START).packs[0][:2], InStep(0, 2, 0), START, {})
    readers = _Readers(3, None, None)

    def holes(task, *at):
        readers.busy[:] = torch.tensor([*at, *[(-1, -1)] * (3 - len(at))])
        return readers.mend(task, WorkerLost(-signal.SIGKILL)).holes

    left_out = holes(task, (4, 1), (3, 0))
    assert left_out == {1: "ended its reader (SIGKILL)"}
    assert holes(replace(task, holes=left_out), (4, 1), (4, 0)) == dict.fromkeys((1, 0), "ended its reader (SIGKILL)")  # lost twice
    assert holes(task, (4, 7)) == {}  # of a longer pack, if numbers repeat
    assert holes(task, (4, 0), (4, 1)) == {}  # one of them lives
    assert holes(task) == {}
    with pytest.raises(WorkerLost):
        holes(task)


def in_order(work, tasks, processes, mend, begin=None):
    return InOrder(
        lambda _: work, tasks, processes, 2, lambda task, result: (task, result), mend, preload="data_pipelines.parcels", begin=begin
    )


def _native(item):
    """Stays in native code, where no signal handler of Python runs."""
    with deadline(0.1):
        return len(hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)) if item < 0 else item


def test_native_code_that_does_not_return_ends_with_its_process_and_the_rest_goes_on():
    lost = []

    def mend(task, why):
        lost.append((task, why.code))
        return -task

    items = in_order(_native, [1, -2, 3, 4, -5, 6], 2, mend)
    assert [task for task, _ in items] == [1, 2, 3, 4, 5, 6]
    assert sorted(lost) == [(-5, -signal.SIGPROF), (-2, -signal.SIGPROF)]
    items.close()


def test_a_process_that_ends_is_noticed_at_once_and_what_mends_it_may_give_up():
    def mend(task, why):
        raise why

    items = in_order(os._exit, [3], 1, mend)
    with pytest.raises(WorkerLost, match="exit code 3"):
        next(items)
    items.close()


def _large(gigabytes):
    try:
        return len(np.ones(gigabytes << 27))
    except MemoryError:
        return "refused"


def test_a_worker_takes_no_more_memory_than_it_may():
    items = in_order(_large, [2, 0], 1, None, partial(limit_memory, 1 << 30))
    assert next(items) == (2, "refused")
    assert next(items) == (0, 0)
    items.close()


def _fail(task):
    raise KeyError(task)


def test_an_error_in_a_process_has_its_traceback():
    items = in_order(_fail, ["here"], 1, None)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*_fail.*KeyError: 'here'"):
        next(items)
    items.close()


def test_a_deadline_is_for_what_is_late_only():
    began = time.perf_counter()
    with pytest.raises(BadSample, match=r"took longer than 0\.05 s"), deadline(0.05):
        time.sleep(30)
    assert time.perf_counter() - began < 5
    previous = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    rung: list[int] = []
    rest, interval = signal.setitimer(signal.ITIMER_REAL, 500)
    for _ in range(100):
        with deadline(0.02):
            pass
    time.sleep(0.05)
    assert rung == []
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 400  # an alarm of the process itself is as it was
    signal.setitimer(signal.ITIMER_REAL, rest, interval)
    assert signal.signal(signal.SIGALRM, previous) is not previous
    with pytest.raises(KeyError), deadline(1):
        raise KeyError


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
