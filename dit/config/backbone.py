"""Sizes and options of the backbone."""

from typing import Literal, Self

from pydantic import PositiveInt, model_validator

from data_pipelines.config import Section, Size


class SpatioTemporalDiTConfig(Section):
    name: Literal["spatiotemporal_dit"] = "spatiotemporal_dit"
    hidden_size: PositiveInt
    """Width D; heads x head size."""
    depth: PositiveInt
    """Number of blocks."""
    num_heads: PositiveInt
    ffn_size: PositiveInt
    """Inner width of the MLP (usually 4 x hidden_size)."""
    patch_size: Size = (1, 2, 2)
    """Latents of one token: frames, height, width."""
    modulation: Literal["shared", "per_block"] = "shared"
    """`shared`: one time projection plus a learned table a block (Wan). `per_block`: adaLN-Zero as in the first DiT."""
    attention: Literal["full", "factorised", "windowed"] = "full"
    """Self-attention over the clip; or alternating over space and time; or inside windows, every second block shifted."""
    window: Size = (4, 8, 8)
    """Window in tokens, for `attention: windowed`."""
    num_classes: PositiveInt | None = None
    """Class-conditional: number of labels (one more is learned for "no class")."""
    learned_variance: bool = False
    """Twice the output channels: the second half says where the variance of a reverse step lies (objective.variance: learned)."""
    jumps: bool = False
    """Also told over how much of t to answer with the mean velocity: set by `dit distill` for students that need it."""
    guided: bool = False
    """Also told the guidance scale to answer under: set by `dit distill` for students that take it as an input."""
    frequency_size: PositiveInt = 256
    """Sinusoidal features of t."""
    attention_backend: Literal["sdpa", "xformers"] = "sdpa"
    """xformers runs on CUDA only."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """`full` recomputes every block in the backward pass. `selective` keeps attention and matrix products, recomputes what is between."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            head = self.hidden_size / self.num_heads
            raise ValueError(f"hidden_size / num_heads = {self.hidden_size} / {self.num_heads} = {head:g} must be an even whole number")
        return self

    @model_validator(mode="after")
    def _rope_has_three_axes(self) -> Self:
        if self.hidden_size // self.num_heads < 6:
            heads = f"{self.hidden_size} / {self.num_heads} = {self.hidden_size // self.num_heads}"
            raise ValueError(f"hidden_size / num_heads = {heads} must be at least 6, two channels for each of t, h, w")
        return self
