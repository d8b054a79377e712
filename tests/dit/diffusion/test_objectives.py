from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_pipelines import randomness
from data_pipelines.packed import Conditioning, PackedLatents, pack_conditioning
from dit.config.objective import LogitNormalTimes, RectifiedFlowConfig, TokenShift
from dit.diffusion import build_objective, held_out_loss
from dit.diffusion.ground_truth import pack_of_points
from dit.diffusion.objectives import Regression

GRIDS = [(1, 2, 2), (2, 2, 3), (1, 1, 1), (1, 2, 2)]
NULL_TEXT = torch.full((2, 5), 9.0)
NULL_LABEL = 7


def pack(indices: list[int], labels: bool = True) -> PackedLatents:
    """Samples whose content depends on their index only."""
    grids = [GRIDS[i] for i in indices]
    texts = [torch.full((1 + i, 5), float(i)) for i in indices]
    tokens = [randomness.normal((t * h * w, 3), i, "latents") for i, (t, h, w) in zip(indices, grids, strict=True)]
    cond = pack_conditioning(grids, texts, torch.tensor(indices) if labels else None)
    return PackedLatents(torch.cat(tokens), cond, tuple(100 + i for i in indices), tuple(map(str, indices)), torch.ones(len(indices)))


def text_denoiser(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Depends on all that a denoiser sees, and on nothing of other samples."""
    text = torch.stack([part.mean() for part in cond.text.split(cond.text_lengths)])
    labels = torch.zeros_like(t) if cond.labels is None else cond.labels.float()
    return x_t * cond.per_token(t)[:, None] + cond.per_token(text + labels)[:, None]


def objective(dropout: float, **options: object) -> Regression:
    config = RectifiedFlowConfig.model_validate({"condition_dropout": dropout, **options})
    built = build_objective(config, NULL_TEXT, NULL_LABEL)
    assert isinstance(built, Regression)
    return built


def test_a_denoiser_that_knows_the_latents_has_no_loss() -> None:
    batch = pack([0, 1, 2])

    def oracle(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return (x_t - batch.tokens) / cond.per_token(t)[:, None]

    losses = objective(0.5)(oracle, batch, 0.0)
    assert losses.per_sample.max() < 1e-9
    flipped = objective(0.5)(lambda *args: -oracle(*args), batch, 0.0)
    assert flipped.per_sample.min() > 1


def test_loss_is_the_mean_over_tokens_and_channels_of_each_sample() -> None:
    batch = pack([1, 0])
    losses = objective(0.0)(lambda x_t, t, cond: torch.zeros_like(x_t), batch, 0.0)
    noises = [randomness.normal((12, 3), 101, "noise"), randomness.normal((4, 3), 100, "noise")]
    parts = batch.tokens.split(batch.cond.lengths)
    expected = [float((noise - latents).square().mean()) for noise, latents in zip(noises, parts, strict=True)]
    assert losses.per_sample.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.6])
def test_draws_of_a_sample_do_not_depend_on_the_pack(dropout: float) -> None:
    together = objective(dropout, shift=TokenShift(base_tokens=4))(text_denoiser, pack([3, 1, 0, 2]), 0.0)
    for place, index in enumerate([3, 1, 0, 2]):
        alone = objective(dropout, shift=TokenShift(base_tokens=4))(text_denoiser, pack([index]), 0.0)
        assert float(alone.t) == float(together.t[place])
        assert float(alone.per_sample) == pytest.approx(float(together.per_sample[place]), rel=1e-6)


def test_conditions_are_dropped_text_and_label_together() -> None:
    seen: list[Conditioning] = []

    def record(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append(cond)
        return x_t

    count = 2000
    batch = pack_of_points(torch.zeros(count, 2), 0)
    cond = batch.cond.with_text([torch.ones(3, 5)] * count, torch.ones(count, dtype=torch.long))
    objective(0.25)(record, replace(batch, cond=cond), 0.0)
    labels, lengths = seen[0].labels, torch.tensor(seen[0].text_lengths)
    assert labels is not None
    dropped = labels == NULL_LABEL
    assert abs(float(dropped.float().mean()) - 0.25) < 4 * (0.25 * 0.75 / count) ** 0.5
    assert torch.equal(lengths == 2, dropped)
    texts = seen[0].text.split(seen[0].text_lengths)
    assert all(torch.equal(text, NULL_TEXT if drop else torch.ones(3, 5)) for text, drop in zip(texts, dropped, strict=True))


def test_holes_have_no_loss_and_no_gradient() -> None:
    batch = replace(pack([0, 1]), weights=torch.tensor([1.0, 0.0]))
    scale = torch.ones(len(batch.tokens), 1, requires_grad=True)
    losses = objective(0.0)(lambda x_t, t, cond: scale * x_t, batch, 0.0)
    losses.per_sample.sum().backward()
    assert losses.per_sample[1] == 0
    assert scale.grad is not None
    assert scale.grad[:4].abs().min() > 0
    assert scale.grad[4:].abs().max() == 0


def test_loss_is_taken_in_float32() -> None:
    losses = objective(0.0)(lambda x_t, t, cond: x_t.bfloat16(), pack([0, 1]), 0.0)
    assert losses.per_sample.dtype == losses.t.dtype == torch.float32


def test_times_follow_the_config() -> None:
    early = objective(0.0, times=LogitNormalTimes(mean=-4.0, std=0.1))(text_denoiser, pack([0, 1, 2]), 0.0).t
    assert float(early.max()) < 0.05


def test_times_are_shifted_by_the_length_of_each_sample() -> None:
    plain = objective(0.0)(text_denoiser, pack([0, 1]), 0.0).t.double()  # 4 and 12 tokens
    shifted = objective(0.0, shift=TokenShift(base_tokens=3))(text_denoiser, pack([0, 1]), 0.0).t
    k = torch.tensor([(4 / 3) ** 0.5, 2.0])
    torch.testing.assert_close(shifted.double(), k * plain / (1 + (k - 1) * plain), atol=1e-6, rtol=0)


def test_held_out_loss_is_fixed_weighted_and_per_level() -> None:
    batches = [replace(pack([0, 1, 2]), weights=torch.tensor([1.0, 0.0, 1.0])), pack([3])]
    losses = held_out_loss(text_denoiser, batches, [0.25, 0.75])
    torch.testing.assert_close(losses, held_out_loss(text_denoiser, batches, [0.25, 0.75]), rtol=0, atol=0, equal_nan=True)
    assert losses.isnan().tolist() == [[False, True, False, False]] * 2
    errors = []
    for index in (0, 2, 3):
        one = pack([index])
        noise = randomness.normal(tuple(one.tokens.shape), 100 + index, "noise")
        x_t = 0.25 * one.tokens + 0.75 * noise
        errors.append(float((text_denoiser(x_t, torch.tensor([0.75]), one.cond) - (noise - one.tokens)).square().mean()))
    assert losses[1, [0, 2, 3]].tolist() == pytest.approx(errors, rel=1e-6)
    assert float(losses[0, 0]) != pytest.approx(float(losses[1, 0]), rel=1e-3)


def test_losses_of_rectified_flow_are_the_golden_ones() -> None:
    """Bit for bit those of the first release; a change here changes every run that is being trained."""
    losses = objective(0.3, shift=TokenShift(base_tokens=4))(text_denoiser, pack([3, 1, 0, 2]), 0.0)
    golden = ["0x1.097d6cp+8", "0x1.72caep+2", "0x1.020892p+8", "0x1.ceeec8p+3"]
    assert losses.per_sample.tolist() == [float.fromhex(value) for value in golden]
    assert losses.t.tolist() == [float.fromhex(value) for value in ("0x1.631e34p-1", "0x1.a40804p-2", "0x1.a44176p-1", "0x1.5e5a88p-3")]
