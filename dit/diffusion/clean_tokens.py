"""Clean tokens beside noised ones: a network that is told them at t = 0, each token by its row, draws the others given them.

One network learns p(unknown | known) for all patterns of what is known (per-token levels: Chen et al. 2024, arXiv:2407.01392).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor

from data_pipelines import randomness
from data_pipelines.packed import Conditioning, Grid
from dit.config.objective import CleanTokens
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.paths import Path


def draw_clean(config: CleanTokens | None, keys: Sequence[int], grids: Sequence[Grid]) -> Tensor | None:
    """Which tokens of a pack are clean, (L,) bool on the CPU, each sample by its own key; at least one token of each is not.

    None if no token is.
    """
    if config is None:
        return None
    clean = torch.cat([_draw(config, key, grid).flatten() for key, grid in zip(keys, grids, strict=True)])
    return clean if bool(clean.any()) else None


def _draw(config: CleanTokens, key: int, grid: Grid) -> Tensor:
    clean, (frames, height, width) = torch.zeros(grid, dtype=torch.bool), grid
    least = {"beginning": frames - 1, "end": frames - 1, "ends": frames - 2, "inside": height * width - 1, "outside": height * width - 1}
    possible = [pattern for pattern in config.patterns if least[pattern] > 0]
    if not possible or randomness.uniform(key, "clean") >= config.fraction:
        return clean

    def pick(purpose: str, count: int) -> int:
        return randomness.key(key, "clean", purpose) % count

    match possible[pick("pattern", len(possible))]:
        case "beginning":
            clean[: 1 + pick("frames", frames - 1)] = True
        case "end":
            clean[-1 - pick("frames", frames - 1) :] = True
        case "ends":
            clean[0] = clean[-1] = True
        case "inside" | "outside" as side:
            area = pick("sides", height * width - 1)  # never the whole frame, which is the last
            box_height, box_width = 1 + area // width, 1 + area % width
            top, left = pick("top", height - box_height + 1), pick("left", width - box_width + 1)
            clean[:, top : top + box_height, left : left + box_width] = True
            return clean if side == "inside" else ~clean
        case never:
            assert_never(never)
    return clean


def beside_clean(
    x: Tensor, t: Tensor, cond: Conditioning, clean: Tensor, tokens: Tensor, level: Tensor
) -> tuple[Tensor, Tensor, Conditioning]:
    """x (L, P), t (n,) and cond with the `clean` (L,) ones of the tokens replaced by `tokens` (L, P), on one more row, at `level` (1,)."""
    rows = cond.sample_of_token.masked_fill(clean, len(t))
    return torch.where(clean[:, None], tokens.to(x), x), torch.cat([t, level.to(t)]), replace(cond, rows=rows)


class Told:
    """A network trained with clean tokens, told the tokens (L, P) that are `known` (L,): to the outside a network with one level a sample.

    Guidance may call it with several copies of the pack at once.
    """

    def __init__(self, network: Denoiser, path: Path, tokens: Tensor, known: Tensor) -> None:
        zero = torch.zeros(1, dtype=torch.float64, device=tokens.device)
        scale = path.input_scale(zero)
        self.network, self.known = network, known
        self.tokens, self.label = tokens if scale is None else scale.to(tokens) * tokens, path.label(zero)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        copies = len(x_t) // len(self.known)
        return self.network(*beside_clean(x_t, t, cond, self.known.repeat(copies), self.tokens.repeat(copies, 1), self.label))
