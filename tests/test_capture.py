"""Any recurrent model is recorded rightly, or says that it is not; and nothing of a watch gets in the way."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unvanish as uv
from tests.capture_subjects import CASES, F, X
from unvanish.capture import link, returned
from unvanish.cells import ZOO
from unvanish.flow.record import NoBackwardError, NonFiniteError


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("hooked", [False, True])
def test_a_record_is_of_what_the_kernel_saw(name: str, hooked: bool) -> None:
    make, run, layer = CASES[name]
    torch.manual_seed(0)
    model = make().double()

    def call() -> Tensor:
        return run(model).square().mean()

    if hooked:
        model.register_forward_hook(lambda m, args, out: out)
    plain = torch.autograd.grad(call(), list(model.parameters()))
    with uv.watch(model) as flow:
        call().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))  # type: ignore[arg-type]
    record = flow[layer]
    assert record.valid
    assert record.residual < 1e-12
    assert not flow.skipped
    if name == "masked":
        assert record.resets is not None
        assert record.resets.nonzero().tolist() == [[4, 1], [7, 2]]
        assert [list(piece) for piece in record.pieces(1)] == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
        assert [len(piece) for piece in record.pieces(0)] == [9]


def test_a_hook_that_changes_input_or_output_is_recorded_as_it_changes() -> None:
    lstm = nn.LSTM(5, 6).double()
    lstm.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    lstm.register_forward_hook(lambda m, args, out: (out[0] * 5, out[1]))
    with uv.watch(lstm) as flow:
        lstm(X)[0].square().mean().backward()
    assert flow["l0"].residual < 1e-12
    assert flow["l0"].valid


def test_states_of_other_modules_by_name() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(6, 6)

        def forward(self, x: Tensor, s: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            u = 0.5 * s[1] + self.w(s[0]) + x
            return u.tanh(), (u.tanh(), u)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif, self.kept = Leaky(), list[Tensor]()

        def forward(self, x: Tensor) -> Tensor:
            s = (torch.zeros(4, 6), torch.zeros(4, 6))
            for row in x:
                out, s = self.lif(row, s)
                s[1].retain_grad()
                self.kept.append(s[1])
            return out

    net, x = Net(), torch.randn(9, 4, 6)
    getters: list[Any] = [(1, 1), lambda module, args, out: out[1][1]]
    for getter in getters:
        net.kept.clear()
        with uv.watch(net, states={"lif": getter}) as flow:
            net(x).square().sum().backward()
        expected = torch.stack([h.grad.norm(dim=1) for h in net.kept])  # type: ignore[union-attr]
        torch.testing.assert_close(flow["lif"].dh, expected.double(), rtol=1e-6, atol=1e-12)
        assert not flow.skipped
    with pytest.raises(ValueError, match=r"states: expected names of the model's modules \(lif, lif.w\), got 'lof'"):
        uv.watch(net, states={"lof": 0})
    with pytest.raises(TypeError, match=r"expected for 'lif' an index"):
        uv.watch(net, states={"lif": 1.5})  # type: ignore[dict-item]
    with uv.watch(net, states={"lif": 7}) as flow:
        net(x).sum().backward()
    assert "can't be read: IndexError" in flow.skipped["lif"]
    with pytest.raises(ValueError, match=r"has no nn.RNN"), uv.watch(nn.Linear(2, 2)):
        pass


def test_a_recurrent_module_that_is_not_known_is_named() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(6, 6)

        def forward(self, h: Tensor) -> Tensor:
            return self.w(h).tanh()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mine, self.rnn = Cell(), nn.RNN(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = x[0]
            for _ in range(5):
                h = self.mine(h)
            return self.rnn(x)[0].sum() + h.sum()

    net = Net()
    with uv.watch(net) as flow:
        net(torch.randn(7, 2, 6)).backward()
    assert list(flow) == ["rnn.l0"]
    assert list(flow.skipped) == ["mine"]
    assert "name it in states=" in flow.skipped["mine"]
    assert "not recorded: mine" in repr(flow)


def test_marks_that_no_gradient_reaches_are_told() -> None:
    w = nn.Linear(3, 3)
    with uv.watch(nn.ModuleDict({"rnn": nn.RNN(3, 3)})) as flow:
        h = torch.zeros(2, 3)
        for _ in range(5):
            h = uv.mark(w(h).tanh(), "mine")
            h = (h > 0).float()
        (w(h).sum() + w.weight.sum()).backward()
        model = nn.RNN(3, 3)
        with uv.watch(model) as inner:
            model(torch.randn(3, 1, 3))[0].sum().backward()
    assert inner["l0"].valid
    with pytest.raises(NoBackwardError, match=r"no backward pass|marked 5 times, and no gradient reached it"):
        flow["mine"]


def test_nans_of_marked_states_and_of_parameters() -> None:
    w = nn.Linear(3, 3)
    with uv.watch(nn.ModuleDict({"r": nn.RNN(3, 3)})) as flow:
        h = torch.zeros(2, 3)
        for t in range(4):
            h = uv.mark(w(h) + (torch.nan if t == 2 else 0.0), "mine")
        h.sum().backward()
    with pytest.raises(NonFiniteError, match="mine: NaN first appears in the forward pass at step 2"):
        flow["mine"]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.scale = nn.RNN(5, 6), nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0].sum() + self.scale.abs().sqrt().sum()

    net = Net()
    with uv.watch(net) as flow:
        net(F).backward()
    with pytest.raises(NonFiniteError, match="scale: its gradient is not finite, although"):
        flow.layers  # noqa: B018


def test_a_gradient_that_is_differentiated_again_keeps_its_record() -> None:
    for family in (nn, uv.nn):
        lstm, x = family.LSTM(5, 6).double(), X.requires_grad_()
        with uv.watch(lstm) as once:
            torch.autograd.grad(lstm(x)[0][-1].square().mean(), x)
        with uv.watch(lstm) as flow:
            (g,) = torch.autograd.grad(lstm(x)[0][-1].square().mean(), x, create_graph=True)
            g.square().mean().backward()
        torch.testing.assert_close(flow["l0"].dh, once["l0"].dh)
        assert flow["l0"].valid


def chain() -> tuple[Tensor, Any]:
    w = torch.randn(3, 3, requires_grad=True)
    h = torch.randn(4, 3) @ w
    return h, returned((h,))


def test_what_goes_on_and_what_starts_anew() -> None:
    h, last = chain()
    assert link((h,), last) == (False, None)
    assert link((h.detach(),), last) == (True, None)
    assert link((h.detach().clone(),), last) == (True, None)
    assert link((h[:2],), last) == (False, None)
    assert link((h * 0.9 + 1,), last) == (False, None)
    assert link((torch.zeros(4, 3),), last) is None
    assert link((torch.randn(4, 3, requires_grad=True),), last) is None
    assert link((torch.randn(4, 3),), last) is None
    assert link((h,), None) is None
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None]
    found = link((h * keep,), last)
    assert found is not None
    assert found.resets is not None
    assert found.resets.tolist() == [False, True, False, False]
    found = link((h.detach() * keep,), last)
    assert found is not None
    assert (found.cut, found.resets.tolist()) == (True, [False, True, False, False])  # type: ignore[union-attr]


def test_what_was_returned_keeps_no_graph_alive() -> None:
    h, last = chain()
    node = weakref.ref(h.grad_fn.next_functions[0][0]) if h.grad_fn.next_functions[0][0] is not None else None  # type: ignore[union-attr]
    data = h.detach()
    del h
    gc.collect()
    assert node is None or node() is None
    assert torch.equal(last.states[0], data)


@pytest.mark.parametrize("name", list(ZOO))
def test_every_cell_is_watched(name: str) -> None:
    torch.manual_seed(0)
    layer, x = uv.nn.Recurrent(ZOO[name](), 5, 6, num_layers=2, bidirectional=True, dtype=torch.float64), X
    with uv.watch(layer, partial=True) as flow:
        layer(x, lengths=[9, 4, 1, 6])[0].square().mean().backward()
    for place in ("l0", "l0.reverse", "l1", "l1.reverse"):
        record = flow[place]
        assert record.valid
        assert record.residual < 1e-12 or not record.dweight.any()  # type: ignore[union-attr]
        assert record.cell == name
        assert record.gate_names == layer.cell.gates
    with uv.watch(layer) as stepwise:
        one = uv.nn.Recurrent(ZOO[name](), 5, 6, dtype=torch.float64)
        with uv.watch(one) as whole:
            one(x)[0][-1].square().sum().backward()
        with uv.watch(one) as stepwise:
            hx = None
            for row in x:
                y, hx = one(row[None], hx)
            y.square().sum().backward()
    torch.testing.assert_close(stepwise["l0"].dh, whole["l0"].dh, rtol=1e-9, atol=1e-13)
