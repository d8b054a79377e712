"""The process under test: derivatives of sharded students, to OUT as JSON. `torchrun derivatives.py OUT`."""

import copy
import json
import sys
from pathlib import Path

import torch

from data_pipelines.packed import pack_conditioning
from dit.config import FitRun, SpatioTemporalDiTConfig
from dit.distillation.flow import derivative
from dit.engine.engine import Engine
from dit.models import build_backbone
from dit.runtime import distributed

OPTIONS: dict[str, dict[str, object]] = {
    "shared": {"jumps": True},
    "per_block": {"modulation": "per_block", "attention": "factorised", "activation_checkpointing": "full"},
}
CASES = (("shared", 2, "fp32"), ("shared", 3, "fp32"), ("shared", 3, "bf16"), ("per_block", 3, "fp32"))


def main() -> None:
    distributed.init()
    found = {f"{name} at stage {stage} in {precision}": compare(name, stage, precision) for name, stage, precision in CASES}
    Path(sys.argv[1], f"rank-{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.shutdown()


def compare(name: str, stage: int, precision: str) -> list[float]:
    """How far the derivative of a sharded student is from that of a whole one, before and after it has been trained for a step."""
    sizes = {"hidden_size": 24, "depth": 2, "num_heads": 2, "ffn_size": 40, "patch_size": (1, 2, 1), "frequency_size": 16}
    torch.manual_seed(0)
    network = build_backbone(SpatioTemporalDiTConfig.model_validate(sizes | OPTIONS[name]), channels=3, text_width=5)
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    single = copy.deepcopy(network)
    engines = []
    for module, values in ((single, {"zero_stage": 0}), (network, {"zero_stage": stage, "whole_below": 0})):
        options = {"out": "unused", "optimizer": {"lr": 1e-2}, "train": {"samples": 100}, "engine": {"precision": precision, **values}}
        engines.append(Engine(module, FitRun.model_validate(options), 1))
    grids = ((2, 3, 4), (1, 5, 2))
    generator = torch.Generator().manual_seed(distributed.rank())  # ranks hold different samples
    cond = pack_conditioning(grids, [torch.randn(n, 5, generator=generator) for n in (3, 1)])
    x, velocity = torch.randn(2, sum(cond.lengths), 6, generator=generator)
    t = torch.rand(2, generator=generator)
    errors = []
    for _ in range(2):
        rates = [derivative(engine.module, x, t, velocity, cond.over(t / 2), "forward", 0.0) for engine in engines]
        errors.append(float((rates[1] - rates[0]).norm() / rates[0].norm()))
        for engine in engines:
            engine.backward(engine.module(x, t, cond.over(t / 2)).square().sum(), 4)
            engine.optimizer_step(0.0)
    return errors


if __name__ == "__main__":
    main()
