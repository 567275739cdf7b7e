"""Recurrent layers as a user would write them, sample by sample and step by step, with `.detach()` where the gradient
is to stop: nothing of the library but names."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from tests.strategies import ModuleCase
from unvanish.cells import State, Weights


@dataclass
class Steps:
    """What a loop came by, for autograd to be asked about; per sample and step, in the order of time."""

    h: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    c: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    a: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """the input's shares of the gates, `[G·H]`"""
    w: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(W_ih, W_hh) as this step alone read them"""


def step(name: str, p: Tensor, read: Tensor, state: State, w: Weights, w_hh: Tensor) -> State:
    """The next state of one sample from p = W_ih x + b_ih; the matrices read `read` in the place of h."""
    q = w_hh @ read
    if w.b_hh is not None:
        q = q + w.b_hh
    if name == "lstm":
        i, f, g, o = (p + q).chunk(4)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if w.w_hr is None else w.w_hr @ h), c
    if name == "gru":
        (p_r, p_z, p_n), (q_r, q_z, q_n) = p.chunk(3), q.chunk(3)
        z = (p_z + q_z).sigmoid()
        return ((1 - z) * (p_n + (p_r + q_r).sigmoid() * q_n).tanh() + z * state[0],)
    return (getattr(torch, name.removeprefix("rnn_"))(p + q),)


def run(
    name: str,
    x: Tensor,
    state: State,
    w: Weights,
    lengths: list[int] | None,
    reverse: bool,
    cut: list[bool],
    steps: Steps | None = None,
) -> tuple[Tensor, State]:
    """(y `[T, B, R]`, final state) of x `[T, B, I]`; at a step that is `cut` the matrices read h.detach()."""
    T, B = x.shape[:2]
    y = [[0 * state[0][b] for b in range(B)] for _ in range(T)]
    final = []
    for b in range(B):
        own: State = tuple(s[b] for s in state)
        length = T if lengths is None else lengths[b]
        for t in range(length - 1, -1, -1) if reverse else range(length):
            w_ih, w_hh = (w.w_ih, w.w_hh) if steps is None else (1 * w.w_ih, 1 * w.w_hh)  # type: ignore[operator]
            assert w_hh is not None
            p = w_ih @ x[t, b] if w.b_ih is None else w_ih @ x[t, b] + w.b_ih
            own = step(name, p, own[0].detach() if cut[t] else own[0], own, w, w_hh)
            y[t][b] = own[0]
            if steps is not None:
                steps.h[t, b], steps.a[t, b], steps.w[t, b] = own[0], p, (w_ih, w_hh)
                if len(own) > 1:
                    steps.c[t, b] = own[1]
        final.append(own)
    return torch.stack([torch.stack(row) for row in y]), tuple(torch.stack(s) for s in zip(*final, strict=True))


def run_module(
    module: nn.RNNBase, case: ModuleCase, x: Tensor, hx: State | None, cuts: list[Tensor], steps: dict[str, Steps]
) -> tuple[Tensor, State]:
    """(y `[T, B, D·R]`, final states `[L·D, B, ·]`) of x `[T, B, I]` in the user's order; `cuts` per layer and
    direction, `steps` gets what each came by."""
    name, D = module.mode.lower(), 2 if module.bidirectional else 1
    rows, finals = module.num_layers * D, []
    widths = (module.proj_size or module.hidden_size, module.hidden_size)[: 2 if name == "lstm" else 1]
    if hx is None:
        hx = tuple(x.new_zeros(rows, x.shape[1], n) for n in widths)
    for layer in range(module.num_layers):
        outputs = []
        for reverse in range(D):
            end = f"_l{layer}" + "_reverse" * reverse
            found = (getattr(module, f"{kind}{end}", None) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            w = Weights(*found, getattr(module, f"weight_hr{end}", None))  # type: ignore[arg-type]
            place = layer * D + reverse
            seen = steps[f"l{layer}" + ".reverse" * reverse] = Steps()
            cut = cuts[place].tolist()
            y, final = run(name, x, tuple(s[place] for s in hx), w, case.lengths, bool(reverse), cut, seen)
            outputs.append(y)
            finals.append(final)
        x = torch.cat(outputs, -1)
    return x, tuple(torch.stack(s) for s in zip(*finals, strict=True))


def time_major(case: ModuleCase, output: Any) -> tuple[Tensor, State]:
    """What a module returned, in the layout of `run_module`."""
    y, final = output
    states = final if isinstance(final, tuple) else (final,)
    if isinstance(y, PackedSequence):
        return pad_packed_sequence(y)[0], states
    if y.dim() == 2:
        return y.unsqueeze(1), tuple(s.unsqueeze(1) for s in states)
    return (y.transpose(0, 1) if case.module.batch_first else y), states
