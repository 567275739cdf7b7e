"""Faulty models: states, samples, shapes, scores and padding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own documentation calls it so)

from tests.diagnosis_cases.common import B, C, Case, H, Module, Net, T, V, X, Y, classes, noise
from tests.diagnosis_cases.healthy_tasks import own_cell


def looped(how: str, cell: str = "LSTMCell", steps: int = T, read: str = "last", every: int = 1) -> Case:
    """A cell stepped by hand, whose state is cut in one of the ways met in the field."""

    def cut(s: Tensor) -> Tensor:
        if how == "detach":
            return s.detach()
        if how == "data":
            return s.data.clone().requires_grad_(True)
        if how == "tensor":
            return torch.tensor(s.tolist())
        return s

    def forward(m: Any, x: Tensor) -> Tensor:
        state: Any = None
        states = []
        for t in range(x.shape[1]):
            if state is not None and t % every == 0:
                state = tuple(map(cut, state)) if isinstance(state, tuple) else cut(state)
            if how == "rebuilt":
                state = None
            with torch.set_grad_enabled(how != "no_grad" or t >= x.shape[1] - 2):
                state = m.cell(x[:, t], state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return m.head(states[-1] if read == "last" else torch.stack(states).mean(0))

    return (
        Module(forward, cell=getattr(nn, cell)(4, H), head=nn.Linear(H, C)),
        (noise(B, steps, 4), Y),
        F.cross_entropy,
    )


def own_cell_cut() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), H)
        for t in range(x.shape[1]):
            h = 0.8 * h.detach() + m.w(torch.cat([x[:, t], h.detach()], 1)).tanh()
        return m.head(h)

    return Module(forward, w=nn.Linear(4 + H, H), head=nn.Linear(H, C)), (X, Y), F.cross_entropy


def kept_state(how: str) -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = m.state
        if how == "h only" and state is not None:
            state = (state[0].detach(), state[1])
        y, m.state = m.rnn(x, state)
        return m.head(y[:, -1])

    return (
        Module(forward, rnn=nn.LSTM(4, H, batch_first=True), head=nn.Linear(H, C), state=None),
        (X, Y),
        F.cross_entropy,
    )


def mixed(how: str) -> Case:
    lstm = nn.LSTM(4, H, 2, batch_first=how not in ("forgotten", "gru forgotten"))
    if how == "gru forgotten":
        return Net(nn.GRU(4, H), out=1), (X, V), F.mse_loss
    if how == "forgotten":
        return Net(lstm), (X, Y), F.cross_entropy
    if how == "first of time-major":
        return Net(lstm, read=lambda y: y[-1]), (X.transpose(0, 1), Y), F.cross_entropy
    if how == "view":
        return Net(nn.LSTM(4, H), read=lambda y: y[-1], start=lambda x: x.view(T, B, 4)), (X, Y), F.cross_entropy

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.rnn(x)[1][0].view(len(x), -1))

    return Module(forward, rnn=lstm, head=nn.Linear(2 * H, C)), (X, Y), F.cross_entropy


def shapes(how: str) -> Case:
    y = V[:, 0]
    if how == "squeezed answers":
        return Net(out=1, end=lambda z: z.squeeze(-1)), (X, V), F.mse_loss
    if how == "by hand":
        return Net(out=1), (X, y), lambda z, y: ((z - y) ** 2).mean()
    if how == "l1":
        return Net(out=1), (X, y), F.l1_loss
    return Net(out=1), (X, y), F.mse_loss


def scores(how: str) -> Case:
    binary = (V > 0).float()
    return {
        "softmax": lambda: (Net(end=lambda z: z.softmax(1)), (X, Y), F.cross_entropy),
        "softmax module": lambda: (Net(end=nn.Softmax(dim=-1)), (X, Y), nn.CrossEntropyLoss()),
        "softmax, tokens": lambda: (
            Net(out=9, read=lambda y: y, end=lambda z: z.softmax(-1)),
            (X, classes(B, T, of=9)),
            lambda z, y: F.cross_entropy(z.reshape(-1, 9), y.reshape(-1)),
        ),
        "softmax, then log_softmax": lambda: (
            Net(end=lambda z: z.softmax(1)),
            (X, Y),
            lambda z, y: F.nll_loss(z.log_softmax(1), y),
        ),
        "scores into nll": lambda: (Net(), (X, Y), F.nll_loss),
        "softmax into nll": lambda: (Net(end=lambda z: z.softmax(1)), (X, Y), F.nll_loss),
        "sigmoid, then with logits": lambda: (
            Net(out=1, end=torch.sigmoid),
            (X, binary),
            F.binary_cross_entropy_with_logits,
        ),
        "sigmoid before cross-entropy": lambda: (Net(end=torch.sigmoid), (X, Y), F.cross_entropy),
        "one class": lambda: (Net(out=1), (X, torch.zeros(B, dtype=torch.long)), F.cross_entropy),
    }[how]()


def padded(how: str) -> Case:
    n, steps = 60, 150 if how == "long" else 50
    lengths = torch.randint(4, 14, (n,), generator=torch.Generator().manual_seed(3))
    inside = torch.arange(steps)[None, :] < lengths[:, None]
    y = classes(n)
    if how == "ids":
        ids = torch.where(inside, classes(n, steps, of=30) + 1, 0)
        emb = nn.Embedding(31, 8, padding_idx=0)
        model = Module(lambda m, x: m.net(m.emb(x)), emb=emb, net=Net(nn.LSTM(8, H, batch_first=True)))
        return model, (ids, y), F.cross_entropy
    x = noise(n, steps, 4) * inside[..., None]
    if how == "minus one":
        x = torch.where(inside[..., None], noise(n, steps, 4), torch.tensor(-1.0))
    if how == "own cell":
        case = own_cell()
        return case[0], (x, y), F.cross_entropy
    if how == "front, packed":
        x = torch.stack([row.roll(steps - int(length), 0) for row, length in zip(x, lengths, strict=True)])

        def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
            given = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return m.head(m.rnn(given)[1][-1])

        model = Module(forward, rnn=nn.GRU(4, H, batch_first=True), head=nn.Linear(H, C))
        return model, (x, lengths, y), F.cross_entropy
    return Net(), (x, y), F.cross_entropy


CASES: dict[str, tuple[Callable[[], Case], str]] = {
    "detach every step, LSTMCell": (lambda: looped("detach"), "state_cut"),
    "detach every step, GRUCell": (lambda: looped("detach", "GRUCell"), "state_cut"),
    "detach every step, RNNCell, pooled": (lambda: looped("detach", "RNNCell", read="mean"), "state_cut"),
    "detach every third step": (lambda: looped("detach", "GRUCell", steps=30, every=3), "state_cut"),
    ".data": (lambda: looped("data"), "state_cut"),
    "through a list": (lambda: looped("tensor", "GRUCell"), "state_cut"),
    "no_grad but for two steps": (lambda: looped("no_grad"), "state_cut"),
    "rebuilt at every step": (lambda: looped("rebuilt", "GRUCell"), "state_cut"),
    "own cell, detached": (own_cell_cut, "state_cut"),
    "state kept": (lambda: kept_state("all"), "state_carried"),
    "c kept": (lambda: kept_state("h only"), "state_carried"),
    "batch_first forgotten": (lambda: mixed("forgotten"), "samples_mixed"),
    "batch_first forgotten, GRU": (lambda: mixed("gru forgotten"), "samples_mixed"),
    "batch_first of a time-major batch": (lambda: mixed("first of time-major"), "samples_mixed"),
    "view for transpose": (lambda: mixed("view"), "samples_mixed"),
    "view of the final state": (lambda: mixed("final"), "samples_mixed"),
    "targets without the last axis": (lambda: shapes("mse"), "target_mismatch"),
    "the same, L1": (lambda: shapes("l1"), "target_mismatch"),
    "the same, by hand": (lambda: shapes("by hand"), "target_mismatch"),
    "answers squeezed": (lambda: shapes("squeezed answers"), "target_mismatch"),
    **{f"{how} (scores)": (lambda how=how: scores(how), "output_not_logits") for how in (
        "softmax", "softmax module", "softmax, tokens", "softmax, then log_softmax", "scores into nll",
        "softmax into nll", "sigmoid, then with logits", "sigmoid before cross-entropy", "one class",
    )},
    **{f"padding: {how}": (lambda how=how: padded(how), "padding_read") for how in (
        "ids", "zeros", "long", "minus one", "own cell", "front, packed",
    )},
}  # fmt: skip
