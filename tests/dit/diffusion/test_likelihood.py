import math

import torch

from data_pipelines.packed import pack_conditioning
from dit.config.path import TrigFlowPath
from dit.diffusion import RECTIFIED_FLOW, build_path
from dit.diffusion.ground_truth import GaussianMixture, ProductMixture, points
from dit.diffusion.likelihood import bits_per_dimension, log_likelihood

TIMES = torch.linspace(0, 1, 161, dtype=torch.float64) ** 2 * (1 - 1e-4) + 1e-4


def test_exact_trace_gives_the_density_of_the_mixture() -> None:
    for path in (RECTIFIED_FLOW, build_path(TrigFlowPath(name="trigflow"))):
        mixture = ProductMixture.standard(path)
        x = mixture.draw(40, 1)
        found = log_likelihood(mixture, path, x, TIMES, points(40))
        assert float((found - mixture.log_prob(x, 0.0)).abs().mean()) < 0.02  # nats, in eight dimensions


def test_hutchinson_is_unbiased_and_depends_on_the_key_only() -> None:
    mixture = GaussianMixture(torch.tensor([[0.6, -0.4], [-0.6, 0.4]]), torch.tensor([0.3, 0.5]), torch.tensor([0.5, 0.5]))
    x = mixture.draw(1, 3).double().expand(800, 2)
    times = torch.linspace(1e-3, 1, 41, dtype=torch.float64)
    exact = log_likelihood(mixture, RECTIFIED_FLOW, x[:1], times, points(1))
    estimates = log_likelihood(mixture, RECTIFIED_FLOW, x, times, points(800), keys=range(800))
    assert float(estimates.std()) > 1e-3
    assert abs(float(estimates.mean() - exact)) < 4 * float(estimates.std()) / 800**0.5
    again = log_likelihood(mixture, RECTIFIED_FLOW, x[:2], times, points(2), keys=[7, 5])
    torch.testing.assert_close(again, estimates[[7, 5]], atol=1e-10, rtol=0)


def test_samples_of_several_tokens_add_up() -> None:
    mixture = ProductMixture.standard()
    x, times = mixture.draw(3, 2), torch.linspace(1e-3, 1, 21, dtype=torch.float64)
    apart = log_likelihood(mixture, RECTIFIED_FLOW, x, times, points(3))
    cond = pack_conditioning([(1, 2, 1), (1, 1, 1)], [torch.zeros(1, 4)] * 2)
    together = log_likelihood(mixture, RECTIFIED_FLOW, x, times, cond)
    torch.testing.assert_close(together, torch.stack([apart[:2].sum(), apart[2]]), atol=1e-9, rtol=0)
    bits = bits_per_dimension(together, cond, 8)
    assert math.isclose(float(bits[0]), -float(together[0]) / (16 * math.log(2)))
