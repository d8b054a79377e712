"""Frozen encoders: captions to text tokens, pixels to latents, and raw packs to packed latents.

A new encoder is a class with the methods of `base.TextEncoder` or `base.LatentCodec`, a class in `dit/config/encoders.py` and a
`case` here.
"""

from typing import assert_never

import torch

from dit.config.encoders import DiffusersVAEConfig, HFTextConfig, PixelsConfig, SmallTextConfig, SmallVAEConfig
from dit.encoders.base import Fingerprint, LatentCodec, TextEncoder
from dit.encoders.pixels import PixelCodec
from dit.encoders.prepare import prepare
from dit.encoders.text import HFTextEncoder, SmallText
from dit.encoders.vae import DiffusersVAE, SmallCodec


def build_text_encoder(config: SmallTextConfig | HFTextConfig, device: torch.device | str = "cpu") -> TextEncoder:
    """The frozen text encoder of a run, on `device`."""
    match config:
        case SmallTextConfig():
            return SmallText(config.path).to(device)
        case HFTextConfig():
            return HFTextEncoder(config).to(device)
        case _:
            assert_never(config)


def build_latent_codec(config: SmallVAEConfig | PixelsConfig | DiffusersVAEConfig, device: torch.device | str = "cpu") -> LatentCodec:
    """The frozen latent codec of a run, on `device`."""
    match config:
        case SmallVAEConfig():
            return SmallCodec(config.path).to(device)
        case PixelsConfig():
            return PixelCodec()
        case DiffusersVAEConfig():
            return DiffusersVAE(config).to(device)
        case _:
            assert_never(config)


__all__ = ["Fingerprint", "LatentCodec", "TextEncoder", "build_latent_codec", "build_text_encoder", "prepare"]
