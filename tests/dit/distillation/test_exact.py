"""Exact students have no loss, others have; derivatives and tangents are those of an independent forward mode and of the papers."""

from collections.abc import Callable

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.autograd import forward_ad

from data_pipelines.packed import Conditioning, PackedLatents, pack_conditioning
from dit.config import SpatioTemporalDiTConfig
from dit.config.objective import ObjectiveConfig, TokenShift
from dit.diffusion import RECTIFIED_FLOW, Denoiser, build_denoiser, equip, euler, schedule
from dit.diffusion.ground_truth import GaussianMixture, pack_of_points, points
from dit.diffusion.objectives import noised
from dit.diffusion.times import draw as draw_times
from dit.distillation import build_distillation, build_student_sampling, teacher_gap
from dit.distillation.flow import derivative
from dit.models import SpatioTemporalDiT, build_backbone
from tests.dit.distillation.toy_students import method

GAUSSIAN = GaussianMixture(torch.tensor([[0.5, -0.2]]), torch.tensor([0.3]), torch.tensor([1.0]))
MIXTURE = GaussianMixture(
    torch.tensor([[1.2, 0.3], [-0.8, 0.9], [-0.2, -1.2]]), torch.tensor([0.25, 0.15, 0.3]), torch.tensor([0.3, 0.3, 0.4])
)


