"""What a step of each distillation costs over a step of training, beside its theoretical multiple. Prints a Markdown table.

    python tests/benchmarks/distillation.py [WIDTH [FRAMES]]

The same network, pack and engine for all; guided teachers. Contestants take turns, step by step, so that a busy machine slows all of
them; CPU times of this process on one thread; a figure is the median of the ratios of the turns. The multiple counts matrix products
and attention in closed form (`dit.models.flops`): a call on dual numbers has twice the products and three times the attention of a
plain one, twice where keys and values are text; a backward pass to inputs alone, through a network that does not learn, the products
once and attention twice. Optimizer, data, draws and heads are in the times and in no count. Methods with a critic: the mean over
rounds in which the student makes samples in every number of its steps.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from data_pipelines.packed import PackedLatents, pack_conditioning
from dit.config import DistillRun, FitRun, SpatioTemporalDiTConfig
from dit.config.distillation import Method, _Derived
from dit.config.objective import RectifiedFlowConfig
from dit.diffusion import ClassifierFreeGuidance, build_objective
from dit.distill import turns_of
from dit.distillation import (
    Weight,
    build_distillation,
    critic_backbone,
    critic_of,
    discriminator_of,
    heads_of,
    objective_at,
    step_calls,
    student_backbone,
    student_of,
    with_critic,
)
from dit.engine.engine import Engine
from dit.models import build_backbone
from dit.models.flops import forward_flops
from dit.runtime import distributed

TURNS = 5
CHANNELS, TEXT_WIDTH, TEXT, DEPTH = 16, 64, 16, 4
STUDENT_STEPS = 2
TARGET = 1.05
NULL = torch.zeros(1, TEXT_WIDTH)
RUN = {"out": tempfile.gettempdir(), "optimizer": {"lr": 1e-4}, "train": {"samples": 10**9}}
CRITIC = {"steps": 1, "optimizer": {"lr": 1e-4}}
METHODS: dict[str, dict[str, Any]] = {
    "consistency, euler": {"name": "consistency", "solver": "euler"},
    "consistency, heun": {"name": "consistency"},
    "consistency, told its guidance": {"name": "consistency", "guidance_range": (1.0, 5.0)},
    "consistency, data": {"name": "consistency", "flow": "data", "guidance": {"s": 1.0}},
    "mean_flow, forward": {"name": "mean_flow"},
    "mean_flow, difference": {"name": "mean_flow", "derivative": "difference"},
    "continuous_consistency, forward": {"name": "continuous_consistency"},
    "continuous_consistency, difference": {"name": "continuous_consistency", "derivative": "difference"},
    "progressive": {"name": "progressive"},
    "moment_matching": {"name": "moment_matching"},
    "moment_matching, critic": {"name": "moment_matching", "critic": CRITIC},
    "distribution_matching": {"name": "distribution_matching", "critic": CRITIC},
    "distribution_matching, heads": {"name": "distribution_matching", "critic": {**CRITIC, "heads": {"blocks": [DEPTH - 1]}}},
    "score_regularised": {"name": "score_regularised", "critic": CRITIC},
    "adversarial": {"name": "adversarial", "critic": {**CRITIC, "blocks": [DEPTH - 1]}},
}


def main(width: int, frames: int) -> None:
    sizes = {"hidden_size": width, "depth": DEPTH, "num_heads": width // 64, "ffn_size": 4 * width, "patch_size": (1, 2, 2)}
    config = SpatioTemporalDiTConfig.model_validate(sizes)
    grids = [(frames, 8, 8)] * 2
    cond = pack_conditioning(grids, [torch.randn(TEXT, TEXT_WIDTH)] * len(grids))
    batch = PackedLatents(torch.randn(sum(cond.lengths), 4 * CHANNELS), cond, tuple(range(len(grids))), ("",) * len(grids), torch.ones(2))
    plain, attention = flops(config, grids)
    share = attention / (plain + attention)
    contestants = {"training": training(config, batch)}
    contestants |= {name: distillation(options, config, batch, share) for name, options in METHODS.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(TURNS + 2):
        for name, (steps, count, _) in contestants.items():
            start = time.process_time()
            steps()
            times[name].append((time.process_time() - start) / count)
    print(f"width {width}, {sum(cond.lengths)} tokens in {len(grids)} samples, attention is {share:.0%} of a pass\n")
    print("| step | time | / training | multiple | ratio / multiple |\n|---|---|---|---|---|")
    for name, (_, _, theory) in contestants.items():
        ratio = median(a / b for a, b in zip(times[name][2:], times["training"][2:], strict=True))
        over = f"{ratio / theory:.2f}" + (" **missed**" if ratio / theory > TARGET else "")
        print(f"| {name} | {1000 * median(times[name][2:]):.0f} ms | {ratio:.2f} | {theory:.2f} | {over} |", flush=True)


class Contestant(NamedTuple):
    """steps: takes `count` steps. multiple: of what a step of training does."""

    steps: Callable[[], None]
    count: int
    multiple: float


def training(config: SpatioTemporalDiTConfig, batch: PackedLatents) -> Contestant:
    objective = build_objective(RectifiedFlowConfig(name="rectified_flow"), NULL, None)
    engine = Engine(network(config), FitRun.model_validate(RUN), 1)
    return Contestant(partial(take, engine, lambda step: objective, batch, 1), 1, 1.0)


def distillation(options: dict[str, Any], config: SpatioTemporalDiTConfig, batch: PackedLatents, attention: float) -> Contestant:
    """attention: its part of a plain pass."""
    asked = {"guidance": {"s": 3.0}, "student_steps": STUDENT_STEPS, **options}
    run = DistillRun.model_validate({**RUN, "teacher": {"run": "none"}, "method": asked})
    method, teacher = run.method, network(config).requires_grad_(False)
    start = network(critic_backbone(method, config))
    start.load_state_dict({**start.state_dict(), **teacher.state_dict()})
    module, critic = with_critic(method, network(student_backbone(method, config)), start, config.hidden_size), critic_of(method)
    by_weights = method.name == "moment_matching" and critic is None
    weights = [Weight(value, torch.ones_like(value)) for value in teacher.parameters()] if by_weights else ()
    guided = ClassifierFreeGuidance(teacher, NULL, method.guidance.scale, None)
    objective = build_distillation(method, guided, None, partial(module, "critic"), discriminator_of(method, module, teacher), weights)
    count = (1 + critic.steps) * STUDENT_STEPS if critic else 1
    engine = Engine(module, run, 1, turns_of(run))
    return Contestant(partial(take, engine, partial(objective_at, objective), batch, count), count, multiple(method, attention))


def network(config: SpatioTemporalDiTConfig) -> nn.Module:
    return build_backbone(config, channels=CHANNELS, text_width=TEXT_WIDTH)


def take(engine: Engine, objective_of: Callable[[int], Any], batch: PackedLatents, count: int) -> None:
    for _ in range(count):
        losses = objective_of(engine.step)(student_of(engine.module), batch, 0.5)
        engine.backward(losses.per_sample.sum(), len(batch.keys))
        engine.optimizer_step(1.0)


def multiple(method: Method, attention: float) -> float:
    """Of a step of training, 3 passes, in a step of `method`, which counts passes as wholes; attention: its part of a plain pass."""
    passes, critic = step_calls(method).forward_passes, critic_of(method)
    rounds = 1 + critic.steps if critic else 1
    if isinstance(method, _Derived) and method.derivative == "forward":  # in the student's turn
        passes += attention / rounds  # the third of three
    if heads_of(method):  # the student's turn goes back to their inputs: products once, not twice
        passes -= (1 - attention) / rounds
    return passes / 3


def flops(config: SpatioTemporalDiTConfig, grids: list[tuple[int, int, int]]) -> tuple[int, int]:
    """Of a plain forward pass: matrix products with attention to text, and self-attention."""
    lengths = [t * h * w for t, h, w in grids]
    whole = forward_flops(config, grids, [TEXT] * len(grids), channels=CHANNELS, text_width=TEXT_WIDTH)
    attention = 4 * config.hidden_size * config.depth * sum(length**2 for length in lengths)
    return whole - attention, attention


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init()
    main(*(int(argument) for argument in (sys.argv[1:] + ["256", "4"][len(sys.argv) - 1 :])))
    distributed.shutdown()
