from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_pipelines import randomness
from data_pipelines.packed import Conditioning, PackedLatents, pack_conditioning
from dit.config import TrainRun
from dit.config.backbone import SpatioTemporalDiTConfig
from dit.config.objective import CleanTokens, RectifiedFlowConfig
from dit.diffusion import Told, build_objective
from dit.diffusion.clean_tokens import draw_clean
from dit.diffusion.paths import RectifiedFlow
from dit.models import build_backbone

GRIDS = ((3, 4, 4), (1, 4, 2), (1, 1, 1), (2, 3, 3), (5, 1, 1))
KEYS = tuple(range(40, 45))


def pack(chosen: list[int], keys: tuple[int, ...] = KEYS) -> PackedLatents:
    grids, own = [GRIDS[i] for i in chosen], tuple(keys[i] for i in chosen)
    tokens = [randomness.normal((t * h * w, 3), key, "latents") for key, (t, h, w) in zip(own, grids, strict=True)]
    cond = pack_conditioning(grids, [torch.full((1, 4), float(i)) for i in chosen])
    return PackedLatents(torch.cat(tokens), cond, own, tuple(map(str, chosen)), torch.ones(len(chosen)))


def objective(**clean: object):
    config = RectifiedFlowConfig.model_validate({"condition_dropout": 0.0, "clean_tokens": clean or None})
    return build_objective(config, torch.zeros(1, 4), None)


@pytest.mark.parametrize("pattern", ["beginning", "end", "ends", "inside", "outside"])
def test_patterns_are_what_they_are_called_and_leave_something_to_learn(pattern: str) -> None:
    config = CleanTokens.model_validate({"fraction": 1.0, "patterns": [pattern]})
    seen = set()
    for key in range(200):
        clean = draw_clean(config, [key], [(4, 3, 5)])
        assert clean is not None
        grid = clean.view(4, 3, 5)
        assert 0 < int(clean.sum()) < clean.numel()
        seen.add(tuple(clean.tolist()))
        frames, places = grid.flatten(1).all(1).tolist(), grid if pattern == "inside" else ~grid
        if pattern in ("inside", "outside"):
            box = places[0]
            assert bool((places == box).all())
            assert int(box.sum()) == int(box.any(0).sum()) * int(box.any(1).sum())
            continue
        assert grid.flatten(1).any(1).tolist() == frames  # whole frames
        expected = {"beginning": sorted(frames, reverse=True), "end": sorted(frames), "ends": [True, False, False, True]}[pattern]
        assert frames == expected
    assert len(seen) == {"beginning": 3, "end": 3, "ends": 1}.get(pattern, len(seen))
    assert len(seen) > 40 or pattern not in ("inside", "outside")


def test_the_fraction_is_that_of_the_samples_and_patterns_that_do_not_fit_are_not_drawn() -> None:
    config = CleanTokens(fraction=0.3)
    masks = draw_clean(config, range(2000), [(3, 2, 2)] * 2000)
    assert masks is not None
    assert float(masks.view(2000, -1).any(1).float().mean()) == pytest.approx(0.3, abs=0.04)
    assert draw_clean(CleanTokens(fraction=1.0), range(50), [(1, 1, 1)] * 50) is None
    assert draw_clean(CleanTokens(fraction=1.0, patterns=("beginning", "ends")), range(50), [(1, 4, 4)] * 50) is None
    assert draw_clean(None, range(50), [(3, 4, 4)] * 50) is None


