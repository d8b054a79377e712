from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipelines.packed import Conditioning, pack_conditioning
from dit.config.objective import Guidance
from dit.config.path import VPPath
from dit.diffusion import (
    RECTIFIED_FLOW,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Denoiser,
    Extrapolation,
    Path,
    Within,
    build_path,
    heun,
    schedule,
)
from dit.diffusion.ground_truth import GaussianMixture, TokenMixture, points

GRIDS = [(1, 2, 2), (1, 1, 3)]
NULL_TEXT = torch.zeros(2, 4)


class TextField:
    """A denoiser whose velocity is x_t scaled by the mean of the text, plus t and label; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.calls += 1
        text = torch.stack([part.mean() for part in cond.text.split(cond.text_lengths)])
        labels = torch.zeros(len(cond.grids)) if cond.labels is None else cond.labels.float()
        return x_t * (text + labels)[cond.sample_of_token][:, None] + cond.per_token(t)[:, None]


def conditioning(labels: bool = False) -> Conditioning:
    return pack_conditioning(GRIDS, [torch.ones(3, 4), torch.full((1, 4), 2.0)], torch.tensor([3, 4]) if labels else None)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_guidance_extrapolates_from_null_to_condition_in_one_call(scale: float, labels: bool) -> None:
    field, x_t, t = TextField(), torch.randn(7, 2), torch.tensor([0.2, 0.8])
    guided = ClassifierFreeGuidance(field, NULL_TEXT, scale, 10)(x_t, t, conditioning(labels))
    assert field.calls == 1
    v_cond = field(x_t, t, conditioning(labels))
    v_null = field(x_t, t, conditioning().with_text([NULL_TEXT] * 2, torch.tensor([10, 10]) if labels else None))
    torch.testing.assert_close(guided, v_null + scale * (v_cond - v_null))
    w = scale - 1  # the other convention
    torch.testing.assert_close(guided, (1 + w) * v_cond - w * v_null)


def test_scale_one_is_one_plain_call() -> None:
    field, x_t, t = TextField(), torch.randn(7, 2), torch.tensor([0.2, 0.8])
    guided = ClassifierFreeGuidance(field, NULL_TEXT, Guidance(w=0.0).scale, None)(x_t, t, conditioning())
    assert field.calls == 1
    assert torch.equal(guided, field(x_t, t, conditioning()))


def test_rows_of_tokens_keep_their_levels() -> None:
    rows = torch.tensor([0, 0, 1, 1, 2, 2, 2])  # the first sample holds two noise levels
    plain = conditioning()
    cond = Conditioning(plain.grids, plain.text, plain.text_lengths, rows)
    x_t, t = torch.zeros(7, 2), torch.tensor([0.1, 0.5, 0.9])
    guided = ClassifierFreeGuidance(TextField(), NULL_TEXT, 4.0, None)(x_t, t, cond)
    torch.testing.assert_close(guided[:, 0], t[rows])


def test_guidance_of_velocity_is_guidance_of_latents_and_noise() -> None:
    """Linear in the prediction, so equal in every parameterisation at the same x_t and t (Ho & Salimans 2022)."""
    x_t, t, scale = torch.randn(7, 2, dtype=torch.float64), torch.tensor([0.3, 0.6], dtype=torch.float64), 2.5
    cond = conditioning()
    field = TextField()
    levels = cond.per_token(t)[:, None]
    v_cond, v_null = field(x_t, t, cond), field(x_t, t, cond.with_text([NULL_TEXT] * 2))
    guided = ClassifierFreeGuidance(field, NULL_TEXT, scale, None)(x_t, t, cond)
    latents_cond, latents_null = x_t - levels * v_cond, x_t - levels * v_null
    torch.testing.assert_close(x_t - levels * guided, latents_null + scale * (latents_cond - latents_null), atol=1e-12, rtol=0)


def test_guidance_is_combined_in_the_precision_of_x() -> None:
    field = TextField()
    guided = ClassifierFreeGuidance(lambda *args: field(*args).bfloat16(), NULL_TEXT, 7.0, None)
    assert guided(torch.randn(7, 2), torch.tensor([0.2, 0.8]), conditioning()).dtype == torch.float32


def field_of(value: Tensor, calls: list[int] | None = None) -> Denoiser:
    def field(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if calls is not None:
            calls.append(1)
        return value

    return field


def test_autoguidance_extrapolates_from_the_weak_model_and_s_one_spares_it() -> None:
    strong, weak = torch.randn(2, 7, 2, dtype=torch.float64)
    calls: list[int] = []
    cond, x_t, t = conditioning(), torch.zeros(7, 2, dtype=torch.float64), torch.tensor([0.2, 0.8])
    guided = AutoGuidance(field_of(strong), field_of(weak, calls), Extrapolation(2.0))(x_t, t, cond)
    torch.testing.assert_close(guided, 2 * strong - weak)
    assert torch.equal(AutoGuidance(field_of(strong), field_of(weak, calls), Extrapolation(1.0))(x_t, t, cond), strong)
    assert len(calls) == 1


def test_rescaled_guidance_has_the_spread_of_the_condition() -> None:
    v, null = torch.randn(2, 7, 2, dtype=torch.float64)
    cond, plain, t = conditioning(), null + 4 * (v - null), torch.rand(2)
    for part in (slice(0, 4), slice(4, 7)):
        full = Extrapolation(4.0, rescale=1.0)(v, null, t, cond)[part]
        torch.testing.assert_close(full.std(correction=0), v[part].std(correction=0))
        half = Extrapolation(4.0, rescale=0.5)(v, null, t, cond)[part]
        torch.testing.assert_close(half, (full + plain[part]) / 2)


def test_zero_star_fits_the_null_prediction_to_each_sample() -> None:
    v, null = torch.randn(2, 7, 2, dtype=torch.float64)
    at_zero = Extrapolation(0.0, zero_star=True)(v, null, torch.rand(2), conditioning())
    for part in (slice(0, 4), slice(4, 7)):
        best = torch.linalg.lstsq(null[part].reshape(-1, 1), v[part].reshape(-1, 1)).solution
        torch.testing.assert_close(at_zero[part], best * null[part])


def test_guidance_within_an_interval_asks_only_what_it_needs() -> None:
    plain, guided = torch.zeros(7, 2), torch.ones(7, 2)
    calls: list[int] = []
    within = Within(field_of(plain, calls), field_of(guided), 0.3, 0.9)
    result = within(torch.zeros(7, 2), torch.tensor([0.2, 0.8]), conditioning())
    assert result[:, 0].tolist() == [0] * 4 + [1] * 3
    assert torch.equal(within(torch.zeros(7, 2), torch.tensor([0.3, 0.9]), conditioning()), guided)
    assert len(calls) == 1


@pytest.mark.parametrize("options", [{}, {"zero_star": True, "rescale": 0.7}], ids=["plain", "all"])
@pytest.mark.parametrize("t", [[0.1, 0.95], [0.1, 0.5], [0.4, 0.5]], ids=["outside", "mixed", "inside"])
def test_guidance_with_an_interval_asks_alike_at_every_t(t: list[float], options: dict[str, Any]) -> None:
    """As ranks must that hold parts of the network; outside, the answer is the unguided one, bit for bit."""
    field, x_t, cond, times = TextField(), torch.randn(7, 2), conditioning(), torch.tensor(t)
    plain = ClassifierFreeGuidance(field, NULL_TEXT, 1.0, None)(x_t, times, cond)
    everywhere = ClassifierFreeGuidance(field, NULL_TEXT, 3.0, None, **options)(x_t, times, cond)
    field.calls = 0
    result = ClassifierFreeGuidance(field, NULL_TEXT, 3.0, None, **options, interval=(0.3, 0.9))(x_t, times, cond)
    assert field.calls == 1
    for level, part in zip(t, (slice(0, 4), slice(4, 7)), strict=True):
        assert torch.equal(result[part], (everywhere if 0.3 <= level <= 0.9 else plain)[part])
    assert not torch.allclose(everywhere, plain)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_rescaled_guidance_of_a_constant_prediction_is_that_prediction(value: float) -> None:
    """Such as a network's before its first step."""
    constant, cond = torch.full((7, 2), value), conditioning()
    torch.testing.assert_close(Extrapolation(4.0, rescale=0.7)(constant, constant, torch.rand(2), cond), constant)
    assert Extrapolation(0.0, rescale=0.7)(torch.randn(7, 2), constant, torch.rand(2), cond).isfinite().all()


