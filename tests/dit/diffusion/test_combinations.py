"""Every path, prediction and sampler of the config, on a real backbone: finite losses, gradients and samples."""

from typing import get_args

import pytest
import torch

from data_pipelines import randomness
from data_pipelines.packed import PackedLatents, pack_conditioning
from dit.config import SpatioTemporalDiTConfig
from dit.config.objective import DiffusionConfig, SamplingConfig
from dit.config.path import Quantity
from dit.diffusion import build_denoiser, build_objective, build_path, sample
from dit.models import build_backbone

BACKBONE = SpatioTemporalDiTConfig(hidden_size=32, depth=1, num_heads=2, ffn_size=32, patch_size=(1, 1, 1))
PATHS = ["rectified_flow", "trigflow", "vp", "ve", "edm"]
SAMPLERS = get_args(SamplingConfig.model_fields["sampler"].annotation)


def pack() -> PackedLatents:
    grids, texts = [(1, 2, 2), (2, 1, 3)], [torch.ones(2, 4), torch.zeros(1, 4)]
    tokens = torch.cat([randomness.normal((t * h * w, 3), i, "latents") for i, (t, h, w) in enumerate(grids)])
    return PackedLatents(tokens, pack_conditioning(grids, texts), (7, 8), ("a", "b"), torch.ones(2))


@pytest.mark.parametrize("prediction", get_args(Quantity))
@pytest.mark.parametrize("path", PATHS)
def test_every_path_and_prediction_trains(path: str, prediction: str) -> None:
    config = DiffusionConfig.model_validate({"name": "diffusion", "path": {"name": path}, "prediction": prediction})
    torch.manual_seed(0)
    network = build_backbone(BACKBONE, channels=3, text_width=4)
    losses = build_objective(config, torch.zeros(1, 4), None)(network, pack(), 0.0)
    losses.per_sample.sum().backward()
    gradient = network.final_layer.linear.weight.grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("path", "prediction"), [("rectified_flow", "velocity"), ("trigflow", "v"), ("vp", "noise"), ("edm", "edm")])
def test_every_sampler_draws_from_every_path(path: str, prediction: str, sampler: str) -> None:
    """An untrained network answers zero; each sample must still depend on its own key alone."""
    config = DiffusionConfig.model_validate({"name": "diffusion", "path": {"name": path}, "prediction": prediction})
    torch.manual_seed(0)
    network = build_backbone(BACKBONE, channels=3, text_width=4)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.02)
    denoiser, cond = build_denoiser(config, network.eval()), pack().cond
    sampling = SamplingConfig.model_validate({"sampler": sampler, "steps": 4, "eta": 0.5, "schedule": {"name": "karras"}})
    states: list[torch.Tensor] = []
    tokens = sample(denoiser, cond, [3, 4], 3, sampling, 1.0, build_path(config.path), None, lambda step, x: states.append(x))
    assert torch.isfinite(tokens).all()
    assert torch.equal(states[-1], tokens)
    assert len(states) == 4
    alone = sample(
        denoiser, pack_conditioning([(1, 2, 2)], [torch.ones(2, 4)]), [3], 3, sampling, 1.0, build_path(config.path), config.times
    )
    scale = float(tokens.abs().max())
    torch.testing.assert_close(alone / scale, tokens[:4] / scale, atol=1e-5, rtol=0)
