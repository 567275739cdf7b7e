"""Faulty models as people show them when they ask for help."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own documentation calls it so)

import unvanish as uv
from tests.diagnosis_cases.common import IDS, Case, Module, X, Y, classes, noise


def packed_then_last_step() -> Case:
    """After unpacking, the last step of a shorter sequence is a zero that was filled in."""
    lengths = classes(60, of=9, seed=4) + 3
    ids = (classes(60, 11, of=20, seed=5) + 1) * (torch.arange(11) < lengths[:, None])

    def forward(m: Any, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(m.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        y, _ = nn.utils.rnn.pad_packed_sequence(m.rnn(packed)[0], batch_first=True)
        return m.head(y[:, -1])

    parts = {"embed": nn.Embedding(21, 8, padding_idx=0), "rnn": nn.LSTM(8, 12, batch_first=True)}
    return Module(forward, **parts, head=nn.Linear(12, 3)), (ids, lengths, classes(60)), F.cross_entropy


def unpacked_to_a_fixed_length() -> Case:
    """The same with `total_length`: of 60 sequences a single one is long enough for the last step to be its own."""
    lengths = classes(60, of=5, seed=4) + 3
    lengths[41] = 11
    ids = (classes(60, 11, of=20, seed=5) + 1) * (torch.arange(11) < lengths[:, None])

    def forward(m: Any, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(m.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        y, _ = nn.utils.rnn.pad_packed_sequence(m.rnn(packed)[0], batch_first=True, total_length=11)
        return m.head(y[:, -1])

    parts = {"embed": nn.Embedding(21, 8, padding_idx=0), "rnn": nn.LSTM(8, 12, batch_first=True)}
    return Module(forward, **parts, head=nn.Linear(12, 3)), (ids, lengths, classes(60)), F.cross_entropy


def first_state_made_once() -> Case:
    start = nn.Linear(2, 12)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.rnn(x, m.h0.expand(1, len(x), 12).contiguous())[0][:, -1])

    rnn, h0 = nn.RNN(4, 12, batch_first=True), start(torch.ones(1, 1, 2)).tanh()
    return Module(forward, rnn=rnn, head=nn.Linear(12, 3), start=start, h0=h0), (X, Y), F.cross_entropy


def spikes_without_surrogate() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        v, count = x.new_zeros(len(x), 32), x.new_zeros(len(x), 32)
        for t in range(x.shape[1]):
            v = 0.9 * v + m.into(x[:, t])
            spike = (v > 0.5).float()
            v, count = v * (1 - spike), count + spike
        return m.head(count)

    return Module(forward, into=nn.Linear(4, 32), head=nn.Linear(32, 3)), (X, Y), F.cross_entropy


def negative_targets_masked() -> Case:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        mask = (y > 0).float()
        return ((z - y).square() * mask).sum() / mask.sum()

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.rnn(x)[0]).squeeze(-1)

    return Module(forward, rnn=nn.GRU(4, 12, batch_first=True), head=nn.Linear(12, 1)), (X, X.cumsum(1)[..., 0]), loss


def channels_viewed_as_steps() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = m.conv(x.transpose(1, 2)).relu()
        return m.head(m.rnn(z.reshape(z.size(0), z.size(2), z.size(1)))[0][:, -1])

    parts = {"conv": nn.Conv1d(4, 10, 3, padding=1), "rnn": nn.LSTM(10, 12, batch_first=True)}
    return Module(forward, **parts, head=nn.Linear(12, 3)), (X, Y), F.cross_entropy


def ids_to_ids(target: Tensor, ids: Tensor = IDS, end: Callable[[Tensor], Tensor] = lambda z: z) -> Case:
    """A causal model whose scores have the classes second, as cross-entropy takes them."""

    def forward(m: Any, ids: Tensor) -> Tensor:
        return end(m.head(m.rnn(m.embed(ids))[0])).transpose(1, 2)

    parts = {"embed": nn.Embedding(30, 8), "rnn": nn.GRU(8, 12, batch_first=True), "head": nn.Linear(12, 30)}
    return Module(forward, **parts), (ids, target), F.cross_entropy


def short_reversed() -> Case:
    ids = classes(60, 8, of=30, seed=6)
    return ids_to_ids(ids.flip(1), ids)


def attention_over_the_batch() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, _ = m.rnn(x)
        return m.head((m.score(y).softmax(0) * y).sum(1))

    parts = {"rnn": nn.GRU(4, 12, batch_first=True), "score": nn.Linear(12, 1)}
    return Module(forward, **parts, head=nn.Linear(12, 3)), (X, Y), F.cross_entropy


def chunks_detached() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        state, y = None, x
        for piece in x.split(4, 1):
            y, state = m.rnn(piece, state)
            state = tuple(s.detach() for s in state)
        return m.head(y[:, -1])

    return Module(forward, rnn=uv.nn.LSTM(4, 12, batch_first=True), head=nn.Linear(12, 3)), (X, Y), F.cross_entropy


def fractions_as_ids() -> Case:
    x = noise(40, 12).sigmoid()

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.rnn(m.embed(x.long()))[0][:, -1])

    parts = {"embed": nn.Embedding(10, 8), "rnn": nn.GRU(8, 12, batch_first=True)}
    return Module(forward, **parts, head=nn.Linear(12, 1)), (x, x[:, -3:].sum(1, keepdim=True)), F.mse_loss


def dead_head() -> Case:
    first = nn.Linear(12, 12)
    nn.init.constant_(first.bias, -8.0)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.first(m.rnn(x)[0][:, -1]).relu())

    rnn = nn.LSTM(4, 12, batch_first=True)
    return Module(forward, rnn=rnn, first=first, head=nn.Linear(12, 3)), (X, Y), F.cross_entropy


CASES: dict[str, tuple[Callable[[], Case], str]] = {
    "packed, then the last step": (packed_then_last_step, "padding_read"),
    "unpacked to a fixed length": (unpacked_to_a_fixed_length, "padding_read"),
    "first state made in __init__": (first_state_made_once, "state_carried"),
    "spikes without a surrogate": (spikes_without_surrogate, "parameters_unmoved"),
    "targets above 0 alone": (negative_targets_masked, "targets_ignored"),
    "channels viewed as steps": (channels_viewed_as_steps, "axes_mixed"),
    "ids not shifted, classes second": (lambda: ids_to_ids(IDS.clone()), "target_in_input"),
    "eight ids in reverse order": (short_reversed, "needs_future"),
    "softmax of tokens, classes second": (
        lambda: ids_to_ids(IDS.roll(1, 1), end=lambda z: z.softmax(-1)), "output_not_logits",
    ),
    "attention over the batch": (attention_over_the_batch, "samples_mixed"),
    "chunks detached inside forward": (chunks_detached, "state_cut"),
    "fractions as ids": (fractions_as_ids, "input_ignored"),
    "head that is off": (dead_head, "dead"),
}  # fmt: skip
