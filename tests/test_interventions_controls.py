"""Healthy models of unusual build: each is found healthy, and no change is proposed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, cross_entropy, mse_loss
from torch.nn.utils.rnn import pack_padded_sequence

from tests.interventions_subjects import Last, recall
from unvanish.diagnosis.interventions import run
from unvanish.diagnosis.subject import Subject

Case = Callable[[], Subject]
CASES: dict[str, Case] = {}
X, Y = recall(256, 6)


def case(build: Case) -> Case:
    CASES[build.__name__] = build
    return build


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Parts(nn.Module):
    """Modules by name, and a forward that is given as a function."""

    def __init__(self, call: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *items: Any) -> Any:
        return self.call(self, *items)


@case
def time_major() -> Subject:
    model = Parts(lambda m, x: m.head(m.rnn(x)[0][-1]), rnn=nn.LSTM(4, 16), head=nn.Linear(16, 3))
    return Subject(model, (X.transpose(0, 1).contiguous(),), Y, cross_entropy)


@case
def time_major_with_a_target_per_step() -> Subject:
    x = torch.randn(12, 256, 3, generator=seeded(1))
    y = torch.cat([torch.zeros(1, 256, 1), x[:-1, :, :1]])
    return Subject(Parts(lambda m, x: m.head(m.rnn(x)[0]), rnn=nn.GRU(3, 16), head=nn.Linear(16, 1)), (x,), y, mse_loss)


@case
def packed() -> Subject:
    lengths = torch.randint(2, 7, (256,), generator=seeded(2))
    x = pack_padded_sequence(X, lengths, batch_first=True, enforce_sorted=False)
    model = Parts(lambda m, x: m.head(m.rnn(x)[1][0][0]), rnn=nn.LSTM(4, 16), head=nn.Linear(16, 3))
    return Subject(model, (x,), Y, cross_entropy)


@case
def dicts_and_two_tasks() -> Subject:
    def call(m: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        h = m.rnn(batch["x"])[1][0]
        return {"a": m.a(h), "b": m.b(h)}

    def loss(out: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
        return cross_entropy(out["a"], y["a"]) + mse_loss(out["b"], y["b"])

    model = Parts(call, rnn=nn.GRU(4, 16, batch_first=True), a=nn.Linear(16, 3), b=nn.Linear(16, 1))
    return Subject(model, ({"x": X},), {"a": Y, "b": X[:, -1, :1]}, loss)


@case
def language_model() -> Subject:
    ids = torch.randint(8, (256, 21), generator=seeded(3))
    ids[:, 1::2] = ids[:, 0:-1:2]
    parts = {"embed": nn.Embedding(8, 12), "rnn": nn.LSTM(12, 24, batch_first=True), "head": nn.Linear(24, 8)}
    model = Parts(lambda m, ids: m.head(m.rnn(m.embed(ids))[0]), **parts)
    return Subject(model, (ids[:, :-1],), ids[:, 1:], lambda out, y: cross_entropy(out.transpose(1, 2), y))


@case
def batch_and_time_folded() -> Subject:
    x = torch.randn(256, 10, 3, generator=seeded(1))
    model = Parts(
        lambda m, x: m.head(m.rnn(x)[0]).reshape(-1, 2), rnn=nn.GRU(3, 16, batch_first=True), head=nn.Linear(16, 2)
    )
    return Subject(model, (x,), (x[..., 0] > 0).long().reshape(-1), cross_entropy)


@case
def batch_norm() -> Subject:
    parts = {"norm": nn.BatchNorm1d(4), "rnn": nn.GRU(4, 16, batch_first=True), "also": nn.BatchNorm1d(16)}
    model = Parts(
        lambda m, x: m.head(m.also(m.rnn(m.norm(x.transpose(1, 2)).transpose(1, 2))[1][0])),
        **parts,
        head=nn.Linear(16, 3),
    )
    return Subject(model, (X * 50 + 200,), Y, cross_entropy)


@case
def rare_class() -> Subject:
    x, _ = recall(512, 6)
    return Subject(Last(nn.GRU(4, 16, batch_first=True), 2), (x,), (x[:, 0, 0] > 2.2).long(), cross_entropy)


@case
def contrastive() -> Subject:
    other = torch.randn(256, 4, generator=seeded(3))
    x = 0.1 * torch.randn(256, 6, 4, generator=seeded(4))
    x[:, 2] += other
    model = Parts(lambda m, x, z: m.rnn(x)[1][0] @ m.b(z).T, rnn=nn.GRU(4, 16, batch_first=True), b=nn.Linear(4, 16))
    return Subject(model, (x, other), torch.arange(256), cross_entropy)


@case
def encoder_decoder() -> Subject:
    ids = torch.randint(5, (256, 5), generator=seeded(3))

    def call(m: Any, ids: Tensor, answers: Tensor) -> Tensor:
        _, h = m.encoder(m.embed(ids))
        before = torch.cat([torch.full((len(answers), 1), 5), answers[:, :-1]], 1)
        return m.head(m.decoder(m.embed(before), h)[0])

    parts = {name: nn.GRU(12, 32, batch_first=True) for name in ("encoder", "decoder")}
    model = Parts(call, embed=nn.Embedding(6, 12), **parts, head=nn.Linear(32, 5))
    return Subject(model, (ids, ids.flip(1)), ids.flip(1), lambda out, y: cross_entropy(out.flatten(0, 1), y.flatten()))


@case
def lightning_module() -> Subject:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Last(nn.GRU(4, 16, batch_first=True), 3)

        def training_step(self, batch: Any, number: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

    return Subject(Module(), ((X, Y),))


class Spike(torch.autograd.Function):
    """A step function with a surrogate gradient."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).float()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:  # type: ignore[override]
        return d / (1 + 10 * ctx.saved_tensors[0].abs()) ** 2


