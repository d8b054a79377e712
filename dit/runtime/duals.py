"""Dual numbers: a value and its tangent, carried together through the functions of torch by a rule for each. No graph is kept.

One call of a network on duals is its derivative along a direction (forward mode). The network runs as ever, module by module, so that
hooks which gather its weights do their work. What is no dual is constant; a function that has no rule raises.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = 1 << 20
"""Scores of attention that are held at a time."""


def dual(value: Tensor, tangent: Tensor) -> Tensor:
    """`value` that moves at the rate `tangent`, of the same shape: functions of torch take it as they take a tensor."""
    return cast(Tensor, Dual(value, tangent))


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and tangent, which is zero for a constant."""
    return (x.value, x.tangent) if isinstance(x, Dual) else (x, torch.zeros_like(x))


def apply_linear(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function`, linear and row by row along the first axis, for which torch has no name: of a dual, value and tangent in one call."""
    return Dual(*function(torch.stack([x.value, x.tangent], dim=1)).unbind(1)) if isinstance(x, Dual) else function(x)


def _method(name: str) -> Callable[..., Any]:
    """A method of tensors, by its rule."""
    method = getattr(Tensor, name)
    return lambda self, *arguments, **options: Dual.__torch_function__(method, (), (self, *arguments), options)


class Dual:
    """Looks like a tensor to functions of torch and is none to others, so that no hook for gradients takes it for one."""

    def __init__(self, value: Tensor, tangent: Tensor) -> None:
        assert value.shape == tangent.shape, (value.shape, tangent.shape)
        self.value, self.tangent = value, tangent

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None) -> Any:
        name, options = function.__name__.strip("_"), options or {}
        if rule := RULES.get(name):
            return rule(*arguments, **options)
        if slope := SLOPES.get(name):
            return _elementwise(function, slope, *arguments, **options)
        if name not in CONSTANT and name not in LINEAR:
            raise NotImplementedError(f"dual numbers have no rule for {name}: give it one in dit/runtime/duals.py")
        first, rest = arguments[0], [_value(x) for x in arguments[1:]]
        if name in CONSTANT or not isinstance(first, Dual):
            return function(_value(first), *rest, **options)
        values, tangents = function(first.value, *rest, **options), function(first.tangent, *rest, **options)
        return Dual(values, tangents) if isinstance(values, Tensor) else tuple(map(Dual, values, tangents))

    def __getattr__(self, name: str) -> Any:
        """A method of tensors; anything else, such as the shape, is that of the value."""
        return partial(_method(name), self) if callable(getattr(Tensor, name)) else getattr(self.value, name)

    def __len__(self) -> int:
        return len(self.value)

    def __rsub__(self, other: Any) -> "Dual":
        return _difference(other, self)

    def __rtruediv__(self, other: Any) -> "Dual":
        return _quotient(other, self)

    __add__ = __radd__ = _method("__add__")
    __mul__ = __rmul__ = _method("__mul__")
    __sub__, __truediv__, __matmul__, __neg__ = (_method(f"__{name}__") for name in ("sub", "truediv", "matmul", "neg"))
    __lt__, __le__, __gt__, __ge__ = (_method(f"__{name}__") for name in ("lt", "le", "gt", "ge"))
    __eq__, __getitem__, __pow__ = _method("__eq__"), _method("__getitem__"), _method("__pow__")
    __hash__ = None  # type: ignore[assignment]


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Dual) else x


def _pieces(*tensors: Any) -> list[tuple[Any, Tensor | None]]:
    """Value and tangent of each, None for constants."""
    return [(x.value, x.tangent) if isinstance(x, Dual) else (x, None) for x in tensors]


def _total(value: Tensor, *terms: Tensor | None) -> Dual:
    """The dual whose tangent is the sum of `terms` that there are."""
    there = [term for term in terms if term is not None]
    return Dual(value, sum(there[1:], there[0]).expand(value.shape).to(value.dtype))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _elementwise(function: Any, slope: Callable[..., Tensor], x: Dual, *rest: Any, **options: Any) -> Dual:
    """slope: the derivative, of x, f(x) and the options."""
    y, wide = function(x.value, *rest, **options), _wide(x.value)
    return Dual(y, (slope(wide, _wide(y), *rest, **options) * x.tangent).to(y.dtype))


def _sum(a: Any, b: Any) -> Dual:
    (a, a_rate), (b, b_rate) = _pieces(a, b)
    return _total(a + b, a_rate, b_rate)


def _difference(a: Any, b: Any) -> Dual:
    (a, a_rate), (b, b_rate) = _pieces(a, b)
    return _total(a - b, a_rate, None if b_rate is None else -b_rate)


def _product(a: Any, b: Any) -> Dual:
    (a, a_rate), (b, b_rate) = _pieces(a, b)
    return _total(a * b, None if a_rate is None else a_rate * b, None if b_rate is None else a * b_rate)


def _quotient(a: Any, b: Any) -> Dual:
    (a, a_rate), (b, b_rate) = _pieces(a, b)
    y = a / b
    return _total(y, None if a_rate is None else a_rate / b, None if b_rate is None else -y / b * b_rate)


def _matmul(a: Any, b: Any) -> Dual:
    (a, a_rate), (b, b_rate) = _pieces(a, b)
    return _total(a @ b, None if a_rate is None else a_rate @ b, None if b_rate is None else a @ b_rate)


def _addmm(bias: Any, a: Any, b: Any) -> Dual:
    return _sum(_matmul(a, b), bias)


def _addcmul(x: Any, a: Any, b: Any) -> Dual:
    (x, x_rate), (a, a_rate), (b, b_rate) = _pieces(x, a, b)
    value, rate = torch.addcmul(x, a, b), x.new_zeros(()) if x_rate is None else x_rate
    for one, other in ((a_rate, b), (a, b_rate)):
        rate = rate if one is None or other is None else torch.addcmul(rate, one, other)
    return _total(value, rate)


def _linear(x: Dual, weight: Tensor, bias: Tensor | None = None) -> Dual:
    return Dual(F.linear(x.value, weight, bias), F.linear(x.tangent, weight))


def _where(condition: Tensor, a: Any, b: Any) -> Dual:
    (a, a_rate), (b, b_rate) = _pieces(a, b)
    value = torch.where(condition, a, b)
    a_rate, b_rate = (value.new_zeros(()) if rate is None else rate for rate in (a_rate, b_rate))
    return Dual(value, torch.where(condition, a_rate, b_rate))


def _joined(function: Callable[..., Tensor]) -> Callable[..., Dual]:
    def rule(tensors: Sequence[Any], *rest: Any, **options: Any) -> Dual:
        values, tangents = zip(*(parts(x) for x in tensors))
        return Dual(function(values, *rest, **options), function(tangents, *rest, **options))

    return rule


def _layer_norm(
    x: Dual, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, **_: Any
) -> Dual:
    value, mean, scale = torch.native_layer_norm(x.value, shape, weight, bias, eps)
    normed, rate = (_wide(x.value) - _wide(mean)) * _wide(scale), _wide(x.tangent)
    rate = rate - rate.mean(-1, keepdim=True)
    return _normed(value, normed, rate, _wide(scale), weight)


def _rms_norm(x: Dual, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None, **_: Any) -> Dual:
    wide = _wide(x.value)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + (torch.finfo(wide.dtype).eps if eps is None else eps))
    return _normed(F.rms_norm(x.value, shape, weight, eps), wide * scale, _wide(x.tangent), scale, weight)


def _normed(value: Tensor, normed: Tensor, rate: Tensor, scale: Tensor, weight: Tensor | None) -> Dual:
    """scale (rate - normed mean(normed rate)) weight, for a norm over the last axis."""
    rate = scale * torch.addcmul(rate, normed, (normed * rate).mean(-1, keepdim=True), value=-1)
    return Dual(value, (rate if weight is None else rate * weight).to(value.dtype))


def _attention(q: Any, k: Any, v: Any) -> Dual:
    """Softmax attention of (g, N, q, K) on (g, N, k, K), block by block of queries: about `SCORES` scores are held, whatever the length.

    With scores S and shares P = softmax S: dS = dQ K' + Q dK', H = P dS, dO = P dV + H V - sum(H) O.
    """
    dtype, shape = q.dtype, q.shape
    q = q * shape[-1] ** -0.5
    (q, q_rate), (k, k_rate), (v, v_rate) = ((None if part is None else _wide(part).flatten(0, 1) for part in x) for x in _pieces(q, k, v))
    out, rate = torch.empty_like(q), torch.empty_like(q)
    rows = max(1, min(q.shape[1], SCORES // k.shape[1]))
    heads = max(1, SCORES // (rows * k.shape[1]))
    for h in range(0, len(q), heads):
        keys, values = k[h : h + heads].mT, v[h : h + heads]
        for r in range(0, q.shape[1], rows):
            here = slice(h, h + heads), slice(r, r + rows)
            shares = (q[here] @ keys).softmax(-1)
            moved = torch.zeros_like(shares) if q_rate is None else q_rate[here] @ keys
            if k_rate is not None:
                moved = torch.baddbmm(moved, q[here], k_rate[h : h + heads].mT)
            moved *= shares
            out[here] = mean = shares @ values
            change = torch.addcmul(moved @ values, moved.sum(-1, keepdim=True), mean, value=-1)
            rate[here] = change if v_rate is None else torch.baddbmm(change, shares, v_rate[h : h + heads])
    return Dual(out.view(shape).to(dtype), rate.view(shape).to(dtype))


def _silu(x: Tensor, y: Tensor, inplace: bool = False) -> Tensor:
    gate = x.sigmoid()
    return torch.addcmul(gate, y, 1 - gate)


def _gelu(x: Tensor, y: Tensor, approximate: str = "none") -> Tensor:
    assert approximate == "tanh", approximate
    root, square = math.sqrt(2 / math.pi), x.square()
    tanh = torch.tanh(root * torch.addcmul(x, x, square, value=0.044715))
    return 0.5 * (1 + tanh) * (1 + x * (1 - tanh) * root * (1 + 0.134145 * square))


def _clamp(x: Tensor, y: Tensor, min: float = -math.inf, max: float = math.inf) -> Tensor:
    return ((x >= min) & (x <= max)).to(x)


LINEAR = {"to", "float", "double", "contiguous", "pad", "sum", "mean", "repeat", "index_select", "view_as_complex", "view_as_real"}
LINEAR |= {"getitem", "reshape", "view", "flatten", "unflatten", "transpose", "expand", "expand_as", "unbind", "split", "chunk"}
"""Linear in their first argument; the others are constants."""
CONSTANT = {"zeros_like", "ones_like", "lt", "le", "gt", "ge", "eq", "floor", "dim"}
"""Of no slope."""
SLOPES: dict[str, Callable[..., Tensor]] = {
    "neg": lambda x, y: -torch.ones_like(x),
    "abs": lambda x, y: x.sign(),
    "square": lambda x, y: 2 * x,
    "sqrt": lambda x, y: 0.5 / y,
    "rsqrt": lambda x, y: -0.5 * y / x,
    "pow": lambda x, y, power: power * x ** (power - 1),
    "exp": lambda x, y: y,
    "expm1": lambda x, y: y + 1,
    "log": lambda x, y: 1 / x,
    "sin": lambda x, y: x.cos(),
    "cos": lambda x, y: -x.sin(),
    "sigmoid": lambda x, y: y * (1 - y),
    "silu": _silu,
    "gelu": _gelu,
    "clamp": _clamp,
}
"""The derivative of functions of one tensor, element by element."""
RULES: dict[str, Callable[..., Dual]] = {
    "add": _sum,
    "sub": _difference,
    "mul": _product,
    "div": _quotient,
    "truediv": _quotient,
    "matmul": _matmul,
    "addmm": _addmm,
    "addcmul": _addcmul,
    "linear": _linear,
    "where": _where,
    "cat": _joined(torch.cat),
    "stack": _joined(torch.stack),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "scaled_dot_product_attention": _attention,
}
