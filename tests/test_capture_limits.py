"""What a watch leaves behind, and what it names instead of recording."""

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import unvanish as uv
from tests.capture_subjects import F, Normed, X
from unvanish.capture.parts import unseen
from unvanish.flow.record import NoBackwardError
from unvanish.nn import observing


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


def test_nothing_is_recorded_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = SimpleNamespace(is_cuda=True, is_meta=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "CUDA graph" in (unseen([on_gpu]) or "")
    assert unseen([torch.zeros(1)]) is None
    layer, ends = nn.GRU(2, 3), list[Any]()
    with uv.watch(layer):
        layer(torch.zeros(4, 1, 2))[0].sum().backward()
        # The hooks of earlier steps are still there when a step is captured.
        monkeypatch.setattr("unvanish.flow.backward_runs.unseen", lambda _: "captured")
        monkeypatch.setattr("unvanish.torch_internals.after_backward", ends.append)
        layer.weight_hh_l0.sum().backward()
    assert not ends
