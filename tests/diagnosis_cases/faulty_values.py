"""Faulty models: numbers, depth, parameters, targets and inits."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own documentation calls it so)

import unvanish as uv
from tests.diagnosis_cases.common import IDS, B, C, Case, H, Module, Net, T, V, X, Y, classes, noise
from tests.diagnosis_cases.healthy_builds import alignment, padded_tagger, translated
from tests.diagnosis_cases.healthy_tasks import multi_task


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


def overflowing() -> Case:
    """Weights between 0 and 1 in a relu RNN: every state is some dozen times the one before."""
    rnn = nn.RNN(4, 64, nonlinearity="relu", batch_first=True)
    for p in rnn.parameters():
        nn.init.uniform_(p, 0, 1)
    return Net(rnn, out=1), (X, V), F.mse_loss


def logarithm_of_states() -> Case:
    """The states grow large but not too large: it is the logarithm of a negative number that is no number."""
    rnn = nn.RNN(4, 8, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(3.0 * torch.eye(8))
    return Net(rnn, out=1), (X.abs(), V), lambda z, y: (-1 - z.abs()).log().mean()


def with_penalty(weight: float) -> Case:
    parts = {"rnn": nn.GRU(4, H, batch_first=True), "head": nn.Linear(H, C), "other": nn.Linear(H, 2)}

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.rnn(x)[0]
        return m.head(y[:, -1]), m.other(y[:, -1])

    return Module(forward, **parts), (X, Y), lambda z, y: weight * F.cross_entropy(z[0], y) + (z[1] ** 2).mean()


def frozen_at_zero() -> Case:
    head = nn.Linear(H, C).requires_grad_(False)
    head.weight.zero_()
    parts = {"rnn": nn.GRU(4, H, batch_first=True), "head": head, "shift": nn.Parameter(torch.zeros(C))}
    return Module(lambda m, x: m.head(m.rnn(x)[0][:, -1]) + m.shift, **parts), (X, Y), F.cross_entropy


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


CASES: dict[str, tuple[Callable[[], Case], str]] = {
    **{f"NaN: {how}": (lambda how=how: not_finite(how), "nan") for how in (
        "input", "target", "rmse", "log", "parameter", "norm",
    )},
    "NaN: log of large states": (logarithm_of_states, "nan"),
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
    "dropout that eval leaves on": (
        lambda: (Net(end=lambda z: F.dropout(z, 0.3)), (X, Y), F.cross_entropy), "regularised_away",
    ),
    "a head of zeros that is frozen": (frozen_at_zero, "input_ignored"),
    "classes first, by view, in the loss": (
        lambda: (
            Net(read=lambda y: y), (X, classes(B, T)), lambda z, y: F.cross_entropy(z.reshape(len(z), C, -1), y),
        ),
        "axes_mixed",
    ),
    "a weight of 0 for the target's term": (lambda: with_penalty(0.0), "targets_ignored"),
    "a step in the middle read": (lambda: (Net(read=lambda y: y[:, 7]), (X, Y), F.cross_entropy), "readout"),
    "states that overflow": (overflowing, "explodes"),
    "first step read": (lambda: (Net(read=lambda y: y[:, 0]), (X, Y), F.cross_entropy), "readout"),
    "input multiplied by 0": (lambda: (Net(start=lambda x: x * 0), (X, Y), F.cross_entropy), "input_ignored"),
}  # fmt: skip
