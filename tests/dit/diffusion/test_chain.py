"""The chain of DDPM: its tables against closed forms in float64, its bound against entropies, its objective against identities."""

import math

import pytest
import torch
import xxhash
from torch import Tensor

from dit.config.objective import DDPMConfig
from dit.config.path import VPPath
from dit.diffusion import DDPM, build_objective, build_path
from dit.diffusion.chain import gaussian_kl, log_variance, posterior
from dit.diffusion.ddpm import bound_terms, prior_bits, step_probabilities, variational_bound
from dit.diffusion.ground_truth import GaussianMixture, pack_of_points, points
from dit.diffusion.objectives import noised
from dit.diffusion.paths import VariancePreserving, betas_of
from dit.diffusion.walk import ends_of

T = 1000
STEPS = torch.arange(1, T + 1, dtype=torch.float64)
SCHEDULES = ["linear", "scaled_linear", "cosine", "sigmoid", "saturating"]


def chain(schedule: str = "linear", steps: int = T) -> VariancePreserving:
    path = build_path(VPPath.model_validate({"name": "vp", "schedule": schedule, "steps": steps}))
    assert isinstance(path, VariancePreserving)
    return path


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_those_of_the_papers(schedule: str) -> None:
    i = STEPS / T
    betas = betas_of(VPPath.model_validate({"name": "vp", "schedule": schedule}))
    place = (STEPS - 1) / (T - 1)
    known = {
        "linear": 1e-4 + (0.02 - 1e-4) * place,
        "scaled_linear": (0.01 + (0.02**0.5 - 0.01) * place) ** 2,
        "sigmoid": 1e-4 + (0.02 - 1e-4) / (1 + torch.exp(6 - 12 * place)),
        "saturating": torch.minimum(1 - torch.exp(-2e-5 * STEPS), torch.tensor(0.02)),
    }
    if schedule in known:
        torch.testing.assert_close(betas, known[schedule], atol=1e-12, rtol=0)
    else:
        signal = torch.cos((i + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        torch.testing.assert_close((1 - betas).cumprod(0)[:-1], signal[:-1], atol=1e-12, rtol=0)
        assert float(betas[-1]) == 0.999
    assert bool((betas > 0).all())
    assert bool((betas < 1).all())


@pytest.mark.parametrize(
    ("schedule", "digest"),
    [
        ("linear", "8ce29c3a364dd353"),
        ("scaled_linear", "dcdb06212970741d"),
        ("cosine", "9f54832523835394"),
        ("sigmoid", "92633e45cb1fa0c7"),
        ("saturating", "1ab7dae9eb06ba31"),
    ],
)
def test_tables_of_the_schedules_are_the_golden_ones(schedule: str, digest: str) -> None:
    """To ten digits: what was trained on a schedule must find the same one later."""
    betas = betas_of(VPPath.model_validate({"name": "vp", "schedule": schedule}))
    assert xxhash.xxh3_64_hexdigest((betas * 1e10).round().long().numpy().tobytes()) == digest


def test_leaked_signal_is_the_measured_one() -> None:
    assert float(chain().at(torch.tensor(1.0)).a ** 2) == pytest.approx(4.036e-5, rel=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_are_the_closed_forms(schedule: str) -> None:
    """One-step kernels compose to the marginals, and the posterior is Bayes' rule on Gaussians, all to 1e-12."""
    path = chain(schedule)
    betas = betas_of(VPPath.model_validate({"name": "vp", "schedule": schedule}))
    mean, variance = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    marginals = []
    for beta in betas:
        mean, variance = mean * (1 - beta).sqrt(), variance * (1 - beta) + beta
        marginals.append(torch.cat([mean, variance]))
    c = path.at(STEPS / T)
    torch.testing.assert_close(torch.stack([c.a, c.b**2], dim=1), torch.stack(marginals), atol=1e-12, rtol=0)
    back, before = posterior(path, STEPS / T, (STEPS - 1) / T), path.at((STEPS - 1) / T)
    torch.testing.assert_close(back.large, betas, atol=1e-12, rtol=0)
    precision = (1 - betas[1:]) / betas[1:] + 1 / before.b[1:] ** 2  # of x_(i-1) given x_i and the latents
    torch.testing.assert_close(back.small[1:], 1 / precision, atol=1e-12, rtol=0)
    torch.testing.assert_close(back.of_x[1:], (1 - betas[1:]).sqrt() / betas[1:] / precision, atol=1e-12, rtol=0)
    torch.testing.assert_close(back.of_latents[1:], before.a[1:] / before.b[1:] ** 2 / precision, atol=1e-12, rtol=0)
    assert (float(back.small[0]), float(back.of_latents[0])) == pytest.approx((0.0, 1.0), abs=1e-12)


def test_mean_by_noise_is_mean_by_latents() -> None:
    path, generator = chain(), torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, T, dtype=torch.float64, generator=generator)
    c, back, betas = path.at(STEPS / T), posterior(path, STEPS / T, (STEPS - 1) / T), betas_of(VPPath(name="vp"))
    x_t = c.a * latents + c.b * noise
    torch.testing.assert_close(
        back.of_x * x_t + back.of_latents * latents, (x_t - betas / c.b * noise) / (1 - betas).sqrt(), atol=1e-10, rtol=0
    )


def test_a_chain_of_draws_has_the_closed_form_moments() -> None:
    x, betas = torch.full((200_000,), 0.7), betas_of(VPPath(name="vp", steps=100, beta_end=0.05)).float()
    generator = torch.Generator().manual_seed(1)
    for beta in betas:
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(len(x), generator=generator)
    c = build_path(VPPath(name="vp", steps=100, beta_end=0.05)).at(torch.tensor(1.0))
    assert float(x.mean()) == pytest.approx(0.7 * float(c.a), abs=4 * float(c.b) / len(x) ** 0.5)
    assert float(x.var()) == pytest.approx(float(c.b) ** 2, rel=4 * (2 / len(x)) ** 0.5)


def test_zero_terminal_snr_keeps_the_first_step() -> None:
    plain, rescaled = (build_path(VPPath(name="vp", zero_terminal_snr=zero)) for zero in (False, True))
    assert float(rescaled.at(torch.tensor(1.0)).a) == 0.0
    first = torch.tensor(1 / T, dtype=torch.float64)
    assert float(rescaled.at(first).a) == pytest.approx(float(plain.at(first).a), abs=1e-15)


def test_prior_of_unit_data_is_near_the_noise() -> None:
    latents = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    bits = prior_bits(chain(), latents, points(500))
    assert 0 < float(bits.mean()) < 1e-4
    shorter = build_path(VPPath(name="vp", steps=100))  # the same betas over fewer steps leave signal
    assert float(prior_bits(shorter, latents, points(500)).mean()) > 1e-2


def gaussian(path: VariancePreserving) -> GaussianMixture:
    return GaussianMixture(torch.zeros(1, 2), torch.tensor([0.6]), torch.ones(1), path)


def exact_noise(path: VariancePreserving, spread: Tensor | None = None) -> object:
    truth = gaussian(path)

    def network(x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        noise = ends_of(truth, path, x_t.double(), t.double(), points(len(x_t)))[1].float()
        return noise if spread is None else torch.cat([noise, spread.expand_as(noise)], dim=1)

    return network


def test_bound_of_the_exact_model_is_the_entropy_and_a_small_gap() -> None:
    path = chain(steps=200)
    batch = pack_of_points(gaussian(path).draw(300, 5), 0)
    terms, prior = variational_bound(exact_noise(path), path, "noise", "large", batch)  # type: ignore[arg-type]
    bound = float((terms.sum(0) + prior).mean())
    entropy = float((-gaussian(path).log_prob(batch.tokens.double(), torch.zeros(300)) / (2 * math.log(2))).mean())
    assert entropy < bound + 0.05
    assert bound - entropy < 0.25  # of one draw of noise a step, and of reverse steps with the forward variance
    wrong, _ = variational_bound(lambda x, t, cond: 0.5 * x, path, "noise", "large", batch)
    assert float(wrong.sum(0).mean()) > bound + 0.5
    assert float(terms[1:].min()) > -1e-9


def test_importance_weighted_bound_falls_to_the_likelihood_of_the_model() -> None:
    """-log mean of K weights p(x_0 .. x_T) / q(x_1 .. x_T | x_0) falls with K (Burda et al. 2015, arXiv:1509.00519, theorem 1).

    At K = 1 it is the bound; its limit is known, for every step of the exact model of Gaussian data is linear.
    """
    steps, most = 8, 128
    path = build_path(VPPath(name="vp", steps=steps, beta_start=0.1, beta_end=0.6))
    assert isinstance(path, VariancePreserving)
    batch = pack_of_points(gaussian(path).draw(400, 4), 0)
    latents, generator = batch.tokens.double()[:, None].expand(-1, most, -1), torch.Generator().manual_seed(0)

    def log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return -((x - mean).square() / variance + (2 * math.pi * variance).log()).sum(-1) / 2

    def fresh() -> Tensor:
        return torch.randn(latents.shape, dtype=torch.float64, generator=generator)

    end, one = path.at(torch.tensor(1.0)), torch.tensor(1.0, dtype=torch.float64)
    x, variance = end.a * latents + end.b * fresh(), one
    weights = log_normal(x, torch.zeros_like(x), one) - log_normal(x, end.a * latents, end.b**2)
    for i in range(steps, 0, -1):
        back, c = posterior(path, torch.tensor(i / steps), torch.tensor((i - 1) / steps)), path.at(torch.tensor(i / steps))
        gain = back.of_x + back.of_latents * 0.36 * c.a / (0.36 * c.a**2 + c.b**2)  # of the reverse step's mean in x
        mean, variance = gain * x, gain**2 * variance + back.large
        if i > 1:
            true = back.of_x * x + back.of_latents * latents
            x = true + back.small.sqrt() * fresh()
            weights = weights - log_normal(x, true, back.small)
        weights = weights + log_normal(x if i > 1 else latents, mean, back.large)
    bits = -1 / (2 * math.log(2))
    bounds = [bits * float((weights.reshape(len(latents), -1, k).logsumexp(2) - math.log(k)).mean()) for k in (1, 4, 16, most)]
    limit = bits * float(log_normal(batch.tokens.double(), torch.zeros(1, dtype=torch.float64), variance).mean())
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > limit + 0.01
    assert bounds[-1] == pytest.approx(limit, abs=0.005)
    draws = [pack_of_points(batch.tokens, 1000 * number) for number in range(8)]  # one alone has a standard error of 0.04
    parts = [variational_bound(exact_noise(path), path, "noise", "large", draw) for draw in draws]  # type: ignore[arg-type]
    assert sum(float((terms.sum(0) + prior).mean()) for terms, prior in parts) / 8 == pytest.approx(bounds[0], abs=0.03)


def test_kl_is_the_integral() -> None:
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    first, second = torch.distributions.Normal(0.3, 1.2), torch.distributions.Normal(-0.5, 0.8)
    integral = torch.trapezoid(first.log_prob(x).exp() * (first.log_prob(x) - second.log_prob(x)), x)
    values = [torch.tensor(value, dtype=torch.float64) for value in (0.3, 2 * math.log(1.2), -0.5, 2 * math.log(0.8))]
    assert float(gaussian_kl(*values)) == pytest.approx(float(integral), rel=1e-6)


# --- the objective ------------------------------------------------------------------------------------------------


def objective(**options: object) -> DDPM:
    config = DDPMConfig.model_validate({"name": "ddpm", "condition_dropout": 0, **options})
    built = build_objective(config, torch.zeros(1, 4), None)
    assert isinstance(built, DDPM)
    return built


def test_the_bound_moves_the_variance_only() -> None:
    batch = pack_of_points(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), 0)
    mean, spread = torch.full((1, 2), 0.1, requires_grad=True), torch.zeros(1, 2, requires_grad=True)

    def network(x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        return torch.cat([mean * x_t, spread.expand_as(x_t)], dim=1)

    hybrid = objective(variance="learned", bound_weight=1.0)(network, batch, 0.0).per_sample.sum()
    simple = objective()(lambda x_t, t, cond: mean * x_t, batch, 0.0).per_sample.sum()
    of_hybrid, of_spread = torch.autograd.grad(hybrid, [mean, spread])
    (of_simple,) = torch.autograd.grad(simple, [mean])
    torch.testing.assert_close(of_hybrid, of_simple)
    assert float(of_spread.abs().min()) > 0


def test_the_best_learned_variance_lies_between_and_is_the_analytic_one() -> None:
    """Where the bound is least, sigma^2 = small + of_latents^2 Var(latents | x_t) (Bao et al. 2022, arXiv:2201.06503, theorem 1)."""
    path, step = chain(), 300
    batch = pack_of_points(gaussian(path).draw(4000, 1), 0)
    steps = torch.full((4000,), step)
    x_t, _, t = noised(batch, steps / T, path)
    noise = exact_noise(path)(x_t, t, batch.cond)  # type: ignore[operator]
    levels = torch.linspace(-1, 1, 201)
    losses = torch.stack(
        [bound_terms(path, torch.cat([noise, level.expand_as(noise)], 1), "noise", "learned", batch, x_t, steps).mean() for level in levels]
    )
    back, c = posterior(path, torch.tensor(step / T), torch.tensor((step - 1) / T)), path.at(torch.tensor(step / T))
    best = float(log_variance(back, "learned", levels[losses.argmin()]).exp())
    uncertainty = 0.36 * c.b**2 / (0.36 * c.a**2 + c.b**2)
    analytic = float(back.small + back.of_latents**2 * uncertainty)
    assert float(back.small) < analytic < float(back.large)
    assert best - float(back.small) == pytest.approx(analytic - float(back.small), rel=0.1)


def test_gradient_of_the_simple_loss_is_that_of_the_bound_up_to_the_known_weight() -> None:
    """beta^2 / (2 sigma^2 alpha (1 - abar)) (Ho et al. 2020, eq. 12)."""
    path, count = chain(), 50
    batch = pack_of_points(torch.randn(count, 2, generator=torch.Generator().manual_seed(0)), 0)
    steps = torch.full((count,), 400)
    x_t, noise, _ = noised(batch, steps / T, path)
    answer = (0.3 * x_t).requires_grad_()
    (of_bound,) = torch.autograd.grad(bound_terms(path, answer, "noise", "large", batch, x_t, steps).sum(), answer)
    beta, c = betas_of(VPPath(name="vp"))[399], path.at(torch.tensor(0.4, dtype=torch.float64))
    weight = beta**2 / (2 * beta * (1 - beta) * c.b**2) / math.log(2)
    torch.testing.assert_close(of_bound, (weight * (answer - noise)).detach().float(), atol=1e-7, rtol=1e-3)


def test_steps_are_whole_and_cover_the_chain() -> None:
    batch = pack_of_points(torch.zeros(20_000, 2), 0)
    t = objective()(lambda x_t, t, cond: x_t, batch, 0.0).t.double() * T
    torch.testing.assert_close(t, t.round(), atol=1e-3, rtol=0)
    counts = torch.bincount(t.round().long(), minlength=T + 1)
    assert int(counts[0]) == 0
    assert float(((counts[1:] - 20) ** 2 / 20).sum()) == pytest.approx(T - 1, abs=5 * (2 * T) ** 0.5)  # chi squared


def test_importance_sampling_keeps_the_bound_and_narrows_it() -> None:
    path = chain(steps=100)
    batch = pack_of_points(gaussian(path).draw(200, 2), 0)
    terms, _ = variational_bound(exact_noise(path), path, "noise", "large", batch)  # type: ignore[arg-type]
    means = terms[1:].mean(1).double()
    for probabilities in (step_probabilities(path, False), step_probabilities(path, True)):
        assert float(probabilities.sum()) == pytest.approx(1.0)
        torch.testing.assert_close((probabilities[1:] * (means / probabilities[1:])).sum(), means.sum())
    uniform, weighted = ((means.square() / step_probabilities(path, flag)[1:]).sum() for flag in (False, True))
    assert float(weighted) < 0.5 * float(uniform)
    estimates = [
        float(
            objective(times=times, path={"name": "vp", "steps": 100})(
                lambda x, t, c: 0.4 * x, pack_of_points(gaussian(path).draw(8000, 3), 0), 0.0
            ).per_sample.mean()
        )
        for times in ("uniform", "importance")
    ]
    assert estimates[0] == pytest.approx(estimates[1], rel=0.1)
