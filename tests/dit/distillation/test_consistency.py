from functools import partial

import pytest
import torch
from torch import Tensor

from data_pipelines.packed import Conditioning
from dit.config.distillation import ConsistencyConfig
from dit.config.objective import Guidance, LogitNormalTimes, TokenShift
from dit.diffusion import euler, heun, sample
from dit.diffusion.draws import noise_tokens
from dit.diffusion.ground_truth import GaussianMixture, pack_of_points, points
from dit.diffusion.objectives import noised
from dit.diffusion.times import draw
from dit.distillation import ConsistencyDistillation, build_student_sampling
from dit.distillation.consistency import relative_gap

GAUSSIAN = GaussianMixture(torch.tensor([[0.5, -0.2]]), torch.tensor([0.3]), torch.tensor([1.0]))
MIXTURE = GaussianMixture(
    torch.tensor([[1.2, 0.3], [-0.8, 0.9], [-0.2, -1.2]]), torch.tensor([0.25, 0.15, 0.3]), torch.tensor([0.3, 0.3, 0.4])
)


def config(**options: object) -> ConsistencyConfig:
    return ConsistencyConfig.model_validate({"name": "consistency", "guidance": {"s": 1.0}, **options})


def exact_student(x_t: Tensor, t: Tensor, cond: Conditioning, phases: int = 1) -> Tensor:
    """Velocity (x_t - f) / (t - e) of GAUSSIAN's exact consistency function f = e's mean + (e's std / t's std) (x_t - t's mean)."""
    level, mean = cond.per_token(t)[:, None], GAUSSIAN.means[0].to(x_t)
    end = ((level * phases).ceil() - 1).clamp(min=0) / phases
    std_t, std_e = (((1 - at) ** 2 * 0.09 + at**2).sqrt() for at in (level, end))
    return (x_t - (1 - end) * mean - std_e * (x_t - (1 - level) * mean) / std_t) / (level - end)


@pytest.mark.parametrize("progress", [0.0, 0.9])
@pytest.mark.parametrize("phases", [1, 2, 4])
def test_the_exact_consistency_function_has_no_loss(progress: float, phases: int) -> None:
    objective = ConsistencyDistillation(config(solver_steps=16, phases=phases, student_steps=4 if phases == 1 else phases), GAUSSIAN, None)
    batch = pack_of_points(GAUSSIAN.draw(500, 1), 0)
    exact = float(objective(partial(exact_student, phases=phases), batch, progress).per_sample.mean())
    teacher = float(objective(GAUSSIAN, batch, progress).per_sample.mean())
    other_phases = float(objective(partial(exact_student, phases=3), batch, progress).per_sample.mean())
    flipped = float(objective(lambda *args: -exact_student(*args, phases=phases), batch, progress).per_sample.mean())
    assert exact < 1e-6
    assert teacher > 100 * exact + 1e-5
    assert other_phases > 100 * exact + 1e-5
    assert flipped > 1e-2


