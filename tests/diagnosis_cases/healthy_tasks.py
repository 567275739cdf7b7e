"""Healthy models: read-outs, inputs and tasks of many kinds."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own documentation calls it so)

from tests.diagnosis_cases.common import IDS, B, C, Case, H, Module, Net, T, V, X, Y, classes, noise


def pooled(how: str) -> Case:
    ways = {"mean": lambda y: y.mean(1), "max": lambda y: y.amax(1), "sum": lambda y: y.sum(1)}
    return Net(read=ways[how]), (X, Y), F.cross_entropy


def attention() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, _ = m.rnn(x)
        return m.head((m.score(y).softmax(1) * y).sum(1))

    parts = {"rnn": nn.LSTM(4, H, batch_first=True), "score": nn.Linear(H, 1), "head": nn.Linear(H, C)}
    return Module(forward, **parts), (X, Y), F.cross_entropy


def residual_stack() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.inp(x)
        for rnn, norm in zip(m.rnns, m.norms, strict=True):
            y = y + rnn(norm(y))[0]
        return m.head(y[:, -1])

    parts = {
        "inp": nn.Linear(4, H),
        "rnns": nn.ModuleList(nn.GRU(H, H, batch_first=True) for _ in range(6)),
        "norms": nn.ModuleList(nn.LayerNorm(H) for _ in range(6)),
        "head": nn.Linear(H, C),
    }
    return Module(forward, **parts), (X, Y), F.cross_entropy


def encoder_decoder() -> Case:
    def forward(m: Any, x: Tensor, shown: Tensor) -> Tensor:
        _, h = m.enc(x)
        y, _ = m.dec(m.emb(shown), h)
        return m.head(y)

    parts = {
        "enc": nn.GRU(4, H, batch_first=True), "dec": nn.GRU(8, H, batch_first=True), "emb": nn.Embedding(30, 8),
        "head": nn.Linear(H, 30),
    }  # fmt: skip
    target = classes(B, 9, of=30, seed=5)
    shown = torch.cat([torch.zeros(B, 1, dtype=torch.long), target[:, :-1]], 1)
    return Module(forward, **parts), (X, shown, target), lambda z, y: F.cross_entropy(z.transpose(1, 2), y)


def autoencoder() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        _, h = m.enc(x)
        y, _ = m.dec(h[-1][:, None].expand(-1, x.shape[1], -1))
        return m.head(y)

    parts = {"enc": nn.GRU(4, H, batch_first=True), "dec": nn.GRU(H, H, batch_first=True), "head": nn.Linear(H, 4)}
    return Module(forward, **parts), (X, X.clone()), F.mse_loss


def masked_loop() -> Case:
    lengths = torch.randint(5, T + 1, (B,), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(T)[None, :] < lengths[:, None]

    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        h = x.new_zeros(len(x), H)
        for t in range(x.shape[1]):
            keep = mask[:, t, None].to(x)
            h = keep * m.cell(x[:, t], h) + (1 - keep) * h
        return m.head(h)

    return Module(forward, cell=nn.GRUCell(4, H), head=nn.Linear(H, C)), (X * mask[..., None], mask, Y), F.cross_entropy


def batch_norm(statistics: bool) -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.norm(m.rnn(x)[0][:, -1]))

    norm = nn.BatchNorm1d(H, track_running_stats=statistics)
    return (
        Module(forward, rnn=nn.LSTM(4, H, batch_first=True), norm=norm, head=nn.Linear(H, C)),
        (X, Y),
        F.cross_entropy,
    )


def contrastive(pairs: bool) -> Case:
    def forward(m: Any, a: Tensor, b: Tensor) -> Any:
        u, v = (F.normalize(m.rnn(x)[0][:, -1], dim=1) for x in (a, b))
        return u @ v.T / 0.1 if pairs else (u, v)

    def loss(z: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(z if pairs else z[0] @ z[1].T / 0.1, y)

    other = X + 0.1 * noise(B, T, 4, seed=6)
    return Module(forward, rnn=nn.GRU(4, H, batch_first=True)), (X, other, torch.arange(B)), loss


def imbalanced() -> Case:
    y = (torch.arange(B) < 3).long()
    return Net(out=2), (X, y), lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([0.1, 0.9]))


def tokens(how: str) -> Case:
    def forward(m: Any, ids: Tensor) -> Tensor:
        return m.head(m.rnn(m.emb(ids))[0])

    model = Module(forward, emb=nn.Embedding(30, 8), rnn=nn.LSTM(8, H, batch_first=True), head=nn.Linear(H, 30))
    x, y = IDS[:, :-1], IDS[:, 1:]
    if how == "padded":  # of few kinds, so that a linear fit would find them in later inputs
        shown = torch.arange(T - 1) < torch.where(torch.arange(B) % 2 == 0, T - 1, T - 4)[:, None]
        x, asked = torch.where(shown, x % 4, 0), torch.cat([shown[:, 1:], shown[:, -1:]], 1)
        y = torch.where(asked, y % 4, -100)
    if how == "folded":
        return model, (x, y.reshape(-1)), lambda z, y: F.cross_entropy(z.flatten(0, 1), y)
    return model, (x, y), lambda z, y: F.cross_entropy(z.transpose(1, 2), y)


def multi_task() -> Case:
    def forward(m: Any, x: Tensor) -> dict[str, Tensor]:
        h = m.rnn(x)[0][:, -1]
        return {"class": m.classes(h), "value": m.value(h)}

    def loss(z: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(z["class"], y["class"]) + 0.5 * F.mse_loss(z["value"], y["value"])

    model = Module(forward, rnn=nn.LSTM(4, H, batch_first=True), classes=nn.Linear(H, C), value=nn.Linear(H, 1))
    return model, (X, {"class": Y, "value": V}), loss


def own_cell() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), H)
        for t in range(x.shape[1]):
            z, n = m.w(torch.cat([x[:, t], h], 1)).chunk(2, 1)
            h = h + z.sigmoid() * (n.tanh() - h)
        return m.head(h)

    return Module(forward, w=nn.Linear(4 + H, 2 * H), head=nn.Linear(H, C)), (X, Y), F.cross_entropy


class Spike(torch.autograd.Function):
    """A step with a surrogate gradient."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(v)
        return (v > 0).to(v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (v,) = ctx.saved_tensors
        return g / (1 + 10 * v.abs()) ** 2


def spiking() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        v, total = x.new_zeros(len(x), H), 0.0
        for t in range(x.shape[1]):
            v = 0.9 * v + m.w(x[:, t])
            spikes: Any = Spike.apply(v - 1)
            v, total = v - spikes.detach(), total + spikes
        return m.head(total / x.shape[1])

    return Module(forward, w=nn.Linear(4, H), head=nn.Linear(H, C)), (X, Y), F.cross_entropy


def folded_batch() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        b, n, t, f = x.shape
        h = m.rnn(x.reshape(b * n, t, f))[0][:, -1]
        return m.head(h.reshape(b, n, -1).mean(1))

    x = noise(B, 5, T, 4)
    return Module(forward, rnn=nn.GRU(4, H, batch_first=True), head=nn.Linear(H, C)), (x, Y), F.cross_entropy


def folded_steps() -> Case:
    return Net(read=lambda y: y.reshape(-1, H)), (X, classes(B * T)), F.cross_entropy


def dict_input() -> Case:
    def forward(m: Any, batch: dict[str, Tensor]) -> Tensor:
        return m.head(m.rnn(batch["x"])[0][torch.arange(len(batch["x"])), batch["lengths"] - 1])

    lengths = torch.randint(3, T, (B,), generator=torch.Generator().manual_seed(3))
    batch = {"x": X * (torch.arange(T)[None, :, None] < lengths[:, None, None]), "lengths": lengths}
    return Module(forward, rnn=nn.GRU(4, H, batch_first=True), head=nn.Linear(H, C)), (batch, Y), F.cross_entropy


@dataclasses.dataclass
class Bundle:
    x: Tensor
    scale: float = 1.0


def dataclass_input() -> Case:
    def forward(m: Any, batch: Bundle) -> Tensor:
        return m.head(m.rnn(batch.x * batch.scale)[0][:, -1])

    return Module(forward, rnn=nn.GRU(4, H, batch_first=True), head=nn.Linear(H, C)), (Bundle(X), Y), F.cross_entropy


def packed() -> Case:
    def forward(m: Any, x: Any) -> Tensor:
        return m.head(m.rnn(x)[1][-1])

    lengths = torch.randint(3, T, (B,), generator=torch.Generator().manual_seed(3))
    given = nn.utils.rnn.pack_padded_sequence(X, lengths, batch_first=True, enforce_sorted=False)
    return Module(forward, rnn=nn.GRU(4, H, batch_first=True), head=nn.Linear(H, C)), (given, Y), F.cross_entropy


def time_major(dense: bool) -> Case:
    net = Net(nn.LSTM(4, H), read=(lambda y: y) if dense else (lambda y: y[-1]))
    x = X.transpose(0, 1)
    if dense:
        return net, (x, classes(T, B)), lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())
    return net, (x, Y), F.cross_entropy


