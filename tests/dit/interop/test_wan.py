"""Parity with diffusers' WanTransformer3DModel under our key map, in both directions."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from data_pipelines.errors import UserError
from data_pipelines.packed import Conditioning, pack_conditioning, patchify, unpack
from dit.config import SpatioTemporalDiTConfig
from dit.interop.wan import (
    backbone_config,
    channels_of,
    diffusers_config,
    from_diffusers,
    original_config,
    to_diffusers,
    to_original,
    unlike_comfyui,
)
from dit.models import build_backbone

CHANNELS, TEXT = 4, 16
SIZES = [  # head size, patch, latents (T, H, W) of the samples of a pack
    pytest.param(12, (1, 2, 2), [(3, 4, 6)], id="one clip"),
    pytest.param(32, (1, 2, 2), [(1, 6, 10)], id="one image"),
    pytest.param(14, (1, 1, 1), [(3, 5, 1), (3, 5, 1)], id="two alike, odd grid"),
    pytest.param(20, (2, 1, 3), [(4, 3, 9), (2, 7, 3), (4, 3, 9)], id="clip, image and clip"),
]


def pair(head_size, patch, dtype):
    """A randomly initialised diffusers model, and ours with its weights."""
    config = SpatioTemporalDiTConfig(
        hidden_size=3 * head_size, depth=2, num_heads=3, ffn_size=50, patch_size=patch, frequency_size=32, modulation="shared"
    )
    fields = diffusers_config(config, channels=CHANNELS, text_width=TEXT)
    torch.manual_seed(0)
    theirs = WanTransformer3DModel.from_config(fields).to(dtype)
    for parameter in theirs.parameters():  # biases and norm weights would otherwise be trivial
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    ours = build_backbone(config, channels=CHANNELS, text_width=TEXT).to(dtype)
    ours.load_state_dict(from_diffusers(theirs.state_dict(), config), strict=True)
    return theirs, ours, config


def pack(sizes, patch, dtype):
    g = torch.Generator().manual_seed(2)
    latents = [torch.randn(CHANNELS, *size, generator=g, dtype=dtype) for size in sizes]
    texts = [torch.randn(3 + i % 2, TEXT, generator=g, dtype=dtype) for i in range(len(sizes))]
    grids = [tuple(have // part for have, part in zip(size, patch)) for size in sizes]
    t = torch.rand(len(sizes), generator=g, dtype=dtype)
    return latents, texts, t, pack_conditioning(grids, texts)


def widen(theirs, monkeypatch):
    """Remove the float32 that diffusers writes into the code and the constants of a float64 model."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else x.to(torch.float32))
    embedder, rope = theirs.condition_embedder, theirs.rope
    half = theirs.config.freq_dim // 2

    def timesteps(t):
        angles = t[:, None] * 10_000.0 ** (-torch.arange(half).double() / half)
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)

    monkeypatch.setattr(embedder.timesteps_proj, "forward", timesteps)
    sizes = (rope.t_dim, rope.h_dim, rope.w_dim)
    angles = [torch.outer(torch.arange(64).double(), 1.0 / 10_000.0 ** (torch.arange(0, n, 2).double() / n)) for n in sizes]
    table = torch.cat([a.repeat_interleave(2, dim=1) for a in angles], dim=1)
    rope.freqs_cos, rope.freqs_sin = table.cos(), table.sin()


@pytest.mark.parametrize(("head_size", "patch", "sizes"), SIZES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_outputs_equal_diffusers(head_size, patch, sizes, dtype, atol, monkeypatch):
    theirs, ours, _ = pair(head_size, patch, dtype)
    if dtype == torch.float64:
        widen(theirs, monkeypatch)
    latents, texts, t, cond = pack(sizes, patch, dtype)
    with torch.no_grad():
        packed = ours(torch.cat([patchify(x, patch) for x in latents]), t, cond)
        for x, text, time, out in zip(latents, texts, t, unpack(packed, cond, patch), strict=True):
            (expected,) = theirs(x[None], time[None] * 1000, text[None], return_dict=False)
            assert expected.std() > 0.1
            torch.testing.assert_close(out, expected[0], rtol=0, atol=atol)


def test_times_of_single_tokens_equal_diffusers(monkeypatch):
    theirs, ours, _ = pair(12, (1, 2, 2), torch.float64)
    widen(theirs, monkeypatch)
    latents, texts, _, cond = pack([(3, 4, 6)], (1, 2, 2), torch.float64)
    times = torch.tensor([0.0, 0.7], dtype=torch.float64)
    rows = (cond.positions[:, 0] > 0).long()  # a clean first frame, the rest noisy
    two = Conditioning(cond.grids, cond.text, cond.text_lengths, rows)
    with torch.no_grad():
        (out,) = unpack(ours(patchify(latents[0], (1, 2, 2)), times, two), two, (1, 2, 2))
        (expected,) = theirs(latents[0][None], 1000 * times[rows][None], texts[0][None], return_dict=False)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-10)


