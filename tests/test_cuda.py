"""On a CUDA device everything is measured as on the CPU: the same numbers, of the same model."""

import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import unvanish as uv
from tests.strategies import LayerCase, ModuleCase, layer_cases, module_cases, runs
from unvanish import engine, train
from unvanish.cells import CELLS, Weights
from unvanish.engine import fused
from unvanish.train.models import SequenceModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
DEVICES = ("cpu", "cuda")
KINDS = [nn.RNN, nn.GRU, nn.LSTM]


def tensors(found: Any) -> list[Tensor]:
    """Every tensor in it, on the CPU."""
    if isinstance(found, PackedSequence):
        return [found.data.detach().cpu()]
    if isinstance(found, Tensor):
        return [found.detach().cpu()]
    if is_dataclass(found):
        return tensors([getattr(found, f.name) for f in fields(found)])
    if isinstance(found, dict):
        return tensors(list(found.values()))
    if isinstance(found, list | tuple):
        return [v for part in found for v in tensors(part)]
    return [torch.tensor(found, dtype=torch.float64)] if isinstance(found, float) else []


def moved(v: Any, device: str) -> Any:
    return tuple(s.to(device) for s in v) if type(v) is tuple else None if v is None else v.to(device)


def assert_same(run: Callable[[str], Any], tolerance: float = 1e-9) -> None:
    expected, found = (tensors(run(device)) for device in DEVICES)
    assert expected
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def layer(kind: type[nn.RNNBase], device: str, **options: Any) -> nn.RNNBase:
    torch.manual_seed(0)
    return kind(3, 5, dtype=torch.float64, **options).to(device)


