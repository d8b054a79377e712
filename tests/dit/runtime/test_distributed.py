"""Who this process is, under each launcher. Real process groups are in tests/dit/engine."""

import os
import signal
from pathlib import Path

import pytest
import torch

from dit.runtime import distributed
from dit.runtime.signals import StopSignals

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*NAMES, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    return monkeypatch


def described() -> dict[str, str]:
    distributed.describe_processes()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_a_single_process(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SLURM_NTASKS", "8")  # a batch script without srun
    environment.setenv("SLURM_PROCID", "0")
    found = described()
    assert int(found.pop("MASTER_PORT")) > 1023
    assert found == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def test_srun(environment: pytest.MonkeyPatch) -> None:
    facts = {
        "PROCID": "5",
        "LOCALID": "1",
        "STEP_NUM_TASKS": "8",
        "STEP_TASKS_PER_NODE": "4(x2)",
        "STEP_NODELIST": "gpu[07,09]",
        "JOB_ID": "1000",
        "STEP_ID": "2",
    }
    for name, value in facts.items():
        environment.setenv(f"SLURM_{name}", value)
    found = described()
    assert found.pop("MASTER_PORT") == "21002"
    assert found == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu07"}


def test_launchers_are_taken_at_their_word(environment: pytest.MonkeyPatch) -> None:
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in given.items():
        environment.setenv(name, value)
    assert described() == {**given, "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("a1,b2", "a1"), ("gpu[03-07,12],login1", "gpu03"), ("c[5]-ib", "c5-ib"), ("x-[1-2]", "x-1")]
)
def test_first_node(nodes: str, first: str) -> None:
    assert distributed.first_node(nodes) == first


def test_without_a_group_everything_answers_for_one_process() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_reduce_sum(torch.tensor([3.0])).tolist() == [3.0]
    assert distributed.gather_json({"a": [1, None]}) == [{"a": [1, None]}]
    distributed.barrier()
    distributed.shutdown()


def test_seeded_builds_equal_weights_and_leaves_no_trace() -> None:
    before = torch.get_rng_state()
    with distributed.seeded(7):
        first = torch.randn(4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    with distributed.seeded(7):
        assert torch.equal(torch.randn(4), first)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_come_back(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals(tmp_path) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == number.name
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_a_stop_file_is_honoured_once(tmp_path: Path) -> None:
    with StopSignals(tmp_path) as stop:
        (tmp_path / "STOP").touch()
        assert stop.reason == f"file {tmp_path / 'STOP'}"
        assert stop.honoured() == f"file {tmp_path / 'STOP'}"
        assert stop.reason is None
