"""What a watch records equals what a loop of cells with retain_grad gives; and it leaves no trace."""

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import unvanish as uv
from tests.low_precision import skip_where_torch_raises
from tests.strategies import ModuleCase, module_cases
from unvanish.flow import module_sequence
from unvanish.flow.record import NoBackwardError, NonFiniteError


def project_out(output: Any, seed: int) -> Tensor:
    """A random linear error of everything a module returns."""
    y, final = output
    parts = [y.data if isinstance(y, PackedSequence) else y, *(final if isinstance(final, tuple) else (final,))]
    generator = torch.Generator().manual_seed(seed)
    return sum((torch.randn(p.shape, generator=generator, dtype=p.dtype) * p).sum() for p in parts)  # type: ignore[return-value]


class CellLoop:
    """A torch module run as a loop of torch's cells, in the user's batch order, keeping every state's gradient."""

    def __init__(self, case: ModuleCase) -> None:
        self.case, self.module = case, case.module
        self.h: dict[str, list[list[Tensor | None]]] = {}
        self.c: dict[str, list[list[Tensor | None]]] = {}

    def step(self, suffix: str, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        m = self.module
        w = [getattr(m, f"weight_{k}_{suffix}") for k in ("ih", "hh")]
        b = [getattr(m, f"bias_{k}_{suffix}", None) for k in ("ih", "hh")]
        if isinstance(m, nn.LSTM):
            if m.proj_size:
                zero = x.new_zeros(len(x), m.hidden_size)
                gates = nn.functional.linear(x, w[0], b[0]) + nn.functional.linear(state[0], w[1], b[1])
                i, f, g, o = gates.chunk(4, 1)
                c = f.sigmoid() * (state[1] + zero) + i.sigmoid() * g.tanh()
                c.retain_grad()
                return (o.sigmoid() * c.tanh()) @ getattr(m, f"weight_hr_{suffix}").T, c
            return torch._VF.lstm_cell(x, state, *w, *b)
        if isinstance(m, nn.GRU):
            return (torch._VF.gru_cell(x, state[0], *w, *b),)
        kind = torch._VF.rnn_tanh_cell if m.nonlinearity == "tanh" else torch._VF.rnn_relu_cell
        return (kind(x, state[0], *w, *b),)

    def run(self) -> tuple[Any, Any]:
        case, m = self.case, self.module
        x = case.padded
        T, B = x.shape[:2]
        hx = case.hx
        given = (
            None
            if hx is None
            else tuple(h.unsqueeze(1) if h.dim() == 2 else h for h in (hx if isinstance(hx, tuple) else (hx,)))
        )
        n_dir = 2 if m.bidirectional else 1
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(m.num_layers):
            outputs = []
            for d in range(n_dir):
                suffix, name = f"l{layer}" + "_reverse" * d, f"l{layer}" + ".reverse" * d
                k = layer * n_dir + d
                sizes = [m.proj_size or m.hidden_size, m.hidden_size][: 2 if isinstance(m, nn.LSTM) else 1]
                rows, last = [], []
                self.h[name], self.c[name] = [[None] * B for _ in range(T)], [[None] * B for _ in range(T)]
                for b in range(B):
                    state = (
                        tuple(x.new_zeros(1, n) for n in sizes)
                        if given is None
                        else tuple(h[k, b : b + 1] for h in given)
                    )
                    ys: list[Tensor] = [x.new_zeros(1, sizes[0])] * T
                    order = range(case.lengths[b])
                    for t in reversed(order) if d else order:
                        state = self.step(suffix, x[t, b : b + 1], state)
                        for s in state:
                            s.retain_grad()
                        self.h[name][t][b] = ys[t] = state[0]
                        self.c[name][t][b] = state[-1]
                    rows.append(torch.stack(ys))
                    last.append(state)
                outputs.append(torch.cat(rows, dim=1))
                finals.append(tuple(torch.cat(s) for s in zip(*last, strict=True)))
            x = torch.cat(outputs, dim=-1)
        final = tuple(torch.stack(s) for s in zip(*finals, strict=True))
        if isinstance(case.x, PackedSequence):
            x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(case.lengths), enforce_sorted=False)
        elif case.x.dim() == 2:
            x, final = x[:, 0], tuple(f[:, 0] for f in final)
        elif m.batch_first:
            x = x.transpose(0, 1)
        return x, final if len(final) > 1 else final[0]

    def norms(self, states: dict[str, list[list[Tensor | None]]], name: str) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64)
        return torch.stack(
            [torch.stack([zero if s is None or s.grad is None else s.grad.norm() for s in row]) for row in states[name]]
        )