def sequence(device: str, T: int = 9) -> Tensor:
    return torch.randn(T, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("accelerated", [False, True])
@settings(max_examples=30)
@given(case=module_cases(), partial=st.booleans())
def test_a_watch_records_the_same(accelerated: bool, case: ModuleCase, partial: bool) -> None:
    def run(device: str) -> Any:
        module = copy.deepcopy(case.module).to(device)
        if accelerated:
            uv.accelerate(module)
        x, hx = moved(case.x, device), moved(case.hx, device)
        with uv.watch(module, partial=partial) as flow:
            y, final = module(x, hx)
            live = [y.data if isinstance(y, PackedSequence) else y, *(final if isinstance(final, tuple) else (final,))]
            torch.cat([v.flatten() for v in live]).square().sum().backward()
        return y, [flow[name] for name in case.names], [p.grad for p in module.parameters()]

    assert_same(run)


@pytest.mark.parametrize(
    ("kind", "added"),
    [
        *itertools.product([uv.nn.RNN, uv.nn.GRU, uv.nn.LSTM], ["lengths", "clip", "checkpoint_every", "states"]),
        (uv.nn.RNN, "sigmoid"),
    ],
)
def test_what_our_layers_add(kind: Any, added: str) -> None:
    def run(device: str) -> Any:
        module = layer(kind, device, **({"nonlinearity": "sigmoid"} if added == "sigmoid" else {}))
        x = sequence(device).requires_grad_()
        if added == "states":
            return list(module.states(x).values())
        if added in ("clip", "checkpoint_every"):
            setattr(module, added, 0.1 if added == "clip" else 4)
        with uv.watch(module) as flow:
            y, final = module(x, **({"lengths": [9, 0, 4, 1]} if added == "lengths" else {}))
            y.square().sum().backward()
        return y, final, x.grad, [p.grad for p in module.parameters()], flow["l0"].dh

    assert_same(run)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_a_loop_of_cells_and_marks(cell: Any) -> None:
    def run(device: str) -> Any:
        torch.manual_seed(0)
        module = nn.ModuleDict({"cell": cell(3, 5, dtype=torch.float64)}).to(device)
        state = None
        with uv.watch(module) as flow:
            for x in sequence(device):
                state = module["cell"](x, state)
                h = state[0] if isinstance(state, tuple) else state
                uv.mark(h, "h")
            h.square().sum().backward()
        return flow["cell"], flow["h"].dh

    assert_same(run)


@pytest.mark.parametrize("kind", KINDS)
def test_the_measures_of_a_layer(kind: type[nn.RNNBase]) -> None:
    def run(device: str) -> Any:
        module, x = layer(kind, device), sequence(device)
        error = module(x)[0].detach()
        return [
            uv.flow.adjoint_map(module, x, sources="all", error=torch.ones(9, 4, 5, dtype=x.dtype, device=device)),
            uv.flow.decompose(module, x, error=error),
            uv.flow.source_gradients(module, x, error=error),
            uv.flow.gate_statistics(module, x),
            uv.flow.jacobian(module, x, t=3),
            uv.flow.singular_values(module, x, j=2, k=7),
            uv.flow.lyapunov(module, x, n=5 if kind is not nn.LSTM else 10),
        ]

    assert_same(run, 1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_random_errors_and_frames_are_drawn_where_the_layer_is(kind: type[nn.RNNBase]) -> None:
    module, x = layer(kind, "cuda"), sequence("cuda")
    assert uv.flow.adjoint_map(module, x, sources=3).norms.isfinite().all()
    assert uv.flow.lyapunov(module, x, n=2).exponents.isfinite().all()


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_torchs(kind: str, dtype: torch.dtype) -> None:
    theirs = getattr(nn, kind)(3, 5).cuda()
    ours = getattr(uv.nn, kind)(3, 5).cuda()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(9, 4, 3, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        assert torch.equal(ours(x)[0], theirs(x)[0])
        with uv.watch(ours) as flow:
            ours(x)[0].float().square().mean().backward()
    assert flow["l0"].dh.isfinite().all()


def test_dropout_inside_cudnn_is_named_and_does_not_raise() -> None:
    module = nn.LSTM(3, 5, num_layers=2, dropout=0.5).cuda()
    x = torch.randn(9, 4, 3, device="cuda")
    with uv.watch(module) as flow:
        module(x)[0].sum().backward()
    assert "drawn inside cuDNN" in flow.skipped[""]


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_kernels_are_chosen_and_say_so(kind: type[nn.RNNBase]) -> None:
    cell = CELLS[layer(kind, "cpu").mode.lower()]
    x = sequence("cuda")
    assert engine.explain(cell, x).rung == "fused"
    assert "CPU" in engine.explain(cell, x).declined["native"]
    assert engine.explain(cell, x, clip=1.0).rung == "manual"
    assert engine.explain(CELLS["rnn_sigmoid"], x).rung == "manual"


@settings(max_examples=60)
@given(case=layer_cases(cells=("rnn_tanh", "rnn_relu", "lstm", "gru")), steps=st.sampled_from([1, 3, 64]))
def test_a_trace_and_its_adjoint(case: LayerCase, steps: int) -> None:
    assume(runs("fused", case))

    def run(device: str) -> Any:
        x, w = case.x.detach().to(device), Weights(*(moved(v, device) for v in case.weights.detach()))
        state = tuple(s.detach().to(device) for s in case.state)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "PIECE_STEPS", steps)
            patch.setattr(fused, "PIECE_ELEMENTS", 1)
            tr = engine.trace(case.cell, x, state, w, case.lengths, case.reverse, adjoint_follows=steps > 1)
            flow = engine.adjoint(tr, torch.ones_like(tr.y), tuple(torch.ones_like(s) for s in tr.final))
        return tr.y, tr.final, flow.dstate, flow.da, flow.dinitial, list(engine.weight_gradients(tr, flow))

    assert_same(run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("mode", ["train", "frozen", "float16", "bfloat16"])
def test_the_replay_is_exact_whatever_the_run_rounds(kind: type[nn.RNNBase], tf32: bool, mode: str) -> None:
    torch.manual_seed(0)
    module = kind(32, 64).cuda().requires_grad_(mode != "frozen")
    x = torch.randn(200, 8, 32, device="cuda", requires_grad=True)
    right = copy.deepcopy(module).double()
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with warnings.catch_warnings(), uv.watch(module) as flow:
            warnings.simplefilter("error")  # weights that are not in one block are copied at every call, with a warning
            dtype = getattr(torch, mode, torch.float16)
            with torch.autocast("cuda", dtype, enabled=mode.endswith("16")):
                y = module(x)[0]
            y.float().sum().backward()
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (tf32, tf32)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    with uv.watch(right) as exact:
        right(x.double())[0].sum().backward()
    assert flow["l0"].problem is None or mode.endswith("16")
    torch.testing.assert_close(flow["l0"].dh, exact["l0"].dh, rtol=1e-4, atol=1e-7)
    if mode == "train":
        assert flow["l0"].residual < (5e-2 if tf32 else 1e-4)


def test_another_stream_and_a_graph_that_is_kept() -> None:
    def run(device: str) -> Any:
        module, x = layer(nn.LSTM, device), sequence(device)
        stream = torch.cuda.Stream() if device == "cuda" else None
        with torch.cuda.stream(stream), uv.watch(module) as flow:
            y = module(x)[0]
            y[2].sum().backward(retain_graph=True)
            y.square().sum().backward()
        return [*flow.passes("l0")]

    assert_same(run)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    def run(device: str) -> Any:
        place = "cuda:1" if device == "cuda" else device
        module, x = layer(nn.GRU, place), sequence(place)
        with uv.watch(module) as flow:
            module(x)[0].square().sum().backward()
        return flow["l0"]

    assert_same(run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1000, 32, 64, 128), (100, 64, 512, 1024)])
def test_the_memory_of_a_watched_step_is_at_most_twice_a_plain_ones(
    kind: type[nn.RNNBase], shape: tuple[int, ...]
) -> None:
    T, B, n_in, H = shape
    module, x = kind(n_in, H).cuda(), torch.randn(T, B, n_in, device="cuda")

    def peak(watched: bool) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        module.zero_grad()
        with uv.watch(module) if watched else contextlib.nullcontext():
            module(x)[0].square().mean().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    peak(True)
    assert peak(True) <= 2 * peak(False)


def test_a_nan_is_traced_to_its_birth() -> None:
    def sentence(device: str) -> str:
        module, x = layer(nn.LSTM, device), sequence(device)
        x[4, 2] = torch.nan
        with uv.watch(module) as flow:
            module(x)[0].sum().backward()
        with pytest.raises(uv.flow.NonFiniteError) as caught:
            _ = flow["l0"]
        return str(caught.value)

    assert sentence("cuda") == sentence("cpu")


def test_compiled_layers_run() -> None:
    module, x = layer(uv.nn.LSTM, "cuda"), sequence("cuda")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(allow_rnn=True):
        torch.testing.assert_close(compiled(x)[0], module(x)[0])


CURES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "forget_bias_": lambda m, x: uv.cures.forget_bias_(m, 2.0),
    "chrono_": lambda m, x: uv.cures.chrono_(m, 50, torch.Generator().manual_seed(0)),
    "orthogonal_": lambda m, x: uv.cures.orthogonal_(m, 1.0, torch.Generator().manual_seed(0)),
    "spectral_radius_": lambda m, x: uv.cures.spectral_radius_(m, 0.7),
    "rescue_": lambda m, x: uv.cures.rescue_(m, x, lag=5, target=0.5),
    "constrain": lambda m, x: uv.cures.constrain_(m, "spectral"),
}


