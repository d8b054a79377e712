"""A small causal video autoencoder that ships with the project, for smoke runs, tests and examples on a CPU.

The layout is that of the large causal video codecs: the first frame alone, then groups of four frames, each a grid of
4 x 4 pixel patches; so T = 1 + 4k frames give t = 1 + k latent frames, and an image is a video of one frame.
Latents are normalised to zero mean and unit variance per channel, with statistics kept in the header of the file.

Letters: B batch, T H W frames, rows and columns of pixels, t h w those of latents, C latent channels, D width.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

STRIDE = 4  # pixels along T, H and W to one latent
ASSET = Path(__file__).parent / "assets" / "small_vae.safetensors"


class CausalBlock(nn.Module):
    """Residual block: a 3x3 convolution in space, then one over this latent frame and the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))
        self.temporal = nn.Conv3d(width, width, (2, 1, 1))
        for parameter in self.temporal.parameters():
            nn.init.zeros_(parameter)  # each block starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.spatial(x))  # B D t h w
        past_padded = F.pad(hidden, (0, 0, 0, 0, 1, 0))  # B D 1+t h w
        return x + self.temporal(past_padded)


def _blocks(width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(CausalBlock(width) for _ in range(depth)))


class SmallVideoVAE(nn.Module):
    """Encode videos to normalised latents and back; deterministic, causal in time in both directions."""

    stride = (STRIDE, STRIDE, STRIDE)
    latent_mean: Tensor  # (C,), of raw latents
    latent_std: Tensor  # (C,)

    def __init__(self, channels: int = 8, width: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.channels, self.width, self.depth = channels, width, depth
        patch = 3 * STRIDE**3
        self.patch_in = nn.Conv3d(patch, width, 1)
        self.encoder = _blocks(width, depth)
        self.to_latent = nn.Conv3d(width, channels, 1)
        self.from_latent = nn.Conv3d(channels, width, 1)
        self.decoder = _blocks(width, depth)
        self.patch_out = nn.Conv3d(width, patch, 1)
        self.register_buffer("latent_mean", torch.zeros(channels), persistent=False)
        self.register_buffer("latent_std", torch.ones(channels), persistent=False)

    def raw_encode(self, video: Tensor) -> Tensor:
        """Encode without normalisation: (B, 3, T, H, W) in [-1, 1] -> (B, C, t, h, w)."""
        patches = rearrange(repeat_first_frame(video), "b c (t r) (h p) (w q) -> b (c r p q) t h w", r=STRIDE, p=STRIDE, q=STRIDE)
        return self.to_latent(self.encoder(self.patch_in(patches)))

    def raw_decode(self, latents: Tensor) -> Tensor:
        """Decode latents without normalisation, without clamping: (B, C, t, h, w) -> (B, 3, T, H, W)."""
        patches = self.patch_out(self.decoder(self.from_latent(latents)))
        video = rearrange(patches, "b (c r p q) t h w -> b c (t r) (h p) (w q)", r=STRIDE, p=STRIDE, q=STRIDE)
        return video[:, :, STRIDE - 1 :]  # of the first group only its last frame exists

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode (B, 3, T, H, W) in [-1, 1] to normalised latents (B, C, t, h, w)."""
        _check_video(video)
        return (self.raw_encode(video) - _per_channel(self.latent_mean)) / _per_channel(self.latent_std)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, C, t, h, w) to (B, 3, T, H, W), clamped to [-1, 1]."""
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(f"got latents of shape {tuple(latents.shape)}, expected (B, {self.channels}, t, h, w)")
        raw = latents * _per_channel(self.latent_std) + _per_channel(self.latent_mean)
        return self.raw_decode(raw).clamp(-1, 1)

    def save(self, path: Path, figures: dict[str, float]) -> None:
        """Write weights as fp16, and sizes, latent statistics and measured figures as JSON in the header."""
        header = {
            "channels": self.channels,
            "width": self.width,
            "depth": self.depth,
            "latent_mean": self.latent_mean.tolist(),
            "latent_std": self.latent_std.tolist(),
            "figures": figures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, path, metadata={"small_vae": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path | None = None) -> SmallVideoVAE:
        """Read the autoencoder that ships with the project, or another file of `save`; frozen, float32, in eval mode."""
        with safe_open(path or ASSET, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("small_vae", "null"))
            if header is None:
                raise ValueError(f"{path or ASSET}: got a safetensors file without the header 'small_vae'")
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)
        codec = cls(header["channels"], header["width"], header["depth"])
        codec.load_state_dict(weights)
        codec.latent_mean.copy_(torch.tensor(header["latent_mean"]))
        codec.latent_std.copy_(torch.tensor(header["latent_std"]))
        return codec.eval().requires_grad_(False)


def repeat_first_frame(video: Tensor) -> Tensor:
    """Put three copies of the first frame in front, so that it fills a group of its own: T = 1 + 4k -> 4 + 4k."""
    first = video[:, :, :1].expand(-1, -1, STRIDE - 1, -1, -1)
    return torch.cat([first, video], dim=2)


def _per_channel(statistics: Tensor) -> Tensor:
    return statistics.view(1, -1, 1, 1, 1)


def _check_video(video: Tensor) -> None:
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"got a video of shape {tuple(video.shape)}, expected (B, 3, T, H, W)")
    frames, height, width = video.shape[2:]
    if frames % STRIDE != 1:
        raise ValueError(f"got {frames} frames, expected 1 + {STRIDE}k, such as 1, 5, 9")
    if height % STRIDE or width % STRIDE:
        raise ValueError(f"got {height} x {width} pixels, expected multiples of {STRIDE}")
