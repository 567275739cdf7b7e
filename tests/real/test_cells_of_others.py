"""Models of other packages with recurrent cells of their own: recorded by name, or listed as not recorded."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unvanish as uv

pytestmark = pytest.mark.real

T, B, H = 7, 3, 6
X = torch.randn(T, B, 5, generator=torch.Generator().manual_seed(0))


class Snn(nn.Module):
    """snntorch's leaky neuron, stepped."""

    def __init__(self) -> None:
        super().__init__()
        import snntorch

        self.fc = nn.Linear(5, H)
        self.lif = snntorch.Leaky(beta=0.9, threshold=0.5)

    def forward(self, x: Tensor) -> Tensor:
        mem, out = self.lif.init_leaky(), []
        for row in x:
            spikes, mem = self.lif(self.fc(row), mem)
            out.append(spikes)
        return torch.stack(out)


class Norse(nn.Module):
    """norse's neuron with recurrent weights, stepped."""

    def __init__(self) -> None:
        super().__init__()
        import norse.torch

        self.lif = norse.torch.LIFRecurrentCell(5, H)

    def forward(self, x: Tensor) -> Tensor:
        state, out = None, []
        for row in x:
            _, state = self.lif(5 * row, state)
            out.append(state.v)
        return torch.stack(out)


Case = tuple[str, Callable[[Any], nn.Module], Callable[[Any], Tensor], dict[str, Any], set[str]]


def first(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = out[0]
    return out


def output(m: Any) -> Tensor:
    return first(m(X)).square().mean()


def rows_of_a_batch(m: Any) -> Tensor:
    return first(m(X.transpose(0, 1))).square().mean()


CASES: dict[str, Case] = {
    "opacus lstm": ("opacus.layers", lambda p: p.DPLSTM(5, H, num_layers=2), output, {"l0": 0, "l1": 0}, set()),
    "opacus gru": ("opacus.layers", lambda p: p.DPGRU(5, H), output, {"l0": lambda m, a, o: o}, set()),
    "torchrecurrent mgu": (
        "torchrecurrent",
        lambda p: p.MGU(5, H, num_layers=2),
        output,
        {"cells.0": lambda m, a, o: o, "cells.1": lambda m, a, o: o},
        set(),
    ),
    "torchrecurrent peephole": ("torchrecurrent", lambda p: p.PeepholeLSTM(5, H), output, {"cells.0": 0}, set()),
    "snntorch": ("snntorch", lambda p: Snn(), output, {"lif": 1}, set()),
    "norse": ("norse.torch", lambda p: Norse(), output, {"lif": lambda m, a, o: o[1].v}, set()),
}


@pytest.mark.parametrize("name", CASES)
def test_states_by_name(name: str) -> None:
    package, make, run, states, skipped = CASES[name]
    package = pytest.importorskip(package)
    torch.manual_seed(0)
    model = make(package)
    # Not a copy: norse clears a gradient in a hook, which copies of its module lack.
    torch.manual_seed(0)
    plain = make(package)
    kept: dict[str, list[Tensor]] = {key: [] for key in states}

    def keep(key: str, getter: Any) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            state = getter(module, args, out) if callable(getter) else out[getter]
            state.retain_grad()
            kept[key].append(state)

        return hook

    for key, getter in states.items():
        plain.get_submodule(key).register_forward_hook(keep(key, getter))
    run(plain).backward()
    with uv.watch(model, states=states) as flow:
        run(model).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))  # type: ignore[arg-type]
    assert set(flow) == set(states)
    assert set(flow.skipped) == skipped
    for key, found in kept.items():
        norms = torch.stack([torch.zeros(B) if s.grad is None else s.grad.norm(dim=-1) for s in found])
        torch.testing.assert_close(flow[key].dh, norms.double(), rtol=1e-5, atol=1e-12)
        assert len(found) == T
        assert flow[key].dh.any()


@pytest.mark.parametrize("name", CASES)
def test_unnamed_cells_are_listed(name: str) -> None:
    package, make, run, states, _ = CASES[name]
    model = make(pytest.importorskip(package))
    both = nn.ModuleDict({"other": model, "rnn": nn.RNN(5, H)})
    with uv.watch(both) as flow:
        (run(model) + both["rnn"](X)[0].sum()).backward()
    assert list(flow) == ["rnn.l0"]
    missing = [key for key in states if f"other.{key}" not in flow.skipped]
    assert not missing, flow.skipped


