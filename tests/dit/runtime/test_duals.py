"""Dual numbers against `torch.func.jvp`: rule by rule, and through the backbone with all its options."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipelines.packed import Conditioning, pack_conditioning
from dit.config import SpatioTemporalDiTConfig
from dit.models import SpatioTemporalDiT, build_backbone
from dit.models.attention import AttentionLayout, attention
from dit.runtime import duals
from dit.runtime.duals import dual, parts

Function = Callable[..., Tensor]
FLOAT64 = 1e-10


def oracle(function: Function, values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, values, tangents)


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


A, B, ROW = random(4, 6, seed=1), random(4, 6, seed=2), random(6, seed=3)
SQUARE, FIRST = random(6, 6, seed=4), torch.tensor([0])
FUNCTIONS: dict[str, Function] = {
    "sums": lambda x, y: 2 + x - y + ROW - (1 - x) - A + (A - y),
    "products": lambda x, y: x * y * A + 3 * x + A * y - -x,
    "quotients": lambda x, y: x / (2 + y * y) + 1 / (3 + x * x) + A / (1 + y * y) + x / 4,
    "broadcast": lambda x, y: x[:, :1] + A + y * ROW + torch.addcmul(ROW, x[:1], y),
    "elementwise": lambda x, y: x.sin() + y.cos() + x.square() * x.exp() + (1 + y.square()).log() * (-y).exp() + x.abs() + y**3,
    "roots": lambda x, y: (2 + x.sin()).sqrt() * (2 + y.cos()).rsqrt() + x.clamp(min=-0.5, max=0.7) + torch.sigmoid(y) * torch.expm1(x),
    "activations": lambda x, y: F.silu(x) + F.gelu(y, approximate="tanh"),
    "matrices": lambda x, y: torch.addmm(ROW, x, SQUARE) + F.linear(y, SQUARE, ROW) + F.linear(x, SQUARE) + x @ (y.transpose(0, 1) @ x),
    "layer_norm": lambda x, y: F.layer_norm(x + 3, (6,), ROW, A[0], eps=1e-6) + F.layer_norm(y, (6,), eps=1e-3),
    "rms_norm": lambda x, y: F.rms_norm(x + 3, (6,), ROW, eps=1e-6) + F.rms_norm(y, (6,)),
    "shapes": lambda x, y: torch.cat([x.unflatten(1, (2, 3)).flatten(0, 1), torch.stack([y[0, :3], A[0, :3]])]).transpose(0, 1).reshape(-1),
    "pieces": lambda x, y: sum(x.chunk(2, dim=1)[0].unbind(1)) + F.pad(y, (0, 1)).split([5, 2], 1)[1].index_select(1, FIRST)[:, 0],
    "choices": lambda x, y: torch.where(A < 0, x, y) + torch.where(A < B, ROW, x) + torch.where(x > 0, y, torch.zeros_like(y)),
    "floor": lambda x, y: (x - x.floor()) * y.to(torch.float64).double(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_rule_is_the_derivative(name: str) -> None:
    values, tangents = (random(4, 6, seed=5), random(4, 6, seed=6)), (random(4, 6, seed=7), random(4, 6, seed=8))
    expected, rate = oracle(FUNCTIONS[name], values, tangents)
    found = parts(FUNCTIONS[name](*map(dual, values, tangents)))
    assert error(found[0], expected) < 1e-14
    assert error(found[1], rate) < FLOAT64
    for moving in (0, 1):  # the other a constant, of which there is no tangent to carry
        still = tuple(tangent if i == moving else torch.zeros_like(tangent) for i, tangent in enumerate(tangents))
        mixed = [dual(x, v) if i == moving else x for i, (x, v) in enumerate(zip(values, tangents, strict=True))]
        rate = oracle(FUNCTIONS[name], values, still)[1]
        torch.testing.assert_close(parts(FUNCTIONS[name](*mixed))[1], rate, rtol=FLOAT64, atol=1e-12)


@pytest.mark.parametrize("scores", [1, 40, 1 << 20])
@pytest.mark.parametrize("moving", [(0, 1, 2), (0,), (1,), (2,)])
def test_attention_in_blocks_of_any_size(scores: int, moving: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duals, "SCORES", scores)
    values = random(3, 2, 5, 4, seed=1), random(3, 2, 7, 4, seed=2), random(3, 2, 7, 4, seed=3)
    tangents = tuple(random(*x.shape, seed=4 + i) if i in moving else torch.zeros_like(x) for i, x in enumerate(values))
    expected, rate = oracle(F.scaled_dot_product_attention, values, tangents)
    mixed = [dual(x, v) if i in moving else x for i, (x, v) in enumerate(zip(values, tangents, strict=True))]
    found = parts(F.scaled_dot_product_attention(*mixed))
    assert error(found[0], expected) < 1e-14
    assert error(found[1], rate) < FLOAT64


def test_what_has_no_rule_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"no rule for erfinv: give it one in dit/runtime/duals\.py"):
        torch.erfinv(dual(A, B))


CHANNELS, TEXT = 3, 5
MIXED, UNIFORM = ((2, 3, 4), (1, 5, 2), (3, 2, 2)), ((2, 3, 2),) * 3
BACKBONES: dict[str, dict[str, Any]] = {
    "wan": {},
    "per_block": {"modulation": "per_block"},
    "factorised": {"attention": "factorised"},
    "windowed": {"attention": "windowed", "window": (2, 2, 2)},
    "classes": {"num_classes": 4, "jumps": True},
    "learned_variance": {"learned_variance": True},
    "checkpointed": {"activation_checkpointing": "full", "jumps": True},
    "selective": {"activation_checkpointing": "selective", "jumps": True},
}


def backbone(**options: Any) -> SpatioTemporalDiT:
    sizes = {"hidden_size": 24, "depth": 2, "num_heads": 2, "ffn_size": 40, "patch_size": (1, 2, 1), "frequency_size": 16}
    torch.manual_seed(0)
    model = build_backbone(SpatioTemporalDiTConfig.model_validate(sizes | options), channels=CHANNELS, text_width=TEXT).double()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def plain_rotation(x: Tensor, phases: Tensor) -> Tensor:
    """The rotary embedding in operations that torch knows the derivative of."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * phases.real - b * phases.imag, a * phases.imag + b * phases.real], dim=-1).flatten(-2)


