"""Run by test_memory.py in two real processes: bytes of all storages that a rank holds, by stage and precision."""

import gc
import json
import sys
from pathlib import Path

import torch
from torch import nn

from dit.config import FitRun
from dit.engine.engine import Engine
from dit.engine.frozen import place_frozen
from dit.runtime import distributed

CASES = [
    {"zero_stage": stage, "precision": precision, "offload": "none", "whole_below": 100}
    for stage in (1, 2, 3)
    for precision in ("fp32", "bf16")
]
KEPT: list[object] = []
"""Whatever was measured: DeepSpeed does not let go of it at once, and differences count only what comes."""


def held() -> int:
    """Bytes of all storages that tensors of this process refer to."""
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))


def measure(case: dict[str, object]) -> dict[str, object]:
    """Of a teacher, which must answer as it would whole, and of a network at the end of a backward pass."""
    values = {"out": "unused", "optimizer": {"lr": 1e-3}, "train": {"samples": 8}, "engine": case, "ema": {"sigma_rel": [0.05]}}
    run, x = FitRun.model_validate(values), torch.ones(3, 256)
    given = x.bfloat16() if run.engine.precision == "bf16" else x
    with torch.no_grad():
        whole = network()(x)
        before = held()
        teacher = place_frozen(network(), run.engine)
        off = float((teacher(given) - whole).abs().max())
    frozen, before = held() - before, held()
    engine = Engine(network(), run, 1)
    for step in range(2):
        engine.backward(engine.module(given).float().square().sum(), 6)
        if step == 0:
            engine.optimizer_step(1.0)
    KEPT.extend((teacher, engine))
    return {**case, "teacher": frozen, "trained": held() - before, "off": off}


if __name__ == "__main__":
    distributed.init()
    found = distributed.gather_json([measure(case) for case in CASES])
    if distributed.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    distributed.shutdown()
