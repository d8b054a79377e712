"""Any prediction under any weighting: the loss is the published weight times the squared error of the published quantity."""

import math
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from data_pipelines import randomness
from dit.config.objective import DiffusionConfig
from dit.config.path import Quantity
from dit.config.weighting import WeightingConfig
from dit.diffusion import RECTIFIED_FLOW, Regression, build_objective
from dit.diffusion.ground_truth import GaussianMixture, pack_of_points, points
from dit.diffusion.weighting import weight_of

NULL = torch.zeros(1, 4)
PREDICTIONS = get_args(Quantity)


def objective(**options: object) -> Regression:
    built = build_objective(DiffusionConfig.model_validate({"name": "diffusion", "condition_dropout": 0, **options}), NULL, None)
    assert isinstance(built, Regression)
    return built


def published(name: str, snr: Tensor, t: Tensor) -> tuple[Quantity, Tensor]:
    logit = torch.logit(t)
    return {
        "min_snr": ("latents", torch.minimum(snr, torch.tensor(5.0))),
        "snr_plus_one": ("latents", snr + 1),
        "truncated_snr": ("latents", torch.maximum(snr, torch.tensor(1.0))),
        "edm": ("latents", snr + 1),  # (sigma^2 + 1) / sigma^2
        "p2": ("noise", 1 / (1 + snr)),
        "sigmoid": ("noise", 1 / (1 + torch.exp(3 + snr.log()))),
        "logit_normal": ("velocity", torch.exp(-(logit**2) / 2) / (math.sqrt(2 * math.pi) * t * (1 - t))),
        "constant": ("v", torch.ones_like(t)),
    }[name]  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["min_snr", "snr_plus_one", "truncated_snr", "edm", "p2", "sigmoid", "logit_normal", "constant"])
@pytest.mark.parametrize("path", ["rectified_flow", "vp", "trigflow"])
def test_every_prediction_has_the_published_loss(name: str, path: str) -> None:
    batch = pack_of_points(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), 0)
    guess = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))  # latents that the network believes in
    weighting = {"name": name, "space": "v"} if name == "constant" else {"name": name}
    for prediction in PREDICTIONS:
        built = objective(path={"name": path}, prediction=prediction, weighting=weighting, times={"name": "logit_normal", "std": 0.7})

        def network(x_t: Tensor, t: Tensor, cond: object, built: Regression = built) -> Tensor:
            c = built.path.at(t)
            noise = (x_t - c.a[:, None] * guess) / c.b[:, None]
            return built.path.target(built.config.prediction, guess, noise.float(), t, batch.cond)

        losses = built(network, batch, 0.0)
        t = losses.t.double()
        c, noise = built.path.at(t), torch.cat([randomness.normal((1, 3), key, "noise") for key in batch.keys])
        space, weight = published(name, (c.a / c.b) ** 2, t)
        x_t = c.a[:, None] * batch.tokens + c.b[:, None] * noise
        wrong = (x_t - c.a[:, None] * guess) / c.b[:, None]
        error = built.path.target(space, batch.tokens, noise, t, batch.cond) - built.path.target(space, guess, wrong.float(), t, batch.cond)
        torch.testing.assert_close(losses.per_sample.double(), (weight * error.square().mean(1)), rtol=2e-3, atol=1e-6)


def test_weightings_are_all_tried_and_huber_is_the_published_distance() -> None:
    names = {config.model_fields["name"].annotation for config in get_args(get_args(WeightingConfig)[0])}
    assert len(names) == 8
    batch = pack_of_points(torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), 0)
    squared, huber = (
        objective(path={"name": "rectified_flow"}, huber=c)(lambda x, t, cond: 0.5 * x, batch, 0.0).per_sample for c in (0.0, 0.3)
    )
    torch.testing.assert_close(huber, (squared + 0.09).sqrt() - 0.3)
    assert TypeAdapter(WeightingConfig).validate_python({"name": "constant"}).space is None


@pytest.mark.parametrize("path", ["rectified_flow", "vp", "ve", "edm", "trigflow"])
@pytest.mark.parametrize("prediction", ["latents", "noise", "v", "velocity", "edm"])
def test_the_exact_prediction_has_the_least_loss(path: str, prediction: Quantity) -> None:
    """For Gaussian data the best answer is linear in x_t: the loss at the Wiener gain is below that of any other gain."""
    times = {"name": "log_normal", "mean": 0.0, "std": 1.0}
    built = objective(path={"name": path}, prediction=prediction, times=times, weighting={"name": "constant", "space": "v"})
    truth = GaussianMixture(torch.zeros(1, 2), torch.tensor([0.6]), torch.ones(1), built.path)
    batch = pack_of_points(truth.draw(3000, 4), 0)

    def loss(gain: float) -> float:
        def network(x: Tensor, label: Tensor, cond: object) -> Tensor:
            scale = built.path.input_scale(levels)
            x_t = x.double() if scale is None else x.double() / scale[:, None]
            velocity = gain * truth.velocity(x_t, levels)
            return built.path.convert(velocity, "velocity", built.config.prediction, x_t, levels, batch.cond).float()

        return float(built(network, batch, 0.0).per_sample.mean())

    levels = built(lambda x, t, cond: x, batch, 0.0).t.double()
    best = loss(1.0)
    assert best < loss(0.9)
    assert best < loss(1.1)


def test_v_on_vp_edm_and_trigflow_are_one_regression() -> None:
    """At one b / a, on data of unit deviation: the same input, the same target up to its sign, the same weight; only t has another name."""
    latents, noise = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma, cond = torch.tensor([0.05, 0.3, 1.0, 4.0, 60.0], dtype=torch.float64), points(5)
    seen = []
    for path, prediction, weighting in [("vp", "v", "constant"), ("edm", "edm", "edm"), ("trigflow", "v", "constant")]:
        built = objective(path={"name": path}, prediction=prediction, weighting={"name": weighting})
        t = built.path.level_of(sigma)
        scale, x_t = built.path.input_scale(t), built.path.interpolate(latents, noise, t, cond)
        target = built.path.target(built.config.prediction, latents, noise, t, cond) * (-1 if prediction == "edm" else 1)
        space, weight = weight_of(built.config.weighting, built.config.prediction, built.path, t)
        weight = weight * built.path.conversion(built.config.prediction, space, t)[1].square()
        seen.append(torch.cat([x_t if scale is None else scale[:, None] * x_t, target, weight[:, None]], dim=1))
    torch.testing.assert_close(seen[0], seen[1], atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(seen[0], seen[2], atol=1e-9, rtol=1e-6)


def test_the_weight_at_the_ends_is_its_limit() -> None:
    """float32 rounds t to 0 and 1, where the density of t divides zero by zero."""
    config = TypeAdapter[WeightingConfig](WeightingConfig).validate_python({"name": "logit_normal"})
    _, weight = weight_of(config, "velocity", RECTIFIED_FLOW, torch.tensor([0.0, 1e-30, 0.5, 1 - 2**-24, 1.0]))
    assert weight[[0, 4]].tolist() == [0, 0]
    assert weight[1] < 1e-9
    assert weight[3] < 1e-9
    assert float(weight[2]) == pytest.approx(4 / math.sqrt(2 * math.pi))
