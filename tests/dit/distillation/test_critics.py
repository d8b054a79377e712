"""Methods with a critic: whose turn it is, and gradients against closed forms of scores that are known."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from data_pipelines.packed import Conditioning, PackedLatents, pack_conditioning
from dit.config.objective import TokenShift
from dit.diffusion import Denoiser, schedule, times
from dit.diffusion.draws import noise_tokens
from dit.diffusion.ground_truth import GaussianMixture, pack_of_points
from dit.distillation import (
    Adversarial,
    DistributionMatching,
    build_distillation,
    discriminator_of,
    objective_at,
    step_calls,
    student_of,
    turn_of,
    with_critic,
)
from dit.distillation.adversarial import under_other_captions
from dit.distillation.networks import Discriminator
from tests.dit.distillation.toy_students import Student, method, random_looks

DATA = GaussianMixture(torch.tensor([[0.5, -0.2]]), torch.tensor([0.3]), torch.tensor([1.0]))
ELSEWHERE = GaussianMixture(torch.tensor([[0.9, -0.2]]), torch.tensor([0.4]), torch.tensor([1.0]))
COUNT = 400


def making(truth: GaussianMixture) -> Denoiser:
    """A student that makes exactly `truth`, one Gaussian, from any level: x_t - t v is the flow's end."""

    def student(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        level, mean, std = cond.per_token(t)[:, None], truth.means[0], truth.stds[0]
        end = mean + std * (x_t - (1 - level) * mean) / ((1 - level).square() * std.square() + level.square()).sqrt()
        return (x_t - end) / level

    return student


def matching(teacher: Denoiser, critic: Denoiser, judge: Discriminator | None = None, **options: object) -> DistributionMatching:
    heads = {"heads": {"blocks": [0], "weight": 0.5, "critic_weight": 0.25}} if judge else {}
    config = method(name="distribution_matching", critic={"optimizer": {"lr": 1.0}, **heads}, **options)
    built = build_distillation(config, teacher, None, critic, judge)
    assert isinstance(built, DistributionMatching)
    return built


def batch_of(count: int = COUNT, first_key: int = 0) -> PackedLatents:
    return pack_of_points(DATA.draw(count, 1), first_key)


def test_the_critic_goes_first_and_every_network_counts_its_own_steps() -> None:
    assert [turn_of(step, 2) for step in range(7)] == [
        ("critic", 0),
        ("critic", 1),
        ("student", 0),
        ("critic", 2),
        ("critic", 3),
        ("student", 1),
        ("critic", 4),
    ]


@pytest.mark.parametrize("number", [0, 3])
def test_the_exact_score_of_what_the_student_makes_is_where_the_critic_ends(number: int) -> None:
    """The derivative of the critic's loss along any direction is zero within 3 standard errors there, and is not elsewhere."""

    def slope(student: Denoiser) -> tuple[float, float]:
        part = torch.zeros(4000, 1, requires_grad=True)
        critic: Denoiser = lambda x_t, t, cond: DATA(x_t, t, cond) + part * x_t  # noqa: E731
        losses = matching(DATA, critic).critic_losses(number, student, batch_of(4000), 0.0)
        (gradient,) = torch.autograd.grad(losses.per_sample.sum(), part)
        return float(gradient.mean()), float(gradient.std() / 4000**0.5)

    mean, error = slope(making(DATA))
    assert abs(mean) < 3 * error
    mean, error = slope(making(ELSEWHERE))
    assert abs(mean) > 6 * error


@pytest.mark.parametrize("number", [0, 1])
def test_the_students_gradient_is_the_difference_of_two_scores(number: int) -> None:
    """(f_critic - f_teacher) / mean|x - f_teacher|, where f = (x_t + t^2 score) / (1 - t) (Tweedie's formula)."""
    push = torch.zeros(COUNT, 2, requires_grad=True)

    def student(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return making(ELSEWHERE)(x_t, t, cond) - push / cond.per_token(t)[:, None]

    seen: list[tuple[Tensor, Tensor]] = []

    def critic(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append((x_t, t))
        return ELSEWHERE(x_t, t, cond)

    built, batch = matching(DATA, critic), batch_of()
    losses = built.student_losses(number, student, batch, 0.0)
    (gradient,) = torch.autograd.grad(losses.per_sample.sum(), push)
    (x_t, t), made = seen[0], built.make(making(ELSEWHERE), batch, number)
    level = t[:, None]
    real, fake = ((x_t + level.square() * truth.score(x_t, t)) / (1 - level) for truth in (DATA, ELSEWHERE))
    expected = (fake - real) / (made - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(gradient, expected / 2, rtol=1e-3, atol=1e-4)  # the loss is the mean over two channels
    torch.testing.assert_close(losses.per_sample, expected.square().mean(1) / 2, rtol=1e-3, atol=1e-4)
    assert float(gradient[:, 0].mean()) > 0.1  # down this gradient lies the data
    assert 0.02 < float(t.min()) < 0.1 < 0.9 < float(t.max()) < 0.98


@pytest.mark.parametrize("number", [0, 1, 5])
def test_the_critic_is_told_the_last_step_of_what_it_sees(number: int) -> None:
    """Samples of one step and of two are different distributions: each is held against its own score."""
    told: list[Tensor | None] = []

    def critic(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        told.append(cond.jump)
        return DATA(x_t, t, cond)

    shift, batch = TokenShift(base_tokens=4), batch_of(8)
    config = method(name="distribution_matching", critic={"optimizer": {"lr": 1.0}}, student_steps=2)
    built = build_distillation(config, DATA, shift, critic)
    assert isinstance(built, DistributionMatching)
    built.critic_losses(number, making(DATA), batch, 0.0)
    built.student_losses(number, making(DATA), batch, 0.0)
    u = torch.full((8,), (1.0, 0.5)[number % 2], dtype=torch.float64)
    expected = times.shift(u, times.shifts((1,) * 8, shift))
    for jump in told:
        assert jump is not None
        torch.testing.assert_close(jump.double(), expected)


def test_there_is_no_gradient_where_the_student_makes_the_data() -> None:
    losses = matching(DATA, DATA).student_losses(0, making(DATA), batch_of(), 0.0)
    assert float(losses.figures["matching_gradient"].max()) == 0


def test_a_sample_of_no_number_is_masked_and_counted() -> None:
    def broken(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return ELSEWHERE(x_t, t, cond).index_fill(0, torch.tensor([3]), torch.nan)

    push = torch.zeros(COUNT, 2, requires_grad=True)
    gradients = []
    for critic in (ELSEWHERE, broken):
        losses = matching(DATA, critic).student_losses(0, lambda *args: making(DATA)(*args) - push, batch_of(), 0.0)
        gradients.append(torch.autograd.grad(losses.per_sample.sum(), push)[0])
    expected, found = gradients
    assert float(losses.figures["not_finite"].sum()) == float(losses.figures["not_finite"][3]) == 1
    assert float(losses.per_sample[3].detach()) == float(found[3].abs().sum()) == 0
    others = torch.arange(COUNT) != 3
    assert torch.equal(found[others], expected[others])


def test_samples_are_made_at_the_levels_of_the_sampler_and_the_last_step_alone_learns() -> None:
    calls: list[tuple[float, bool]] = []

    def student(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        calls.append((float(t[0]), torch.is_grad_enabled()))
        return making(DATA)(x_t, t, cond)

    config = method(name="distribution_matching", critic={"optimizer": {"lr": 1.0}, "steps": 1}, student_steps=3)
    built = build_distillation(config, DATA, TokenShift(base_tokens=4), DATA)  # k = 1/2 for one token
    assert isinstance(built, DistributionMatching)
    levels = schedule(3, 0.5).float().tolist()
    for step, count in ((1, 1), (3, 2), (5, 3), (7, 1)):  # the student's turns
        calls.clear()
        built.at(step)(student, batch_of(5), 0.0)
        assert calls == [(pytest.approx(level), i == count - 1) for i, level in enumerate(levels[:count])]
    calls.clear()
    built.at(4)(student, batch_of(5), 0.0)  # the critic's third
    assert [learns for _, learns in calls] == [False] * 3


def linear(x_t: Tensor, t: Tensor, batch: PackedLatents) -> Tensor:
    """Two heads that like x to the right."""
    return torch.stack([x_t[:, 0], 3 * x_t[:, 0]], dim=1)


def constant(value: float) -> Discriminator:
    return lambda x_t, t, batch: torch.full((len(x_t), 2), value)


def test_heads_of_a_critic_tell_samples_from_data() -> None:
    for judge, student_loss, critic_loss in (
        (constant(0.0), 0.6931, 1.3863),
        (constant(2.0), 0.1269, 2.2539),
        (constant(-2.0), 2.1269, 2.2539),
    ):
        plain, judged = matching(DATA, DATA), matching(DATA, DATA, judge)
        for name, weight, expected in (("student_losses", 0.5, student_loss), ("critic_losses", 0.25, critic_loss)):
            without, with_heads = (getattr(m, name)(0, making(DATA), batch_of(), 0.0).per_sample for m in (plain, judged))
            torch.testing.assert_close(with_heads - without, torch.full((COUNT,), weight * expected), atol=1e-4, rtol=0)


def adversarial(judge: Discriminator, **critic: object) -> Adversarial:
    settings = {"optimizer": {"lr": 1.0}, "blocks": [0], "mismatched": False, "smoothness": 0.0, **critic}
    built = build_distillation(method(name="adversarial", critic=settings), DATA, None, None, judge)
    assert isinstance(built, Adversarial)
    return built


@pytest.mark.parametrize(("said", "expected"), [(0.0, 2.0), (0.5, 2.0), (3.0, 4.0), (-3.0, 4.0)])
def test_hinge_losses(said: float, expected: float) -> None:
    built, batch = adversarial(constant(said)), batch_of()
    torch.testing.assert_close(built.critic_losses(making(DATA), batch, 0.0).per_sample, torch.full((COUNT,), expected))
    losses = built.student_losses(making(DATA), batch, 0.0)
    torch.testing.assert_close(losses.per_sample, torch.full((COUNT,), -said))
    assert set(losses.t.tolist()) == {1.0, 0.75, 0.5, 0.25}  # the levels of a sampler of four steps


def test_the_student_moves_where_the_heads_want_it() -> None:
    push = torch.zeros(COUNT, 2, requires_grad=True)
    losses = adversarial(linear).student_losses(lambda *args: making(DATA)(*args) - push, batch_of(), 0.0)
    (gradient,) = torch.autograd.grad(losses.per_sample.sum(), push)
    assert float(gradient[:, 0].max()) < 0
    assert float(gradient[:, 1].abs().max()) == 0


def test_smoothness_is_the_square_of_the_gradient_of_the_heads() -> None:
    plain, smooth = (adversarial(linear, smoothness=weight) for weight in (0.0, 2.0))
    batch = batch_of(4000)
    added = smooth.critic_losses(making(DATA), batch, 0.0).per_sample - plain.critic_losses(making(DATA), batch, 0.0).per_sample
    assert float(added.mean()) == pytest.approx(2.0 * (1 + 9) / 2, abs=4 * float(added.std()) / 4000**0.5)


def captions(texts: Sequence[float], labels: Sequence[int] | None = None) -> Conditioning:
    parts = [torch.full((1 + i % 2, 4), text) for i, text in enumerate(texts)]
    return pack_conditioning([(1, 1, 1)] * len(texts), parts, None if labels is None else torch.tensor(labels))


def test_data_under_another_caption_are_to_be_told_apart() -> None:
    wrong, others = under_other_captions(captions([1.0, 2.0, 3.0]))
    assert [float(part.mean()) for part in wrong.text.split(wrong.text_lengths)] == [3.0, 1.0, 2.0]
    assert others.tolist() == [1, 1, 1]
    assert under_other_captions(captions([1.0, 1.0]))[1].tolist() == [1, 1]  # of different lengths
    assert under_other_captions(captions([1.0]))[1].tolist() == [0]
    assert under_other_captions(captions([1.0], [4]))[1].tolist() == [0]

    def reads(x_t: Tensor, t: Tensor, batch: PackedLatents) -> Tensor:
        cond = batch.cond
        return cond.per_token(torch.stack([part.mean() for part in cond.text.split(cond.text_lengths)]))[:, None]

    latents, cond = DATA.draw(3, 1), captions([0.1, 0.2, 0.4])
    batch = PackedLatents(latents, cond, (1, 2, 3), ("a", "b", "c"), torch.ones(3))
    plain, told = (adversarial(reads, mismatched=flag).critic_losses(making(DATA), batch, 0.0).per_sample for flag in (False, True))
    torch.testing.assert_close(told - plain, 1 + torch.tensor([0.4, 0.1, 0.2]))


def test_a_sample_behind_a_hole_has_no_other_caption() -> None:
    def reads(x_t: Tensor, t: Tensor, batch: PackedLatents) -> Tensor:
        cond = batch.cond
        return cond.per_token(torch.stack([part.mean() for part in cond.text.split(cond.text_lengths)]))[:, None]

    batch = PackedLatents(DATA.draw(3, 1), captions([0.1, 0.2, 0.4]), (1, 2, 3), ("a", "b", "c"), torch.tensor([1.0, 0, 1]))
    plain, told = (adversarial(reads, mismatched=flag).critic_losses(making(DATA), batch, 0.0).per_sample for flag in (False, True))
    torch.testing.assert_close(told - plain, torch.tensor([1.4, 0, 0]))


IN_PIXELS = {"features": {"name": "random_conv"}, "blocks": [0, 1]}


def test_samples_in_pixels_are_led_by_heads_and_by_the_teacher() -> None:
    """The gradient of ADD in the samples, by its equations in float64: -mean_k D_k + (2.5 / 2 heads) (1 - t) |x - f_teacher(x_t)|^2."""
    config = method(name="adversarial", critic={"optimizer": {"lr": 1.0}, **IN_PIXELS}, distillation_weight=2.5)
    cond = pack_conditioning([(1, 3, 1), (2, 2, 2), (1, 1, 1)], [torch.randn(1 + i % 2, 4) for i in range(3)])
    batch = PackedLatents(DATA.draw(12, 1).float(), cond, (4, 5, 6), ("a", "b", "c"), torch.tensor([1.0, 1, 0]))
    looks, push = random_looks(), torch.zeros(12, 2, requires_grad=True)
    torch.manual_seed(0)
    module = with_critic(config, Student(2, 8, 1), Student(2, 8, 1), 8, looks)
    judge = discriminator_of(config, module, module, looks)
    made: list[Tensor] = []

    def student(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        velocity, level = 1.5 * DATA(x_t, t, cond), cond.per_token(t)[:, None]
        made.append((x_t - level * velocity).double())
        return velocity - push / level

    built = build_distillation(config, DATA, None, None, judge)
    losses = objective_at(built, 1)(student, batch, 0.0)
    (found,) = torch.autograd.grad(losses.per_sample.sum(), push, retain_graph=True)

    heads, x = copy.deepcopy(module.get_submodule("critic")).double(), made[0].requires_grad_()
    texts = torch.stack([part.mean(0) for part in cond.text.double().split(cond.text_lengths)])
    t = times.uniforms(batch.keys, None, "distilled time")
    level = cond.per_token(t)[:, None]
    x_t = (1 - level) * x.detach() + level * noise_tokens(batch.keys, cond.lengths, 2, "distilled noise")
    error = (x - (x_t - level * DATA(x_t, t, cond))).square()
    losses64 = []
    for i, rows in enumerate(torch.arange(12).split(cond.lengths)):
        said = []
        for k, places in enumerate(looks.layers(x[rows], (1, 1, 1), 0)):
            h = heads.bodies[k](places).mean(0)
            c = heads.caption(texts[i])[64 * k : 64 * (k + 1)]
            said.append(heads.plain[k].weight[0] @ h + heads.plain[k].bias[0] + c @ h / 8)
        losses64.append(-(said[0] + said[1]) / 2 + 2.5 / 2 * (1 - t[i]) * error[rows].mean())
    (expected,) = torch.autograd.grad(losses64[0] + losses64[1], x)  # the third is a hole
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.per_sample[:2].double(), torch.stack(losses64[:2]), rtol=1e-5, atol=1e-6)
    assert float(found[-1].abs().max()) == float(losses.per_sample.detach()[2]) == 0


def test_each_turn_in_pixels_has_gradients_for_its_network_alone() -> None:
    config = method(name="adversarial", critic={"optimizer": {"lr": 1.0}, **IN_PIXELS}, distillation_weight=2.5)
    looks = random_looks()
    module = with_critic(config, Student(2, 8, 1), Student(2, 8, 1), 8, looks)
    built = build_distillation(config, DATA, None, None, discriminator_of(config, module, module, looks))
    for step, turn in ((0, "critic"), (1, "student")):
        for name in ("student", "critic"):
            module.get_submodule(name).requires_grad_(name == turn)  # as the engine does
        module.zero_grad()
        objective_at(built, step)(student_of(module), batch_of(5), 0.0).per_sample.sum().backward()
        moved = {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert moved == {turn}


def test_heads_in_pixels_are_told_caption_and_class_and_see_no_other_sample() -> None:
    looks = random_looks()._replace(classes=3)
    config = method(name="adversarial", critic={"optimizer": {"lr": 1.0}, **IN_PIXELS})
    module = with_critic(config, Student(2, 8, 1), Student(2, 8, 1), 8, looks)
    judge = discriminator_of(config, module, module, looks)
    assert judge is not None

    def said(texts: Sequence[float], labels: Sequence[int], latents: Tensor) -> Tensor:
        spread = [torch.tensor([text, -text, 0.0, 1.0])[None] for text in texts]
        cond = pack_conditioning([(1, 2, 1)] * len(texts), spread, torch.tensor(labels))
        batch = PackedLatents(latents, cond, (1, 2)[: len(texts)], ("a", "b")[: len(texts)], torch.ones(len(texts)))
        return judge(latents, torch.zeros(len(texts)), batch).detach()

    latents = DATA.draw(4, 1).float()
    plain, told, classed = (said((0.3, text), (0, label), latents) for text, label in ((0.5, 1), (-2.0, 1), (0.5, 2)))
    for other in (told, classed):
        assert torch.equal(other[:2], plain[:2])
        assert float((other - plain)[2:].abs().min()) > 1e-4
    torch.testing.assert_close(said((0.3,), (0,), latents[:2]), plain[:2])


def test_heads_of_a_model_with_classes_take_a_pack_of_holes() -> None:
    looks = random_looks()._replace(classes=3)
    config = method(name="adversarial", critic={"optimizer": {"lr": 1.0}, **IN_PIXELS})
    module = with_critic(config, Student(2, 8, 1), Student(2, 8, 1), 8, looks)
    built = build_distillation(config, DATA, None, None, discriminator_of(config, module, module, looks))
    holes = pack_conditioning([(1, 1, 1)] * 2, [torch.zeros(1, 4)] * 2)  # nobody could say of which class they are
    batch = PackedLatents(torch.zeros(2, 2), holes, (1, 2), ("", ""), torch.zeros(2))
    for step in (0, 1):
        losses = objective_at(built, step)(student_of(module), batch, 0.0).per_sample
        losses.sum().backward()
        assert losses.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "critic", "options"),
    [
        ("distribution_matching", {}, {}),
        ("score_regularised", {}, {"derivative": "difference"}),  # the closed form has no rules of dual numbers
        ("moment_matching", {}, {}),
        ("adversarial", IN_PIXELS, {"distillation_weight": 2.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_round_of_turns_costs_what_is_said(name: str, critic: dict[str, object], options: dict[str, object]) -> None:
    config = method(name=name, critic={"optimizer": {"lr": 1.0}, "steps": 2, **critic}, student_steps=3, guidance={"s": 3.0}, **options)
    calls = {"trained": 0, "plain": 0, "teacher": 0}

    def counting(own: str) -> Denoiser:
        def network(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            calls["trained" if own != "teacher" and torch.is_grad_enabled() else "plain" if own != "teacher" else own] += 1
            return DATA(x_t, t, cond)

        return network

    built = build_distillation(config, counting("teacher"), None, counting("critic"), constant(0.0) if critic else None)
    for step in range(9):  # three rounds, so that every number of steps is made as often
        objective_at(built, step)(counting("student"), batch_of(3), 0.0)
    said = step_calls(config)
    assert [9 * said.trained, 9 * said.plain, 9 * said.teacher / 2] == pytest.approx([calls["trained"], calls["plain"], calls["teacher"]])