@given(case=module_cases(), seed=st.integers(0, 99))
def test_equal_to_a_loop_of_cells(case: ModuleCase, seed: int) -> None:
    loop = CellLoop(case)
    project_out(loop.run(), seed).backward()
    with uv.watch(case.module) as flow:
        project_out(case.module(case.x, case.hx), seed).backward()
    assert list(flow) == case.names
    for name in case.names:
        record = flow[name]
        torch.testing.assert_close(record.dh, loop.norms(loop.h, name), rtol=1e-12, atol=1e-15)
        if isinstance(case.module, nn.LSTM):
            assert record.dc is not None
            torch.testing.assert_close(record.dc, loop.norms(loop.c, name), rtol=1e-12, atol=1e-15)
        else:
            assert record.dc is None
        assert record.residual <= 1e-12
        assert record.lengths.tolist() == case.lengths


@given(case=module_cases(torch.float32, dropout=0.5), seed=st.integers(0, 99))
def test_dropout_between_layers_is_drawn_again(case: ModuleCase, seed: int) -> None:
    with uv.watch(case.module) as flow:
        project_out(case.module(case.x, case.hx), seed).backward()
    for record in flow.values():
        assert record.residual <= 1e-4


@given(case=module_cases(torch.float32, dropout=0.3), seed=st.integers(0, 99), fails=st.booleans())
def test_leaves_outputs_gradients_generator_hooks_and_attributes_alone(
    case: ModuleCase, seed: int, fails: bool
) -> None:
    def step(module: nn.Module) -> list[Tensor]:
        torch.manual_seed(seed)
        module.zero_grad()
        output = module(case.x, case.hx)
        project_out(output, seed).backward()
        y, final = output
        parts = [y.data if isinstance(y, PackedSequence) else y, *(final if isinstance(final, tuple) else (final,))]
        return [*parts, *(p.grad.clone() for p in module.parameters() if p.grad is not None), torch.get_rng_state()]

    module = case.module
    expected = step(module)
    before = {k: copy.copy(v) for k, v in vars(module).items()}
    if fails:
        with contextlib.suppress(ZeroDivisionError), uv.watch(module):
            watched = step(module)
            raise ZeroDivisionError
    else:
        with uv.watch(module):
            watched = step(module)
    again = step(module)
    for other in (watched, again):
        assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))
    assert vars(module).keys() == before.keys()
    assert all(not getattr(module, name) for name in before if "hooks" in name)
    assert all(p._backward_hooks is None for p in module.parameters())


def test_a_wrong_record_has_a_large_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(2, 3, dtype=torch.float64)
    right = module_sequence.layer_directions

    def swapped(module: nn.RNNBase, weights: Any) -> Any:
        layers = right(module, weights)
        i, f, g, o = layers[0].weights.w_hh.chunk(4)
        return [layers[0]._replace(weights=layers[0].weights._replace(w_hh=torch.cat([f, i, g, o])))]

    monkeypatch.setattr(module_sequence, "layer_directions", swapped)
    with uv.watch(lstm) as flow:
        lstm(torch.randn(4, 2, 2, dtype=torch.float64))[0].sum().backward()
    assert flow["l0"].residual > 1e-3


def test_scaling_the_loss_scales_and_permuting_the_batch_permutes() -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(2, 3, dtype=torch.float64), torch.randn(5, 4, 2, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])

    def record(x: Tensor, scale: float) -> uv.flow.LayerFlow:
        with uv.watch(lstm) as flow:
            (lstm(x)[0].square().sum() * scale).backward()
        return flow["l0"]

    base, other = record(x, 1.0), record(x[:, order], 1e12)
    torch.testing.assert_close(other.dh, 1e12 * base.dh[:, order], rtol=1e-11, atol=0)
    changed = x.clone()
    changed[:, 0] += 1
    torch.testing.assert_close(record(changed, 1.0).dc[:, 1:], base.dc[:, 1:], rtol=1e-13, atol=0)


