"""Our layers are torch's in everything but how the sequence is run."""

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence

import unvanish as uv
from tests.strategies import ModuleCase, module_cases
from unvanish.nn.modules import on_gradient


def flat(output: Any) -> list[Tensor]:
    y, final = output
    return [y.data if isinstance(y, PackedSequence) else y, *(final if isinstance(final, tuple) else (final,))]


def outcome(module: nn.RNNBase, case: ModuleCase, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    module.zero_grad()
    out = flat(module(case.x, case.hx))
    sum((torch.randn_like(o) * o).sum() for o in out).backward()  # type: ignore[union-attr]
    return [*(o.detach() for o in out), *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@given(data=st.data(), seed=st.integers(0, 99), training=st.booleans())
def test_outputs_and_gradients_equal_torch(
    dtype: torch.dtype, tolerance: float, data: Any, seed: int, training: bool
) -> None:
    case = data.draw(module_cases(dtype, dropout=0.4))
    module = case.module.train(training)
    expected = outcome(module, case, seed)
    uv.accelerate(module)
    torch.testing.assert_close(outcome(module, case, seed), expected, rtol=tolerance, atol=tolerance)
    assert type(module).__module__ == "unvanish.nn.layers"
    uv.restore(module)
    assert type(module).__module__ == "torch.nn.modules.rnn"


@given(case=module_cases(), seed=st.integers(0, 99))
def test_a_watch_on_ours_equals_a_watch_on_torch(case: ModuleCase, seed: int) -> None:
    def record(module: nn.RNNBase) -> uv.flow.Watch:
        with uv.watch(module) as flow:
            outcome(module, case, seed)
        return flow

    theirs, ours = record(case.module), record(uv.accelerate(case.module))
    for name in case.names:
        torch.testing.assert_close(ours[name].dh, theirs[name].dh, rtol=1e-11, atol=1e-14)
        assert ours[name].valid


@pytest.mark.parametrize("kind", [uv.nn.RNN, uv.nn.LSTM, uv.nn.GRU])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    ],
)  # fmt: skip
def test_lengths_equal_packing_and_may_be_zero(kind: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = kind(2, 3, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
    x = torch.randn(4, 6, 2, dtype=torch.float64)
    lengths = torch.tensor([3, 0, 6, 1], dtype=dtype)
    y, final = layer(x, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        assert (y[b, n:] == 0).all()
        finals = final if isinstance(final, tuple) else (final,)
        if n:
            alone, alone_final = layer(x[b : b + 1, :n])
            torch.testing.assert_close(y[b : b + 1, :n], alone, rtol=1e-12, atol=1e-14)
            theirs = alone_final if isinstance(alone_final, tuple) else (alone_final,)
            torch.testing.assert_close([f[:, b : b + 1] for f in finals], list(theirs), rtol=1e-12, atol=1e-14)
        else:
            assert all((f[:, b] == 0).all() for f in finals)
    with uv.watch(layer, partial=True) as flow:
        layer(x, lengths=lengths)[0].sum().backward()
    assert flow["l0"].lengths.tolist() == [3, 0, 6, 1]
    assert flow["l1.reverse"].residual <= 1e-12


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_backward_in_eval_mode_equals_training_without_dropout(kind: str) -> None:
    torch.manual_seed(0)
    layer = getattr(uv.nn, kind)(2, 3, num_layers=2, bidirectional=True, dropout=0.5, dtype=torch.float64)
    x = torch.randn(5, 4, 2, dtype=torch.float64, requires_grad=True)

    def gradients() -> list[Tensor]:
        loss = sum(o.square().sum() for o in flat(layer(x)))
        return list(torch.autograd.grad(loss, [x, *layer.parameters()]))  # type: ignore[arg-type]

    dropped = gradients()
    layer.eval()
    found = gradients()
    layer.train()
    layer.dropout = 0.0
    expected = gradients()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(dropped[0], found[0])


@pytest.mark.parametrize("lengths", [[1, 2], [1.0, 2.0, 3.0], [1, 2, 9], [-1, 2, 3]])
def test_lengths_that_do_not_fit(lengths: list[float]) -> None:
    with pytest.raises(ValueError, match="lengths: expected"):
        uv.nn.GRU(2, 3)(torch.zeros(4, 3, 2), lengths=lengths)


def test_clip_bounds_the_error_handed_back() -> None:
    torch.manual_seed(0)
    rnn = uv.nn.RNN(2, 4, dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(8)
    rnn.clip = 0.01
    x = torch.randn(20, 3, 2, dtype=torch.float64)
    with uv.watch(rnn, partial=True) as flow:
        rnn(x)[0][-1].sum().backward()
    assert (flow["l0"].dh[:-1] <= 0.01 * (1 + 1e-12)).all()
    assert (flow["l0"].dh[-1] > 1).all()
    assert flow["l0"].residual <= 1e-12


def test_sigmoid_rnn_and_cell() -> None:
    torch.manual_seed(0)
    rnn, cell = (
        uv.nn.RNN(2, 3, nonlinearity="sigmoid", dtype=torch.float64),
        uv.nn.RNNCell(2, 3, nonlinearity="sigmoid"),
    )
    cell.double().load_state_dict({k.removesuffix("_l0"): v for k, v in rnn.state_dict().items()})
    x = torch.randn(4, 2, 2, dtype=torch.float64)
    y, _ = rnn(x)
    h = torch.zeros(2, 3, dtype=torch.float64)
    for t in range(4):
        expected = torch.sigmoid(x[t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0)
        h = cell(x[t], h)
        torch.testing.assert_close(h, expected, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(y[t], h, rtol=1e-13, atol=1e-15)
    with pytest.raises(ValueError, match="nonlinearity='sigmoid', which torch's layer does not have"):
        uv.restore(rnn)
    with pytest.raises(ValueError, match="nonlinearity"):
        uv.nn.RNN(2, 3, nonlinearity="selu")
    with pytest.raises(RuntimeError, match="input: expected 2 features, got 5"):
        cell(torch.zeros(4, 5, dtype=torch.float64))


@given(case=module_cases())
def test_states_are_those_of_the_run(case: ModuleCase) -> None:
    module = uv.accelerate(case.module).eval()
    states = module.states(case.x, case.hx)
    assert list(states) == case.names
    y, _ = module(case.x, case.hx)
    if isinstance(y, PackedSequence):
        y = nn.utils.rnn.pad_packed_sequence(y)[0]
    elif y.dim() == 2:
        y = y.unsqueeze(1)
    elif module.batch_first:
        y = y.transpose(0, 1)
    top = [s.h for name, s in states.items() if name.startswith(f"l{module.num_layers - 1}")]
    torch.testing.assert_close(torch.cat(top, -1), y, rtol=1e-12, atol=1e-14)
    for s in states.values():
        if s.c is not None and not module.proj_size:
            torch.testing.assert_close(s.h, s.gates["o"] * s.c.tanh(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_double_backward_pickle_deepcopy_state_dict_and_functional_call(kind: str) -> None:
    torch.manual_seed(0)
    ours, theirs = getattr(uv.nn, kind)(2, 3, dtype=torch.float64), getattr(nn, kind)(2, 3, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)

    def penalty(layer: nn.Module) -> Tensor:
        (g,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    torch.testing.assert_close(penalty(ours), penalty(theirs), rtol=1e-11, atol=1e-13)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        assert torch.equal(twin(x)[0], ours(x)[0])
    other = {k: v * 2 for k, v in theirs.state_dict().items()}
    expected = torch.func.functional_call(theirs, other, (x,))[0]
    torch.testing.assert_close(torch.func.functional_call(ours, other, (x,))[0], expected, rtol=1e-12, atol=1e-14)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    theirs.load_state_dict(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize(
    "register", [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm]
)
def test_parametrised_layers_are_swapped_and_trained_as_torchs(kind: str, register: Any) -> None:
    def build() -> nn.RNNBase:
        torch.manual_seed(0)
        layer = getattr(nn, kind)(2, 3, num_layers=2, dtype=torch.float64)
        for k in range(2):
            register(layer, f"weight_hh_l{k}")
        return layer

    theirs, ours = build(), uv.accelerate(build())
    assert isinstance(ours, getattr(uv.nn, kind))
    x = torch.randn(5, 2, 2, dtype=torch.float64)
    for module in (theirs, ours):
        module(x)[0].square().sum().backward()
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-11, atol=1e-12, msg=name)
    restored = uv.restore(ours)
    assert not isinstance(restored, getattr(uv.nn, kind))
    torch.testing.assert_close(restored(x)[0], theirs(x)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_torch_func_and_distributed_training(kind: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    ours, theirs = (getattr(where, kind)(2, 3, dtype=torch.float64) for where in (uv.nn, nn))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 2, 2, dtype=torch.float64)

    def gradients(layer: nn.Module) -> list[Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

        return list(torch.func.grad(loss)(dict(layer.named_parameters())).values())

    expected = gradients(theirs)
    torch.testing.assert_close(gradients(ours), expected, rtol=1e-11, atol=1e-12)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(ours)(x)[0].square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close([p.grad for p in ours.parameters()], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("initial", [None, torch.float32, torch.bfloat16, torch.float64])
def test_autocast_returns_torchs_dtypes(
    kind: str, given: torch.dtype, weights: torch.dtype, initial: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    ours, theirs = getattr(uv.nn, kind)(2, 3).to(weights), getattr(nn, kind)(2, 3).to(weights)
    theirs.load_state_dict(ours.state_dict())
    x, hx = torch.randn(4, 2, 2, dtype=given), None if initial is None else torch.randn(1, 2, 3, dtype=initial)
    hx = (hx, hx) if hx is not None and kind == "LSTM" else hx
    with torch.autocast("cpu", torch.bfloat16):
        if torch.float64 in (given, weights, initial) and len({given, weights, initial or given}) > 1:
            for layer in (theirs, ours):
                with pytest.raises(RuntimeError):
                    layer(x, hx)
            return
        mine = flat(ours(x, hx))
        if kind != "LSTM" or given == torch.float64 or initial == torch.float64:
            expected = flat(theirs(x, hx))
        else:
            # Torch's LSTM has no bfloat16 without AVX-512, and with some of these dtypes another one than elsewhere.
            double = None if hx is None else tuple(h.double() for h in hx)
            expected = [v.bfloat16() for v in flat(theirs.double()(x.double(), double))]
    assert [v.dtype for v in mine] == [v.dtype for v in expected]
    torch.testing.assert_close(mine, expected, rtol=3e-2, atol=3e-2)
    mine[0].sum().backward()


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize(
    ("x", "hx"),
    [
        (torch.zeros(4), None),
        (torch.zeros(4, 2, 3, 1), None),
        (torch.zeros(4, 2, 5), None),
        (torch.zeros(4, 2, 3, dtype=torch.float64), None),
        (torch.zeros(0, 2, 3), None),
        (torch.zeros(4, 2, 3), torch.zeros(1, 3, 6)),
        (torch.zeros(4, 2, 3), torch.zeros(1, 6)),
        (torch.zeros(4, 3), torch.zeros(1, 1, 6)),
        (torch.zeros(4, 3), torch.zeros(2, 6)),
        (torch.zeros(4, 2, 3), torch.zeros(1, 2, 6, dtype=torch.float64)),
        (torch.zeros(4, 2, 3), torch.zeros(1, 2, 6, dtype=torch.int64)),
        (torch.zeros(4, 2, 3), torch.zeros(1, 2, 6, dtype=torch.bool)),
    ],
)
def test_wrong_input_raises_what_torch_raises(kind: str, x: Tensor, hx: Tensor | None) -> None:
    ours, theirs = getattr(uv.nn, kind)(3, 6), getattr(nn, kind)(3, 6)
    state = (hx, hx) if hx is not None and kind == "LSTM" else hx
    with pytest.raises(Exception) as expected:  # noqa: PT011 (whatever torch raises)
        theirs(x, state)
    with pytest.raises(type(expected.value)):
        ours(x, state)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("form", [tuple, list])
def test_wrong_containers_of_states_raise_what_torch_raises(kind: str, count: int, form: Any) -> None:
    ours, theirs = getattr(uv.nn, kind)(3, 6), getattr(nn, kind)(3, 6)
    for hx in (form([torch.zeros(1, 2, 6)] * count), 0, form([torch.zeros(1, 2, 6), None])):
        if kind == "LSTM" and count == 2 and hx != 0 and None not in hx:
            continue
        with pytest.raises(Exception) as expected:  # noqa: PT011 (whatever torch raises)
            theirs(torch.zeros(4, 2, 3), hx)
        with pytest.raises(type(expected.value), match=re.escape(str(expected.value))):
            ours(torch.zeros(4, 2, 3), hx)
        ours.clip = 1.0
        with pytest.raises(type(expected.value), match="hx: "):
            ours(torch.zeros(4, 2, 3), hx)
        ours.clip = None


def test_weights_of_another_dtype_are_named() -> None:
    lstm = uv.nn.LSTM(3, 4)
    lstm.weight_hh_l0 = nn.Parameter(lstm.weight_hh_l0.detach().double())
    with pytest.raises(RuntimeError, match=r"w_hh: expected torch\.float32 on cpu, as the input, got torch\.float64"):
        lstm(torch.zeros(5, 2, 3))
    with pytest.raises(RuntimeError, match=r"w_hh: expected torch\.float32"):
        lstm.states(torch.zeros(5, 2, 3))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_many_errors_at_once_and_forward_mode_equal_torch(kind: str) -> None:
    torch.manual_seed(0)
    ours, theirs = (getattr(m, kind)(3, 5, bidirectional=True, num_layers=2).double() for m in (uv.nn, nn))
    theirs.load_state_dict(ours.state_dict())
    x, tangent = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        answers = module(leaf)[0].sum((0, 1))
        gradients = torch.autograd.grad(
            answers, [leaf, *module.parameters()], torch.eye(10, dtype=torch.float64), is_grads_batched=True
        )
        with forward_ad.dual_level():
            y = module(forward_ad.make_dual(x, tangent))[0]
            found.append([*gradients, forward_ad.unpack_dual(y).tangent])
    torch.testing.assert_close(*found)


def test_a_nonlinearity_given_twice_is_refused() -> None:
    for family in (nn.RNN, uv.nn.RNN):
        with pytest.raises(TypeError):
            family(2, 3, 1, "tanh", nonlinearity="relu")


def test_states_leave_parametrised_layers_alone() -> None:
    layer = parametrizations.spectral_norm(uv.nn.LSTM(2, 3), "weight_hh_l0")
    before = [v.clone() for v in layer.state_dict().values()]
    layer.states(torch.randn(4, 2, 2))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.state_dict().values(), strict=True))
    assert layer.training


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_autocast_does_not_round_the_states(kind: str) -> None:
    torch.manual_seed(0)
    layer, x = getattr(uv.nn, kind)(2, 3), torch.randn(4, 2, 2).bfloat16()
    expected = layer.states(x.float())["l0"]
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.states(x)["l0"]
    assert torch.equal(found.h, expected.h)
    assert all(torch.equal(found.gates[gate], value) for gate, value in expected.gates.items())


def test_a_gradient_that_is_undefined_is_not_heard() -> None:
    class Two(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            ctx.set_materialize_grads(False)
            return x.clone(), 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0]

    read, unread = Two.apply(torch.ones(3, requires_grad=True))
    heard: list[Tensor] = []
    for output in (read, unread):
        on_gradient(output, heard.append)
    read.sum().backward()
    assert [d.tolist() for d in heard] == [[1.0] * 3]
