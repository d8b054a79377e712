"""Learning rate, averages and parameter groups against closed forms and plain torch."""

import math

import pytest
import torch
from torch import nn

from dit.config.engine import EMAConfig, OptimizerConfig
from dit.engine.optimizer import AdamWithEMA, ema_betas, lr_at, parameter_groups


def test_warm_up_and_cosine() -> None:
    config = OptimizerConfig(lr=2.0, warmup_samples=100, schedule="cosine", final_lr_fraction=0.1)
    expected = {1: 0.02, 50: 1.0, 100: 2.0, 600: 1.1, 1100: 0.2, 5000: 0.2, 350: 0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2}
    assert {seen: lr_at(config, seen, 1100) for seen in expected} == pytest.approx(expected)


def test_constant_has_no_end() -> None:
    config = OptimizerConfig(lr=2.0)
    assert [lr_at(config, seen, 10) for seen in (1, 5, 10, 100)] == [2.0] * 4


def test_average_forgets_the_start_and_then_decays() -> None:
    assert [ema_betas(EMAConfig(), k)["ema"] for k in (1, 2, 8)] == pytest.approx([2 / 11, 3 / 12, 0.5])
    assert ema_betas(EMAConfig(), 100_000)["ema"] == 0.999


def test_only_matrices_of_layers_decay() -> None:
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2), nn.LayerNorm(2), nn.Conv3d(2, 2, 1))
    net.table = nn.Parameter(torch.zeros(6, 3))
    decayed, plain = parameter_groups(net, 0.1)
    names = {id(p): name for name, p in net.named_parameters()}
    assert ({names[id(p)] for p in decayed["params"]}, decayed["weight_decay"]) == ({"1.weight", "3.weight"}, 0.1)
    assert {names[id(p)] for p in plain["params"]} == {"0.weight", "1.bias", "2.weight", "2.bias", "3.bias", "table"}
    assert plain["weight_decay"] == 0.0


def group(p: nn.Parameter) -> dict[str, object]:
    return {"params": [p], "betas": OptimizerConfig(lr=0.1).betas, "eps": 1e-8, "weight_decay": 0.5, "network": ""}


def test_a_trial_step_leaves_no_trace_after_reset() -> None:
    torch.manual_seed(0)
    weights = nn.Parameter(torch.randn(37))
    start = weights.detach().clone()
    optimizer = AdamWithEMA([group(weights)], EMAConfig(decay=0.99), "")
    weights.grad = torch.zeros_like(weights)
    optimizer.reset(optimizer.param_groups[0]["params"], {0})
    optimizer.step()
    optimizer.reset(optimizer.param_groups[0]["params"], {0})
    state = optimizer.state[weights]
    assert torch.equal(weights, start)
    assert torch.equal(state["ema"], start)
    assert float(state["step"]) == float(state["exp_avg"].abs().sum()) == float(state["exp_avg_sq"].abs().sum()) == 0


def test_ten_steps_equal_plain_adamw_bit_for_bit() -> None:
    torch.manual_seed(0)
    start = torch.randn(1003)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    config = OptimizerConfig(lr=0.1)
    optimizer = AdamWithEMA([group(ours)], EMAConfig(decay=0.6), "")
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=config.betas, eps=config.eps, weight_decay=0.5, fused=True)
    optimizer.reset(optimizer.param_groups[0]["params"], {0})
    optimizer.set_lr(0.1)
    average = start.double()
    for k in range(1, 11):
        ours.grad = torch.randn(1003)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
        beta = min(0.6, (1 + k) / (10 + k))
        average = beta * average + (1 - beta) * theirs.detach().double()
    assert torch.equal(ours, theirs)
    assert torch.allclose(optimizer.state[ours]["ema"].double(), average, rtol=0, atol=1e-6)  # ten roundings of values up to 4
