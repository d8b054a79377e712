"""Figures of clips against naive loops in float64, and controls that must come out worse."""

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines import moving_shapes as ms
from dit.evaluation.pixels import feature_distance, frame_similarity, psnr, ssim, warping_error


@pytest.fixture(scope="module")
def videos() -> Tensor:
    return torch.from_numpy(np.stack([ms.draw(5, index).video for index in range(12)]))


def noisy(videos: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    return (videos + 255 * sigma * noise).round().clamp(0, 255).to(torch.uint8)


def test_psnr_is_its_formula(videos: Tensor) -> None:
    other = noisy(videos, 0.1)
    difference = (videos.numpy().astype(float) - other.numpy().astype(float)) / 255
    expected = [10 * np.log10(1 / np.mean(one**2)) for one in difference]
    np.testing.assert_allclose(psnr(videos, other).numpy(), expected, rtol=1e-5)
    assert psnr(videos, videos).tolist() == [100.0] * 12


def naive_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """One channel (H, W) in [0, 1]: the definition, window by window."""
    weight = np.array([[np.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    weight /= weight.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (weight * a).sum(), (weight * b).sum()
            va, vb, vab = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum(), (weight * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return float(np.mean(values))


def test_ssim_is_its_definition(videos: Tensor) -> None:
    x, y = videos[:1, :2, :20, :17], noisy(videos, 0.2)[:1, :2, :20, :17]
    a, b = x[0].numpy() / 255.0, y[0].numpy() / 255.0
    expected = np.mean([naive_ssim(a[t, :, :, c], b[t, :, :, c]) for t in range(2) for c in range(3)])
    assert float(ssim(x, y)) == pytest.approx(expected, rel=1e-6)
    assert ssim(videos, videos).tolist() == pytest.approx([1.0] * 12)


def test_likeness_falls_with_noise(videos: Tensor) -> None:
    for likeness in (psnr, ssim):
        values = torch.stack([likeness(videos, noisy(videos, sigma)) for sigma in (0.02, 0.05, 0.1, 0.3)])
        assert (values.diff(dim=0) < 0).all()


def test_a_shift_within_the_radius_warps_without_error() -> None:
    picture = torch.randint(0, 256, (1, 40, 40, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    moved = torch.stack([picture[:, 4 + k : 36 + k, 4 + 2 * k : 36 + 2 * k] for k in range(2)], dim=1)  # (1, 2, 32, 32, 3): moves (1, 2)
    inner = moved[:, :, 4:28, 4:28]  # where content comes from inside
    frames = torch.stack([moved[:, 0, 1:25, 2:26], moved[:, 1, :24, :24]], dim=1)  # the same content: no motion left
    assert warping_error(frames, 8, 2).item() == 0
    assert warping_error(inner, 24, 1).item() > 0.2  # two pixels are out of reach
    # every square of frame 1 but those that come from beyond the edge is found in frame 0
    whole = warping_error(moved, 8, 2)
    assert whole.item() < warping_error(moved, 8, 1).item()


def test_warping_error_by_hand() -> None:
    before, after = torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8), torch.full((1, 1, 8, 8, 3), 51, dtype=torch.uint8)
    assert warping_error(torch.cat([before, after], 1), 4, 2).item() == pytest.approx(0.2)


def test_warping_error_grows_with_noise_and_with_shuffled_frames(videos: Tensor) -> None:
    values = torch.stack([warping_error(noisy(videos, sigma), 8, 2) for sigma in (0.0, 0.05, 0.1, 0.2)])
    assert (values.diff(dim=0) > 0).all()
    assert warping_error(videos[:, [0, 8, 1, 7, 2, 6, 3, 5, 4]], 8, 2).mean() > 1.5 * warping_error(videos, 8, 2).mean()
    assert warping_error(videos[:, :1].expand(-1, 4, -1, -1, -1), 8, 2).tolist() == [0.0] * 12


def test_frame_similarity_is_the_mean_cosine_of_neighbours() -> None:
    features = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 5.0]], [[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]]])
    assert frame_similarity(features).tolist() == pytest.approx([0.5, -1.0])


def test_feature_distance_by_hand() -> None:
    a = [torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[1.0, 0.0, 0.0]]])]
    b = [torch.tensor([[[6.0, 8.0], [0.0, 7.0]]]), torch.tensor([[[0.0, 0.0, 2.0]]])]
    assert feature_distance(a, b).tolist() == pytest.approx([(0 + 2) / 2 + 2])
    assert feature_distance(a, a).tolist() == [0.0]
