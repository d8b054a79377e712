"""No autoencoder: the latents are the pixels."""

from torch import Tensor

from data_pipelines.packed import Grid
from dit.encoders.base import CODE_VERSION, Fingerprint, causal_latent_size


class PixelCodec:
    """Latents equal to the video in [-1, 1]."""

    channels = 3
    stride: Grid = (1, 1, 1)

    def fingerprint(self) -> Fingerprint:
        return {"class": "PixelCodec", "range": "[-1, 1]", "version": CODE_VERSION}

    def latent_size(self, size: Grid) -> Grid:
        return causal_latent_size(size, self.stride)

    def encode(self, video: Tensor) -> Tensor:
        return video.float()

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float().clamp(-1, 1)
