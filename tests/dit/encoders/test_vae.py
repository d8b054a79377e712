from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL, AutoencoderKLLTXVideo, AutoencoderKLWan
from safetensors.torch import load_file, save_file

from data_pipelines.errors import UserError
from dit.config.encoders import DiffusersVAEConfig, PixelsConfig
from dit.encoders import build_latent_codec
from dit.encoders.base import LatentCodec
from dit.encoders.vae import DiffusersVAE


def kl(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4, scaling_factor=0.4, shift_factor=0.1, **options,
    )  # fmt: skip


def wan(**options: Any) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 2.0, 1.0],
        **options,
    )


def ltx(**options: Any) -> AutoencoderKLLTXVideo:
    model = AutoencoderKLLTXVideo(
        latent_channels=6, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), scaling_factor=0.5, encoder_causal=True, **options,
    )  # fmt: skip
    model.latents_mean.copy_(torch.linspace(-1, 1, 6))
    model.latents_std.copy_(torch.linspace(0.5, 2, 6))
    return model


def dc() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()), scaling_factor=0.41,
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], Any], int, tuple[int, int, int], tuple[int, int, int]]] = {
    "kl": (kl, 4, (1, 2, 2), (3, 8, 6)),
    "wan": (wan, 4, (4, 8, 8), (5, 16, 24)),
    "ltx": (ltx, 6, (8, 32, 32), (9, 32, 64)),
    "dc": (dc, 4, (1, 4, 4), (2, 8, 12)),
}


def saved(model: Any, folder: Path, **options: object) -> DiffusersVAE:
    model.save_pretrained(folder)
    codec = build_latent_codec(DiffusersVAEConfig.model_validate({"name": "diffusers", "path": str(folder), **options}))
    assert isinstance(codec, DiffusersVAE)
    return codec