@pytest.mark.parametrize("kind", ["CfC", "LTC"])
def test_ncps_whose_cells_are_not_called_as_modules(kind: str) -> None:
    package = pytest.importorskip("ncps.torch")
    torch.manual_seed(0)
    model = getattr(package, kind)(5, H, batch_first=False)
    with uv.watch(model, states={"rnn_cell": 1}) as flow:
        output(model).backward()
    assert "called directly" in flow.skipped["rnn_cell"]
    with pytest.raises(uv.flow.record.NoBackwardError, match="called directly"):
        flow["rnn_cell"]
    with pytest.raises(ValueError, match="and nothing was marked"), uv.watch(model):
        output(model).backward()


def test_ncps_marked_by_hand() -> None:
    package = pytest.importorskip("ncps.torch")
    torch.manual_seed(0)
    cell = package.CfCCell(5, H, backbone_units=8, backbone_layers=1)
    h, kept = torch.zeros(B, H), list[Tensor]()
    with uv.watch(cell) as flow:
        for row in X:
            _, h = cell(row, h, 1.0)
            h.retain_grad()
            kept.append(uv.mark(h, "cfc"))
        h.square().sum().backward()
    norms = torch.stack([s.grad.norm(dim=1) for s in kept])  # type: ignore[union-attr]
    torch.testing.assert_close(flow["cfc"].dh, norms.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["LiGRU", "SLiGRU"])
def test_speechbrain_loops_hidden_in_a_forward(kind: str) -> None:
    package = pytest.importorskip(
        "speechbrain.nnet.RNN",
        reason="missing, or made for another torch",
        exc_type=(ImportError, OSError),  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    model = getattr(package, kind)(hidden_size=H, input_shape=(B, T, 5), nonlinearity="tanh")
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="and nothing was marked"), uv.watch(model):
        rows_of_a_batch(model).backward()
    torch.manual_seed(1)
    rows_of_a_batch(plain).backward()
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True)
        if p.grad is not None
    )  # type: ignore[arg-type]


def test_opacus_private_training_within_a_watch() -> None:
    opacus = pytest.importorskip("opacus")
    from torch.utils.data import DataLoader, TensorDataset

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = opacus.layers.DPLSTM(5, H, batch_first=True), nn.Linear(H, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0][:, -1])

    def trained(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Net()
        data = DataLoader(TensorDataset(torch.randn(12, T, 5), torch.randn(12, 1)), batch_size=6)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        generator = torch.Generator().manual_seed(3)
        engine = opacus.PrivacyEngine()
        model, optimizer, data = engine.make_private(
            module=model, optimizer=optimizer, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0,
            poisson_sampling=False, noise_generator=generator,
        )  # fmt: skip

        def epoch() -> None:
            for x, y in data:
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()

        if watched:
            with uv.watch(model, states={"_module.rnn.l0": 0}) as flow:
                epoch()
            assert flow["_module.rnn.l0"].dh.shape == (T, 6)
        else:
            epoch()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))


@pytest.mark.parametrize("name", ["opacus gru", "torchrecurrent mgu"])
def test_a_diagnosis_of_a_model_without_known_layers_ends(name: str) -> None:
    package, make, *_ = CASES[name]
    model = make(pytest.importorskip(package))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = model, nn.Linear(H, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(x)[0][-1])

    found = uv.diagnose(Net(), X, torch.randn(B, 1), loss=nn.functional.mse_loss, budget=0)
    assert not found.layers
    assert str(found)


@pytest.mark.parametrize("name", ["Leaky", "Synaptic", "Alpha", "Lapicque", "RLeaky", "SLSTM"])
def test_snntorchs_hidden_states_are_listed(name: str) -> None:
    package = pytest.importorskip("snntorch")
    options: dict[str, dict[str, Any]] = {
        "Leaky": {"beta": 0.9}, "Synaptic": {"alpha": 0.9, "beta": 0.8}, "Alpha": {"alpha": 0.9, "beta": 0.8},
        "Lapicque": {"beta": 0.9}, "RLeaky": {"beta": 0.9, "linear_features": H},
        "SLSTM": {"input_size": H, "hidden_size": H},
    }  # fmt: skip
    model = nn.ModuleDict(
        {
            "inner": nn.Linear(5, H),
            "cell": getattr(package, name)(init_hidden=True, **options[name]),
            "rnn": nn.RNN(5, H),
        }
    )
    getattr(model["cell"], "reset_mem", lambda: None)()
    with uv.watch(model) as flow:
        spikes = torch.stack([model["cell"](model["inner"](row)) for row in X])
        (spikes.sum() + model["rnn"](X)[0].sum()).backward()
    assert list(flow) == ["cell.lstm_cell", "rnn.l0"] if name == "SLSTM" else ["rnn.l0"]
    assert name == "SLSTM" or "cell" in flow.skipped, flow.skipped
