"""∂E/∂h_t by autograd alone: torch's recurrent kernels are replaced by loops whose states keep their gradient."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass
class Kernel:
    """One call: the first weight, and of each layer and direction the states by input step, `[b_t, H]`."""

    weight: Tensor
    states: dict[str, list[Tensor]]
    rows: Tensor | None = None
    """the row of each sample of the user's, of packed input"""
    permuted: bool = False

    def norms(self, end: str) -> list[list[float]]:
        """Sample → ‖∂E/∂h_t‖ at each of its steps."""
        hs = self.states[end]
        rows = list(range(max(map(len, hs)))) if self.rows is None else self.rows.tolist()
        return [[0.0 if h.grad is None else float(h.grad[i].norm()) for h in hs if i < len(h)] for i in rows]


def step(kind: str, x: Tensor, s: tuple[Tensor, ...], W: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One step of torch's equations."""
    h, (w_ih, w_hh, *biases) = s[0], W
    b_ih, b_hh = biases or (0.0, 0.0)
    a, u = x @ w_ih.T + b_ih, h @ w_hh.T + b_hh
    if kind == "lstm":
        i, f, g, o = (a + u).chunk(4, 1)
        c = f.sigmoid() * s[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if kind == "gru":
        (ar, az, an), (ur, uz, un) = a.chunk(3, 1), u.chunk(3, 1)
        z = (az + uz).sigmoid()
        return ((1 - z) * (an + (ar + ur).sigmoid() * un).tanh() + z * h,)
    return ((a + u).tanh() if kind == "rnn_tanh" else (a + u).relu(),)


class Kernels:
    """In place of `torch._VF`."""

    def __init__(self, original: Any) -> None:
        self.original, self.calls = original, list[Kernel]()

    def __getattr__(self, name: str) -> Any:
        kind = name.removesuffix("_cell")
        if kind not in GATES:
            return getattr(self.original, name)
        return self._cell(kind) if name != kind else self._layers(kind)

    def permuted(self, original: Any) -> Any:
        def permute_hidden(module: Any, hx: Any, permutation: Tensor | None) -> Any:
            # The first time after a kernel ran it is the way back to the user's order.
            if self.calls and not self.calls[-1].permuted and self.calls[-1].weight is module.weight_ih_l0:
                self.calls[-1].rows, self.calls[-1].permuted = permutation, True
            return original(module, hx, permutation)

        return permute_hidden

    def _cell(self, kind: str) -> Callable[..., Any]:
        def run(x: Tensor, hx: Any, *weights: Any) -> Any:
            s = step(kind, x, tuple(hx) if kind == "lstm" else (hx,), tuple(w for w in weights if w is not None))
            s[0].retain_grad()
            self.calls.append(Kernel(weights[0], {"": [s[0]]}))
            return s if kind == "lstm" else s[0]

        return run

    def _layers(self, kind: str) -> Callable[..., Any]:
        def run(x: Tensor, *args: Any) -> Any:
            if isinstance(args[1], list):  # not packed: hx, flat weights, then the settings
                hx, flat, bias, layers, dropout, training, both, batch_first = args
                rows = list((x.transpose(0, 1) if batch_first else x).unbind(0))
            else:
                sizes, hx, flat, bias, layers, dropout, training, both = args
                rows = list(x.split(sizes.tolist()))
            states = tuple(hx) if kind == "lstm" else (hx,)
            kept: dict[str, list[Tensor]] = {}
            last: list[tuple[Tensor, ...]] = []
            per, directions = (4 if bias else 2), 1 + bool(both)
            for k in range(layers):
                outs = []
                for d in range(directions):
                    n = k * directions + d
                    hs, end = self._run(
                        kind, rows, tuple(s[n] for s in states), tuple(flat[per * n : per * n + per]), d
                    )
                    kept[f"l{k}{'.reverse' if d else ''}"] = hs
                    outs.append(hs)
                    last.append(end)
                rows = [torch.cat(both_ways, 1) for both_ways in zip(*outs, strict=True)]
                if dropout and training and k < layers - 1:
                    sizes_ = [len(r) for r in rows]
                    rows = list(nn.functional.dropout(torch.cat(rows), dropout).split(sizes_))
            self.calls.append(Kernel(flat[0], kept))
            if isinstance(args[1], list):
                y = torch.stack(rows)
                y = y.transpose(0, 1) if batch_first else y
            else:
                y = torch.cat(rows)
            return (y, *(torch.stack(part) for part in zip(*last, strict=True)))

        return run

    @staticmethod
    def _run(
        kind: str, rows: list[Tensor], s: tuple[Tensor, ...], W: tuple[Tensor, ...], backwards: int
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        hs: list[Tensor] = [rows[0]] * len(rows)
        for t in reversed(range(len(rows))) if backwards else range(len(rows)):
            b = len(rows[t])
            new = step(kind, rows[t], tuple(v[:b] for v in s), W)
            new[0].retain_grad()
            hs[t] = new[0]
            s = tuple(torch.cat([v, old[b:]]) for v, old in zip(new, s, strict=True))
        return hs, s


@contextmanager
def kernels() -> Iterator[list[Kernel]]:
    """Every call of torch's recurrent kernels within the block."""
    with pytest.MonkeyPatch.context() as patch:
        replaced = Kernels(torch.nn.modules.rnn._VF)
        patch.setattr(torch.nn.modules.rnn, "_VF", replaced)
        for kind in (nn.RNNBase, nn.LSTM):
            patch.setattr(kind, "permute_hidden", replaced.permuted(kind.permute_hidden))
        yield replaced.calls


def expected(model: nn.Module, run: Callable[[nn.Module], Tensor], name: str) -> list[list[float]]:
    """Sample → ‖∂E/∂h_t‖ at each of its steps, of one record's layer, over all calls in their order."""
    with kernels() as calls:
        run(model).backward()
    place = re.fullmatch(r"(?:(.*)\.)?(l\d+(?:\.reverse)?)", name)
    owner, end = (model.get_submodule(place[1] or ""), place[2]) if place else (model.get_submodule(name), "")
    first = owner.weight_ih_l0 if end else owner.weight_ih
    found = [call.norms(end) for call in calls if call.weight is first]
    return [[n for steps in parts for n in steps] for parts in zip(*found, strict=True)]
