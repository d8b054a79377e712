"""What a step of each distillation costs over a step of training, beside its theoretical multiple. Prints a Markdown table.

    python tests/benchmarks/distillation.py [WIDTH [FRAMES]]

The same network, pack and engine for all; guided teachers. Contestants take turns, step by step, so that a busy machine slows all of
them; CPU times of this process on one thread; a figure is the median of the ratios of the turns. The multiple counts matrix products
and attention in closed form (`dit.models.flops`): a call on dual numbers has twice the products and three times the attention of a
plain one, twice where keys and values are text. Optimizer, data and draws are in both times and in neither count.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from pydantic import TypeAdapter

from data_pipelines.packed import PackedLatents, pack_conditioning
from dit.config import FitRun, SpatioTemporalDiTConfig
from dit.config.distillation import MethodConfig, _Derived
from dit.config.objective import RectifiedFlowConfig
from dit.diffusion import ClassifierFreeGuidance, build_objective
from dit.distillation import Weight, build_distillation, step_calls, student_backbone
from dit.engine.engine import Engine
from dit.models import build_backbone
from dit.models.flops import forward_flops
from dit.runtime import distributed

TURNS = 5
CHANNELS, TEXT_WIDTH, TEXT = 16, 64, 16
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
}


def main(width: int, frames: int) -> None:
    sizes = {"hidden_size": width, "depth": 4, "num_heads": width // 64, "ffn_size": 4 * width, "patch_size": (1, 2, 2)}
    config = SpatioTemporalDiTConfig.model_validate(sizes)
    null = torch.zeros(1, TEXT_WIDTH)
    grids = [(frames, 8, 8)] * 2
    texts = [torch.randn(TEXT, TEXT_WIDTH)] * len(grids)
    cond = pack_conditioning(grids, texts)
    batch = PackedLatents(torch.randn(sum(cond.lengths), 4 * CHANNELS), cond, tuple(range(len(grids))), ("",) * len(grids), torch.ones(2))
    teacher = build_backbone(config, channels=CHANNELS, text_width=TEXT_WIDTH).requires_grad_(False)
    weights = [Weight(value, torch.ones_like(value)) for value in teacher.parameters()]

    def engine(backbone: SpatioTemporalDiTConfig) -> Engine:
        run = {"out": tempfile.gettempdir(), "optimizer": {"lr": 1e-4}, "train": {"samples": 10**9}}
        return Engine(build_backbone(backbone, channels=CHANNELS, text_width=TEXT_WIDTH), FitRun.model_validate(run), 1)

    def step_of(objective: Any, trained: Engine) -> Callable[[], None]:
        def step() -> None:
            trained.backward(objective(trained.module, batch, 0.5).per_sample.sum(), len(grids))
            trained.optimizer_step(1.0)

        return step

    plain, attention = flops(config, grids)
    base = build_objective(RectifiedFlowConfig(name="rectified_flow"), null, None)
    contestants: dict[str, tuple[Callable[[], None], float]] = {"training": (step_of(base, engine(config)), 1.0)}
    for name, options in METHODS.items():
        method = TypeAdapter(MethodConfig).validate_python({"guidance": {"s": 3.0}, **options})
        guided = ClassifierFreeGuidance(teacher, null, method.guidance.scale, None)
        objective = build_distillation(method, guided, None, weights=weights if method.name == "moment_matching" else ())
        multiple = float(step_calls(method).forward_passes)
        if isinstance(method, _Derived) and method.derivative == "forward":
            multiple += attention / (plain + attention)  # the third of three
        contestants[name] = (step_of(objective, engine(student_backbone(method, config))), multiple / 3)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(TURNS + 2):
        for name, (step, _multiple) in contestants.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    print(
        f"width {width}, {sum(cond.lengths)} tokens in {len(grids)} samples, attention is {attention / (plain + attention):.0%} of a pass\n"
    )
    print("| step | time | / training | multiple | ratio / multiple |\n|---|---|---|---|---|")
    for name, (_, multiple) in contestants.items():
        ratio = median(a / b for a, b in zip(times[name][2:], times["training"][2:], strict=True))
        print(f"| {name} | {1000 * median(times[name][2:]):.0f} ms | {ratio:.2f} | {multiple:.2f} | {ratio / multiple:.2f} |", flush=True)


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