def test_no_backward_is_an_error_not_zeros() -> None:
    lstm, x = nn.LSTM(2, 3), torch.randn(4, 2, 2)
    with uv.watch(lstm) as flow:
        pass
    with pytest.raises(NoBackwardError, match="no forward pass"):
        flow["l0"]
    with uv.watch(lstm) as flow:
        with torch.no_grad():
            lstm(x)
        y, _ = lstm(x)
        with pytest.raises(NoBackwardError, match="no backward pass"):
            flow["l0"]
    y.sum().backward()
    with pytest.raises(NoBackwardError, match="no backward pass"):
        flow.layers  # noqa: B018
    with pytest.raises(KeyError, match="no layer 'l7'"):
        flow["l7"]
    both = nn.ModuleDict({"a": nn.GRU(2, 3), "b": nn.GRU(2, 3)})
    with uv.watch(both) as flow:
        both["b"](x)
        both["a"](x)[0].sum().backward()
    assert list(flow) == ["a.l0"]
    with pytest.raises(NoBackwardError, match="does not depend on it"):
        flow["b.l0"]


def test_wrong_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no nn.RNN, nn.LSTM, nn.GRU or cell"), uv.watch(nn.Linear(2, 2)):
        pass
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got int"):
        uv.watch(3)  # type: ignore[arg-type]
    with uv.watch(nn.LSTM(2, 2)) as flow:
        uv.mark(torch.zeros(2), "h")
    assert "does not require gradients" in flow.skipped["h"]


@pytest.mark.parametrize("option", ["every", "keep"])
@pytest.mark.parametrize("value", [0, 1.5, True, "2"])
def test_counts_are_whole_numbers(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}: expected a whole number, at least 1"):
        uv.watch(nn.LSTM(2, 3), **{option: value})


@pytest.mark.parametrize("family", [nn, uv.nn])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("inside", [True, False])
def test_under_autocast_the_record_is_that_of_the_weights_own_dtype(family: Any, kind: str, inside: bool) -> None:
    if family is nn:
        skip_where_torch_raises(kind)
    torch.manual_seed(0)
    for made in (kind, f"{kind}Cell"):
        layer, x = getattr(family, made)(3, 4), torch.randn(5, 2, 3)

        def loss(x: Tensor, layer: nn.Module = layer) -> Tensor:
            if isinstance(layer, nn.RNNBase):
                return layer(x)[0].float().square().sum()
            h = None
            for row in x:
                h = layer(row, h)
            h = h[0] if isinstance(h, tuple) else h
            return h.float().square().sum()  # type: ignore[union-attr]

        for options in ({}, {"partial": True}):
            for mine in (x, x.bfloat16()):
                with uv.watch(layer, **options) as flow, torch.autocast("cpu", torch.bfloat16):
                    value = loss(mine)
                    if inside:
                        value.backward()
                    else:
                        with torch.autocast("cpu", enabled=False):
                            value.backward()
                with uv.watch(layer) as right:
                    loss(mine.float()).backward()
                name = next(iter(flow))
                torch.testing.assert_close(flow[name].dh, right[name].dh, rtol=3e-2, atol=1e-3)
                recorded = isinstance(layer, uv.nn.layers.EngineSequence) and not options
                residual = flow[name].residual
                # Where the CPU multiplies in bfloat16 torch's layer runs, whose gradient there is to compare with.
                assert residual < 2e-2 or (recorded and math.isnan(residual))
                assert flow[name].valid, flow[name].problem


@pytest.mark.parametrize("family", [nn, uv.nn])
def test_a_batch_of_no_samples_is_no_error(family: Any) -> None:
    layer, cell = family.LSTM(3, 4, 2), family.LSTMCell(3, 4)
    with uv.watch(nn.ModuleDict({"layer": layer, "cell": cell}), partial=True) as flow:
        layer(torch.zeros(5, 0, 3))[0].sum().backward()
        cell(torch.zeros(0, 3))[0].sum().backward()
    assert flow["layer.l0"].dh.shape == (5, 0)
    assert flow["layer.l1"].dweight.tolist() == [0.0] * 5
    assert flow["cell"].dh.shape == (1, 0)
    assert "B=0" in repr(flow)