# --- against the exact conditional of a mixture -------------------------------------------------------------------

VP = build_path(VPPath(name="vp"))


def two_classes(path: Path) -> tuple[GaussianMixture, GaussianMixture]:
    """Data of four components, and those two of them that are class y."""
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.4], [0.2, -1.1], [0.9, -0.8]], dtype=torch.float64)
    stds, weights = torch.tensor([0.3, 0.25, 0.4, 0.3], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.3, 0.2], dtype=torch.float64)
    return GaussianMixture(means, stds, weights, path), GaussianMixture(means[:2], stds[:2], weights[:2] / 0.5, path)


@pytest.mark.parametrize("path", [RECTIFIED_FLOW, VP], ids=["rectified_flow", "vp"])
def test_classifier_guidance_at_strength_one_is_the_exact_conditional(path: Path) -> None:
    everything, of_class = two_classes(path)

    def log_likelihood(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return everything.log_posterior(x, t)[:, :2].logsumexp(1)

    x, t, cond = torch.randn(60, 2, dtype=torch.float64), torch.linspace(0.05, 0.95, 60, dtype=torch.float64), points(60)
    guided = ClassifierGuidance(everything, path, log_likelihood, 1.0)
    torch.testing.assert_close(guided(x, t, cond), of_class(x, t, cond), atol=1e-10, rtol=1e-10)
    stronger = ClassifierGuidance(everything, path, log_likelihood, 2.5)(x, t, cond)  # (1 + w) v_y - w v with 1 + w = gamma
    torch.testing.assert_close(stronger, 2.5 * of_class(x, t, cond) - 1.5 * everything(x, t, cond), atol=1e-10, rtol=1e-10)
    assert torch.equal(ClassifierGuidance(everything, path, log_likelihood, 0.0)(x, t, cond), everything(x, t, cond))


def test_samples_under_classifier_guidance_are_those_of_the_class() -> None:
    """Wasserstein-2 of one number a sample within 1.5 times that of as many real samples."""
    means, stds = (
        torch.tensor([[1.0], [-0.6], [0.2], [-1.5]], dtype=torch.float64),
        torch.tensor([0.2, 0.15, 0.2, 0.3], dtype=torch.float64),
    )
    everything = GaussianMixture(means, stds, torch.tensor([0.2, 0.3, 0.3, 0.2], dtype=torch.float64))
    of_class = GaussianMixture(means[:2], stds[:2], torch.tensor([0.4, 0.6], dtype=torch.float64))
    count = 2000
    quantiles = TokenMixture(of_class.means, of_class.stds, of_class.weights).quantiles(count)

    def distance(x: Tensor) -> float:
        return float((x[:, 0].double().sort().values - quantiles).square().mean().sqrt())

    def log_likelihood(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return everything.log_posterior(x, cond.per_token(t))[:, :2].logsumexp(1)

    floor = sum(distance(of_class.draw(count, seed)) for seed in range(8)) / 8
    noise, cond = torch.randn(count, 1, dtype=torch.float64), pack_conditioning([(1, count, 1)], [torch.zeros(1, 4)])
    guided = Within(everything, ClassifierGuidance(everything, RECTIFIED_FLOW, log_likelihood, 1.0), 0, 0.999)
    assert distance(heun(guided, noise, schedule(40, 1.0), cond)) < 1.5 * floor
    assert distance(heun(everything, noise, schedule(40, 1.0), cond)) > 5 * floor


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 3.0])
def test_analytic_guided_field_is_the_same_in_every_parameterisation(w: float) -> None:
    everything, of_class = two_classes(VP)
    x, t, cond = torch.randn(40, 2, dtype=torch.float64), torch.linspace(0.05, 0.95, 40, dtype=torch.float64), points(40)
    guided = AutoGuidance(of_class, everything, Extrapolation(w + 1))(x, t, cond)
    for quantity in ("latents", "noise", "score", "v", "edm"):
        parts = [VP.convert(field(x, t, cond), "velocity", quantity, x, t, cond) for field in (of_class, everything)]
        both = VP.convert((1 + w) * parts[0] - w * parts[1], quantity, "velocity", x, t, cond)
        torch.testing.assert_close(guided, both, atol=1e-10, rtol=1e-11)
        single = [VP.convert(field(x, t, cond).float(), "velocity", quantity, x.float(), t, cond) for field in (of_class, everything)]
        of_single = VP.convert((1 + w) * single[0] - w * single[1], quantity, "velocity", x.float(), t, cond)
        assert of_single.dtype == torch.float32
        assert (of_single - guided).abs().max() < 1e-6 * guided.abs().max()
