"""Segmentations and their attention, against one masked attention over the whole pack in float64."""

import pytest
import torch

from data_pipelines.errors import UserError
from data_pipelines.packed import pack_conditioning
from dit.models.attention import AttentionLayout, attention

CPU = torch.device("cpu")
UNIFORM = ((2, 3, 4),) * 3
MIXED = ((2, 3, 4), (1, 5, 2), (2, 3, 4), (3, 2, 2))
SORTED = ((2, 3, 4), (2, 3, 4), (1, 5, 2))
PACKS = pytest.mark.parametrize("grids", [UNIFORM, MIXED, SORTED], ids=["uniform", "mixed", "sorted"])


def masked(q, k, v, mask):
    """Attention by the book: q (Lq, N, K), mask (Lq, Lk), rows without a True give zeros."""
    scores = torch.einsum("qnc,knc->nqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0.0)
    return torch.einsum("nqk,knc->qnc", weights, v)


def sees(grids, rule):
    """(L, L) mask: same sample, and `rule` holds for the positions (L, 1, 3) and (1, L, 3)."""
    cond = pack_conditioning(grids, [torch.zeros(0, 1)] * len(grids))
    sample, at = cond.sample_of_token, cond.positions
    return (sample[:, None] == sample) & rule(at[:, None], at[None])


def qkv(q_tokens, k_tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(q_tokens, 2, 8), (k_tokens, 2, 8), (k_tokens, 2, 8)]
    return [torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_equal_with_gradients(layout, mask):
    q, k, v = qkv(sum(layout.query_lengths), sum(layout.key_lengths))
    ours, naive = attention(q, k, v, layout, "sdpa"), masked(q, k, v, mask)
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-12)
    weight = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), weight) for out in (ours, naive)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@PACKS
def test_full_attention_is_a_mask_of_samples(grids):
    assert_equal_with_gradients(AttentionLayout.full(grids, CPU), sees(grids, lambda a, b: torch.tensor(True)))


@PACKS
def test_spatial_attention_is_a_mask_of_frames(grids):
    assert_equal_with_gradients(AttentionLayout.spatial(grids, CPU), sees(grids, lambda a, b: a[..., 0] == b[..., 0]))


@PACKS
def test_temporal_attention_is_a_mask_of_places(grids):
    rule = sees(grids, lambda a, b: (a[..., 1:] == b[..., 1:]).all(-1))
    assert_equal_with_gradients(AttentionLayout.temporal(grids, CPU), rule)


@PACKS
@pytest.mark.parametrize("shifted", [False, True])
def test_windowed_attention_is_a_mask_of_windows(grids, shifted):
    def window_of(at, size):
        window = torch.tensor([2, 2, 3])
        shift = torch.tensor([1, 1, 1]) * shifted * (size > window)
        return (at + shift) // window

    parts = []
    for grid in grids:
        size = torch.tensor(grid)
        parts.append(sees((grid,), lambda a, b, size=size: (window_of(a, size) == window_of(b, size)).all(-1)))
    assert_equal_with_gradients(AttentionLayout.windowed(grids, (2, 2, 3), shifted, CPU), torch.block_diag(*parts).bool())


def test_shifted_windows_join_what_plain_windows_part():
    grids, window = ((4, 4, 4),), (2, 2, 2)
    plain, shifted = (AttentionLayout.windowed(grids, window, s, CPU) for s in (False, True))
    assert plain.query_lengths == (8,) * 8
    assert sorted(set(shifted.query_lengths)) == [1, 2, 4, 8]
    assert len(shifted.query_lengths) == 27


@pytest.mark.parametrize("text_lengths", [(3, 3, 3, 3), (3, 1, 4, 3), (0, 2, 0, 5), (0, 0, 0, 0)])
@pytest.mark.parametrize("lengths", [(24, 10, 24, 12), (6, 6, 6, 6)])
def test_cross_attention_sees_the_text_of_its_sample_only(lengths, text_lengths):
    samples = [torch.ones(q, k, dtype=torch.bool) for q, k in zip(lengths, text_lengths, strict=True)]
    mask = torch.block_diag(*samples).bool()
    assert_equal_with_gradients(AttentionLayout.cross(lengths, text_lengths, CPU), mask.view(sum(lengths), sum(text_lengths)))


def test_uniform_segments_fold_without_a_copy():
    for layout in (AttentionLayout.full(UNIFORM, CPU), AttentionLayout.spatial(SORTED, CPU)):
        assert layout.folded.query is layout.folded.key is layout.folded.restore is None
    assert AttentionLayout.full(UNIFORM, CPU).folded.batches == ((3, 24, 24),)


def test_tokens_that_a_layout_does_not_cover_are_refused():
    q, k, v = qkv(23, 23)
    with pytest.raises(AssertionError):
        attention(q, k, v, AttentionLayout.full(((2, 3, 4),), CPU), "sdpa")


def test_xformers_on_the_cpu_names_the_key_to_change():
    q, k, v = qkv(24, 24)
    with pytest.raises(UserError, match=r"backbone\.attention_backend"):
        attention(q, k, v, AttentionLayout.full(((2, 3, 4),), CPU), "xformers")


@PACKS
def test_the_mask_for_xformers_is_the_same_segmentation(grids):
    pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is not installed", exc_type=ImportError)
    layout = AttentionLayout.temporal(grids, CPU)
    total = sum(layout.query_lengths)
    bias = layout.block_diagonal_mask.materialize((total, total))
    blocks = torch.block_diag(*[torch.ones(n, n) for n in layout.query_lengths]).bool()
    assert torch.equal(bias == 0, blocks)
    assert torch.equal(bias == -torch.inf, ~blocks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@PACKS
def test_xformers_equals_sdpa(grids):
    pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is not installed", exc_type=ImportError)
    layout = AttentionLayout.temporal(grids, torch.device("cuda"))
    q, k, v = (x.detach().cuda().bfloat16() for x in qkv(sum(layout.query_lengths), sum(layout.key_lengths)))
    # bfloat16 keeps 8 bits of mantissa, and the two kernels sum in different orders
    torch.testing.assert_close(attention(q, k, v, layout, "xformers"), attention(q, k, v, layout, "sdpa"), rtol=0, atol=2e-2)
