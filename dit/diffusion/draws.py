"""Noise drawn for each sample by its own key, so that it depends on no other sample of the pack."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipelines import randomness


def noise_tokens(keys: Sequence[int], lengths: Sequence[int], channels: int, *purpose: int | str) -> Tensor:
    """Standard normal tokens (L, channels), float32 on the CPU, for samples of `lengths` tokens."""
    return torch.cat([randomness.normal((length, channels), key, *purpose) for key, length in zip(keys, lengths, strict=True)])
