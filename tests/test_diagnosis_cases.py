"""The diagnosis by exact tests on a table of models: name, model, batch, loss, expected code.

A healthy model of unusual build must not be accused, a faulty one must be told its fault first.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own documentation calls it so)

import unvanish as uv

B, T, H, C = 40, 18, 16, 3
Case = tuple[nn.Module, tuple[Any, ...], Callable[..., Tensor]]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, of: int = C, seed: int = 1) -> Tensor:
    return torch.randint(of, shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A recurrent layer, a read-out and an end, each exchangeable."""

    def __init__(
        self,
        rnn: Any = None,
        out: int = C,
        read: Callable[[Tensor], Tensor] = lambda y: y[:, -1],
        end: Callable[[Tensor], Tensor] = lambda z: z,
        start: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.rnn = rnn or nn.GRU(4, H, batch_first=True)
        width = self.rnn.hidden_size * (2 if getattr(self.rnn, "bidirectional", False) else 1)
        self.head = nn.Linear(width, out)
        self.read, self.end, self.start = read, end, start

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head(self.read(self.rnn(self.start(x))[0])))


class Module(nn.Module):
    """Named parts, and a function for forward."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


X = noise(B, T, 4)
Y = classes(B)
V = noise(B, 1, seed=2)
IDS = classes(B, T, of=30, seed=3)


# Healthy ------------------------------------------------------------------------------------------------------------


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


def forecast() -> Case:
    return Net(out=4, read=lambda y: y), (X[:, :-1], X[:, 1:]), F.mse_loss


def bidirectional_tagger() -> Case:
    x = noise(80, T, 4)
    y = (x[:, :, 0] + x[:, :, 0].roll(-1, 1) > 0).long()
    net = Net(nn.LSTM(4, H, batch_first=True, bidirectional=True), out=2, read=lambda y: y)
    return net, (x, y), lambda z, y: F.cross_entropy(z.transpose(1, 2), y)


def sigmoid_and_bce() -> Case:
    y = (V > 0).float()
    return Net(out=1, end=torch.sigmoid), (X, y), F.binary_cross_entropy


def log_softmax_and_nll() -> Case:
    return Net(end=lambda z: z.log_softmax(-1)), (X, Y), F.nll_loss


def blank_then_answer() -> Case:
    """A copy task: all but the last steps have no answer."""
    y = torch.full((B, T), -100)
    y[:, -4:] = classes(B, 4)
    return Net(read=lambda y: y), (X, y), lambda z, y: F.cross_entropy(z.transpose(1, 2), y, ignore_index=-100)


def impulse() -> Case:
    x = torch.zeros(B, T, 4)
    x[torch.arange(B), classes(B, of=T), classes(B, of=4)] = 1
    return Net(), (x, Y), F.cross_entropy


def convolution_first() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.rnn(m.conv(x.transpose(1, 2)).relu().transpose(1, 2))[0].mean(1))

    parts = {"conv": nn.Conv1d(4, 8, 3, stride=2), "rnn": nn.GRU(8, H, batch_first=True), "head": nn.Linear(H, C)}
    return Module(forward, **parts), (X, Y), F.cross_entropy


def variational() -> Case:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, spread = m.code(m.rnn(x)[0][:, -1]).chunk(2, 1)
        z = mean + spread.exp() * torch.randn_like(mean)
        return m.head(z), mean, spread

    def loss(out: tuple[Tensor, ...], y: Tensor) -> Tensor:
        answer, mean, spread = out
        return F.mse_loss(answer, y) + 1e-2 * (mean**2 + (2 * spread).exp() - 2 * spread - 1).mean()

    parts = {"rnn": nn.GRU(4, H, batch_first=True), "code": nn.Linear(H, 8), "head": nn.Linear(4, 1)}
    return Module(forward, **parts), (X, V), loss


def frozen_extractor() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = m.features(x).tanh()
        return m.head(m.rnn(x)[0][:, -1])

    parts = {"features": nn.Linear(4, 6).requires_grad_(False), "rnn": nn.GRU(6, H, batch_first=True)}
    return Module(forward, **parts, head=nn.Linear(H, C)), (X, Y), F.cross_entropy


def open_gates() -> Case:
    lstm = nn.LSTM(4, H, batch_first=True)
    with torch.no_grad():
        lstm.bias_ih_l0[H : 2 * H] = 5.0
    return Net(lstm), (X, Y), F.cross_entropy


def quantiles() -> Case:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        q = torch.tensor([0.1, 0.5, 0.9])
        error = y - z
        return torch.maximum(q * error, (q - 1) * error).mean()

    return Net(out=3), (X, V), loss


def words_of_letters() -> Case:
    """A fresh state for every word of a sentence, then a second layer over the words."""

    def forward(m: Any, x: Tensor) -> Tensor:
        words = [m.letters(x[:, t : t + 3])[1][-1] for t in range(0, x.shape[1], 3)]
        return m.head(m.words(torch.stack(words, 1))[0][:, -1])

    parts = {"letters": nn.GRU(4, H, batch_first=True), "words": nn.GRU(H, H, batch_first=True)}
    return Module(forward, **parts, head=nn.Linear(H, C)), (X, Y), F.cross_entropy


def padded_tagger() -> Case:
    lengths = torch.randint(4, T, (B,), generator=torch.Generator().manual_seed(3))
    inside = torch.arange(T)[None, :] < lengths[:, None]
    ids, y = torch.where(inside, IDS + 1, 0), torch.where(inside, classes(B, T), -100)

    def forward(m: Any, ids: Tensor) -> Tensor:
        return m.head(m.rnn(m.emb(ids))[0])

    model = Module(
        forward, emb=nn.Embedding(32, 8, padding_idx=0), rnn=nn.LSTM(8, H, batch_first=True), head=nn.Linear(H, C)
    )
    return model, (ids, y), lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())


def packed_answers() -> Case:
    lengths = torch.randint(3, T, (B,), generator=torch.Generator().manual_seed(3)).sort(descending=True).values

    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        y, _ = m.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))
        return m.head(y.data)

    model = Module(forward, rnn=nn.GRU(4, H, batch_first=True), head=nn.Linear(H, C))
    goal = nn.utils.rnn.pack_padded_sequence(classes(B, T), lengths, batch_first=True).data
    return model, (X, lengths, goal), F.cross_entropy


def target_network() -> Case:
    """Bootstrapped latents: a second encoder without gradient gives the targets."""

    def forward(m: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            goal = m.slow(b)[0][:, -1]
        return m.head(m.rnn(a)[0][:, -1]), goal

    parts = {"rnn": nn.GRU(4, H, batch_first=True), "slow": nn.GRU(4, H, batch_first=True), "head": nn.Linear(H, H)}
    return Module(forward, **parts), (X, X + 0.1, Y), lambda z, _: 1 - F.cosine_similarity(*z).mean()


def radial_features() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        u = m.inp(x)
        return m.head(m.rnn(torch.exp(-((u - m.centres) ** 2)))[0][:, -1])

    model = Module(forward, inp=nn.Linear(4, 1), rnn=nn.GRU(7, H, batch_first=True), head=nn.Linear(H, C))
    model.register_buffer("centres", torch.linspace(-1, 1, 7))
    return model, (X, Y), F.cross_entropy


def smooth_forecast() -> Case:
    t = torch.arange(T + 3) / 4
    x = (t + 6 * torch.rand(B, 1, generator=torch.Generator().manual_seed(0))).sin()[..., None] + 0.1 * noise(
        B, T + 3, 1
    )
    return Net(nn.GRU(1, H, batch_first=True), out=1, read=lambda y: y), (x[:, :-3], 2 * x[:, 3:] - 1), F.mse_loss


def loss_inside() -> Case:
    """The model returns its own loss, next to its scores."""

    def forward(m: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = m.head(m.rnn(x)[0][:, -1])
        return {"loss": F.cross_entropy(z, y), "logits": z}

    model = Module(forward, rnn=nn.GRU(4, H, batch_first=True), head=nn.Linear(H, C))
    return Module(lambda m, b: m.net(*b), net=model), ((X, Y),), lambda z: z["loss"]


def memory_as_answer() -> Case:
    """c of an LSTMCell is not bounded, so that its targets may lie outside [-1, 1]."""

    def forward(m: Any, x: Tensor) -> Tensor:
        state = None
        for x_t in x.unbind(1):
            state = m.cell(x_t, state)
        return state[1]

    return Module(forward, cell=nn.LSTMCell(4, 1)), (X, 2 * V), F.mse_loss


def translated(how: str) -> Case:
    """Encoder and decoder of ids, with the mistakes that are made in it."""
    n, steps = 60, 7
    source = classes(n, steps, of=9, seed=7) + 1
    shown = torch.cat([torch.zeros(n, 1, dtype=torch.long), source[:, :-1]], 1)
    major = how == "time-major"

    def forward(m: Any, source: Tensor, shown: Tensor) -> Tensor:
        _, h = m.enc(m.emb(source))
        return m.head(m.dec(m.emb(shown), None if how == "encoder dropped" else h)[0])

    parts = {"emb": nn.Embedding(10, 8), "head": nn.Linear(H, 10)}
    parts |= {name: nn.GRU(8, H, batch_first=not major) for name in ("enc", "dec")}
    batch = (source, source if how == "unshifted" else shown, source)
    batch = tuple(t.T.contiguous() for t in batch) if major else batch
    return Module(forward, **parts), batch, lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())


def alignment(scores: bool) -> Case:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        z = z.transpose(0, 1)
        lengths = torch.full((len(y),), T), torch.full((len(y),), y.shape[1])
        return F.ctc_loss(z if scores else z.log_softmax(-1), y, *lengths)

    return Net(out=6, read=lambda y: y), (X, classes(B, 4, of=5) + 1), loss


HEALTHY: dict[str, Callable[[], Case]] = {
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
    "forecast": forecast,
    "bidirectional tagger": bidirectional_tagger,
    "sigmoid and binary_cross_entropy": sigmoid_and_bce,
    "log_softmax and nll_loss": log_softmax_and_nll,
    "answers at the end alone": blank_then_answer,
    "impulse": impulse,
    "convolution first": convolution_first,
    "variational": variational,
    "frozen extractor": frozen_extractor,
    "open gates": open_gates,
    "memory as the answer": memory_as_answer,
    "quantiles": quantiles,
    "a state per word": words_of_letters,
    "padded tagger": padded_tagger,
    "packed answers": packed_answers,
    "target network": target_network,
    "radial features": radial_features,
    "smooth forecast": smooth_forecast,
    "loss inside": loss_inside,
    "translation": lambda: translated("right"),
    "translation, time-major": lambda: translated("time-major"),
    "alignment": lambda: alignment(scores=False),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_is_not_accused(name: str) -> None:
    torch.manual_seed(0)
    model, batch, loss = HEALTHY[name]()
    found = uv.diagnose(model, *batch, loss=loss, budget=0)
    assert found.findings[0].code == "healthy", found
    assert not [n for n in found.notes if n.startswith("not tested")], found.notes


# Faulty -------------------------------------------------------------------------------------------------------------


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


def not_finite(how: str) -> Case:
    x, v = X.clone(), V.clone()
    if how == "input":
        x[3, 4, 1] = math.nan
    if how == "target":
        v[2] = math.inf
    net = Net(out=1)
    if how == "rmse":
        with torch.no_grad():
            v[3] = net(x)[3]
        return net, (x, v), lambda z, y: ((z - y) ** 2).sqrt().mean()
    if how == "log":
        return Net(out=1, end=lambda z: z.log()), (x, v), F.mse_loss
    if how == "parameter":
        nn.init.constant_(net.rnn.weight_hh_l0, math.nan)
    if how == "norm":
        return Net(out=1, start=lambda x: x / (x * 0).norm(dim=-1, keepdim=True)), (x, v), F.mse_loss
    return net, (x, v), F.mse_loss


def deep(kind: str, layers: int) -> Case:
    return Net(getattr(nn, kind)(4, H, layers, batch_first=True)), (X, Y), F.cross_entropy


def deep_modules() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        for rnn in m.rnns:
            x = rnn(x)[0]
        return m.head(x[:, -1])

    rnns = nn.ModuleList(nn.LSTM(4 if i == 0 else H, H, batch_first=True) for i in range(9))
    return Module(forward, rnns=rnns, head=nn.Linear(H, C)), (X, Y), F.cross_entropy


def unmoved(how: str) -> Case:
    if how == "list":
        layers = [nn.GRU(4, H, batch_first=True)]
        return (
            Module(lambda m, x: m.head(m.layers[0](x)[0][:, -1]), layers=layers, head=nn.Linear(H, C)),
            (X, Y),
            F.cross_entropy,
        )
    if how == "frozen":
        return Net().requires_grad_(False), (X, Y), F.cross_entropy
    if how == "argmax":
        return Net(), (X, Y), lambda z, y: (z.argmax(1) != y).float().mean()
    return Net(read=lambda y: y[:, -1].detach()), (X, Y), F.cross_entropy


def ranges(how: str) -> Case:
    return {
        "sigmoid": lambda: (Net(out=1, end=torch.sigmoid), (X, 5 * V), F.mse_loss),
        "tanh": lambda: (Net(out=1, end=torch.tanh), (X, 3 + V), F.mse_loss),
        "relu": lambda: (Net(out=1, end=torch.relu), (X, V), F.l1_loss),
        "tanh before cross-entropy": lambda: (Net(out=20, end=torch.tanh), (X, classes(B, of=20)), F.cross_entropy),
        "state": lambda: (
            Module(lambda m, x: m.rnn(x)[0][:, -1], rnn=nn.LSTM(4, 1, batch_first=True)),
            (X, 4 * V),
            F.mse_loss,
        ),
    }[how]()


def ignored(how: str) -> Case:
    if how == "class 0":
        return Net(), (X, Y), lambda z, y: F.cross_entropy(z, y, ignore_index=0)
    if how == "tags":
        net = Net(out=4, read=lambda y: y)
        return net, (X, classes(B, T, of=4)), lambda z, y: F.cross_entropy(z.transpose(1, 2), y, ignore_index=0)
    weight = torch.ones(C)
    weight[1] = 0
    return Net(), (X, Y), lambda z, y: F.cross_entropy(z, y, weight=weight)


def leak(how: str) -> Case:
    def forward(m: Any, ids: Tensor) -> Tensor:
        return m.head(m.rnn(m.emb(ids))[0])

    both = how == "both directions"
    rnn = nn.LSTM(8, H, batch_first=True, bidirectional=both)
    model = Module(forward, emb=nn.Embedding(30, 8), rnn=rnn, head=nn.Linear(2 * H if both else H, 30))
    batch = (IDS[:, :-1], IDS[:, 1:]) if both else (IDS, IDS.clone())
    return model, batch, lambda z, y: F.cross_entropy(z.transpose(1, 2), y)


def future() -> Case:
    x = noise(120, T, 2)
    y = x[:, :, :1].roll(-2, 1)
    return Net(nn.GRU(2, H, batch_first=True), out=1, read=lambda y: y), (x, y * 2 + 1), F.mse_loss


def reversed_copy() -> Case:
    x = classes(B, T, of=8)

    def forward(m: Any, ids: Tensor) -> Tensor:
        return m.head(m.rnn(m.emb(ids))[0])

    model = Module(forward, emb=nn.Embedding(8, 8), rnn=nn.GRU(8, H, batch_first=True), head=nn.Linear(H, 8))
    return model, (x, x.flip(1)), lambda z, y: F.cross_entropy(z.transpose(1, 2), y)


def drowned() -> Case:
    case = multi_task()

    def loss(z: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(z["class"], y["class"]) + F.mse_loss(z["value"] * 300, y["value"] * 300)

    return case[0], case[1], loss


def copies() -> Case:
    net = Net(nn.LSTM(4, H, batch_first=True))
    for p in net.rnn.parameters():
        nn.init.constant_(p, 0.1)
    return net, (X, Y), F.cross_entropy


def off() -> Case:
    rnn = nn.RNN(4, H, batch_first=True, nonlinearity="relu")
    with torch.no_grad():
        rnn.bias_ih_l0.fill_(-30.0)
    return Net(rnn), (X, Y), F.cross_entropy


def own_loop(how: str) -> Case:
    """A linear recurrence written out."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), H)
        for t in range(x.shape[1]):
            h = m.w(x[:, t]) + m.u(torch.zeros_like(h) if how == "starts anew" else h)
        return m.head(h)

    u = nn.Linear(H, H, bias=False)
    with torch.no_grad():
        nn.init.orthogonal_(u.weight).mul_(1.6 if how == "explodes" else 1.0)
    return Module(forward, w=nn.Linear(4, H), u=u, head=nn.Linear(H, C)), (X, Y), F.cross_entropy


