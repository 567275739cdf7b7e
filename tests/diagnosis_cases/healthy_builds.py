"""Healthy models of unusual build."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own documentation calls it so)

from tests.diagnosis_cases.common import IDS, B, C, Case, H, Module, Net, T, V, X, Y, classes, noise


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


def functional_dropout() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(F.dropout(F.dropout(m.rnn(x)[0][:, -1], 0.4, m.training), 0.0))

    return Module(forward, rnn=nn.GRU(4, H, batch_first=True), head=nn.Linear(H, C)), (X, Y), F.cross_entropy


def flat_language_model(vocabulary: int) -> Case:
    """Samples and steps in one axis; as many classes as there may be samples that a test looks at."""
    ids = classes(60, 25, of=vocabulary)

    def forward(m: Any, ids: Tensor) -> Tensor:
        return m.head(m.rnn(m.embed(ids))[0].reshape(-1, H))

    parts = {"embed": nn.Embedding(vocabulary, 8), "rnn": nn.LSTM(8, H, batch_first=True)}
    return (
        Module(forward, **parts, head=nn.Linear(H, vocabulary)),
        (ids[:, :-1], ids[:, 1:]),
        lambda z, y: F.cross_entropy(z, y.reshape(-1)),
    )


def head_at_zero() -> Case:
    """All answers are the same until the first update."""
    net = Net()
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    return net, (X, Y), F.cross_entropy


def padded_far_beyond() -> Case:
    """All samples end long before the batch does: the steps that are dropped hold padding alone."""
    lengths = torch.randint(3, T // 2, (B,), generator=torch.Generator().manual_seed(3))
    x = X * (torch.arange(T)[None, :, None] < lengths[:, None, None])

    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        return m.head(m.rnn(x)[0][torch.arange(len(x)), lengths - 1])

    return Module(forward, rnn=nn.GRU(4, H, batch_first=True), head=nn.Linear(H, C)), (x, lengths, Y), F.cross_entropy


def filled_forward() -> Case:
    """Each sample is read at its own end; after it its last step is repeated."""
    lengths = torch.randint(T // 2, T - 4, (B,), generator=torch.Generator().manual_seed(3))
    x = X[torch.arange(B)[:, None], torch.minimum(torch.arange(T)[None], lengths[:, None] - 1)]

    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        return m.head(m.rnn(x)[0][torch.arange(len(x)), lengths - 1])

    return Module(forward, rnn=nn.GRU(4, H, batch_first=True), head=nn.Linear(H, C)), (x, lengths, Y), F.cross_entropy


def annealed() -> Case:
    """An autoencoder whose penalty has no weight yet; the labels are passed and not used."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = m.rnn(x)[0]
        return m.head(y), m.spread(y[:, -1]), x

    def loss(z: tuple[Tensor, Tensor, Tensor], y: Tensor) -> Tensor:
        return F.mse_loss(z[0].roll(1, 1), z[2]) + 0.0 * z[1].square().mean()

    return (
        Module(forward, rnn=nn.GRU(4, H, batch_first=True), head=nn.Linear(H, 4), spread=nn.Linear(H, 2)),
        (X, Y),
        loss,
    )


def torchs_own_dropout() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.dropout(m.rnn(x)[0][:, -1], p=0.3, train=m.training))

    return Module(forward, rnn=nn.GRU(4, H, batch_first=True), head=nn.Linear(H, C)), (X, Y), F.cross_entropy


def alignment(scores: bool) -> Case:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        z = z.transpose(0, 1)
        lengths = torch.full((len(y),), T), torch.full((len(y),), y.shape[1])
        return F.ctc_loss(z if scores else z.log_softmax(-1), y, *lengths)

    return Net(out=6, read=lambda y: y), (X, classes(B, 4, of=5) + 1), loss


CASES: dict[str, Callable[[], Case]] = {
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
    "functional dropout": functional_dropout,
    "a head that starts at zero": head_at_zero,
    **{f"flat answers, {classes} classes": partial(flat_language_model, classes) for classes in (9, 12, 13)},
    "padded far beyond the last sample": padded_far_beyond,
    "filled forward": filled_forward,
    "annealed penalty": annealed,
    "torch.dropout": torchs_own_dropout,
    "packed answers": packed_answers,
    "target network": target_network,
    "radial features": radial_features,
    "smooth forecast": smooth_forecast,
    "loss inside": loss_inside,
    "translation": lambda: translated("right"),
    "translation, time-major": lambda: translated("time-major"),
    "alignment": lambda: alignment(scores=False),
}  # fmt: skip