@pytest.mark.parametrize(("solver", "integrate"), [("euler", euler), ("heun", heun)])
def test_the_target_is_the_students_own_jump_from_where_the_teacher_leads(solver: str, integrate: object) -> None:
    settings = config(solver=solver, solver_steps=2, stages=1)
    batch = pack_of_points(MIXTURE.draw(1, 3), 42)
    levels = draw(settings.times, None, batch.keys, batch.cond.lengths)
    x_t, _, t = noised(batch, levels)

    def student(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return x.sin() + cond.per_token(t)[:, None]

    assert callable(integrate)
    x_r = integrate(MIXTURE, x_t, torch.tensor([float(t), 0.75 * float(t), 0.5 * float(t)]), batch.cond)
    f_t, f_r = (x - time[:, None] * student(x, time, batch.cond) for x, time in ((x_t, t), (x_r, t / 2)))
    expected = ((f_t - f_r) / t).square().mean()
    got = ConsistencyDistillation(settings, MIXTURE, None)(student, batch, 0.0)
    assert float(got.per_sample) == pytest.approx(float(expected), rel=1e-4)
    assert float(got.t) == float(t)


def test_nothing_blows_up_next_to_the_data() -> None:
    settings = config(times=LogitNormalTimes(mean=-16.0, std=0.5))
    batch = pack_of_points(GAUSSIAN.draw(200, 1), 0)
    losses = ConsistencyDistillation(settings, GAUSSIAN, None)(exact_student, batch, 0.0)
    assert float(losses.t.max()) < 1e-5
    assert torch.isfinite(losses.per_sample).all()
    velocity = GAUSSIAN(batch.tokens, torch.full((200,), 1e-6), batch.cond)
    near = ConsistencyDistillation(settings, GAUSSIAN, None)(lambda *args: velocity, batch, 0.0)
    assert float(near.per_sample.max()) < 1e-3  # f(x, 0) = x: there the student is the teacher


def test_only_the_students_answer_at_t_has_a_gradient() -> None:
    calls: dict[str, list[bool]] = {"teacher": [], "student": []}
    weight = torch.tensor(0.7, requires_grad=True)

    def teacher(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        calls["teacher"].append(torch.is_grad_enabled())
        return MIXTURE(x_t, t, cond)

    def student(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        calls["student"].append(torch.is_grad_enabled())
        return weight * x_t

    batch = pack_of_points(MIXTURE.draw(50, 2), 5)
    settings = config(solver_steps=2)
    loss = ConsistencyDistillation(settings, teacher, None)(student, batch, 0.0).per_sample.sum()
    loss.backward()
    assert calls == {"teacher": [False] * 4, "student": [False, True]}

    def moved(step: float) -> float:
        """The loss when the weight moves at t alone, the target staying as it is."""
        answers = iter([0.7, 0.7 + step])
        losses = ConsistencyDistillation(settings, MIXTURE, None)(lambda x, t, cond: next(answers) * x, batch, 0.0)
        return float(losses.per_sample.double().sum())

    assert weight.grad is not None
    assert float(weight.grad) == pytest.approx((moved(1e-2) - moved(-1e-2)) / 2e-2, rel=1e-3)


def test_gap_halves_from_stage_to_stage() -> None:
    settings = config(stages=4, q=2.0)
    assert [relative_gap(settings, p) for p in (0.0, 0.24, 0.25, 0.5, 0.99, 1.0)] == [1 / 2, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]
    assert relative_gap(config(stages=1, q=8.0), 0.7) == 1 / 8


def test_pseudo_huber_is_the_published_distance() -> None:
    batch = pack_of_points(MIXTURE.draw(50, 2), 5)
    squared = ConsistencyDistillation(config(), MIXTURE, None)(MIXTURE, batch, 0.5).per_sample
    huber = ConsistencyDistillation(config(huber=0.1), MIXTURE, None)(MIXTURE, batch, 0.5).per_sample
    # Song & Dhariwal 2023: sqrt(|e|^2 + c^2) - c with c = 0.1 sqrt(D), here divided by sqrt(D), D = 2
    expected = ((2 * squared + 0.02).sqrt() - 0.02**0.5) / 2**0.5
    torch.testing.assert_close(huber, expected)


def test_student_is_sampled_in_its_own_steps() -> None:
    sampling = build_student_sampling(config(student_steps=2))
    assert (sampling.sampler, sampling.steps, sampling.guidance) == ("consistency", 2, Guidance(s=1.0))


def test_a_student_of_several_phases_steps_from_end_to_end_without_fresh_noise() -> None:
    sampling = build_student_sampling(config(phases=4, student_steps=4))
    assert (sampling.sampler, sampling.steps, sampling.guidance) == ("euler", 4, Guidance(s=1.0))
    cond = points(200)
    noise = noise_tokens(list(range(200)), cond.lengths, 2, "start noise")
    jumped = sample(partial(exact_student, phases=4), cond, list(range(200)), 2, sampling, 1.0)
    mean = GAUSSIAN.means[0].float()
    torch.testing.assert_close(jumped, mean + 0.3 * noise, atol=1e-5, rtol=0)  # the flow map of a Gaussian, exactly
    with pytest.raises(ValueError, match="phases=4 and student_steps=3"):
        config(phases=4, student_steps=3)


def test_times_are_shifted_as_the_teachers() -> None:
    batch = pack_of_points(torch.zeros(4, 2), 0)
    plain = ConsistencyDistillation(config(), MIXTURE, None)(MIXTURE, batch, 0.0).t
    shifted = ConsistencyDistillation(config(), MIXTURE, TokenShift(base_tokens=4))(MIXTURE, batch, 0.0).t
    torch.testing.assert_close(shifted, 0.5 * plain / (1 - 0.5 * plain))


def test_the_gap_is_relative_before_the_shift() -> None:
    batch = pack_of_points(torch.zeros(4, 2), 0)
    visited: list[Tensor] = []

    def student(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        visited.append(t)
        return MIXTURE(x_t, t, cond)

    ConsistencyDistillation(config(), MIXTURE, TokenShift(base_tokens=4))(student, batch, 0.0)  # gap 1/2, k = 1/2
    lower, upper = visited
    u = upper / (0.5 + 0.5 * upper)  # the inverse of t = k u / (1 + (k - 1) u)
    torch.testing.assert_close(lower / (0.5 + 0.5 * lower), u / 2)


@pytest.mark.parametrize("phases", [1, 2])
def test_a_skip_never_asks_at_the_end_of_a_phase(phases: int) -> None:
    """At t = 0 a network that predicts noise says nothing of the velocity: 0 / 0."""
    asked: list[Tensor] = []

    def knows_nothing_of_data(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        asked.append(t)
        return MIXTURE(x_t, t, cond) * (t / t)[:, None]

    settings = config(skip=0.4, phases=phases, student_steps=2, solver="euler", solver_steps=2)
    batch = pack_of_points(MIXTURE.draw(500, 2), 5)
    losses = ConsistencyDistillation(settings, knows_nothing_of_data, None)(knows_nothing_of_data, batch, 0.5)
    assert torch.isfinite(losses.per_sample).all()
    t, _, r, at_t = asked  # the teacher at t and between, the student at r and t
    end = ((t.double() * phases).ceil() - 1) / phases
    torch.testing.assert_close(r.double(), torch.maximum(t - 0.4, end + (t - end) * 1e-3), rtol=1e-5, atol=1e-6)
    assert (r > end).all()
    assert torch.equal(t, at_t)
