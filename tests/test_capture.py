"""Any recurrent model is recorded rightly, or says that it is not; and nothing of a watch gets in the way."""

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import unvanish as uv
from unvanish.capture import link, returned
from unvanish.cells import ZOO
from unvanish.flow.record import NoBackwardError, NonFiniteError
from unvanish.nn import observing

X = torch.randn(9, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
F = X.float()


class Packs(nn.LSTM):
    """Packs its input itself; a sample without steps gets a zero state."""

    def forward(self, x: Tensor, hx: Any = None, lengths: Tensor | None = None) -> Any:  # type: ignore[override]
        assert lengths is not None
        y, state = super().forward(pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=False), hx)
        state = tuple(torch.where((lengths == 0)[None, :, None], 0.0, s) for s in state)
        return pad_packed_sequence(y)[0], state


class Normed(nn.GRU):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = nn.LayerNorm(self.input_size)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(3 * self.norm(x))[0]


class Masked(nn.RNN):
    """Step by step, where a mask is off the state is set to zero."""

    def forward(self, *, batch: dict[str, Tensor]) -> dict[str, Any]:  # type: ignore[override]
        h, out = None, []
        for x, keep in zip(batch["x"], batch["mask"], strict=True):
            y, h = super().forward(x[None], h)
            h = h * keep[:, None]
            out.append(y)
        return {"y": torch.cat(out), "more": (h, 3)}


class Directly(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.forward(x)[0]


MASK = torch.ones(9, 4, dtype=torch.float64)
MASK[3, 1] = MASK[6, 2] = 0
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], str]] = {
    "packs": (lambda: Packs(5, 6), lambda m: m(X, lengths=torch.tensor([9, 4, 1, 6]))[0], "l0"),
    "packs, all shorter": (lambda: Packs(5, 6), lambda m: m(X, lengths=torch.tensor([8, 4, 1, 0]))[0], "l0"),
    "normed": (lambda: Normed(5, 6), lambda m: m(X), "l0"),
    "masked": (lambda: Masked(5, 6), lambda m: m(batch={"x": X, "mask": MASK})["y"], "l0"),
    "forward called": (lambda: Directly(nn.LSTM(5, 6)), lambda m: m(X), "inner.l0"),
    "a cell's forward called": (lambda: Directly(Stepped()), lambda m: m(X), "inner.cell"),
}


class Stepped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(5, 6)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        h = x.new_zeros(x.shape[1], 6)
        out = []
        for row in x:
            h = self.cell.forward(row, h)
            out.append(h)
        return (torch.stack(out),)


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
    with pytest.raises(NonFiniteError, match="mine: NaN born forward at step 2"):
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


def test_nothing_stays_behind() -> None:
    model = nn.Sequential(Normed(5, 6), nn.Linear(6, 2))
    forwards = {kind: vars(kind)["forward"] for kind in observing.TORCHS}
    with uv.watch(model) as flow:
        model(F).sum().backward()
        torch.save(model, io.BytesIO())
        best, ema = copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)
        pickled = pickle.dumps(nn.LSTM(5, 6))
    assert all(vars(kind)["forward"] is forward for kind, forward in forwards.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for twin in (model, best, ema) for m in twin.modules())
    assert all(p._backward_hooks is None for twin in (model, best) for p in twin.parameters())
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    pickle.loads(pickled)
    for twin in (best, ema):
        torch.save(twin, io.BytesIO())
    held = weakref.ref(flow)
    del flow
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("family", [nn, uv.nn])
def test_fake_and_meta_tensors_are_named(family: Any) -> None:
    for device, mode in (("cpu", FakeTensorMode()), ("meta", None)):

        def run(device: str = device) -> uv.flow.Watch:
            lstm = family.LSTM(5, 6, device=device)
            with uv.watch(lstm) as flow:
                lstm(torch.empty(9, 4, 5, device=device))[0].sum().backward()
            return flow

        if mode is None:
            flow = run()
        else:
            with mode:
                flow = run()
        assert "hold no numbers" in flow.skipped[""]
        with pytest.raises(NoBackwardError, match="hold no numbers"):
            flow["l0"]


def test_scripted_quantized_and_compiled_parts_are_named() -> None:
    class Net(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.enc, self.dec = layer, nn.GRU(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.dec(self.enc(x)[0])[0]

    scripted = Net(torch.jit.script(Directly2(nn.LSTM(5, 6))))
    with uv.watch(scripted) as flow:
        scripted(F).sum().backward()
    assert "inside a scripted module" in flow.skipped["enc.inner"]
    assert flow["dec.l0"].valid
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = Net(torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(5, 6)), {nn.LSTM})[0])
        with uv.watch(quantized) as flow:
            quantized(F).sum().backward()
        assert "quantized" in flow.skipped["enc"]
        compiled = torch.compile(Net(nn.LSTM(5, 6)), backend="eager")
        with uv.watch(compiled) as flow:  # type: ignore[arg-type]
            compiled(F).sum().backward()
    for name in ("_orig_mod.enc", "_orig_mod.dec"):
        assert name in flow.skipped or flow[f"{name}.l0"].valid


class Directly2(nn.Module):
    def __init__(self, layer: nn.LSTM) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner(x)[0]
        return y, y


def test_functional_transforms_are_named() -> None:
    lstm = nn.LSTM(5, 6)
    parameters = {k: v.detach() for k, v in lstm.named_parameters()}
    with uv.watch(lstm) as flow:
        torch.func.grad(lambda p: torch.func.functional_call(lstm, p, (F,))[0].sum())(parameters)
    assert "torch.func" in flow.skipped[""]


def test_threads_that_share_a_model() -> None:
    lstm, errors = nn.LSTM(5, 6), list[BaseException]()

    def work(seed: int) -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(5):
                lstm(torch.randn(9, 4, 5, generator=generator))[0].sum().backward()
        except BaseException as error:
            errors.append(error)

    with uv.watch(lstm, keep=20) as flow:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert flow["l0"].dh.shape == (9, 4)


def test_a_closure_of_lbfgs_and_accumulated_gradients() -> None:
    lstm = nn.LSTM(5, 6).double()
    optimizer = torch.optim.LBFGS(lstm.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = lstm(X)[0].square().mean()
        loss.backward()
        return loss

    with uv.watch(lstm, keep=99) as flow:
        optimizer.step(closure)  # type: ignore[arg-type]
        for part in X.split(3):
            lstm(part)[0].square().mean().backward()
    assert all(record.valid and record.residual < 1e-12 for record in flow.passes("l0"))
    assert len(flow.passes("l0")) > 4


def test_an_invalid_record_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden(nn.LSTM):
        """What it returns is not what its weights make."""

        def forward(self, x: Tensor, hx: Any = None) -> Any:
            return super().forward(x, hx)

    lstm = Hidden(5, 6)
    with uv.watch(lstm) as flow:
        y, _ = lstm(F)
        (y.square().mean() + lstm.weight_ih_l0.pow(4).sum()).backward()
    record = flow["l0"]
    assert not record.valid
    assert "differs from autograd's" in (record.problem or "")
    assert "not valid" in repr(record)
    with uv.watch(lstm) as flow:
        (lstm(F)[0].square().mean() + 0.1 * sum(p.square().sum() for p in lstm.parameters())).backward()
    assert flow["l0"].residual > 1e-2
    assert flow["l0"].valid, "a penalty on the weights explains the difference"


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
