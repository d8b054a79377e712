"""Small students of analytic teachers, trained by the objectives of the project in seconds."""

import copy
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from data_pipelines.packed import Conditioning, Grid, PackedLatents, pack_conditioning
from dit.config.distillation import Method, MethodConfig
from dit.diffusion import Denoiser, sample
from dit.diffusion.draws import noise_tokens
from dit.diffusion.ground_truth import GaussianMixture, ProductMixture, points
from dit.distillation import (
    Looks,
    build_distillation,
    build_student_sampling,
    discriminator_of,
    objective_at,
    student_of,
    turn_of,
    with_critic,
)

Truth = GaussianMixture | ProductMixture
Weights = dict[str, Tensor]
TOKENS = 8
"""Of a sample: independent draws, all at one level."""


def method(**options: object) -> Any:
    return TypeAdapter(MethodConfig).validate_python({"guidance": {"s": 1.0}, **options})


class Student(nn.Module):
    """Blocks of an MLP, modulated by t and by the jump, which has no effect at first."""

    def __init__(self, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.time, self.jump = (nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(2))
        nn.init.zeros_(self.jump[2].weight)
        nn.init.zeros_(self.jump[2].bias)
        self.first, self.last = nn.Linear(channels, width), nn.Linear(width, channels)
        self.modulations = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(blocks))

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.last(self.features(x_t, t, cond, (len(self.blocks) - 1,))[0])

    def features(self, x_t: Tensor, t: Tensor, cond: Conditioning, blocks: Sequence[int]) -> list[Tensor]:
        time = self.time(features(t)) + self.jump(features(torch.zeros_like(t) if cond.jump is None else cond.jump))
        x, after = self.first(x_t), []
        for modulation, block in zip(self.modulations, self.blocks, strict=True):
            shift, scale = cond.per_token(modulation(time)).chunk(2, dim=1)
            x = x + block(nn.functional.layer_norm(x, x.shape[1:]) * (1 + scale) + shift)
            after.append(x)
        return [after[i] for i in blocks]


def features(t: Tensor) -> Tensor:
    angles = t[:, None] * torch.tensor([0.5, 1.0, 2.0, 4.0])
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@lru_cache(maxsize=2)
def pool(truth: Truth) -> Tensor:
    return truth.draw(50_000, 0).float()


def some(truth: Truth, count: int, step: int) -> Tensor:
    """Latents of a step, out of a pool: quantiles of a mixture take their time."""
    return pool(truth)[torch.randint(50_000, (count,), generator=torch.Generator().manual_seed(step))]


def pack(truth: Truth, count: int, step: int) -> PackedLatents:
    cond = pack_conditioning([(1, TOKENS, 1)] * count, [torch.zeros(1, 4)] * count)
    keys = tuple(range(count * step, count * (step + 1)))
    return PackedLatents(some(truth, count * TOKENS, step), cond, keys, ("",) * count, torch.ones(count))


def teach(truth: Truth, student: Student, steps: int, lr: float) -> Student:
    """The student as a teacher: its velocity regressed on the exact one."""
    optimizer = torch.optim.Adam(student.parameters(), lr)
    rng = torch.Generator().manual_seed(0)
    cond = points(256)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 - 2 * step / steps)
        latents = some(truth, 256, step)
        t = torch.rand(256, generator=rng)
        x_t = torch.lerp(latents, torch.randn(latents.shape, generator=rng), t[:, None])
        loss = (student(x_t, t, cond) - truth(x_t, t, cond)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def distil(config: Method, teacher: Denoiser, truth: Truth, student: Student, steps: int, lr: float, count: int) -> Student:
    """Train as the loop does: one pack of `count` samples a step."""
    objective = build_distillation(config, teacher, None)
    optimizer = torch.optim.Adam(student.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 - 2 * step / steps)
        losses = objective(student, pack(truth, count, step), step / steps)
        optimizer.zero_grad()
        losses.per_sample.mean().backward()
        optimizer.step()
    return student


def distil_in_turns(
    config: Any,
    teacher: Denoiser,
    truth: Truth,
    student: Student,
    steps: int,
    lrs: tuple[float, float],
    count: int,
    looks: Looks | None = None,
) -> Student:
    """Train student and critic as the engine does, `steps` in all. student: as the taught network, from which the critic starts too."""
    module = with_critic(config, student, student, student.first.out_features, looks)
    critic, judge = partial(module, "critic"), discriminator_of(config, module, copy.deepcopy(student).requires_grad_(False), looks)
    method = build_distillation(config, teacher, None, critic, judge)
    optimizers = {
        name: torch.optim.Adam(module.get_submodule(name).parameters(), lr, betas=(0.0, 0.99))
        for name, lr in zip(("student", "critic"), lrs, strict=True)
    }
    bases = dict(zip(("student", "critic"), lrs, strict=True))
    for step in range(steps):
        turn = turn_of(step, config.critic.steps).network
        for name in optimizers:
            module.get_submodule(name).requires_grad_(name == turn)
        optimizers[turn].param_groups[0]["lr"] = bases[turn] * min(1.0, 2 - 2 * step / steps)
        losses = objective_at(method, step)(student_of(module), pack(truth, count, step), step / steps)
        optimizers[turn].zero_grad()
        losses.per_sample.mean().backward()
        optimizers[turn].step()
    return student.requires_grad_(True)


def random_looks(width: int = 64) -> Looks:
    """Pixels are tokens seen through a random frozen network of two layers; every token is a place."""
    rng = torch.Generator().manual_seed(3)
    first, bias, second = torch.randn(2, width, generator=rng), torch.randn(width, generator=rng), torch.randn(width, width, generator=rng)

    def layers(tokens: Tensor, grid: Grid, key: int) -> list[Tensor]:
        hidden = torch.tanh(tokens @ first.to(tokens) + bias.to(tokens))
        return [hidden, torch.tanh(hidden @ second.to(tokens) / width**0.5)]

    return Looks(layers, (width, width), 4, None)


def draw(student: Denoiser, config: Method, channels: int, steps: int, count: int = 1000) -> tuple[Tensor, Tensor]:
    """Start noise and samples, (count, channels), of the student's own sampler in `steps` steps."""
    keys, cond = list(range(10**9, 10**9 + count)), points(count)
    sampling = build_student_sampling(config).model_copy(update={"steps": steps})
    return noise_tokens(keys, cond.lengths, channels, "start noise"), sample(student, cond, keys, channels, sampling, 1.0)


def root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def weights(student: Student) -> Weights:
    return {name: value.clone() for name, value in student.state_dict().items()}
