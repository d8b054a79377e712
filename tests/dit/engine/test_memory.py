"""The formula of memory against the summed storages of real processes under ZeRO 1 to 3, with a teacher beside what is trained."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dit.config.engine import EMAConfig, EngineConfig
from dit.engine.frozen import frozen_bytes
from dit.engine.memory import state_bytes
from tests.processes import ENVIRONMENT

PARAMETERS = 12 * (256 * 256 + 256)
EVERY = list(product((1, 2, 3), ("fp32", "bf16")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "has_critic", "cases"),
    [(2, False, EVERY), (2, True, EVERY), (4, True, [(3, "fp32")])],
    ids=["one_network", "with_critic", "with_critic_on_four"],
)
def test_what_a_rank_holds_is_as_the_formula_says(ranks: int, has_critic: bool, cases: list[tuple[int, str]], tmp_path: Path) -> None:
    """With a critic, in the student's turn and in its own."""
    asked: list[dict[str, Any]] = [
        {"engine": {"zero_stage": stage, "precision": precision, "whole_below": 100}, "critic": has_critic} for stage, precision in cases
    ]
    worker = Path(__file__).parent / "memory_worker.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), str(worker)]
    command = [*launcher, str(tmp_path / "found"), json.dumps(asked)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    of_ranks = json.loads((tmp_path / "found").read_text())
    assert [len(found) for found in of_ranks] == [len(cases)] * ranks
    for found in (case for rank in of_ranks for case in rank):
        engine = EngineConfig.model_validate(found["engine"])
        state = state_bytes(
            engine, EMAConfig(sigma_rel=(0.05,)), PARAMETERS, ranks, critic=PARAMETERS if has_critic else None, on_gpu=False
        )
        assert set(found["trained"]) == ({"student", "critic"} if has_critic else {""})
        for held in found["trained"].values():
            assert 0.95 < held / (state.device + state.host) < 1.05, found
        assert 0.95 < found["teacher"] / frozen_bytes(engine, PARAMETERS, ranks) < 1.05, found
        assert found["off"] < (0.05 if engine.precision == "bf16" else 1e-5), found