def test_the_key_map_is_lossless():
    theirs, ours, config = pair(20, (2, 1, 3), torch.float32)
    exported = to_diffusers(ours.state_dict(), config)
    original = theirs.state_dict()
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    back = from_diffusers(exported, config)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())
    assert channels_of(back, config) == CHANNELS


def test_the_names_of_wans_own_code_are_those_that_diffusers_converts():
    theirs, ours, config = pair(20, (1, 2, 2), torch.float32)
    original = to_original(ours.state_dict(), config)
    assert {"head.modulation", "blocks.1.modulation", "blocks.0.norm3.weight", "blocks.0.self_attn.o.bias"} <= original.keys()
    converted = convert_wan_transformer_to_diffusers(dict(original))
    expected = theirs.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)
    fields = original_config(config, channels=CHANNELS, text_width=TEXT)
    assert (fields["dim"], fields["num_heads"], fields["in_dim"], fields["text_dim"], fields["patch_size"]) == (60, 3, 4, 16, [1, 2, 2])
    assert unlike_comfyui(config, channels=CHANNELS, text_width=TEXT) == [
        "head size 20, not 128", "frequency_size 32, not 256", "text width 16, not 4096", "latent channels 4, not 16",
    ]  # fmt: skip
    wan = SpatioTemporalDiTConfig(hidden_size=1536, depth=30, num_heads=12, ffn_size=8960, patch_size=(1, 2, 2))
    assert unlike_comfyui(wan, channels=16, text_width=4096) == []


def test_the_config_survives_the_round_trip():
    theirs, _, config = pair(20, (2, 1, 3), torch.float32)
    assert backbone_config(theirs.config) == config
    assert backbone_config({**theirs.config, "out_channels": None, "patch_size": (2, 1, 3)}) == config
    with pytest.raises(UserError, match=r"describes no Wan transformer: it lacks ffn_dim, text_dim"):
        backbone_config({key: value for key, value in theirs.config.items() if key not in ("ffn_dim", "text_dim")})


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"modulation": "per_block"}, "backbone.modulation"),
        ({"attention": "factorised"}, "backbone.attention"),
        ({"attention": "windowed"}, "backbone.attention"),
        ({"num_classes": 3}, "backbone.num_classes"),
    ],
)
def test_what_wan_has_not_is_refused_by_its_key(options, key):
    config = SpatioTemporalDiTConfig(hidden_size=24, depth=1, num_heads=2, ffn_size=40, **options)
    state = build_backbone(config, channels=CHANNELS, text_width=TEXT).state_dict()
    with pytest.raises(UserError, match=key):
        to_diffusers(state, config)
    with pytest.raises(UserError, match=key):
        diffusers_config(config, channels=CHANNELS, text_width=TEXT)


def test_weights_that_do_not_fit_are_refused():
    theirs, _, config = pair(12, (1, 2, 2), torch.float32)
    with pytest.raises(UserError, match=r"backbone\.depth: 3"):
        from_diffusers(theirs.state_dict(), config.model_copy(update={"depth": 3}))
    with pytest.raises(UserError, match=r"backbone\.patch_size"):
        from_diffusers(theirs.state_dict(), config.model_copy(update={"patch_size": (1, 1, 4)}))
    with pytest.raises(UserError, match="image_dim: 1280"):
        backbone_config({**theirs.config, "image_dim": 1280})
