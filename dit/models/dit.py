"""The backbone: noisy tokens, times and conditions in, a prediction out. Knows nothing of noise schedules, losses or optimisers.

Letters: n samples, L tokens, P channels of a token, R conditioning rows, S text tokens, D width, K channels a head.
"""

from collections.abc import Sequence
from typing import Any, assert_never, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from data_pipelines.packed import Conditioning
from dit.config import SpatioTemporalDiTConfig
from dit.models.attention import AttentionLayout
from dit.models.blocks import AdaLNModulation, Context, DiTBlock, FinalLayer, SharedModulation
from dit.models.embeddings import LabelEmbedder, TimestepEmbedder, WideLinear, rotation

_SLOW = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
"""Operations whose results selective checkpointing keeps."""


def _keep_what_is_slow() -> Any:
    return create_selective_checkpoint_contexts(_SLOW)


class SpatioTemporalDiT(nn.Module):
    """Diffusion transformer over packed images and clips (arXiv:2212.09748), by default in the layout of Wan (arXiv:2503.20314).

    channels: C of the latents. text_width: width of a text token.
    """

    def __init__(self, config: SpatioTemporalDiTConfig, *, channels: int, text_width: int) -> None:
        super().__init__()
        width, (pt, ph, pw) = config.hidden_size, config.patch_size
        token_size = channels * pt * ph * pw
        self.config = config
        self.patch_embedder = nn.Linear(token_size, width)
        self.text_embedder = nn.Sequential(nn.Linear(text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))
        self.time_embedder = TimestepEmbedder(config.frequency_size, width)
        self.jump_embedder = TimestepEmbedder(config.frequency_size, width) if config.jumps else None
        self.guidance_embedder = TimestepEmbedder(config.frequency_size, width, units=1) if config.guided else None
        self.label_embedder = None if config.num_classes is None else LabelEmbedder(config.num_classes, width)
        self.time_projection = WideLinear(width, 6 * width) if config.modulation == "shared" else None
        self.blocks = nn.ModuleList(
            DiTBlock(width, config.num_heads, config.ffn_size, config.modulation, config.attention_backend) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(width, token_size * (2 if config.learned_variance else 1), config.modulation)
        self.initialize_weights()

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """What the objective has it predict of every token: x_t (L, P), t (R,) in [0, 1] -> (L, P), or (L, 2 P), in the dtype of x_t.

        cond.rows None: one row of t a sample; otherwise the row of each token, so one sample may hold several noise levels.
        """
        (x,), time, rows = self._after(x_t, t, cond, (len(self.blocks) - 1,))
        return self.final_layer(x, time, rows).reshape(len(x_t), -1).to(x_t.dtype)  # (..., D) -> (L, P)

    def features(self, x_t: Tensor, t: Tensor, cond: Conditioning, blocks: Sequence[int]) -> list[Tensor]:
        """Tokens after each of `blocks`, (L, D), in their order. Blocks behind the last of them are not called."""
        tokens, _, _ = self._after(x_t, t, cond, blocks)
        return [x.reshape(len(x_t), -1) for x in tokens]

    def _after(self, x_t: Tensor, t: Tensor, cond: Conditioning, blocks: Sequence[int]) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Tokens after each of `blocks`, (L, D) or (n, l, D); the embedding of time for the final layer; rows, as for `embed_time`."""
        block_time, final_time, rows = self.embed_time(t, cond)
        layouts = self.layouts(cond)
        x = self.patch_embedder(x_t.to(self.patch_embedder.weight.dtype))  # (L, P) -> (L, D)
        context = Context(
            rows,
            text=self.text_embedder(cond.text.to(x.dtype)),  # (S, text_width) -> (S, D)
            phases=rotation(cond.positions, self.config.hidden_size // self.config.num_heads, x.dtype),  # (L, 1, K / 2)
            cross_layout=AttentionLayout.cross(cond.lengths, cond.text_lengths, x.device),
        )
        if rows is None:
            x = x.unflatten(0, (len(cond.grids), -1))  # (L, D) -> (n, l, D)
        found = {}
        for i, block in enumerate(self.blocks[: max(blocks) + 1]):
            x = self._run(block, x, block_time, layouts[i % len(layouts)], context)
            if i in blocks:
                found[i] = x
        return [found[i] for i in blocks], final_time, rows

    def embed_time(self, t: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor, Tensor | None]:
        """What blocks and final layer take as time, and the row of each token (None if samples of one length have one row each)."""
        rows, embedded = cond.rows, self.time_embedder(t)  # (R,) -> (R, D)
        if self.jump_embedder is not None:
            embedded = embedded + self.jump_embedder(torch.zeros_like(t) if cond.jump is None else cond.jump)
        if self.guidance_embedder is not None:
            embedded = embedded + self.guidance_embedder(torch.ones_like(t) if cond.guidance is None else cond.guidance)
        if rows is None:
            assert len(t) == len(cond.grids), f"{len(t)} times for {len(cond.grids)} samples"
            rows = cond.sample_of_token if len(set(cond.lengths)) > 1 else None
        if self.label_embedder is not None:
            labels = cond.labels if cond.labels is not None else torch.full((len(cond.grids),), self.label_embedder.num_classes)
            per_sample = self.label_embedder(labels.to(t.device))  # (n,) -> (n, D)
            if cond.rows is None:
                embedded = embedded + per_sample
            else:  # a row of t may serve several samples: one row for each pair that occurs
                pairs = torch.stack([cond.rows, cond.sample_of_token], dim=1)
                pairs, rows = pairs.unique(dim=0, return_inverse=True)
                embedded = embedded[pairs[:, 0]] + per_sample[pairs[:, 1]]  # (R, D)
        if self.time_projection is None:
            return embedded, embedded, rows
        return self.time_projection(F.silu(embedded)).unflatten(1, (6, -1)), embedded[:, None], rows  # (R, 6, D), (R, 1, D)

    def layouts(self, cond: Conditioning) -> tuple[AttentionLayout, ...]:
        """Segmentations of self-attention; block i uses number i modulo their count."""
        grids, device, window = cond.grids, self.patch_embedder.weight.device, self.config.window
        match self.config.attention:
            case "full":
                return (AttentionLayout.full(grids, device),)
            case "factorised":
                return AttentionLayout.spatial(grids, device), AttentionLayout.temporal(grids, device)
            case "windowed":
                return tuple(AttentionLayout.windowed(grids, window, shifted, device) for shifted in (False, True))
            case _:
                assert_never(self.config.attention)

    def initialize_weights(self) -> None:
        """Start as the identity on tokens and as zero velocity, so that the first steps are those of a linear model."""
        for module in self.modules():
            if isinstance(module, nn.Linear):  # keep the variance of activations, forward and backward
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embedders = [self.time_embedder.mlp, self.text_embedder]
        for layer in (layer for mlp in embedders for layer in mlp if isinstance(layer, nn.Linear)):
            nn.init.normal_(layer.weight, std=0.02)  # as in DiT
        for embedder in (self.jump_embedder, self.guidance_embedder):  # starts as the network without it
            if embedder is not None:
                nn.init.zeros_(cast(nn.Linear, embedder.mlp[2]).weight)
        if self.label_embedder is not None:
            nn.init.normal_(self.label_embedder.table.weight, std=0.02)
        if self.time_projection is not None:  # no block depends on time before it has learned to
            nn.init.zeros_(self.time_projection.weight)
        for module in self.modules():
            if isinstance(module, SharedModulation):  # gates start shut: a block adds nothing
                nn.init.zeros_(module.table)
            if isinstance(module, AdaLNModulation):  # the same, adaLN-Zero
                nn.init.zeros_(module.linear.weight)
        for block in self.blocks:  # cross-attention has no gate, so its output starts at zero
            assert isinstance(block, DiTBlock)
            nn.init.zeros_(block.cross_attention.out.weight)
        nn.init.zeros_(self.final_layer.linear.weight)  # zero velocity: the loss starts at the variance of its target

    def _run(self, block: nn.Module, x: Tensor, time: Tensor, layout: AttentionLayout, context: Context) -> Tensor:
        match self.config.activation_checkpointing:
            case "none":
                return block(x, time, layout, context)
            case "selective":
                return checkpoint(block, x, time, layout, context, use_reentrant=False, context_fn=_keep_what_is_slow)
            case "full":
                return checkpoint(block, x, time, layout, context, use_reentrant=False)
            case _:
                assert_never(self.config.activation_checkpointing)