def exact(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """The mean velocity of GAUSSIAN's flow from t down to t - jump: the flow keeps (x - mean of t) / std of t."""
    assert cond.jump is not None
    level, jump = cond.per_token(t)[:, None].double(), cond.per_token(cond.jump)[:, None].double()
    mean, x = GAUSSIAN.means[0].double(), x_t.double()

    def moved(end: Tensor) -> Tensor:
        std_t, std_e = (((1 - at) ** 2 * 0.09 + at**2).sqrt() for at in (level, end))
        return (1 - end) * mean + std_e / std_t * (x - (1 - level) * mean)

    long = (x - moved(level - jump)) / jump
    return torch.where(jump.abs() < 1e-9, GAUSSIAN.velocity(x, level[:, 0]), long).to(x_t)


def flipped(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    return -exact(x_t, t, cond)


def doubles(batch: PackedLatents) -> PackedLatents:
    return PackedLatents(batch.tokens.double(), batch.cond, batch.keys, batch.ids, batch.weights)


METHODS: dict[str, dict[str, object]] = {
    "consistency": {"solver_steps": 16},
    "phases": {"name": "consistency", "phases": 4, "solver_steps": 16},
    "skip": {"name": "consistency", "skip": 0.05, "solver_steps": 4},
    "mean_flow": {"derivative": "difference", "step": 3e-3},
    "continuous_consistency": {"derivative": "difference", "step": 3e-3},
    "progressive": {"teacher_steps": 256},
}


def loss_of(name: str, student: Denoiser) -> float:
    """The mean loss, or for continuous consistency the tangent, whose normalised square is the loss."""
    objective = build_distillation(method(**{"name": name, **METHODS[name]}), GAUSSIAN, None)
    losses = objective(student, pack_of_points(GAUSSIAN.draw(400, 1), 0), 0.9)
    return float(losses.figures.get("tangent_norm", losses.per_sample).square().mean().sqrt())


@pytest.mark.parametrize("name", METHODS)
def test_the_exact_student_has_no_loss(name: str) -> None:
    own = loss_of(name, exact)
    assert own < (1e-3 if name == "continuous_consistency" else 1e-5)
    assert loss_of(name, GAUSSIAN) > 20 * own + 1e-4  # it knows the velocity alone
    assert loss_of(name, flipped) > 1e-2


@pytest.mark.parametrize("name", METHODS)
def test_the_gap_to_the_teacher_is_that_of_the_jump(name: str) -> None:
    objective = build_distillation(method(**{"name": name, **METHODS[name]}), GAUSSIAN, None)
    batches = [pack_of_points(GAUSSIAN.draw(30, 1), 0), pack_of_points(GAUSSIAN.draw(20, 2), 30)]
    gap = teacher_gap(objective, exact, batches, (0.3, 0.75, 1.0))
    assert gap.shape == (3, 50)
    assert float(gap.max()) < 1e-4
    off = teacher_gap(objective, lambda x_t, t, cond: exact(x_t, t, cond) + 0.1, batches, (0.3, 0.75, 1.0))
    torch.testing.assert_close(off, torch.full_like(off, 0.01), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["phases", "progressive"])
def test_jumps_end_where_the_sampler_steps(name: str) -> None:
    config = method(**{"name": name, **METHODS[name]})
    objective = build_distillation(config, GAUSSIAN, TokenShift(base_tokens=4))  # k = 1/2 for one token
    levels = schedule(build_student_sampling(config).steps, 0.5)
    walk = objective.walk(levels[:-1], (1,) * 4).levels
    torch.testing.assert_close(walk[0], levels[:-1])
    torch.testing.assert_close(walk[-1], levels[1:])


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_exact_mean_flow_is_sampled_exactly_in_any_number_of_steps(steps: int) -> None:
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    drawn = euler(exact, noise, schedule(steps, 1.0), points(200))
    torch.testing.assert_close(drawn, GAUSSIAN.means[0].float() + 0.3 * noise, atol=1e-5, rtol=0)


def test_data_move_along_their_own_line() -> None:
    batch = pack_of_points(MIXTURE.draw(100, 1), 0)
    config = method(name="consistency", flow="data", stages=1, skip=1.0)
    levels = draw_times(config.times, None, batch.keys, batch.cond.lengths)
    _, noise, _ = noised(batch, levels)
    losses = build_distillation(config, MIXTURE, None)(lambda x_t, t, cond: noise - batch.tokens, batch, 0.0)
    assert float(losses.per_sample.max()) < 1e-10  # a gap down to the data is plain training
    with pytest.raises(ValueError, match="flow=data and guidance s=3"):
        method(name="consistency", flow="data", guidance={"s": 3.0})


def small_dit(**options: object) -> tuple[SpatioTemporalDiT, Tensor, Tensor, Tensor, Conditioning]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "depth": 2, "num_heads": 2, "ffn_size": 40, "patch_size": (1, 1, 1), "frequency_size": 16, "jumps": True}
    network = build_backbone(SpatioTemporalDiTConfig.model_validate(sizes | options), channels=4, text_width=5).double()
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    cond = pack_conditioning([(2, 3, 2), (1, 2, 2)], [torch.randn(3, 5).double(), torch.randn(1, 5).double()])
    x, velocity = torch.randn(2, 16, 4, dtype=torch.float64)
    t, jump = torch.tensor([0.7, 0.3], dtype=torch.float64), torch.tensor([0.2, 0.3], dtype=torch.float64)
    return network, x, t, velocity, cond.over(jump)


OBJECTIVES = {
    "rectified_flow": {"name": "rectified_flow"},
    "trigflow": {"name": "diffusion", "path": {"name": "trigflow"}, "prediction": "v"},
    "ve": {"name": "diffusion", "path": {"name": "ve"}, "prediction": "noise"},
    "edm": {"name": "diffusion", "path": {"name": "edm"}, "prediction": "edm"},
    "zero_terminal_snr": {"name": "diffusion", "path": {"name": "vp", "zero_terminal_snr": True}, "prediction": "v"},
    "ddpm": {"name": "ddpm", "variance": "learned"},
    "variational": {"name": "variational", "path": {"pieces": 4}},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_derivative_of_a_student_of_any_teacher_is_the_same_by_differences_and_by_dual_numbers(name: str) -> None:
    network, x, t, velocity, cond = small_dit(learned_variance=name == "ddpm")
    config = TypeAdapter(ObjectiveConfig).validate_python(OBJECTIVES[name])
    denoiser = build_denoiser(config, equip(network, config), RECTIFIED_FLOW)
    truth = derivative(denoiser, x, t, velocity, cond, "forward", 0.0)
    steps = (4e-4, 2e-4, 1e-4)
    errors = [float((derivative(denoiser, x, t, velocity, cond, "difference", h) - truth).norm() / truth.norm()) for h in steps]
    assert errors[-1] < 5e-3
    assert 3.5 < errors[0] / errors[1] < 4.5  # second order
    assert 3.5 < errors[1] / errors[2] < 4.5


def test_compiled_blocks_are_differentiated_as_they_are() -> None:
    network, x, t, velocity, cond = small_dit()
    truth = derivative(network, x, t, velocity, cond, "forward", 0.0)
    for block in network.blocks:
        block.compile()
    assert torch.equal(derivative(network, x, t, velocity, cond, "forward", 0.0), truth)


def test_a_difference_is_one_sided_at_the_ends_of_time() -> None:
    seen: list[Tensor] = []

    def student(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append(t)
        return x_t * cond.per_token(t)[:, None]

    x, t = torch.tensor([[2.0], [3.0]], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    rate = derivative(student, x, t, torch.ones_like(x), points(2), "difference", 1e-5)  # d(x t) = x dt + t dx
    torch.testing.assert_close(rate, torch.tensor([[2.0], [4.0]], dtype=torch.float64), atol=1e-4, rtol=0)
    assert all(0 <= float(level.min()) <= float(level.max()) <= 1 for level in seen)


@pytest.mark.parametrize("jumps", [True, False])
def test_a_difference_stays_between_the_level_that_is_jumped_to_and_one(jumps: bool) -> None:
    seen: list[tuple[Tensor, Tensor | None]] = []

    def student(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append((t, cond.jump))
        return x_t * cond.per_token(t)[:, None]

    t = torch.tensor([0.5, 0.5, 0.01, 1.0], dtype=torch.float64)
    jump = torch.tensor([0.3, 0.01, 0.01, 0.2], dtype=torch.float64)
    x = torch.ones(4, 1, dtype=torch.float64)
    rate = derivative(student, x, t, 0 * x, points(4).over(jump) if jumps else points(4), "difference", 0.05)
    torch.testing.assert_close(rate, x)
    (upper, above), (lower, below) = seen
    assert upper.tolist() == pytest.approx([0.55, 0.55, 0.06, 1.0])
    assert lower.tolist() == pytest.approx([0.45, 0.49 if jumps else 0.45, 1e-5, 0.95], abs=1e-4)
    assert (lower > 0).all()
    if jumps:
        assert above is not None
        assert below is not None
        torch.testing.assert_close(upper - above, t - jump)  # what is jumped to stays where it is
        torch.testing.assert_close(lower - below, t - jump, atol=1e-4, rtol=0)
        assert (below >= 0).all()


def test_the_tangent_is_the_published_one_in_trigonometric_coordinates() -> None:
    batch = doubles(pack_of_points(MIXTURE.draw(60, 3), 7))
    config = method(name="continuous_consistency", warmup=0.0)
    x, _, t = noised(batch, draw_times(config.times, None, batch.keys, batch.cond.lengths))
    bend = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64)

    def student(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return (x_t @ bend.to(x_t) + cond.per_token(t)[:, None]).sin()

    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    losses = build_distillation(config, MIXTURE, None)(lambda *args: weight * student(*args), batch, 1.0)
    (gradient,) = torch.autograd.grad(losses.per_sample.double().sum(), weight)

    angle = torch.atan(t.double() / (1 - t.double()))  # (n,), one token each
    along = (angle.cos() + angle.sin())[:, None]

    def on_trigflow(answer: Callable[[Tensor, Tensor, Conditioning], Tensor], x_trig: Tensor, angle: Tensor) -> Tensor:
        """F = (cos x - f) / sin of a velocity on rectified flow."""
        scale, level = angle.cos() + angle.sin(), angle.sin() / (angle.cos() + angle.sin())
        x_rf = x_trig / scale[:, None]
        f = x_rf - level[:, None] * answer(x_rf, level, batch.cond)
        return (angle.cos()[:, None] * x_trig - f) / angle.sin()[:, None]

    x_trig = x.double() * along
    teacher = on_trigflow(MIXTURE, x_trig, angle)  # dx / dangle
    with forward_ad.dual_level():
        duals = forward_ad.make_dual(x_trig, teacher), forward_ad.make_dual(angle, torch.ones_like(angle))
        own, rate = forward_ad.unpack_dual(on_trigflow(student, *duals))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    g = -cos.square() * (own - teacher) - cos * sin * (x_trig + rate)  # Lu & Song 2024, algorithm 1
    norm = g.square().mean(1).sqrt()
    torch.testing.assert_close(losses.figures["tangent_norm"].double(), norm, rtol=1e-3, atol=1e-4)
    of_weight = on_trigflow(student, x_trig, angle) - on_trigflow(lambda x, t, cond: torch.zeros_like(x), x_trig, angle)
    expected = -2 * (g / (norm + 0.1)[:, None] * of_weight).mean(1).sum()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)
