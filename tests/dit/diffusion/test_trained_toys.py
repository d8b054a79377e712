"""What training reaches where the answer is known: the Wiener gain, the least loss at every t, and conditions that are obeyed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from data_pipelines.packed import Conditioning, PackedLatents, pack_conditioning
from dit.config.objective import DDPMConfig, RectifiedFlowConfig
from dit.diffusion import ClassifierFreeGuidance, build_objective, build_path, euler, schedule
from dit.diffusion.ground_truth import GaussianMixture

NULL_LABEL = 2
TOKENS = 64
MIXTURE = GaussianMixture(torch.tensor([[-1.2], [1.0]]), torch.tensor([0.3, 0.5]), torch.tensor([0.4, 0.6]))


def batch(latents: Tensor, samples: int, first_key: int, labels: Tensor | None = None) -> PackedLatents:
    """Latents (n * TOKENS, P) as `samples` samples of many independent tokens, so that keys are few."""
    grid = (1, 1, len(latents) // samples)
    cond = pack_conditioning([grid] * samples, [torch.zeros(1, 4)] * samples, labels)
    keys = tuple(range(first_key, first_key + samples))
    return PackedLatents(latents, cond, keys, tuple(map(str, keys)), torch.ones(samples))


def test_the_best_linear_network_is_the_wiener_filter() -> None:
    """L_simple is quadratic in the gain of noise = gain x_t; at every step its least place is b / (a^2 std^2 + b^2)."""
    config = DDPMConfig.model_validate(
        {"name": "ddpm", "condition_dropout": 0, "path": {"name": "vp", "steps": 2, "beta_start": 0.2, "beta_end": 0.6}}
    )
    objective, path, std = build_objective(config, torch.zeros(1, 4), None), build_path(config.path), 0.7
    latents = std * torch.randn(300 * 400, 64, generator=torch.Generator().manual_seed(0))
    packed = batch(latents, 300, 0)
    at = [objective(lambda x_t, t, cond, g=gain: g * x_t, packed, 0.0) for gain in (-1.0, 0.0, 1.0)]
    minus, zero, plus = (losses.per_sample.double() for losses in at)
    for t in (0.5, 1.0):
        chosen = at[0].t == t
        slope, curvature = (minus - plus)[chosen].sum() / 4, ((minus + plus) / 2 - zero)[chosen].sum()
        c = path.at(torch.tensor(t))
        assert float(slope / curvature) == pytest.approx(float(c.b / (c.a**2 * std**2 + c.b**2)), abs=1e-3)


class Toy(nn.Module):
    """A small network of x_t, t and the label, token by token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.labels = nn.Embedding(NULL_LABEL + 1, 8)
        self.layers = nn.Sequential(nn.Linear(15, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        t = cond.per_token(t)[:, None]
        waves = torch.cat([torch.cos(k * torch.pi * t) for k in range(1, 6)], dim=1)
        labels = torch.full((len(cond.grids),), NULL_LABEL) if cond.labels is None else cond.labels
        return self.layers(torch.cat([x_t, x_t * t, waves, self.labels(cond.per_token(labels))], dim=1))


def train(samples_of: Callable[[int], PackedLatents], steps: int, dropout: float) -> Toy:
    toy = Toy()
    config = RectifiedFlowConfig.model_validate({"times": {"name": "uniform"}, "stratified": True, "condition_dropout": dropout})
    objective = build_objective(config, torch.zeros(1, 4), NULL_LABEL)
    optimizer = torch.optim.Adam(toy.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        objective(toy, samples_of(step), step / steps).per_sample.mean().backward()
        optimizer.step()
        decay.step()
    return toy.eval().requires_grad_(False)


def test_a_trained_network_has_the_least_loss_at_every_t() -> None:
    """Within 5 % of E |velocity - E[velocity | x_t]|^2, on noise it has not seen."""
    toy = train(lambda step: batch(MIXTURE.draw(32 * TOKENS, step), 32, step * 32), 500, 0.0)
    latents, generator = MIXTURE.draw(60_000, 10_000), torch.Generator().manual_seed(1)
    for level in (0.1, 0.3, 0.5, 0.7, 0.9):
        noise, t = torch.randn(latents.shape, generator=generator), torch.full((1,), level)
        x_t, target = (1 - level) * latents + level * noise, noise - latents
        cond = pack_conditioning([(1, 1, len(latents))], [torch.zeros(1, 4)])
        loss, least = ((answer(x_t, t, cond) - target).square().mean() for answer in (toy, MIXTURE))
        assert float(least) < float(loss) < 1.05 * float(least), f"at t = {level}"


def test_samples_follow_the_condition_they_are_given_and_none_when_swapped_or_dropped() -> None:
    """Each label is a component of the mixture: own label, swapped label, the label of no class, and guidance away from it."""

    def conditional(step: int) -> PackedLatents:
        labels = torch.arange(32) % 2
        noise = torch.randn(32, TOKENS, 1, generator=torch.Generator().manual_seed(step))
        latents = MIXTURE.means[labels][:, None] + MIXTURE.stds[labels, None, None] * noise
        return batch(latents.flatten(0, 1), 32, step * 32, labels)

    toy, labels = train(conditional, 300, 0.2), torch.arange(2)
    noise = torch.randn(2 * 2000, 1, generator=torch.Generator().manual_seed(2))

    def right(shown: Tensor, scale: float = 1.0) -> float:
        """Part of the samples that are nearer to the component of `labels`."""
        cond = pack_conditioning([(1, 1, 2000)] * 2, [torch.zeros(1, 4)] * 2, shown)
        x = euler(ClassifierFreeGuidance(toy, torch.zeros(1, 4), scale, NULL_LABEL), noise, schedule(30, 1.0), cond)
        return float(((x[:, 0] > -0.2).long() == cond.per_token(labels)).float().mean())

    assert right(labels) > 0.97
    assert right(labels, scale=2.0) > right(labels)
    assert right(1 - labels) < 0.03
    null = torch.full((2,), NULL_LABEL)
    assert right(null) == pytest.approx(0.5, abs=0.03)  # both labels get the same samples
