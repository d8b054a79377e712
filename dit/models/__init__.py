"""Networks: tokens in, tokens out. A new backbone is a file here, a config class and one `case` below."""

from typing import assert_never

from dit.config import SpatioTemporalDiTConfig
from dit.models.compiled import compile_blocks
from dit.models.dit import SpatioTemporalDiT
from dit.models.sequence_parallel import SequenceParallelDiT
from dit.runtime import distributed


def build_backbone(config: SpatioTemporalDiTConfig, *, channels: int, text_width: int) -> SpatioTemporalDiT:
    """The backbone of `config` for latents of `channels` and text tokens of `text_width`, freshly initialised.

    Where several ranks compute a pack together (`distributed.init`), all of them call it at once.
    """
    match config:
        case SpatioTemporalDiTConfig():
            backbone = SpatioTemporalDiT if distributed.sequence_parallel() == 1 else SequenceParallelDiT
            return backbone(config, channels=channels, text_width=text_width)
        case _:
            assert_never(config)


__all__ = ["SequenceParallelDiT", "SpatioTemporalDiT", "build_backbone", "compile_blocks"]