def clip(size: tuple[int, int, int], batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", MODELS)
def test_shapes_are_those_promised(kind: str, tmp_path: Path) -> None:
    build, channels, stride, size = MODELS[kind]
    codec = saved(build(), tmp_path)
    assert (codec.channels, codec.stride) == (channels, stride)
    latents = codec.encode(clip(size))
    assert latents.shape == (2, channels, *codec.latent_size(size))
    video = codec.decode(latents * 50)
    assert video.shape == (2, 3, *size)
    assert video.abs().max() <= 1
    assert latents.dtype == video.dtype == torch.float32
    assert torch.equal(latents, codec.encode(clip(size)))
    assert not latents.requires_grad


def test_normalisation_is_that_of_the_published_pipelines(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = {"kl": kl(), "wan": wan(), "ltx": ltx(), "dc": dc()}
    with torch.no_grad():
        for name, model in models.items():
            video = clip(MODELS[name][3], 1)
            frames = video[0].transpose(0, 1)  # (T, 3, H, W)
            if name == "kl":
                raw = model.encode(frames).latent_dist.mode()
                expected = ((raw - 0.1) * 0.4).transpose(0, 1)[None]
            elif name == "dc":
                expected = (model.encode(frames).latent * 0.41).transpose(0, 1)[None]
            elif name == "wan":
                raw = model.encode(video).latent_dist.mode()
                expected = (raw - torch.tensor([0.1, -0.2, 0.3, 0.0]).view(4, 1, 1, 1)) / torch.tensor([1.5, 0.5, 2.0, 1.0]).view(
                    4, 1, 1, 1
                )
            else:
                raw = model.encode(video).latent_dist.mode()
                mean, std = torch.linspace(-1, 1, 6).view(6, 1, 1, 1), torch.linspace(0.5, 2, 6).view(6, 1, 1, 1)
                expected = (raw - mean) * 0.5 / std
            torch.testing.assert_close(saved(model, tmp_path / name).encode(video), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_decoding_undoes_the_normalisation(kind: str, tmp_path: Path) -> None:
    build, _, _, size = MODELS[kind]
    codec = saved(build(), tmp_path)
    latents = codec.encode(clip(size, 1))
    raw = latents * codec.std + codec.mean
    model = codec.model
    with torch.no_grad():
        if codec.stride[0] == 1:
            expected = torch.stack([model.decode(raw[:, :, frame]).sample for frame in range(raw.shape[2])], dim=2)
        else:
            expected = model.decode(raw).sample
    torch.testing.assert_close(codec.decode(latents), expected.clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["kl", "dc"])
def test_image_autoencoders_take_each_frame_as_an_image(kind: str, tmp_path: Path) -> None:
    build, _, _, size = MODELS[kind]
    codec, video = saved(build(), tmp_path), clip(size)
    frames = [codec.encode(video[:, :, t : t + 1]) for t in range(size[0])]
    torch.testing.assert_close(codec.encode(video), torch.cat(frames, dim=2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["wan", "ltx"])
def test_the_first_frame_of_a_causal_codec_is_an_image(kind: str, tmp_path: Path) -> None:
    build, _, _, size = MODELS[kind]
    codec, video = saved(build(), tmp_path), clip(size)
    assert codec.latent_size((1, *size[1:]))[0] == 1
    torch.testing.assert_close(codec.encode(video)[:, :, :1], codec.encode(video[:, :, :1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((6, 16, 16), r"got 6 frames, expected 1 \+ 4k"),
        ((5, 12, 16), "height 12, expected a multiple of 8"),
        ((5, 16, 4), "width 4, expected a multiple of 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_rule(size: tuple[int, int, int], message: str, tmp_path: Path) -> None:
    codec = saved(wan(), tmp_path)
    with pytest.raises(UserError, match=message):
        codec.latent_size(size)
    with pytest.raises(UserError, match=message):
        codec.encode(clip(size))


def test_decoders_that_know_a_noise_level_are_told_there_is_none(tmp_path: Path) -> None:
    codec = saved(ltx(timestep_conditioning=True), tmp_path)
    latents = codec.encode(clip((9, 32, 32), 1))
    with torch.no_grad():
        expected = codec.model.decode(latents * codec.std + codec.mean, torch.zeros(1)).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(latents), expected)


def test_precision_is_of_the_weights_only(tmp_path: Path) -> None:
    codec = saved(kl(), tmp_path, dtype="bfloat16")
    assert codec.model.dtype == torch.bfloat16
    assert codec.encode(clip((1, 8, 8))).dtype == torch.float32


def test_it_is_frozen_and_its_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    first, second = saved(kl(), tmp_path / "a"), saved(kl(), tmp_path / "b")
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert first.fingerprint() == saved(first.model, tmp_path / "c").fingerprint()
    assert first.fingerprint() != second.fingerprint()
    assert first.fingerprint()["class"] == "AutoencoderKL"
    assert all(isinstance(value, str | int) for value in first.fingerprint().values())


@pytest.mark.parametrize("kind", ["kl", "wan", "ltx"])
def test_a_posterior_to_draw_from_is_its_mean_and_deviation(kind: str, tmp_path: Path) -> None:
    build, channels, _, size = MODELS[kind]
    mean = saved(build(), tmp_path)
    codec = saved(mean.model, tmp_path, posterior="sample")
    video = clip(size)
    moments = codec.encode(video)
    assert moments.shape[1] == 2 * channels
    torch.testing.assert_close(moments[:, :channels], mean.encode(video))
    frames = video.transpose(1, 2).flatten(0, 1) if kind == "kl" else video
    with torch.no_grad():
        raw = codec.model.encode(frames).latent_dist
    deviation = torch.exp(0.5 * raw.logvar)
    if kind == "kl":
        deviation = deviation.unflatten(0, (2, size[0])).transpose(1, 2)
    torch.testing.assert_close(moments[:, channels:] * codec.std, deviation)
    assert codec.fingerprint() != mean.fingerprint()


def test_a_codec_without_a_posterior_has_none_to_draw_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoders\.latents\.posterior"):
        saved(dc(), tmp_path, posterior="sample")


def test_subfolders_are_found(tmp_path: Path) -> None:
    dc().save_pretrained(tmp_path / "vae")
    codec = build_latent_codec(DiffusersVAEConfig(name="diffusers", path=str(tmp_path), subfolder="vae"))
    assert codec.stride == (1, 4, 4)


def test_unusable_paths_and_other_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoders\.latents\.path"):
        build_latent_codec(DiffusersVAEConfig(name="diffusers", path=str(tmp_path / "missing")))
    AsymmetricAutoencoderKL().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="AsymmetricAutoencoderKL, expected one of AutoencoderKL, "):
        build_latent_codec(DiffusersVAEConfig(name="diffusers", path=str(tmp_path / "other")))
    kl().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(UserError, match=r"encoders\.latents\.path"):
        build_latent_codec(DiffusersVAEConfig(name="diffusers", path=str(tmp_path / "pickled")))


def test_pixels_are_their_own_latents() -> None:
    codec: LatentCodec = build_latent_codec(PixelsConfig(name="pixels"))
    video = clip((3, 5, 7))
    assert torch.equal(codec.encode(video), video)
    assert torch.equal(codec.decode(video * 3), (video * 3).clamp(-1, 1))
    assert (codec.channels, codec.stride, codec.latent_size((3, 5, 7))) == (3, (1, 1, 1), (3, 5, 7))


def test_weights_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    kl().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    lost = min(name for name in tensors if name.startswith("decoder."))
    del tensors[lost]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"encoders.latents.path: the weights in .* lack 1 tensors of the model, such as {lost}"):
        build_latent_codec(DiffusersVAEConfig(name="diffusers", path=str(tmp_path)))