def test_the_network_sees_clean_tokens_at_zero_and_learns_from_the_others() -> None:
    batch, seen = pack([0, 1, 2, 3, 4]), []

    def oracle(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        level = cond.per_token(t)[:, None]
        seen.append((x, level[:, 0], cond))
        exact = (x - batch.tokens) / level
        return torch.where(level > 0, exact, 100.0)  # what it says of clean tokens does not count

    losses = objective(fraction=1.0)(oracle, batch, 0.0)
    ((x, level, _),) = seen
    clean = draw_clean(CleanTokens(fraction=1.0), batch.keys, batch.cond.grids)
    assert clean is not None
    assert torch.equal(level == 0, clean)
    assert torch.equal(x[clean], batch.tokens[clean])
    assert torch.equal(level[~clean], batch.cond.per_token(losses.t)[~clean])  # t is the level of the noised tokens
    assert losses.per_sample.max() < 1e-8
    plain = objective()(lambda x, t, cond: torch.zeros_like(x), batch, 0.0)
    there = (~clean).float()[:, None]
    masked = objective(fraction=1.0)(lambda x, t, cond: torch.zeros_like(x), batch, 0.0)
    noise = torch.cat([randomness.normal((n, 3), key, "noise") for key, n in zip(batch.keys, batch.cond.lengths, strict=True)])
    error = (noise - batch.tokens).square() * there
    expected = [float(e.sum() / m.sum() / 3) for e, m in zip(error.split(batch.cond.lengths), there.split(batch.cond.lengths), strict=True)]
    assert masked.per_sample.tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(masked.t, plain.t)
    assert not torch.allclose(masked.per_sample, plain.per_sample)


def test_draws_of_a_sample_do_not_depend_on_the_pack() -> None:
    def denoiser(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return x * cond.per_token(t)[:, None] + 1

    together = objective(fraction=0.7)(denoiser, pack([3, 0, 4, 1, 2]), 0.0)
    for place, index in enumerate([3, 0, 4, 1, 2]):
        alone = objective(fraction=0.7)(denoiser, pack([index]), 0.0)
        assert float(alone.per_sample) == pytest.approx(float(together.per_sample[place]), rel=1e-6)
        assert float(alone.t) == float(together.t[place])


def test_a_sample_without_clean_tokens_has_the_loss_it_always_had() -> None:
    batch = pack([0, 3])
    for key in range(300):  # until one of the two has clean tokens
        keyed = replace(batch, keys=(key, key + 1000))
        clean = draw_clean(CleanTokens(fraction=0.5), keyed.keys, keyed.cond.grids)
        if clean is not None and bool(clean[:48].any()) != bool(clean[48:].any()):
            break
    with_clean = objective(fraction=0.5)(lambda x, t, cond: x, keyed, 0.0)
    without = objective()(lambda x, t, cond: x, keyed, 0.0)
    assert clean is not None
    other = int(bool(clean[:48].any()))
    assert float(with_clean.per_sample[other]) == pytest.approx(float(without.per_sample[other]), rel=1e-6)


def test_a_told_backbone_heeds_what_it_is_told() -> None:
    """Through the rows of a real network: what is unknown changes with what is known, and what stands in its place beforehand does not."""
    config = SpatioTemporalDiTConfig(hidden_size=32, depth=1, num_heads=2, ffn_size=32, patch_size=(1, 1, 1))
    torch.manual_seed(0)
    network = build_backbone(config, channels=3, text_width=4)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1)
    for block in network.blocks:
        torch.nn.init.normal_(block.modulation.table, std=0.5)
    batch = pack([0, 3])
    known = torch.arange(len(batch.tokens)) % 3 == 0
    x, t = torch.randn_like(batch.tokens), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        answer = Told(network, RectifiedFlow(), batch.tokens, known)(x, t, batch.cond)
        elsewhere = torch.where(known[:, None], x + 5, x)
        assert torch.equal(Told(network, RectifiedFlow(), batch.tokens, known)(elsewhere, t, batch.cond), answer)
        other = Told(network, RectifiedFlow(), batch.tokens + 1, known)(x, t, batch.cond)
        assert (other - answer)[~known].abs().max() > 1e-3


def test_a_config_with_clean_tokens_is_read(tmp_path) -> None:
    values = {"data": {"sources": [{"path": "x"}], "token_budget": 4, "packs_per_step": 1}, "out": "y", "optimizer": {"lr": 1e-3}}
    values |= {"backbone": {"hidden_size": 48, "depth": 2, "num_heads": 4, "ffn_size": 96}, "train": {"samples": 8, "seed": 0}}
    run = TrainRun.model_validate(values | {"objective": {"clean_tokens": {"fraction": 0.25, "patterns": ["beginning"]}}})
    assert run.objective.clean_tokens == CleanTokens(fraction=0.25, patterns=("beginning",))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="clean_tokens"):
        TrainRun.model_validate(values | {"objective": {"name": "ddpm", "clean_tokens": {"fraction": 0.25}}})