@pytest.mark.parametrize("cure", list(CURES))
def test_cures_change_the_same_weights(cure: str) -> None:
    def run(device: str) -> Any:
        module, x = layer(nn.LSTM, device), sequence(device)
        CURES[cure](module, x)
        return [*module.parameters(), module(x)[0]]

    assert_same(run, 1e-6)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU])
def test_omega_and_flossing(kind: type[nn.RNNBase]) -> None:
    def run(device: str) -> Any:
        module, x = layer(kind, device), sequence(device)
        with uv.cures.Omega(module) as omega:
            module(x)[0].square().sum().backward()
        omega.penalty().backward()
        grown = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        uv.cures.GradientFlossing(module, n=2)(x).backward()
        return grown, [p.grad for p in module.parameters() if p.grad is not None]

    assert_same(run, 1e-6)


class LastStep(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = kind(4, 24, batch_first=True)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[0][:, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_diagnosis_is_the_same(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(160, 40, 4), torch.randint(0, 3, (160,))

    def found(device: str) -> Any:
        loss = nn.CrossEntropyLoss()
        return uv.diagnose(LastStep(kind).to(device), x.to(device), y.to(device), loss=loss, lag=30, budget=0)

    cpu, cuda = (found(device) for device in DEVICES)
    assert cuda["encoder.l0"].verdict == cpu["encoder.l0"].verdict
    assert cuda["encoder.l0"].rate == pytest.approx(cpu["encoder.l0"].rate, rel=1e-3)
    assert [p.cure for p in cuda.prescriptions] == [p.cure for p in cpu.prescriptions]
    if able := [p for p in cuda.prescriptions if p.act is not None]:
        assert {p.device.type for p in able[0].apply(LastStep(kind).to("cuda")).parameters()} == {"cuda"}


@pytest.mark.parametrize("omega", [0.0, 1.0])
def test_training_on_the_device(omega: float) -> None:
    task = train.make_task("adding", 20)
    torch.manual_seed(0)
    model = SequenceModel(nn.RNN(task.inputs, 16, batch_first=True), task.outputs, task.answers)
    configuration = train.TrainingConfiguration(60, 32, 1e-2, 1.0, 0, omega=omega, patience=2)
    progress = train.fit(model, task, configuration, machines=train.Machines(accelerator="gpu"))
    assert progress.error[-1] < progress.error[0]
    assert all(p.device.type == "cpu" for p in model.parameters())