def few() -> Case:
    return Net(), (X[:4], Y[:4]), F.cross_entropy


def truncated_between_batches() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = None if m.state is None else m.state.detach()
        y, m.state = m.rnn(x, state)
        return m.head(y)

    model = Module(forward, rnn=nn.GRU(4, H, batch_first=True), head=nn.Linear(H, 4), state=None)
    return model, (X[:, :-1], X[:, 1:]), F.mse_loss


def recall() -> Case:
    """Symbols at the first step, and for the rest of the time the same for all samples."""
    x = torch.cat([X[:, :1], torch.zeros(B, T - 1, 4)], 1)
    return Net(), (x, Y), F.cross_entropy


CASES: dict[str, Callable[[], Case]] = {
    "mean pool": lambda: pooled("mean"),
    "max pool": lambda: pooled("max"),
    "sum pool": lambda: pooled("sum"),
    "attention": attention,
    "residual stack": residual_stack,
    "encoder and decoder": encoder_decoder,
    "autoencoder": autoencoder,
    "masked loop": masked_loop,
    "batch norm": lambda: batch_norm(True),
    "batch norm without statistics": lambda: batch_norm(False),
    "contrastive, states": lambda: contrastive(False),
    "contrastive, pairs": lambda: contrastive(True),
    "class imbalance": imbalanced,
    "recall after a pause": recall,
    "token prediction": lambda: tokens("dense"),
    "token prediction, folded": lambda: tokens("folded"),
    "token prediction, padded": lambda: tokens("padded"),
    "several tasks": multi_task,
    "own cell": own_cell,
    "spiking cell": spiking,
    "several sequences per sample": folded_batch,
    "samples and steps folded": folded_steps,
    "dict": dict_input,
    "dataclass": dataclass_input,
    "packed": packed,
    "time-major": lambda: time_major(False),
    "time-major, dense": lambda: time_major(True),
    "four samples": few,
    "state detached between batches": truncated_between_batches,
}  # fmt: skip
