"""torch's tools treat ours as they treat torch's classes: fx, quantisation, export, ONNX, FLOPs, TorchScript."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import unvanish as uv
from tests.dropin_subjects import LAYERS, Reads, every_layer, every_module, given, pair


@every_module
def test_fx_traces_a_leaf(kind: str) -> None:
    graphs = []
    for module in pair(kind, 3, 8):
        model, x = Reads(module), given(kind)
        traced = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(traced(x), model(x))
        graphs.append([(node.op, str(node.target)) for node in traced.graph.nodes])
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(module)
    assert graphs[1] == graphs[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*reduce_range.*")
@pytest.mark.parametrize("kind", [*LAYERS, "LSTMCell"])
def test_fx_quantises_what_it_quantises_of_torchs(kind: str) -> None:
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    found = []
    for module in pair(kind, 3, 8):
        torch.manual_seed(0)
        model, x = Reads(module).eval(), given(kind)
        prepared = prepare_fx(model, QConfigMapping().set_global(default_dynamic_qconfig), (x,))
        done = convert_fx(prepared)
        found.append((type(done.part), done(x)))
    assert found[1][0] is found[0][0]
    torch.testing.assert_close(found[1][1], found[0][1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@every_layer
def test_eager_quantisation_is_told_to_restore_first(kind: str) -> None:
    model = nn.Sequential(pair(kind, 3, 8)[1]).eval()
    with pytest.warns(UserWarning, match=f"leaves this {kind} of unvanish as it is; .* call unvanish.restore"):
        torch.ao.quantization.quantize_dynamic(model, {getattr(nn, kind)})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unvanish.*")
        torch.ao.quantization.quantize_dynamic(uv.restore(model), {getattr(nn, kind)})
    assert not hasattr(pair(kind, 3, 8)[1], "qconfig")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*reduce_range.*")
@pytest.mark.parametrize("kind", [*LAYERS, "RNNCell"])
@pytest.mark.parametrize("named", ["by name", "by class"])
def test_eager_quantisation_of_a_layer_that_is_named(kind: str, named: str) -> None:
    found = []
    for module in pair(kind, 3, 8):
        torch.manual_seed(0)
        model, x = Reads(module).eval(), given(kind)
        chosen = {"part" if named == "by name" else type(module): torch.ao.quantization.default_dynamic_qconfig}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*unvanish.*")
            done = torch.ao.quantization.quantize_dynamic(model, chosen)
        found.append((type(done.part), done(x)))
    assert found[1][0] is found[0][0]
    torch.testing.assert_close(found[1][1], found[0][1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_eager_quantisation_leaves_a_layer_with_an_option_of_its_own() -> None:
    model = nn.Sequential(
        uv.nn.LSTM(3, 8), uv.nn.RNN(8, 8, nonlinearity="sigmoid"), uv.nn.RNNCell(8, 8, nonlinearity="sigmoid")
    )
    model[0].clip = 1.0
    for k, (kind, option) in enumerate((("LSTM", "clip"), ("RNN", "sigmoid"), ("RNNCell", "sigmoid"))):
        with pytest.warns(UserWarning, match=f"leaves this {kind} of unvanish as it is.*{option}"):
            torch.ao.quantization.quantize_dynamic(
                model[k : k + 1], {str(k): torch.ao.quantization.default_dynamic_qconfig}
            )
        assert type(model[k]).__module__.startswith("unvanish.")


@every_layer
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_holds_torchs_operators(kind: str, strict: bool, compiler: Any) -> None:
    ours, x = Reads(pair(kind, 3, 8)[1]).eval(), given(kind)
    program = torch.export.export(ours, (x,), strict=strict)
    assert not any("unvanish" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), ours(x))


@every_layer
@pytest.mark.parametrize("strict", [True, False])
def test_a_program_for_any_number_of_steps_holds_the_engines(kind: str, strict: bool, compiler: Any) -> None:
    ours, x = Reads(pair(kind, 3, 8)[1]).eval(), given(kind)
    program = torch.export.export(ours, (x,), dynamic_shapes=({0: torch.export.Dim("T", min=2)},), strict=strict)
    for T in (3, 9):
        torch.testing.assert_close(program.module()(given(kind, T=T)), ours(given(kind, T=T)))


@every_layer
def test_onnx_of_an_exported_program(kind: str, tmp_path: Any) -> None:
    import onnxruntime

    ours, x = Reads(pair(kind, 3, 8)[1]).eval(), given(kind)
    program = torch.export.export(ours, (x,))
    torch.onnx.export(program, (), f=tmp_path / "m.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), ours(x), rtol=1e-4, atol=1e-5)


@every_module
@pytest.mark.parametrize("train", [True, False])
def test_flops_are_torchs(kind: str, train: bool) -> None:
    options: list[dict[str, Any]] = [{}]
    options += [{"num_layers": 2, "bidirectional": True}] if kind in LAYERS else []
    options += [{"proj_size": 4}] if kind == "LSTM" else []
    for each in options:
        found = []
        for module in pair(kind, 3, 8, dtype=torch.float64, **each):
            with FlopCounterMode(display=False) as counter:
                y = tree_leaves(module(given(kind, torch.float64)))[0]
                if train:
                    y.sum().backward()
            found.append(counter.get_total_flops())
        assert found[1] == found[0] > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_module
def test_scripts(kind: str) -> None:
    class Holds(nn.Module):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.part = part

        def forward(self, x: Tensor) -> Any:
            return self.part(x)

    module, x = pair(kind, 3, 8)[1], given(kind)
    kind_before = type(module)
    scripted = torch.jit.script(Holds(module))
    torch.testing.assert_close(scripted(x), module(x))
    assert type(module) is kind_before
    assert [p.data_ptr() for p in scripted.parameters()] == [p.data_ptr() for p in module.parameters()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_torchs_class_lacks_is_not_scripted_without_it() -> None:
    layer = uv.nn.LSTM(3, 4)
    layer.clip = 1.0
    for module in (layer, uv.nn.RNN(3, 4, nonlinearity="sigmoid"), uv.nn.RNNCell(3, 4, nonlinearity="sigmoid")):
        with pytest.raises(ValueError, match="torch's"):
            torch.jit.script(module)
