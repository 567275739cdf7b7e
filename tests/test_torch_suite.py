"""PyTorch's own inputs for its recurrent modules, and the ways out of Python: export, ONNX, quantisation."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import module_db

import unvanish as uv

OURS = {getattr(nn, name): getattr(uv.nn, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")}
INFOS = [info for info in module_db if info.module_cls in OURS]


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
@pytest.mark.parametrize("training", [True, False])
def test_pytorchs_inputs_give_pytorchs_outputs_and_gradients(info: Any, training: bool) -> None:
    inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)
    assert inputs
    for given in inputs:
        built, called = given.constructor_input, given.forward_input
        results = []
        theirs = info.module_cls(*built.args, **built.kwargs).double().train(training)
        ours = OURS[info.module_cls](*built.args, **built.kwargs).double().train(training)
        ours.load_state_dict(theirs.state_dict())
        for module in (theirs, ours):
            torch.manual_seed(1)
            output = module(*called.args, **called.kwargs)
            flat = [v for v in torch.utils._pytree.tree_leaves(output) if isinstance(v, Tensor) and v.requires_grad]
            grads = torch.autograd.grad([v.sum() for v in flat], list(module.parameters()), allow_unused=True)
            results.append([*flat, *grads])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_pytorchs_wrong_inputs_raise_pytorchs_errors(info: Any) -> None:
    wrong = info.module_error_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=True)
    for case in wrong:
        built, called = case.module_error_input.constructor_input, case.module_error_input.forward_input

        def attempt(built: Any = built, called: Any = called) -> None:
            OURS[info.module_cls](*built.args, **built.kwargs).double()(*called.args, **called.kwargs)

        with pytest.raises(case.error_type):
            attempt()


class Wrapped(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = getattr(uv.nn, kind)(3, 4, num_layers=2, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_export(kind: str) -> None:
    model, x = Wrapped(kind).eval(), torch.randn(5, 2, 3)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_onnx_holds_torchs_own_graph(kind: str, tmp_path: Any) -> None:
    import onnxruntime

    model, x = Wrapped(kind).eval(), torch.randn(5, 2, 3)
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_dynamic_quantisation_of_the_restored_model(kind: str) -> None:
    model, x = Wrapped(kind).eval(), torch.randn(5, 2, 3)
    quantised = torch.ao.quantization.quantize_dynamic(uv.restore(copy.deepcopy(model)), {getattr(nn, kind)})
    assert "quantized" in type(quantised.layer).__module__
    torch.testing.assert_close(quantised(x), model(x), rtol=0.1, atol=0.05)


IN_TORCHS_PLACE = """
import warnings
import torch
from torch import nn
from torch.nn.modules import rnn as torchs
import unvanish as uv

for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"):
    setattr(nn, name, getattr(uv.nn, name))

class Output(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]

for kind in ("RNN", "LSTM", "GRU"):
    stock = getattr(torchs, kind)
    for x in (torch.randn(1, 2, 3), torch.randn(1, 2, 3).double(), torch.randn(20, 2, 3), torch.zeros(5, 0, 3)):
        ours, theirs = getattr(nn, kind)(3, 4, dtype=x.dtype), stock(3, 4, dtype=x.dtype)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))
        if not x.numel():
            continue
        torch.testing.assert_close(torch.jit.script(Output(ours))(x), theirs(x)[0])
        for layer in (ours, theirs):
            with uv.watch(layer) as flow:
                layer(x)[0].sum().backward()
            assert flow.layers
    assert type(uv.accelerate(stock(3, 4))) is getattr(uv.nn, kind)
    assert type(uv.restore(getattr(nn, kind)(3, 4))) is stock
    assert type(uv.cures.layer_norm_(stock(3, 4)).inner) is stock
    for layer in (stock(3, 4).double(), getattr(nn, kind)(3, 4).double()):
        uv.flow.adjoint_map(layer, torch.randn(6, 2, 3).double())
torch.jit.script(nn.RNNCell(3, 4))(torch.randn(2, 3))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    left = torch.ao.quantization.quantize_dynamic(Output(nn.LSTM(3, 4)).eval(), {nn.LSTM})
assert type(left.layer) is uv.nn.LSTM and any("unvanish.restore" in str(w.message) for w in told)
assert type(uv.cures.replace_(torchs.RNN(3, 4), "gru")) is torchs.GRU
assert type(uv.cures.replace_(torchs.RNNCell(3, 4), "gru")) is torchs.GRUCell
"""


def test_ours_take_the_place_of_torchs_for_a_whole_program(tmp_path: Path) -> None:
    """torch.nn.LSTM is set to ours, as before the import of a library that builds its own layers. Modules of unvanish
    that are imported after that must still recognise torch's own classes."""
    program = tmp_path / "program.py"
    program.write_text(IN_TORCHS_PLACE)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
