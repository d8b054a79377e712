"""Latent codecs: autoencoders of the diffusers library, and the small one that ships with the project.

Owns the normalisation, so that latents have about unit variance as the published models expect them; weights are read from
safetensors only. Image autoencoders encode a video frame by frame.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from data_pipelines.errors import UserError
from data_pipelines.extras import check_loaded
from data_pipelines.packed import Grid
from dit.config.encoders import DiffusersVAEConfig
from dit.encoders.base import (
    CODE_VERSION,
    Fingerprint,
    causal_latent_size,
    check_declared,
    device_of,
    frozen,
    hash_of_weights,
    load_own,
)
from dit.encoders.small_vae import SmallVideoVAE

CLASSES = ("AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLLTXVideo", "AutoencoderDC")


class SmallCodec(nn.Module):
    """The causal video autoencoder that ships with the project."""

    def __init__(self, path: str | None) -> None:
        super().__init__()
        self.model = load_own(SmallVideoVAE.load, path, "encoders.latents.path")
        self.channels = self.model.channels
        self.stride: Grid = self.model.stride

    def fingerprint(self) -> Fingerprint:
        return {"class": "SmallVideoVAE", "weights": hash_of_weights(self.model), "version": CODE_VERSION}

    def latent_size(self, size: Grid) -> Grid:
        return causal_latent_size(size, self.stride)

    def encode(self, video: Tensor) -> Tensor:
        return self.model.encode(video.to(device_of(self.model)))

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents.to(device_of(self.model)))


@dataclass(frozen=True)
class Layout:
    """What the pipelines of an autoencoder know about its latents: normalised = (latents - mean) / std, per channel."""

    channels: int
    stride: Grid
    mean: list[float]
    std: list[float]


class DiffusersVAE(nn.Module):
    """AutoencoderKL, AutoencoderKLWan, AutoencoderKLLTXVideo or AutoencoderDC as a deterministic, normalised codec.

    Encoding takes the mean of the posterior, or its mean and standard deviation (`posterior: sample`). Raises UserError if the path
    or the class of the model is not usable.
    """

    def __init__(self, config: DiffusersVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.model = frozen(_load(config))
        if config.posterior == "sample" and type(self.model).__name__ == "AutoencoderDC":
            raise UserError("encoders.latents.posterior: an AutoencoderDC has no posterior to draw from; take 'mean'")
        self.layout = layout = layout_of(self.model)
        self.channels, self.stride = layout.channels, layout.stride
        check_declared("encoders.latents.channels", config.channels, self.channels)
        check_declared("encoders.latents.stride", config.stride, self.stride)
        self.register_buffer("mean", torch.tensor(layout.mean).view(-1, 1, 1, 1))  # (C, 1, 1, 1)
        self.register_buffer("std", torch.tensor(layout.std).view(-1, 1, 1, 1))  # (C, 1, 1, 1)
        self.mean: Tensor
        self.std: Tensor

    @cached_property
    def _hash(self) -> str:
        return hash_of_weights(self.model)

    def fingerprint(self) -> Fingerprint:
        facts: Fingerprint = {"mean": str(self.layout.mean), "std": str(self.layout.std), "dtype": self.config.dtype}
        facts["posterior"] = self.config.posterior
        return {"class": type(self.model).__name__, "weights": self._hash, **facts, "version": CODE_VERSION}

    def latent_size(self, size: Grid) -> Grid:
        return causal_latent_size(size, self.stride)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        self.latent_size((video.shape[2], video.shape[3], video.shape[4]))
        video = video.to(device_of(self.model), self.model.dtype)
        match type(self.model).__name__:
            case "AutoencoderDC":
                return (_unfold(self.model.encode(_frames(video)).latent, len(video)).float() - self.mean) / self.std
            case "AutoencoderKL":
                posterior = self.model.encode(_frames(video)).latent_dist
                mean, deviation = _unfold(posterior.mean, len(video)), _unfold(posterior.std, len(video))
            case _:
                posterior = self.model.encode(video).latent_dist
                mean, deviation = posterior.mean, posterior.std
        latents = (mean.float() - self.mean) / self.std
        return latents if self.config.posterior == "mean" else torch.cat([latents, deviation.float() / self.std], 1)

    def decode(self, latents: Tensor) -> Tensor:
        raw = latents.to(self.mean) * self.std + self.mean
        raw = raw.to(self.model.dtype)
        match type(self.model).__name__:
            case "AutoencoderKL" | "AutoencoderDC":
                video = _unfold(self.model.decode(_frames(raw)).sample, len(raw))
            case "AutoencoderKLLTXVideo" if self.model.config.timestep_conditioning:
                video = self.model.decode(raw, raw.new_zeros(len(raw))).sample  # such decoders denoise; our latents are clean
            case _:
                video = self.model.decode(raw).sample
        return video.float().clamp(-1, 1)


def layout_of(model: Any) -> Layout:
    """Read channels, stride and normalisation of an autoencoder from its own config and buffers."""
    config, mean, std = model.config, None, None
    match type(model).__name__:
        case "AutoencoderKL":
            side = 2 ** (len(config.block_out_channels) - 1)
            channels, stride = config.latent_channels, (1, side, side)
            mean = config.latents_mean or [config.shift_factor or 0.0] * channels
            std = config.latents_std
        case "AutoencoderKLWan":
            side = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
            channels, stride = config.z_dim, (2 ** sum(config.temperal_downsample), side, side)
            mean, std = config.latents_mean, config.latents_std
        case "AutoencoderKLLTXVideo":
            side = model.spatial_compression_ratio
            channels, stride = config.latent_channels, (model.temporal_compression_ratio, side, side)
            mean, std = model.latents_mean.tolist(), model.latents_std.tolist()
        case "AutoencoderDC":
            channels, stride = config.latent_channels, (1, model.spatial_compression_ratio, model.spatial_compression_ratio)
        case name:
            raise AssertionError(name)
    scale = config.get("scaling_factor") or 1.0
    mean, std = list(mean or [0.0] * channels), [value / scale for value in std or [1.0] * channels]
    if not len(mean) == len(std) == channels:
        found = f"{len(mean)} means and {len(std)} stds of latents"
        raise UserError(f"encoders.latents.path: config.json has {found}, expected one for each of {channels} channels")
    return Layout(channels, stride, mean, std)


def _load(config: DiffusersVAEConfig) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "encoders.latents.name: diffusers needs the extra hf: pip install -c constraints.txt -e '.[hf]' in the project's folder"
        ) from error
    local = Path(config.path).expanduser().exists()
    path = str(Path(config.path).expanduser()) if local else config.path
    where: dict[str, Any] = {"subfolder": config.subfolder, "local_files_only": local}
    try:
        name = diffusers.AutoencoderKL.load_config(path, **where).get("_class_name")  # of any class
        if name not in CLASSES:
            raise UserError(f"encoders.latents.path: {config.path} holds a {name}, expected one of {', '.join(CLASSES)}")
        options = {"torch_dtype": getattr(torch, config.dtype), "use_safetensors": True, "output_loading_info": True}
        model, found = getattr(diffusers, name).from_pretrained(path, **where, **options)
    except OSError as error:
        expected = "a local folder with config.json and safetensors weights, or a hub name that can be reached"
        raise UserError(f"encoders.latents.path: got {config.path!r}, expected {expected}. diffusers says: {error}") from error
    check_loaded("encoders.latents.path", config.path, found)
    return model


def _frames(video: Tensor) -> Tensor:
    return rearrange(video, "b c t h w -> (b t) c h w")


def _unfold(frames: Tensor, clips: int) -> Tensor:
    return rearrange(frames, "(b t) c h w -> b c t h w", b=clips)
