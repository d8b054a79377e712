"""Run by test_memory.py in real processes: bytes of all storages that a rank holds, by stage and precision, with and without a critic."""

import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from dit.config import FitRun
from dit.config.distillation import MethodConfig
from dit.diffusion.ground_truth import pack_of_points
from dit.distillation import build_distillation, objective_at, student_of, turn_of, with_critic
from dit.engine.engine import Engine
from dit.engine.frozen import place_frozen
from dit.engine.turns import Turns
from dit.runtime import distributed

KEPT: list[object] = []
"""Whatever was measured: DeepSpeed does not let go of it at once, and differences count only what comes."""


def held() -> int:
    """Bytes of all storages that tensors of this process refer to."""
    time.sleep(0.2)  # gloo's threads let go of what they sent a moment after it has arrived
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


class Network(nn.Module):
    """Layers that are called as a backbone is, whatever the conditions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))

    def forward(self, x_t: Tensor, *_: object) -> Tensor:
        return self.layers(x_t.to(self.layers[0].weight.dtype))


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Of a teacher, which must answer as it would whole, and of what is trained, at the end of the last backward pass of each turn."""
    values = {"out": "unused", "optimizer": {"lr": 1e-3}, "train": {"samples": 8}, "ema": {"sigma_rel": [0.05]}}
    run = FitRun.model_validate({**values, "engine": case["engine"]})
    x = torch.ones(3, 256)
    with torch.no_grad():
        whole = Network()(x)
        before = held()
        teacher = place_frozen(Network(), run.engine)
        off = float((teacher(x) - whole).abs().max())
    frozen, before = held() - before, held()
    engine, loss_of = matched(run, teacher) if case["critic"] else alone(run)
    found = {}
    for step in range(4):
        engine.backward(loss_of(), 6)
        found[engine.turn] = held() - before
        if step < 3:
            engine.optimizer_step(1.0)
    KEPT.extend((teacher, engine))
    return {**case, "teacher": frozen, "trained": found, "off": off}


def alone(run: FitRun) -> tuple[Engine, Callable[[], Tensor]]:
    engine = Engine(Network(), run, 1)
    return engine, lambda: engine.module(torch.ones(3, 256)).float().square().sum()


def matched(run: FitRun, teacher: nn.Module) -> tuple[Engine, Callable[[], Tensor]]:
    """Student and critic in turns, as `dit distill` trains them."""
    asked = {"name": "distribution_matching", "guidance": {"s": 1.0}, "critic": {"steps": 1, "optimizer": {"lr": 1e-3}}}
    method: Any = TypeAdapter(MethodConfig).validate_python(asked)
    module = with_critic(method, Network(), Network(), 256)
    objective = build_distillation(method, teacher, None, partial(module, "critic"))
    turns = Turns({"student": run.optimizer, "critic": method.critic.optimizer}, lambda step: turn_of(step, 1).network)
    engine, batch = Engine(module, run, 1, turns), pack_of_points(torch.ones(3, 256), 0)
    return engine, lambda: objective_at(objective, engine.step)(student_of(module), batch, 0.0).per_sample.sum()


if __name__ == "__main__":
    distributed.init()
    found = distributed.gather_json([measure(case) for case in json.loads(sys.argv[2])])
    if distributed.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    distributed.shutdown()
