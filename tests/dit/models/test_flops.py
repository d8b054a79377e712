"""Closed-form cost against what torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipelines.packed import pack_conditioning
from dit.config import SpatioTemporalDiTConfig
from dit.models import build_backbone
from dit.models.flops import forward_flops, parameters

GRIDS = ((2, 3, 4), (1, 5, 3), (5, 3, 4))
TEXTS = (3, 2, 3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modulation": "per_block"},
        {"attention": "factorised"},
        {"attention": "windowed", "window": (2, 2, 3)},
        {"num_classes": 4},
        {"jumps": True},
        {"learned_variance": True},
    ],
)
def test_cost_is_what_torch_counts(options):
    config = SpatioTemporalDiTConfig(hidden_size=24, depth=3, num_heads=2, ffn_size=40, patch_size=(1, 2, 1), frequency_size=16, **options)
    model = build_backbone(config, channels=3, text_width=5)
    cond = pack_conditioning(GRIDS, [torch.randn(n, 5) for n in TEXTS], torch.arange(3))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(sum(cond.lengths), 6), torch.rand(3), cond)
    attended = 0  # the counter does not know the attention kernel of the CPU: 4 Nq Nk D
    for i in range(config.depth):
        layouts = model.layouts(cond)
        attended += sum(q * k for q, k in zip(layouts[i % len(layouts)].query_lengths, layouts[i % len(layouts)].key_lengths))
        attended += sum(q * k for q, k in zip(cond.lengths, TEXTS))
    assert forward_flops(config, GRIDS, TEXTS, channels=3, text_width=5) == counter.get_total_flops() + 4 * attended * 24
    assert parameters(config, channels=3, text_width=5) == sum(p.numel() for p in model.parameters())
