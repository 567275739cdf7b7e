"""Every operation that a program knows, and what has no program."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import unvanish as uv
from tests.program_cases import drawn, gradients
from unvanish.cells import ZOO, Cell, Weights
from unvanish.engine import native, stepped
from unvanish.engine.program import Programs, programs

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason="the kernels are not built")


class Expression(Cell):
    """No matrix: one state is a function of three, whose initial values are arguments of any value."""

    gates, states, recurrent = ("x",), ("a", "b", "c"), {}

    def __init__(self, f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.f = f

    def step(self, p: Any, q: Any, s: Any, v: Any) -> tuple[Tensor, ...]:
        return self.f(s.a, s.b, s.c) + 0 * p.x, s.b, s.c


def once(cell: Cell, a: Tensor, b: Tensor, c: Tensor, rung: str) -> list[Tensor]:
    """The value and the three derivatives of an `Expression`'s function at these numbers."""
    zero = torch.zeros
    w = Weights(zero(1, 1, dtype=a.dtype), None)
    leaves = [v.unsqueeze(-1).clone().requires_grad_() for v in (a, b, c)]
    y, _ = uv.engine.run(cell, zero(1, len(a), 1, dtype=a.dtype), tuple(leaves), w, rung=rung)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True, materialize_grads=True)
    return [y.squeeze(), *(g.squeeze(-1) for g in grads)]


ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda x: x.clamp(max=80).exp(),
    "expm1": torch.expm1,
    "log": lambda x: (x.abs() + 0.1).log(),
    "log1p": lambda x: x.abs().log1p(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "erf": torch.erf,
    "sqrt": lambda x: (x * x + 0.1).sqrt(),
    "rsqrt": lambda x: (x * x + 0.1).rsqrt(),
    "reciprocal": lambda x: (x.abs() + 0.5).reciprocal(),
    "neg": torch.neg,
    "abs": torch.abs,
    "cube": lambda x: x**3,
    "power": lambda x: (x.abs() + 0.1) ** 1.7,
    "inverse": lambda x: (1.5 + x * x) ** -1,
    "clamp": lambda x: x.clamp(-0.5, 0.75),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "elu": functional.elu,
    "leaky_relu": lambda x: functional.leaky_relu(x, 0.1),
    "softplus": functional.softplus,
    "logsigmoid": functional.logsigmoid,
    "hardtanh": functional.hardtanh,
    "hardsigmoid": functional.hardsigmoid,
    "hardswish": functional.hardswish,
    "softsign": functional.softsign,
    "mish": functional.mish,
    "selu": functional.selu,
    "relu6": functional.relu6,
    "square": torch.square,
    "masked": lambda x: x.masked_fill(x > 0.3, 0.5),
    "detached": lambda x: x.detach() * x,
    "filled": lambda x: torch.zeros_like(x) + torch.full_like(x, 0.3) * x,
    "rounded": lambda x: x * x.round() + x.floor() - x.ceil() * x.trunc(),
    "scalar": lambda x: torch.tensor(0.5) * x - torch.ones_like(x),
    "in_place": lambda x: (x * 2).mul_(x).add_(1.0).sigmoid_(),
    "where": lambda x: torch.where((x > 0) & ~(x >= 1) | (x < -1), x * x, 2 * x),
    "as_numbers": lambda x: (x > 0).to(x.dtype) * x - (x != 0.5).to(x.dtype),
}
TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "add_scaled": lambda x, y: torch.add(x, y, alpha=0.3),
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda x, y: x / (y.abs() + 0.5),
    "rsub": lambda x, y: 1 - x * y,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda x, y: torch.where(x < y, x * y, y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "shared": lambda x, y: x * y + (x * y).tanh(),
}
leaf = st.sampled_from([lambda a, b, c: a, lambda a, b, c: b, lambda a, b, c: c])
Expr = Callable[[Tensor, Tensor, Tensor], Tensor]


