import pytest
import torch
from torch import Tensor

from data_pipelines.packed import pack_conditioning
from dit.config.objective import SamplingConfig
from dit.config.path import EDMPath, PathConfig, RectifiedFlowPath, TrigFlowPath, VEPath, VPPath
from dit.diffusion import (
    RECTIFIED_FLOW,
    ClassifierFreeGuidance,
    Denoiser,
    Known,
    Path,
    Told,
    build_path,
    complete,
    follow,
    invert,
    levels,
    vary,
)
from dit.diffusion.editing import _noise_again
from dit.diffusion.ground_truth import ProductMixture, TokenMixture

PAIRS, VALUE = 2000, 0.9
COND = pack_conditioning([(2 * PAIRS, 1, 1)], [torch.zeros(1, 4)])  # one sample of all pairs: their noise is drawn at once
KNOWN = Known(torch.tensor([VALUE, 0.0], dtype=torch.float64).repeat(PAIRS)[:, None], torch.tensor([True, False]).repeat(PAIRS))
"""The first token of each pair."""


def overlapping() -> TokenMixture:
    """Two tokens whose conditional has one broad mode."""
    means = torch.tensor([[0.7, 0.7], [-0.7, -0.7]], dtype=torch.float64)
    return TokenMixture(means, torch.full((2,), 0.7, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64))


def distance(drawn: Tensor, truth: TokenMixture) -> float:
    """Wasserstein-2 between the second tokens drawn and p(second | first = VALUE), by their quantiles."""
    second = drawn.double().view(-1, 2)[:, 1]
    return float((second.sort().values - truth.given(torch.tensor([VALUE])).quantiles(len(second))).square().mean().sqrt())


def floor(truth: TokenMixture) -> float:
    """The mean distance of as many real samples of the conditional."""
    given, rng = truth.given(torch.tensor([VALUE])), torch.Generator().manual_seed(0)
    found = []
    for _ in range(8):
        which = torch.multinomial(given.weights, PAIRS, replacement=True, generator=rng)
        real = given.means[which, 0] + given.stds[which] * torch.randn(PAIRS, generator=rng, dtype=torch.float64)
        found.append(distance(torch.stack([torch.full_like(real, VALUE), real], dim=1).view(-1, 1), truth))
    return sum(found) / len(found)


def completed(
    denoiser: Denoiser, sampling: SamplingConfig, path: Path, repeats: int = 1, jump: int = 1, shift: float = 1.0, key: int = 5
) -> Tensor:
    return complete(denoiser, KNOWN, COND, [key], levels(sampling, shift, path), sampling, path, repeats, jump)


PATHS: list[tuple[PathConfig, dict[str, object]]] = [
    (RectifiedFlowPath(), {"sampler": "heun", "steps": 20}),
    (RectifiedFlowPath(), {"sampler": "ancestral", "steps": 60}),
    (TrigFlowPath(name="trigflow"), {"sampler": "unipc", "steps": 20}),
    (VPPath(name="vp"), {"sampler": "dpmpp_2m", "steps": 30}),
    (VPPath(name="vp"), {"sampler": "ddim", "steps": 120, "eta": 1.0}),
    (VEPath(name="ve"), {"sampler": "dpmpp_2m", "steps": 30, "schedule": {"name": "karras", "sigma_max": 49.0}}),
    (EDMPath(name="edm"), {"sampler": "heun", "steps": 20, "schedule": {"name": "karras"}}),
]


@pytest.mark.parametrize(("config", "sampling"), PATHS, ids=lambda value: value["sampler"] if isinstance(value, dict) else value.name)
def test_told_clean_tokens_the_exact_denoiser_draws_the_conditional(config: PathConfig, sampling: dict[str, object]) -> None:
    path = build_path(config)
    truth = TokenMixture.standard(path)

    def network(x: Tensor, label: Tensor, cond: object) -> Tensor:  # sees what a network sees: scaled tokens and labels
        assert len(label) == 2
        assert label.isfinite().all()
        t = torch.stack([LEVEL[0], torch.zeros((), dtype=torch.float64)])
        scale = path.input_scale(t)
        return truth(x if scale is None else x / cond.per_token(scale)[:, None], t, cond)  # type: ignore[attr-defined]

    LEVEL: list[Tensor] = []
    told = Told(network, path, KNOWN.latents, KNOWN.mask)

    def denoiser(x: Tensor, t: Tensor, cond: object) -> Tensor:
        LEVEL[:] = [t[0]]
        scale = path.input_scale(t)
        return told(x if scale is None else scale * x, path.label(t), cond)  # type: ignore[arg-type]

    drawn = completed(denoiser, SamplingConfig.model_validate(sampling), path)
    assert distance(drawn, truth) < 2 * floor(truth)
    assert torch.equal(drawn[KNOWN.mask], KNOWN.latents[KNOWN.mask])


