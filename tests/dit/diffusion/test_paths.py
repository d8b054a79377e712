import torch

from dit.diffusion.paths import interpolate, latents_of, noise_of, velocity_of


def test_ends_of_the_path_are_data_and_noise() -> None:
    latents, noise = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(interpolate(latents, noise, torch.zeros(5, 1)), latents)
    assert torch.equal(interpolate(latents, noise, torch.ones(5, 1)), noise)


def test_velocity_is_the_slope_of_the_path() -> None:
    latents, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    t = torch.rand(5, 1, dtype=torch.float64)
    slope = (interpolate(latents, noise, t + 1e-6) - interpolate(latents, noise, t - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, velocity_of(latents, noise), atol=1e-8, rtol=0)


def test_both_ends_follow_from_a_point_and_its_velocity() -> None:
    latents, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    t = torch.rand(5, 1, dtype=torch.float64)
    x_t, velocity = interpolate(latents, noise, t), velocity_of(latents, noise)
    torch.testing.assert_close(latents_of(x_t, velocity, t), latents, atol=1e-14, rtol=0)
    torch.testing.assert_close(noise_of(x_t, velocity, t), noise, atol=1e-14, rtol=0)