@case
def spiking() -> Subject:
    x, y = torch.rand(256, 10, 4, generator=seeded(1)), torch.randint(3, (256,), generator=seeded(2))
    x[torch.arange(256), :, y] += 0.7

    def call(m: Any, x: Tensor) -> Tensor:
        v = spike = x.new_zeros(len(x), 32)
        total = x.new_zeros(len(x), 3)
        for x_t in x.unbind(1):
            v = 0.9 * v * (1 - spike.detach()) + m.w(x_t) + 0.3 * m.u(spike)
            spike = Spike.apply(v - 1)  # type: ignore[no-untyped-call]
            total = total + m.head(spike)
        return total / x.shape[1]

    return Subject(Parts(call, w=nn.Linear(4, 32), u=nn.Linear(32, 32), head=nn.Linear(32, 3)), (x,), y, cross_entropy)


@case
def residual_stack() -> Subject:
    def call(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        for rnn in m.stack:
            x = x + rnn(m.norm(x))[0]
        return m.head(x[:, -1])

    stack = nn.ModuleList(nn.LSTM(16, 16, batch_first=True) for _ in range(4))
    return Subject(
        Parts(call, first=nn.Linear(4, 16), stack=stack, norm=nn.LayerNorm(16), head=nn.Linear(16, 3)),
        (X,), Y, cross_entropy,
    )  # fmt: skip


@case
def both_directions_pooled_into_a_sigmoid() -> Subject:
    x, y = recall(256, 8, classes=2)
    rnn = nn.LSTM(4, 8, batch_first=True, bidirectional=True)
    model = Parts(lambda m, x: m.head(m.rnn(x)[0].mean(1)).sigmoid(), rnn=rnn, head=nn.Linear(16, 1))
    return Subject(model, (x,), y.float()[:, None], binary_cross_entropy)


@case
def attention_over_a_cell_loop() -> Subject:
    def call(m: Any, x: Tensor) -> Tensor:
        h, states = x.new_zeros(len(x), 16), []
        for x_t in x.unbind(1):
            h = m.cell(x_t, h)
            states.append(h)
        y = torch.stack(states, 1)
        return m.head((m.score(y).softmax(1) * y).sum(1))

    return Subject(
        Parts(call, cell=nn.GRUCell(4, 16), score=nn.Linear(16, 1), head=nn.Linear(16, 3)), (X,), Y, cross_entropy
    )


@pytest.mark.parametrize("name", CASES)
def test_a_healthy_model_of_unusual_build_is_healthy(name: str) -> None:
    torch.manual_seed(0)
    found = run(CASES[name](), budget=60.0)
    assert [f.code for f in found.findings] == ["healthy"]
    assert "unseen" in found.findings[0].says
    assert not found.plan
    assert [t.name for t in found.tried] == ["as it is"]
