import pytest
import torch
from torch import Tensor

from data_pipelines.packed import Conditioning, pack_conditioning
from dit.config.objective import Guidance
from dit.diffusion import ClassifierFreeGuidance

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