def grown(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    def one(name: str, e: Expr) -> Expr:
        return lambda a, b, c: ONE[name](e(a, b, c))

    def two(name: str, d: Expr, e: Expr) -> Expr:
        return lambda a, b, c: TWO[name](d(a, b, c), e(a, b, c))

    return st.builds(one, st.sampled_from(list(ONE)), inner) | st.builds(two, st.sampled_from(list(TWO)), inner, inner)


@given(f=st.recursive(leaf, grown, max_leaves=8), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_random_expressions(f: Expr, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(33, generator=g, dtype=torch.float64).clamp(-2, 2) for _ in range(3))
    cell = Expression(f)
    assert isinstance(programs(cell, a.dtype, stepped.OPERATIONS), Programs)
    ours, theirs = once(cell, a, b, c, "manual"), once(cell, a, b, c, "reference")
    for x, y in zip(ours, theirs, strict=True):
        if bool((y.abs() < 1e12).all()):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10 * max(1.0, float(y.detach().abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_each_operation(name: str, dtype: torch.dtype) -> None:
    # Further out these lose all their digits, or their derivative is a difference of two large numbers.
    span = 3.0 if name in ("cube", "expm1", "shared", "exp", "mish", "selu", "elu") else 8.0
    a = torch.linspace(-span, span, 97, dtype=dtype)
    b = a.flip(0) * 0.7
    f: Expr = (lambda a, b, c: ONE[name](a)) if name in ONE else (lambda a, b, c: TWO[name](a, b))
    cell = Expression(f)
    assert isinstance(programs(cell, dtype, stepped.OPERATIONS), Programs)
    close = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    for x, y in zip(once(cell, a, b, a, "manual"), once(cell, a, b, a, "reference"), strict=True):
        torch.testing.assert_close(x, y, **close)


RAW: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{f: lambda x, y, f=f: getattr(torch, f)(x) for f in ("exp", "expm1", "log", "log1p", "sigmoid", "tanh", "relu")},
    **{f: lambda x, y, f=f: getattr(torch, f)(x) for f in ("sqrt", "abs", "sign", "floor", "round", "erf", "atan")},
    **{f: lambda x, y, f=f: getattr(torch, f)(x, y) for f in ("add", "sub", "mul", "div", "maximum", "minimum", "pow")},
    "clamp": lambda x, y: x.clamp(-1, 1),
    "where": lambda x, y: torch.where(x > y, x, y),
    "softplus": lambda x, y: functional.softplus(x),
    "logsigmoid": lambda x, y: functional.logsigmoid(x),
    "reciprocal": lambda x, y: 1 / x,
    "isnan": lambda x, y: torch.where(x.isnan(), y, x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(RAW))
def test_special_values(name: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    edge = math.log(largest)
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, -1e-20, largest, -largest, 1e-5]
    values += [edge - 0.5, edge + 0.5, 1 - edge, -edge - 40, 20.5, -20.5, 1 + 1e-6, 2.5, -3.5]
    x = torch.tensor(values, dtype=dtype)
    a, b = x.repeat_interleave(len(x)), x.repeat(len(x))
    cell = Expression(lambda a, b, c: RAW[name](a, b))
    ours, theirs = once(cell, a, b, a, "manual")[0], once(cell, a, b, a, "reference")[0]
    close = {"rtol": 1e-12, "atol": 1e-300} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-38}
    torch.testing.assert_close(ours, theirs, equal_nan=True, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subnormal_numbers_are_zero(dtype: torch.dtype) -> None:
    tiny = torch.full((5,), torch.finfo(dtype).tiny / 8, dtype=dtype)
    found = once(Expression(lambda a, b, c: a * 4 + 1e-30 * b), tiny, torch.zeros_like(tiny), tiny, "manual")[0]
    assert not found.any()


class Odd(Cell):
    """A state that is a function of the only share, with whatever else is given."""

    gates, states = ("h",), ("h",)

    def __init__(self, f: Callable[..., Tensor], **given: Any) -> None:
        self.f = f
        vars(self).update(given)

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        return self.f(self, p.h + q.h)


def sampled(cell: Odd, a: Tensor) -> Tensor:
    return a * torch.rand_like(a).gt(-1)


def dropped(cell: Odd, a: Tensor) -> Tensor:
    return functional.dropout(a, 1e-9)


def sorted_twice(cell: Odd, a: Tensor) -> Tensor:
    return torch.stack([a, 2 * a]).sort(0).values[0]


def branching(cell: Odd, a: Tensor) -> Tensor:
    return a.tanh() if float(a.detach().flatten()[0]) > -1e9 else a


def scaled_by_buffer(cell: Any, a: Tensor) -> Tensor:
    return a.tanh() * cell.scale


GLOBAL = torch.tensor(0.7, dtype=torch.float64)


def scaled_by_global(cell: Odd, a: Tensor) -> Tensor:
    return a.tanh() * GLOBAL


def counting(cell: Any, a: Tensor) -> Tensor:
    cell.calls = cell.calls + 1
    return a.tanh()


def by_samples(cell: Odd, a: Tensor) -> Tensor:
    return a.tanh() * (1 + 1e-3 * a.shape[0])


def in_single(cell: Odd, a: Tensor) -> Tensor:
    return a.half().to(a.dtype)


class Doubled(Odd):
    """Does more than its step."""

    def advance(self, p: Tensor, s: Any, w: Weights) -> Any:
        return tuple(2 * a for a in super().advance(p, s, w))


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        (Odd(sampled), "aten.rand"),
        (Doubled(lambda cell, a: a.tanh()), "its own advance"),
        (Odd(dropped), "no compiled instruction"),
        (Odd(sorted_twice), "aten.stack"),
        (Odd(branching), "aten"),
        (Odd(scaled_by_buffer, scale=torch.tensor(0.7, dtype=torch.float64)), "holds a Tensor"),
        (Odd(scaled_by_global), "none of its arguments"),
        (Odd(counting, calls=0), "changes the cell"),
        (Odd(by_samples), "differ from call to call"),
        (Odd(in_single), "float16"),
        (Odd(lambda cell, a: cell.phi(a), phi=nn.PReLU()), "holds a Parameter"),
    ],
)
def test_what_has_no_program_runs_in_torch_operations(cell: Cell, why: str) -> None:
    data = drawn(cell, 4, 3, 2, 5, torch.float64, 0)
    reason = stepped.obstacle(cell, data[0])
    assert reason is not None
    assert why in reason
    choice = uv.engine.explain(cell, data[0])
    assert choice.rung == "manual"
    assert str(choice).endswith(f"manual: runs in torch operations, {reason}")
    # These differ by themselves, or have no rung that could be right: the manual one evaluates all steps at once.
    if why not in ("holds a Parameter", "float16", "differ from call to call", "its own advance"):
        torch.testing.assert_close(gradients("manual", cell, data), gradients("reference", cell, data))


def test_the_choice_says_that_the_kernels_run() -> None:
    choice = uv.engine.explain(ZOO["mgu"](), torch.zeros(2, 1, 3))
    assert str(choice).endswith("manual: runs in the kernels, by programs of its step")
    assert uv.engine.explain(ZOO["mgu"](), torch.zeros(2, 1, 3, dtype=torch.bfloat16)).how == (
        "in torch operations, programs are for float32 and float64 on the CPU, the input is torch.bfloat16 on cpu"
    )


def test_constants_that_change_make_another_program() -> None:
    cell: Any = ZOO["leaky"]()
    name = next(iter(vars(cell)))
    data = drawn(cell, 4, 3, 2, 5, torch.float64, 0)
    for value in (0.3, 0.6):
        setattr(cell, name, value)
        torch.testing.assert_close(gradients("manual", cell, data), gradients("reference", cell, data))
    phi = nn.Dropout(0.5).eval()
    odd = Odd(lambda cell, a: cell.phi(a).tanh(), phi=phi)
    assert stepped.obstacle(odd, data[0]) is None
    phi.train()
    assert stepped.obstacle(odd, data[0]) is not None
