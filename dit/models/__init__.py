"""Networks: tokens in, tokens out. A new backbone is a file here, a config class and one `case` below."""

from typing import assert_never

from dit.config import SpatioTemporalDiTConfig
from dit.models.dit import SpatioTemporalDiT


def build_backbone(config: SpatioTemporalDiTConfig, *, channels: int, text_width: int) -> SpatioTemporalDiT:
    """The backbone of `config` for latents of `channels` and text tokens of `text_width`, freshly initialised."""
    match config:
        case SpatioTemporalDiTConfig():
            return SpatioTemporalDiT(config, channels=channels, text_width=text_width)
        case _:
            assert_never(config)