def test_frozen_weights_and_autograd_grad() -> None:
    lstm = nn.LSTM(2, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    with uv.watch(lstm) as flow:
        torch.autograd.grad(lstm(x)[0].sum(), x)
    assert flow["l0"].dh.min() > 0
    assert math.isnan(flow["l0"].residual)


@pytest.mark.parametrize("form", ["weight_norm", "spectral"])
def test_parametrised_weights(form: str) -> None:
    torch.manual_seed(0)
    gru = nn.GRU(2, 3, dtype=torch.float64)
    wrap = {"weight_norm": nn.utils.parametrizations.weight_norm, "spectral": nn.utils.parametrizations.spectral_norm}[
        form
    ]
    wrap(gru, "weight_hh_l0")
    gru, twin = copy.deepcopy(gru), copy.deepcopy(gru)
    x = torch.randn(4, 2, 2, dtype=torch.float64)
    expected = twin(x)[0]
    expected.sum().backward()
    with uv.watch(gru) as flow:
        found = gru(x)[0]
        found.sum().backward()
    assert flow["l0"].residual <= 1e-12
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(gru.state_dict().values(), twin.state_dict().values(), strict=True))


def test_parametrised_cells_are_left_alone_too() -> None:
    torch.manual_seed(0)
    cell = nn.GRUCell(2, 3, dtype=torch.float64)
    nn.utils.parametrizations.spectral_norm(cell, "weight_hh")
    twin, x = copy.deepcopy(cell), torch.randn(4, 2, 2, dtype=torch.float64)
    outputs = []
    for module in (twin, cell):
        with contextlib.nullcontext() if module is twin else uv.watch(cell) as flow:
            h = None
            for row in x:
                h = module(row, h)
            h.sum().backward()
        outputs.append(h)
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(cell.state_dict().values(), twin.state_dict().values(), strict=True))
    assert flow["cell"].dh.shape == (4, 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(2, 3, dtype=torch.float64), torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    with uv.watch(lstm) as expected:
        lstm(x)[0].square().sum().backward()
    with uv.watch(lstm) as flow:
        y = torch.utils.checkpoint.checkpoint(lambda x: lstm(x)[0], x, use_reentrant=reentrant)
        y.square().sum().backward()
    torch.testing.assert_close(flow["l0"].dh, expected["l0"].dh, rtol=1e-12, atol=0)
    assert flow["l0"].residual <= 1e-12


def test_non_finite_values_are_traced_to_their_birth() -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(2, 3, num_layers=2), torch.randn(6, 4, 2)
    bad = x.clone()
    bad[3, 2, 1] = math.nan
    with uv.watch(lstm) as flow:
        lstm(bad)[0].sum().backward()
    with pytest.raises(
        NonFiniteError, match="l0: NaN first appears in the forward pass at step 3, sample 2, in the input x"
    ):
        flow["l0"]
    with uv.watch(lstm) as flow:
        y, _ = lstm(x)
        (y * torch.where(torch.arange(6) == 4, math.inf, 1.0)[:, None, None]).sum().backward()
    with pytest.raises(
        NonFiniteError,
        match="l1: infinity first appears in the backward pass at step 4, sample 0, in the gradient arriving at h from",
    ):
        flow["l1"]


def test_save_and_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.LSTM(2, 3), "b": nn.RNN(3, 3)})
    with uv.watch(model, partial=True) as flow:
        model["b"](model["a"](torch.randn(5, 2, 2))[0])[0].sum().backward()
    flow.save(tmp_path / "f.flow")
    loaded = uv.flow.load(tmp_path / "f.flow")
    assert list(loaded) == ["a.l0", "b.l0"]
    for name, record in flow.items():
        assert loaded[name].tensors().keys() == record.tensors().keys()
        assert all(torch.equal(loaded[name].tensors()[k], v) for k, v in record.tensors().items())
        assert repr(loaded[name]) == repr(record)
    assert [f.name for f in tmp_path.iterdir()] == ["f.flow"]
    frame = loaded.to_dataframe()
    assert len(frame) == 2 * 5 * 2
    assert frame.dh.tolist()[:10] == flow["a.l0"].dh.flatten().tolist()


@pytest.mark.parametrize("content", [b"", b"junk", b"\x08\0\0\0\0\0\0\0{}      ", bytes(200)])
def test_files_that_are_no_flows_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match="flow file"):
        uv.flow.load(tmp_path / "f")
