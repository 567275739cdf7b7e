"""Healthy models as people build them, which look unusual from outside."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own documentation calls it so)

from tests.diagnosis_cases.common import Case, Module, Net, X, Y, classes, noise


def as_many_classes_as_steps() -> Case:
    """Tied weights, and scores `[samples, classes, steps]` whose last two axes have one size."""
    ids = (classes(40, 1, of=12, seed=7) + 5 * torch.arange(13)) % 12

    def forward(m: Any, ids: Tensor) -> Tensor:
        return (m.rnn(m.embed(ids))[0] @ m.embed.weight.T).transpose(1, 2)

    net = Module(forward, embed=nn.Embedding(12, 16), rnn=nn.LSTM(16, 16, batch_first=True))
    return net, (ids[:, :-1], ids[:, 1:]), F.cross_entropy


def packed_final_state() -> Case:
    lengths = classes(60, of=9, seed=4) + 3
    ids = (classes(60, 11, of=20, seed=5) + 1) * (torch.arange(11) < lengths[:, None])

    def forward(m: Any, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(m.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        return m.head(torch.cat(list(m.rnn(packed)[1][0]), 1))

    parts = {"embed": nn.Embedding(21, 8, padding_idx=0), "rnn": nn.LSTM(8, 12, batch_first=True, bidirectional=True)}
    return Module(forward, **parts, head=nn.Linear(24, 3)), (ids, lengths, classes(60)), F.cross_entropy


def experts() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        weights = m.gate(x.mean(1)).softmax(1)
        return m.head((weights[..., None] * torch.stack([r(x)[0][:, -1] for r in m.rnns], 1)).sum(1))

    rnns = nn.ModuleList([nn.GRU(4, 12, batch_first=True), nn.RNN(4, 12, batch_first=True)])
    return Module(forward, gate=nn.Linear(4, 2), rnns=rnns, head=nn.Linear(12, 3)), (X, Y), F.cross_entropy


def greedy_decoder() -> Case:
    """Its own last answer, by argmax, is the next input: no gradient passes there, and the state carries it."""
    ids = classes(40, 3, of=6, seed=8) + 1

    def forward(m: Any, ids: Tensor) -> Tensor:
        h, last, found = m.encoder(m.embed(ids))[1][0], torch.zeros(len(ids), dtype=torch.long), []
        for _ in range(3):
            h = m.cell(m.embed(last), h)
            found.append(m.head(h))
            last = found[-1].argmax(1)
        return torch.stack(found, 2)

    parts = {"embed": nn.Embedding(7, 8), "encoder": nn.GRU(8, 16, batch_first=True), "cell": nn.GRUCell(8, 16)}
    return Module(forward, **parts, head=nn.Linear(16, 7)), (ids, ids), F.cross_entropy


def pointer() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, h = m.rnn(x)
        return (m.key(y) * m.query(h[-1])[:, None]).sum(-1)

    parts = {"rnn": nn.GRU(4, 12, batch_first=True), "key": nn.Linear(12, 8), "query": nn.Linear(12, 8)}
    return Module(forward, **parts), (X, X[..., 1].argmax(1)), F.cross_entropy


def one_sided_loss() -> Case:
    """No gradient for targets below the answers, wherever those are: nothing is left out."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (y - z).relu().mean()

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.rnn(x)[0]).squeeze(-1) * 1e-3

    return Module(forward, rnn=nn.GRU(4, 12, batch_first=True), head=nn.Linear(12, 1)), (X, noise(40, 18, seed=9)), loss


def threshold_beside_the_way() -> Case:
    """A comparison that only chooses, while the gradient has another way."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.rnn(x)[0][:, -1]
        return m.head(y * (y > 0).float())

    return Module(forward, rnn=nn.GRU(4, 12, batch_first=True), head=nn.Linear(12, 3)), (X, Y), F.cross_entropy


def detached_features() -> Case:
    """A detach that is meant: what is in front is trained elsewhere."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.rnn(m.features(x).detach())[0][:, -1])

    parts = {"features": nn.Linear(4, 8), "rnn": nn.GRU(8, 12, batch_first=True)}
    return Module(forward, **parts, head=nn.Linear(12, 3)), (X, Y), F.cross_entropy


def forget_gate_half_closed() -> Case:
    net = Net(nn.LSTM(4, 16, batch_first=True))
    with torch.no_grad():
        net.rnn.bias_ih_l0[16:32] -= 2
    return net, (X, Y), F.cross_entropy


def images_with_dark_edges() -> Case:
    """Rows of images, read from top to bottom: the last ones are black, as many as the drawing leaves."""
    images = torch.rand(60, 28, 10, generator=torch.Generator().manual_seed(3)) * noise(60, 28, 10).gt(0)
    tail = classes(60, of=6, seed=6) + 1
    return (
        Net(nn.LSTM(10, 16, batch_first=True)),
        (images * (torch.arange(28) < 28 - tail[:, None])[..., None], classes(60)),
        F.cross_entropy,
    )


CASES: dict[str, Callable[[], Case]] = {
    "as many classes as steps": as_many_classes_as_steps,
    "packed, final state": packed_final_state,
    "experts": experts,
    "greedy decoder": greedy_decoder,
    "pointer over the steps": pointer,
    "one-sided loss": one_sided_loss,
    "threshold beside the way": threshold_beside_the_way,
    "detached features": detached_features,
    "forget gate half closed": forget_gate_half_closed,
    "images with dark edges": images_with_dark_edges,
}