Point = tuple[Conditioning, tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def point(grids: tuple[tuple[int, int, int], ...], rows: bool = False, texts: tuple[int, ...] = (3, 1, 4)) -> Point:
    """Conditioning, and values and tangents of x_t, t and the jump."""
    cond = pack_conditioning(grids, [random(n, TEXT, seed=n) for n in texts], torch.arange(len(grids)))
    if rows:
        cond = Conditioning(cond.grids, cond.text, cond.text_lengths, torch.arange(sum(cond.lengths)) % 5, cond.labels)
    count = 5 if rows else len(grids)
    t = random(count, seed=1).sigmoid()
    values = random(sum(cond.lengths), 2 * CHANNELS, seed=2), t, t / 3
    return cond, values, (random(*values[0].shape, seed=3), torch.ones(count).double(), random(count, seed=4))


def through(network: Function, at: Point) -> tuple[Tensor, Tensor]:
    cond, values, tangents = at
    x, t, jump = map(dual, values, tangents)
    return parts(network(x, t, cond.over(jump)))


def truth(network: Function, at: Point, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    cond, values, tangents = at
    with monkeypatch.context() as patch:
        patch.setattr("dit.models.blocks.rotate", plain_rotation)
        return oracle(lambda x, t, jump: network(x, t, cond.over(jump)), values, tangents)


@pytest.mark.parametrize(
    ("name", "grids", "rows"),
    [(name, MIXED, False) for name in BACKBONES] + [("wan", UNIFORM, False), ("classes", UNIFORM, True), ("per_block", MIXED, True)],
)
def test_the_derivative_of_the_backbone_is_exact(name: str, grids: Any, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network, at = backbone(**BACKBONES[name]), point(grids, rows)
    expected, rate = truth(network, at, monkeypatch)
    found = through(network, at)
    assert error(found[0], expected) < 1e-13
    assert error(found[1], rate) < FLOAT64
    single: Any = (at[0], *(tuple(x.float() for x in part) for part in at[1:]))
    assert error(through(network.float(), single)[1], truth(network, single, monkeypatch)[1]) < 1e-5


def test_samples_without_text_have_a_derivative_too(monkeypatch: pytest.MonkeyPatch) -> None:
    network, at = backbone(), point(MIXED, texts=(3, 0, 4))
    assert error(through(network, at)[1], truth(network, at, monkeypatch)[1]) < FLOAT64
    nothing = point(MIXED, texts=(0, 0, 0))
    assert error(through(network, nothing)[1], truth(network, nothing, monkeypatch)[1]) < FLOAT64


def test_in_bfloat16_the_derivative_is_as_exact_as_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    network, (cond, values, tangents) = backbone().bfloat16().double(), point(MIXED)
    values = tuple(x.bfloat16().double() for x in values)  # type: ignore[assignment]
    answer, rate = truth(network, (cond, values, tangents), monkeypatch)
    low: Any = (cond, tuple(x.float() for x in values), tuple(x.float() for x in tangents))
    rounded, found = through(network.bfloat16(), low)
    assert error(rounded, answer) > 1e-3
    assert error(found, rate) < 5e-3  # 2^-8, the resolution of the weights, is 4e-3


def test_xformers_leaves_dual_numbers_to_torch() -> None:
    layout = AttentionLayout.full(MIXED, torch.device("cpu"))
    q, k, v = (dual(random(46, 2, 4, seed=i), random(46, 2, 4, seed=i + 3)) for i in range(3))
    for one, other in zip(parts(attention(q, k, v, layout, "xformers")), parts(attention(q, k, v, layout, "sdpa"))):
        assert torch.equal(one, other)


def test_attention_holds_a_block_of_scores() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            out = function(*arguments, **(options or {}))
            self.elements = max(self.elements, out.numel() if isinstance(out, Tensor) else 0)
            return out

    q, k, v = (dual(random(1, 2, 3000, 4, seed=i), random(1, 2, 3000, 4, seed=i)) for i in range(3))
    with Largest() as largest:
        F.scaled_dot_product_attention(q, k, v)
    assert largest.elements <= duals.SCORES < 3000**2
