"""Counter-based randomness: every draw is a pure function of (seed, epoch, sample, purpose).

No draw of a run comes from a process-wide generator, so none depends on rank, world size, worker count, accumulation or
restarts, and any single sample can be replayed alone on another machine. Draws are made on the CPU for the same reason.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def key(*parts: int | str) -> int:
    """Hash `parts` (for example seed, epoch, sample id, purpose) to a 63-bit integer, equal on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator that yields the same numbers for the same `parts`."""
    import torch  # which takes seconds, and whoever makes shards needs keys alone

    return torch.Generator().manual_seed(key(*parts))


def normal(shape: tuple[int, ...], *parts: int | str) -> Tensor:
    """Standard normal draws of `shape`, float32."""
    import torch

    return torch.randn(shape, generator=generator(*parts))


def uniform(*parts: int | str) -> float:
    """One uniform draw from [0, 1) in double precision."""
    return key(*parts) / 2.0**63
