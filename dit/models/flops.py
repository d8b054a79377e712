"""What a backbone costs, in closed form: parameters, operations of one forward pass over a pack, and the memory of its activations.

Letters: L tokens, P channels of a token, R conditioning rows, S text tokens, D width. A multiplication with its addition is two
operations. Matrix products and attention are counted, elementwise work is not. A backward pass costs twice the forward.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Literal, assert_never

from data_pipelines.packed import Grid
from dit.config import SpatioTemporalDiTConfig


def parameters(config: SpatioTemporalDiTConfig, *, channels: int, text_width: int) -> int:
    """Number of parameters of the backbone."""
    d, p = config.hidden_size, channels * prod(config.patch_size)
    attention = 4 * (d * d + d) + 2 * d
    block = 2 * attention + 2 * d + (d * config.ffn_size + config.ffn_size) + (config.ffn_size * d + d)
    answer = p * (1 + config.learned_variance)
    total = config.depth * block + (p * d + d) + (text_width * d + d) + (d * d + d) + (d * answer + answer)
    total += (1 + config.jumps + config.guided) * ((config.frequency_size * d + d) + (d * d + d))
    total += 0 if config.num_classes is None else (config.num_classes + 1) * d
    match config.modulation:
        case "shared":
            return total + 6 * (d * d + d) + config.depth * 6 * d + 2 * d
        case "per_block":
            return total + (6 * config.depth + 2) * (d * d + d)
        case _:
            assert_never(config.modulation)


def forward_flops(
    config: SpatioTemporalDiTConfig,
    grids: Sequence[Grid],
    text_lengths: Sequence[int],
    *,
    channels: int,
    text_width: int,
    rows: int | None = None,
) -> int:
    """Floating point operations of one forward pass over samples of `grids` (t, h, w in tokens) and `text_lengths`.

    rows: conditioning rows, None for one a sample.
    """
    d, p = config.hidden_size, channels * prod(config.patch_size)
    lengths = [prod(grid) for grid in grids]
    tokens, text, rows = sum(lengths), sum(text_lengths), len(grids) if rows is None else rows
    scalars = rows * (1 + config.jumps + config.guided) * (config.frequency_size * d + d * d)
    ends = tokens * (2 + config.learned_variance) * p * d + text * (text_width * d + d * d) + scalars
    projections = config.depth * (tokens * (6 * d * d + 2 * d * config.ffn_size) + text * 2 * d * d)
    modulation = rows * d * d * (6 if config.modulation == "shared" else 6 * config.depth + 2)
    pairs = sum(sum(_attended_pairs(config, i, grid) for grid in grids) for i in range(config.depth))
    pairs += config.depth * sum(q * k for q, k in zip(lengths, text_lengths, strict=True))
    return 2 * (ends + projections + modulation) + 4 * d * pairs


BLOCK_BYTES = {"fp32": 89, "bf16": 69}
"""Bytes that a block keeps for its backward pass, for each token and channel of the width, beside the MLP's; as measured on the CPU."""
MIXED_BYTES = {"fp32": 24, "bf16": 20}
"""More of them where samples of several lengths, or several rows of t a sample, give every token a modulation of its own."""


def activation_bytes(config: SpatioTemporalDiTConfig, tokens: int, precision: Literal["fp32", "bf16"], *, mixed: bool = False) -> int:
    """Bytes that a forward pass over a pack of `tokens` keeps for the backward pass, at its peak. An estimate: text is left out.

    With checkpointing of activations every block keeps its input, and one block at a time the rest; selectively also what its six
    projections of the width, its MLP and its two attentions give. Fused norms on a GPU keep less. bf16: layers that compute in fp32
    keep such a copy of their weights.
    """
    d, c = config.hidden_size, 4 if precision == "fp32" else 2
    block = tokens * (d * (BLOCK_BYTES[precision] + mixed * MIXED_BYTES[precision]) + 2 * c * config.ffn_size)
    wide = d * (config.frequency_size + d) + d * d * (6 if config.modulation == "shared" else 6 * config.depth + 2)
    copies = 4 * wide if precision == "bf16" else 0  # layers that compute in fp32 keep their weights so
    ends = tokens * d * (4 * c + 5 * mixed) + copies
    match config.activation_checkpointing:
        case "none":
            return ends + config.depth * block
        case "selective":
            return ends + config.depth * tokens * c * (10 * d + config.ffn_size) + block
        case "full":
            return ends + config.depth * tokens * c * d + block
        case _:
            assert_never(config.activation_checkpointing)


def _attended_pairs(config: SpatioTemporalDiTConfig, block: int, grid: Grid) -> int:
    """Pairs of tokens that see each other in the self-attention of block number `block`."""
    t, h, w = grid
    match config.attention:
        case "full":
            return prod(grid) ** 2
        case "factorised":
            return t * (h * w) ** 2 if block % 2 == 0 else h * w * t**2
        case "windowed":  # windows are products of intervals, so the sum of squares factorises
            return prod(sum(part**2 for part in _intervals(size, window, block % 2 == 1)) for size, window in zip(grid, config.window))
        case _:
            assert_never(config.attention)


def _intervals(size: int, window: int, shifted: bool) -> Iterator[int]:
    """Lengths of the windows of one axis."""
    start = window - window // 2 if shifted and size > window else window
    borders = [0, *range(start, size, window), size]
    return (end - begin for begin, end in pairwise(borders))
