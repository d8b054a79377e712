"""The truth itself: closed forms against autograd, quadrature and fine integration."""

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from data_pipelines.packed import pack_conditioning
from dit.config.path import EDMPath, TrigFlowPath, VEPath, VPPath
from dit.diffusion import RECTIFIED_FLOW, Path, build_path, rk4
from dit.diffusion.ground_truth import GaussianMixture, ProductMixture, TokenMixture, main, points

TRIGFLOW = build_path(TrigFlowPath(name="trigflow"))
PATHS = [RECTIFIED_FLOW, build_path(VPPath(name="vp")), build_path(EDMPath(name="edm")), TRIGFLOW, build_path(VEPath(name="ve"))]
CLOSE = {"atol": 1e-12, "rtol": 1e-12}


@pytest.mark.parametrize("path", PATHS, ids=["rectified_flow", "vp", "edm", "trigflow", "ve"])
def test_score_is_the_gradient_of_the_density_and_gives_latents_noise_and_velocity(path: Path) -> None:
    t = torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
    c = path.at(t)
    a, b, da, db = (part[:, None] for part in c)
    means, stds, weights = torch.randn(5, 3, dtype=torch.float64), torch.rand(5).double() + 0.2, torch.full((5,), 0.2, dtype=torch.float64)
    full = GaussianMixture(means, stds, weights, path)
    x = (b.clamp(min=1) * torch.randn(50, 3, dtype=torch.float64)).requires_grad_()
    log_p = full.log_prob(x, t)
    spread = (a.square() * stds.square() + b.square()).sqrt()[..., None].expand(-1, -1, 3)
    parts = Independent(Normal(a[..., None] * means, spread), 1)
    torch.testing.assert_close(log_p, MixtureSameFamily(Categorical(weights.expand(50, -1)), parts).log_prob(x), **CLOSE)
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    torch.testing.assert_close(full.score(x, t), gradient, **CLOSE)
    latents, noise = full.ends(x, t)
    torch.testing.assert_close(a * latents, x + b.square() * gradient, **CLOSE)  # Tweedie
    torch.testing.assert_close(noise, -b * gradient, **CLOSE)
    torch.testing.assert_close(full.velocity(x, t), da * latents - db * b * gradient, **CLOSE)
    product, level = ProductMixture.standard(path), path.at(t[20])
    x = (level.b.clamp(min=1) * torch.randn(50, 8, dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(product.log_prob(x, float(t[20])).sum(), x)
    velocity = level.da * (x + level.b.square() * gradient) / level.a - level.db * level.b * gradient
    torch.testing.assert_close(product(x, t[20].expand(50), points(50)), velocity, **CLOSE)


def test_a_mixture_of_tokens_at_one_level_is_the_mixture_of_their_vectors() -> None:
    x, t = torch.randn(50, 2, dtype=torch.float64), torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
    for path in PATHS:
        tokens = TokenMixture.standard(path)
        velocity = tokens(x.view(-1, 1), t, pack_conditioning([(2, 1, 1)] * 50, [torch.zeros(1, 4)] * 50)).view(50, 2)
        whole = GaussianMixture(tokens.means, tokens.stds, tokens.weights, path)
        torch.testing.assert_close(velocity, whole.velocity(x, t), **CLOSE)


def test_flow_map_is_the_integral_of_the_velocity() -> None:
    for path in (RECTIFIED_FLOW, TRIGFLOW):
        mixture, x = ProductMixture.standard(path), torch.randn(40, 8, dtype=torch.float64)
        times = torch.linspace(0.95, 0.1, 801, dtype=torch.float64)
        torch.testing.assert_close(rk4(mixture, x, times, points(40)), mixture.flow_map(x, 0.95, 0.1), atol=1e-9, rtol=0)
        torch.testing.assert_close(mixture.flow_map(mixture.flow_map(x, 1.0, 0.3), 0.3, 1.0), x, atol=1e-9, rtol=0)


def test_ends_of_the_velocity_are_the_means() -> None:
    """At t = 1 the best velocity is noise - E[latents], at t = 0 it is E[noise] - latents = -latents."""
    mixture = GaussianMixture(torch.tensor([[1.0, 0.5], [-0.4, 0.1]]), torch.tensor([0.3, 0.5]), torch.tensor([0.4, 0.6]))
    x, mean = torch.randn(20, 2, dtype=torch.float64), 0.4 * mixture.means[0] + 0.6 * mixture.means[1]
    torch.testing.assert_close(mixture.velocity(x, torch.ones(20)), x - mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixture.velocity(x, torch.zeros(20)), -x, atol=1e-6, rtol=0)


def test_distance_tells_the_data_from_what_is_not() -> None:
    mixture = ProductMixture.standard()
    drawn = mixture.draw(4000, 0)
    assert mixture.distance(drawn) < 0.05
    assert mixture.distance(drawn * 1.1) > 0.08
    assert mixture.distance(torch.randn(4000, 8)) > 0.2
    assert float((drawn.T.cov() - torch.eye(8)).abs().max()) < 0.1


def test_the_table_names_every_sampler(capsys: pytest.CaptureFixture[str]) -> None:
    main(count=64, steps=(4, 8))
    printed = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert {"euler", "heun", "rk4", "ddim", "dpmpp_2m", "unipc", "ancestral", "dpmpp_2m_sde", "euler_maruyama"} <= set(rows)