def sigmoid_stack() -> Case:
    net = Net()
    net.head = nn.Sequential(*(m for _ in range(10) for m in (nn.Linear(H, H), nn.Sigmoid())), nn.Linear(H, C))
    return net, (X, Y), F.cross_entropy


def order_of_tags(how: str) -> Case:
    """Every step is tagged with the id before."""
    ids = classes(60, 9, of=12, seed=9)
    y = torch.cat([ids[:, :1], ids[:, :-1]], 1)
    first = how == "flattened in another order"

    def forward(m: Any, ids: Tensor) -> Tensor:
        z = m.head(m.rnn(m.emb(ids))[0])
        return z.transpose(0, 1).reshape(-1, 12) if first else z

    parts = {"emb": nn.Embedding(12, 8), "rnn": nn.GRU(8, H, batch_first=first), "head": nn.Linear(H, 12)}
    return Module(forward, **parts), (ids, y), lambda z, y: F.cross_entropy(z.reshape(-1, 12), y.reshape(-1))


def masked_the_wrong_way() -> Case:
    model, (ids, y), _ = padded_tagger()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(z.transpose(1, 2), y.clamp_min(0), reduction="none")
        return (each * (y < 0)).sum() / (y < 0).sum()

    return model, (ids, y), loss


def explosion() -> Case:
    rnn = uv.cures.spectral_radius_(nn.RNN(4, H, batch_first=True, nonlinearity="relu"), 2.5)
    return Net(rnn), (noise(B, 60, 4), Y), F.cross_entropy


