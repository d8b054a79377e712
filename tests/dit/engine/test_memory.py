"""The formula of memory against the summed storages of real processes under ZeRO 1 to 3, with a teacher beside the network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dit.config.engine import EMAConfig, EngineConfig
from dit.engine.frozen import frozen_bytes
from dit.engine.memory import state_bytes
from tests.processes import ENVIRONMENT

PARAMETERS = 12 * (256 * 256 + 256)


@pytest.mark.slow
def test_what_a_rank_holds_is_as_the_formula_says(tmp_path: Path) -> None:
    worker = Path(__file__).parent / "memory_worker.py"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(worker),
        str(tmp_path / "found"),
    ]
    done = subprocess.run(launcher, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    ranks = json.loads((tmp_path / "found").read_text())
    assert [len(found) for found in ranks] == [6, 6]
    for found in (case for rank in ranks for case in rank):
        engine = EngineConfig.model_validate({name: found[name] for name in EngineConfig.model_fields if name in found})
        state = state_bytes(engine, EMAConfig(sigma_rel=(0.05,)), PARAMETERS, 2, on_gpu=False)
        frozen = frozen_bytes(engine, PARAMETERS, 2)
        assert 0.95 < found["trained"] / (state.device + state.host) < 1.05, found
        assert 0.95 < found["teacher"] / frozen < 1.05, found
        assert found["off"] < (0.05 if found["precision"] == "bf16" else 1e-5), found
