import math
from itertools import product
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit.config.path import PathConfig, Quantity
from dit.diffusion import OnPath, Path, Predicting, build_path
from dit.diffusion.ground_truth import ProductMixture, points

CONFIGS: list[dict[str, object]] = [
    {"name": "rectified_flow"},
    {"name": "trigflow"},
    {"name": "ve"},
    {"name": "edm", "sigma_data": 0.5},
    *({"name": "vp", "schedule": schedule} for schedule in ("linear", "scaled_linear", "cosine", "sigmoid", "saturating")),
    {"name": "vp", "schedule": "scaled_linear", "zero_terminal_snr": True},
]
QUANTITIES = get_args(Quantity)


def path(config: dict[str, object]) -> Path:
    return build_path(TypeAdapter(PathConfig).validate_python(config))


def name(config: dict[str, object]) -> str:
    return "-".join(str(part) for part in config.values())


def levels(count: int) -> Tensor:
    return torch.linspace(0.02, 0.98, count, dtype=torch.float64)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_derivatives_are_those_of_the_coefficients(config: dict[str, object]) -> None:
    t, h = levels(50) + 1e-4, 1e-6
    c, before, after = path(config).at(t), path(config).at(t - h), path(config).at(t + h)
    torch.testing.assert_close(c.da, (after.a - before.a) / (2 * h), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(c.db, (after.b - before.b) / (2 * h), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_path_begins_at_the_data_and_noise_only_gains(config: dict[str, object]) -> None:
    c = path(config).at(torch.linspace(0, 1, 3001, dtype=torch.float64))
    assert (float(c.a[0]), float(c.b[0])) == (1.0, 0.0)
    assert bool(((c.b / c.a).diff() > 0).all())
    if config.get("zero_terminal_snr"):
        assert float(c.a[-1]) == 0.0


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_every_prediction_gives_every_other(config: dict[str, object]) -> None:
    """All paths, predictions and targets: round trips to 1e-12 in float64 and 1e-4 in float32, relative to the target's size."""
    count, ours = 40, path(config)
    cond, t = points(count), levels(count)
    latents, noise = torch.randn(2, count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = ours.interpolate(latents, noise, t, cond)
    for source, target in product(QUANTITIES, QUANTITIES):
        value, truth = (ours.target(quantity, latents, noise, t, cond) for quantity in (source, target))
        scale = truth.abs().max() + _amplified(ours, source, target, value, x_t, t)
        torch.testing.assert_close(ours.convert(value, source, target, x_t, t, cond) / scale, truth / scale, atol=1e-12, rtol=0)
        single = ours.convert(value.float(), source, target, x_t.float(), t, cond)
        torch.testing.assert_close(single / scale.float(), (truth / scale).float(), atol=1e-5, rtol=0)


def _amplified(ours: Path, source: Quantity, target: Quantity, value: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The largest term of the conversion: rounding errors are relative to it."""
    p, q = ours.conversion(source, target, t)
    return (p[:, None] * x_t).abs().max() + (q[:, None] * value).abs().max()


def test_predictions_are_those_of_the_papers() -> None:
    t, cond = torch.tensor([0.3], dtype=torch.float64), points(1)
    latents, noise = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[-1.0]], dtype=torch.float64)

    def value(config: dict[str, object], quantity: Quantity) -> float:
        return float(path(config).target(quantity, latents, noise, t, cond))

    assert value({"name": "rectified_flow"}, "velocity") == -3.0
    assert value({"name": "rectified_flow"}, "score") == pytest.approx(1 / 0.3)
    angle = 0.15 * math.pi
    assert value({"name": "trigflow"}, "v") == pytest.approx(-math.cos(angle) - 2 * math.sin(angle))  # a noise - b latents
    assert value({"name": "trigflow"}, "velocity") == pytest.approx(math.pi / 2 * value({"name": "trigflow"}, "v"))
    sigma, data = 24.0, 0.5  # Karras et al. 2022: D = c_skip x + c_out F
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / math.hypot(sigma, data)
    assert c_skip * (2 - sigma) + c_out * value({"name": "edm", "sigma_data": 0.5}, "edm") == pytest.approx(2.0)


def test_edm_network_sees_scaled_tokens_and_the_log_of_sigma() -> None:
    seen: list[tuple[float, float]] = []

    def network(x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        seen.append((float(x_t), float(t)))
        return torch.zeros_like(x_t)

    ours, t = path({"name": "edm", "sigma_data": 0.5}), torch.tensor([0.1], dtype=torch.float64)
    velocity = Predicting(network, ours, "edm")(torch.tensor([[4.0]], dtype=torch.float64), t, points(1))
    assert seen[0] == pytest.approx((4 / math.hypot(8, 0.5), math.log(8) / 4))
    latents = 4 - 0.1 * float(velocity)  # x_t - b / b' velocity
    assert latents == pytest.approx(0.25 / 64.25 * 4)  # F = 0: c_skip x_t


def test_what_does_not_determine_another_is_refused() -> None:
    t = torch.tensor([0.5, 1.0], dtype=torch.float64)
    for config in ({"name": "rectified_flow"}, {"name": "trigflow"}, CONFIGS[-1]):
        with pytest.raises(ValueError, match="noise does not determine latents at t = 1"):
            path(config).conversion("noise", "latents", t)
        assert torch.isfinite(path(config).conversion("v", "latents", t)[1]).all()
    with pytest.raises(ValueError, match="latents does not determine noise at t = 0"):
        path({"name": "rectified_flow"}).conversion("latents", "noise", torch.zeros(1))


def test_level_of_is_the_inverse_of_sigma() -> None:
    for config in CONFIGS:
        c = path(config).at(levels(30))
        torch.testing.assert_close(path(config).level_of(c.b / c.a), levels(30), atol=1e-10, rtol=0)
    assert float(path({"name": "rectified_flow"}).level_of(torch.tensor(torch.inf))) == 1.0


@pytest.mark.parametrize("own", CONFIGS, ids=name)
def test_a_denoiser_of_one_path_is_one_of_another(own: dict[str, object]) -> None:
    """Rectified flow and TrigFlow by a network of any path: x_t is scaled and t mapped, exactly (variance exploding inputs included)."""
    count = 64
    x = torch.randn(count, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for other in CONFIGS[:2]:
        t = torch.linspace(0.05, 0.95, count, dtype=torch.float64)
        truth = ProductMixture.standard(path(other))(x, t, points(count))
        moved = OnPath(ProductMixture.standard(path(own)), path(own), path(other))(x, t, points(count))
        torch.testing.assert_close(moved, truth, atol=2e-9, rtol=1e-9)


class Copies(TorchDispatchMode):
    """Counts what goes from the CPU to another device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and result.device.type != "cpu"
        return result


def test_the_tables_of_a_chain_go_to_a_device_once() -> None:
    """Each copy would wait for a GPU to finish."""
    chain, t = path({"name": "vp"}), torch.empty(3, device="meta")
    with Copies() as copies:
        chain.at(t)
        assert copies.count == 2
        assert chain.at(t).a.device.type == "meta"
        assert copies.count == 2