def test_replacement_is_biased_and_resampling_lessens_it() -> None:
    sampling, truth = SamplingConfig(sampler="ancestral", steps=40), TokenMixture.standard()
    once, often = (distance(completed(truth, sampling, RECTIFIED_FLOW, repeats, 4, 0.3), truth) for repeats in (1, 12))
    assert once > 7 * floor(truth)  # the negative control
    assert often < once / 2


@pytest.mark.slow
def test_replacement_resampled_often_in_small_steps_reaches_a_conditional_of_three_modes() -> None:
    """What it costs to let samples cross from mode to mode while the known token is still told noisily: 3,840 calls."""
    sampling, truth = SamplingConfig(sampler="ancestral", steps=160), TokenMixture.standard()
    found = [distance(completed(truth, sampling, RECTIFIED_FLOW, 24, 12, 0.3, key), truth) for key in (5, 6)]
    assert sum(found) / 2 < 2 * floor(truth)


def test_replacement_with_resampling_reaches_a_conditional_of_one_mode() -> None:
    sampling, truth = SamplingConfig(sampler="ancestral", steps=30), overlapping()
    once, often = (distance(completed(truth, sampling, RECTIFIED_FLOW, repeats, 5, 0.3), truth) for repeats in (1, 12))
    assert often < 2 * floor(truth) < once


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("sampler", ["euler", "heun", "rk4", "ddim", "ancestral", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler_maruyama"])
def test_known_latents_come_back_bit_for_bit_from_every_sampler(sampler: str, repeats: int) -> None:
    known = Known(torch.randn(8, 1, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 2 == 0)
    cond, sampling = pack_conditioning([(2, 1, 1)] * 4, [torch.zeros(1, 4)] * 4), SamplingConfig.model_validate({"sampler": sampler})
    states: list[Tensor] = []

    def seen(x: Tensor, t: Tensor, cond: object) -> Tensor:
        states.append(x - (1 - t.float()).repeat_interleave(2)[:, None] * known.latents)  # the noise of the known tokens
        return TokenMixture.standard()(x, t, cond)  # type: ignore[arg-type]

    drawn = complete(seen, known, cond, range(4), levels(sampling, 1.0), sampling, RECTIFIED_FLOW, repeats)
    assert torch.equal(drawn[known.mask], known.latents[known.mask])
    assert drawn.isfinite().all()
    late = states[-1][known.mask].abs().max()
    assert late < 0.2  # near the data the network sees them nearly clean
    one, cond = Known(known.latents[2:4], known.mask[2:4]), pack_conditioning([(2, 1, 1)], [torch.zeros(1, 4)])
    alone = complete(TokenMixture.standard(), one, cond, [1], levels(sampling, 1.0), sampling, RECTIFIED_FLOW, repeats)
    assert torch.allclose(alone, drawn[2:4], atol=1e-5)


def test_guidance_of_a_told_network_guides_only_what_is_unknown() -> None:
    cond = pack_conditioning([(2, 1, 1), (2, 1, 1)], [torch.ones(1, 4), torch.ones(1, 4)])
    known = Known(torch.tensor([[0.5], [0.0], [0.0], [-0.3]]), torch.tensor([True, False, False, True]))
    calls: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor, cond: object) -> Tensor:
        calls.append((x, cond.per_token(t)))  # type: ignore[attr-defined]
        return cond.text.mean(1)[cond.sample_of_token][:, None].expand_as(x)  # type: ignore[attr-defined]

    guided = ClassifierFreeGuidance(Told(network, RECTIFIED_FLOW, known.latents, known.mask), torch.zeros(1, 4), 3.0, None)
    velocity = guided(torch.full((4, 1), 7.0), torch.tensor([0.5, 0.25]), cond)
    ((x, t),) = calls
    assert x[:, 0].tolist() == pytest.approx([0.5, 7, 7, -0.3] * 2)
    assert t.tolist() == [0, 0.5, 0.25, 0] * 2
    assert velocity[:, 0].tolist() == [3.0] * 4


@pytest.mark.parametrize(("solver", "order"), [("euler", 1.0), ("heun", 2.0), ("rk4", 2.0)])
def test_inversion_returns_the_noise_within_the_solvers_order(solver: str, order: float) -> None:
    truth, noise = (
        ProductMixture.standard(dimensions=2),
        torch.randn(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )
    cond = pack_conditioning([(1, 300, 1)], [torch.zeros(1, 4)])
    latents = truth.flow_map(noise, 1.0, 0.0)
    errors = []
    for steps in (40, 80, 160):
        times = levels(SamplingConfig(steps=steps), 1.0)
        errors.append(float((invert(truth, latents, cond, times, solver, RECTIFIED_FLOW) - noise).square().mean().sqrt()))  # type: ignore[arg-type]
    slopes = torch.tensor(errors).log2().diff().neg()
    assert slopes.tolist() == pytest.approx([order] * 2, abs=0.3)
    assert errors[-1] < 0.05


@pytest.mark.parametrize(
    "config", [RectifiedFlowPath(), VPPath(name="vp"), EDMPath(name="edm", sigma_max=20.0)], ids=lambda path: path.name
)
def test_inverted_and_sampled_again_latents_are_as_they_were(config: PathConfig) -> None:
    path = build_path(config)
    truth, cond = ProductMixture.standard(path, 2), pack_conditioning([(1, 300, 1)], [torch.zeros(1, 4)])
    latents = truth.draw(300, 3)
    values = {"sampler": "heun", "steps": 100, "schedule": {"name": "karras", "sigma_max": 20.0}}
    sampling = SamplingConfig.model_validate(values if path is not RECTIFIED_FLOW else {"sampler": "heun", "steps": 100})
    times = levels(sampling, 1.0, path)
    noise = invert(truth, latents, cond, times, "heun", path)
    again = follow(truth, noise, times, cond, [0], sampling, path)
    assert (again - latents).square().mean().sqrt() < 0.03
    spread = float(noise.std() / path.at(times[0]).b)
    assert spread == pytest.approx(1.0, abs=0.1)


def test_the_weaker_sdedit_is_the_nearer_its_result_is_to_what_was_given() -> None:
    cond, sampling = pack_conditioning([(1, 500, 1)], [torch.zeros(1, 4)]), SamplingConfig(sampler="heun", steps=40)
    for path in (RECTIFIED_FLOW, build_path(VPPath(name="vp"))):
        truth = ProductMixture.standard(path, 2)
        given, times = truth.draw(500, 1), levels(sampling, 1.0, path)
        moved = [
            float((vary(truth, given, cond, [0], times, sampling, path, strength) - given).square().mean().sqrt())
            for strength in (0.001, 0.3, 0.7, 1.0)
        ]
        assert moved == sorted(moved)
        assert moved[0] < 0.01  # 46 dB of data of unit variance
        assert moved[-1] == pytest.approx(2**0.5, abs=0.15)  # nothing is left of it: two independent draws
        assert truth.distance(vary(truth, given, cond, [0], times, sampling, path, 0.5)) < 0.15


@pytest.mark.parametrize("config", [RectifiedFlowPath(), TrigFlowPath(name="trigflow"), VPPath(name="vp")])
def test_noise_taken_up_again_has_the_spread_of_its_level(config: PathConfig) -> None:
    path, cond = build_path(config), pack_conditioning([(20_000, 1, 1)], [torch.zeros(1, 4)])
    t, s = torch.tensor([0.6], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    latents = torch.full((20_000, 1), 2.0, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    x_t = path.interpolate(latents, torch.randn(latents.shape, generator=rng, dtype=torch.float64), t, cond)
    x_s, c = _noise_again(x_t, t, s, cond, path, [3]), path.at(s)
    assert float(x_s.mean()) == pytest.approx(2.0 * float(c.a), abs=0.03)  # 4 standard errors
    assert float(x_s.std()) == pytest.approx(float(c.b), rel=0.02)
    again = torch.corrcoef(torch.stack([x_t[:, 0], x_s[:, 0]]))[0, 1]  # what is left of the noise that was there
    kept = c.a / path.at(t).a
    assert float(again) == pytest.approx(float(kept * path.at(t).b / c.b), abs=0.03)
