"""What every encoder offers, and what encoders share: freezing, fingerprints, and the rule of sizes that fit.

Encoders are frozen. A fingerprint names all that an encoding depends on, so a latent cache of other encoders is refused
rather than trained on. Must not know diffusion, backbones or the loop.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn

from data_pipelines.errors import UserError
from data_pipelines.packed import Grid

CODE_VERSION = 1
"""Part of every fingerprint. Raise it when an encoder gives other numbers for the same input and weights."""

Fingerprint = dict[str, str | int]
Module = TypeVar("Module", bound=nn.Module)


class TextEncoder(Protocol):
    """Captions to text tokens of `width` channels."""

    @property
    def width(self) -> int: ...

    def fingerprint(self) -> Fingerprint:
        """All that the encoding depends on."""

    def encode(self, captions: list[str]) -> list[Tensor]:
        """Encode captions to one (S_i, width) float32 each, on the encoder's device."""


class LatentCodec(Protocol):
    """Pixels to normalised latents of `channels` channels and back; one latent covers `stride` frames, rows and columns."""

    @property
    def channels(self) -> int: ...

    @property
    def stride(self) -> Grid: ...

    def fingerprint(self) -> Fingerprint:
        """All that the encoding depends on."""

    def latent_size(self, size: Grid) -> Grid:
        """Frames, height, width of the latents of a video of `size`. Raises UserError for a size that does not fit."""

    def encode(self, video: Tensor) -> Tensor:
        """Encode (B, 3, T, H, W) in [-1, 1], any device, to (B, C, t, h, w) float32 on the codec's device; no randomness.

        A codec whose latents are to be drawn from a posterior gives (B, 2C, t, h, w): its mean, then its standard deviation.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, C, t, h, w) to (B, 3, T, H, W) float32, clamped to [-1, 1]; with gradient by the latents, if they have one."""


def frozen(module: Module) -> Module:
    """Switch off gradients and training behaviour."""
    return module.requires_grad_(False).eval()


def load_own(load: Callable[[str | None], Module], path: str | None, key: str) -> Module:
    """Load an encoder of the project itself, frozen. Raises UserError that names `key` if the file is none of its files."""
    if path is not None and not Path(path).is_file():
        raise UserError(f"{key}: got {path!r}, expected a file, or null for the weights that ship with the project")
    try:
        return frozen(load(path))
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{key}: {error}") from error


def check_declared(key: str, declared: object, found: object) -> None:
    """Raise UserError that names `key` unless what a config declares, if it does, is what the encoder has."""
    if declared is not None and declared != found:
        raise UserError(f"{key}: got {declared}, and this encoder has {found}: change it, or leave it out")


def device_of(module: nn.Module) -> torch.device:
    """Where the weights are."""
    return next(module.parameters()).device


def hash_of_weights(module: nn.Module) -> str:
    """Hash names, dtypes, shapes and values of all parameters and buffers (xxh3, 128 bits)."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def causal_latent_size(size: Grid, stride: Grid) -> Grid:
    """Latents of a codec that takes the first frame alone and then groups of stride[0]: 1 + k * stride[0] frames give 1 + k.

    Raises UserError that names the rule which `size` (frames, height, width) breaks.
    """
    (frames, height, width), (group, *sides) = size, stride
    if frames < 1 or (frames - 1) % group:
        raise UserError(f"size {list(size)}: got {frames} frames, expected 1 + {group}k for whole k.")
    for name, pixels, side in zip(("height", "width"), (height, width), sides, strict=True):
        if pixels < side or pixels % side:
            raise UserError(f"size {list(size)}: got {name} {pixels}, expected a multiple of {side}.")
    return 1 + (frames - 1) // group, height // sides[0], width // sides[1]