def saturated() -> Case:
    rnn = nn.GRU(4, H, batch_first=True)
    with torch.no_grad():
        rnn.weight_ih_l0.mul_(200)
    return Net(rnn), (X, Y), F.cross_entropy


FAULTY: dict[str, tuple[Callable[[], Case], str]] = {
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
    **{f"NaN: {how}": (lambda how=how: not_finite(how), "nan") for how in (
        "input", "target", "rmse", "log", "parameter", "norm",
    )},
    "ten LSTM layers": (lambda: deep("LSTM", 10), "depth"),
    "eight GRU layers": (lambda: deep("LSTM", 8), "depth"),
    "nine LSTM modules": (deep_modules, "depth"),
    **{f"unmoved: {how}": (lambda how=how: unmoved(how), "parameters_unmoved") for how in (
        "list", "frozen", "argmax", "detached encoder",
    )},
    **{f"range: {how}": (lambda how=how: ranges(how), "output_range") for how in (
        "sigmoid", "tanh", "relu", "tanh before cross-entropy", "state",
    )},
    **{f"ignored: {how}": (lambda how=how: ignored(how), "targets_ignored") for how in ("class 0", "tags", "weight 0")},
    "target is the input": (lambda: leak("same"), "target_in_input"),
    "both directions": (lambda: leak("both directions"), "target_in_input"),
    "two steps ahead": (future, "needs_future"),
    "reversed copy": (reversed_copy, "needs_future"),
    "a term that drowns another": (drowned, "loss_unbalanced"),
    "constant weights": (copies, "symmetric"),
    "all units off": (off, "dead"),
    "explosion": (explosion, "explodes"),
    "weights too large": (saturated, "saturated"),
    "raw inputs": (lambda: (Net(nn.LSTM(4, H, batch_first=True)), (100 + 300 * X, Y), F.cross_entropy), "input_scale"),
    "raw inputs, one feature": (
        lambda: (Net(), (X * torch.tensor([1.0, 1.0, 1.0, 5e3]), Y), F.cross_entropy), "input_scale",
    ),
    "raw targets": (lambda: (Net(out=1), (X, 5_000 + 100 * V), F.mse_loss), "target_scale"),
    "ids as numbers": (
        lambda: (Net(nn.GRU(1, H, batch_first=True), start=lambda x: x.float()[..., None]), (IDS, Y), F.cross_entropy),
        "ids_as_numbers",
    ),
    "features first, by view": (
        lambda: (Net(start=lambda x: x.view(B, T, 4)), (noise(B, 4, T), Y), F.cross_entropy), "axes_mixed",
    ),
    "encoder dropped": (lambda: translated("encoder dropped"), "input_ignored"),
    "decoder shown its target": (lambda: translated("unshifted"), "target_in_input"),
    "scores into ctc_loss": (lambda: alignment(scores=True), "output_not_logits"),
    "own loop that explodes": (lambda: own_loop("explodes"), "explodes"),
    "own loop that starts anew": (lambda: own_loop("starts anew"), "state_cut"),
    "ten sigmoid layers": (sigmoid_stack, "depth"),
    "tags flattened in another order": (lambda: order_of_tags("flattened in another order"), "samples_mixed"),
    "batch_first forgotten, tags": (lambda: order_of_tags("batch_first forgotten"), "samples_mixed"),
    "mask the wrong way round": (masked_the_wrong_way, "targets_ignored"),
    "first step read": (lambda: (Net(read=lambda y: y[:, 0]), (X, Y), F.cross_entropy), "readout"),
    "input multiplied by 0": (lambda: (Net(start=lambda x: x * 0), (X, Y), F.cross_entropy), "input_ignored"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_is_named_first(name: str) -> None:
    torch.manual_seed(0)
    build, code = FAULTY[name]
    model, batch, loss = build()
    found = uv.diagnose(model, *batch, loss=loss, budget=0)
    assert found.findings[0].code == code, found
    assert any(c.isdigit() for c in found.findings[0].proof)


def test_an_optimizer_of_another_model_is_a_finding_of_this_one() -> None:
    model, batch, loss = Net(), (X, Y), F.cross_entropy
    other = torch.optim.Adam(Net().parameters())
    found = uv.diagnose(model, *batch, loss=loss, optimizer=other, budget=5)
    assert found.findings[0].code == "parameters_unmoved"
    assert "lacks 6 of 6" in found.findings[0].proof
    with pytest.raises(TypeError, match="optimizer: expected"):
        uv.diagnose(model, *batch, loss=loss, optimizer=3, budget=0)  # type: ignore[arg-type]


def test_answers_that_are_nan_do_not_look_like_a_state_that_is_carried() -> None:
    model, batch, loss = not_finite("log")
    found = uv.diagnose(model, *batch, loss=loss, budget=0)
    assert [f.code for f in found.findings] == ["nan"]
