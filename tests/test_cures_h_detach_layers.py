"""h-detach in whole layers, in every form of input and in cells stepped by hand: outputs, gradients and records are
those of plain loops with `.detach()`."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import unvanish as uv
from tests import plain_loops
from tests.strategies import ModuleCase, module_cases
from unvanish import cures, engine


class Compared:
    """A layer with h-detach beside plain loops over the same weights, input and draws."""

    def __init__(self, case: ModuleCase, p: float, seed: int) -> None:
        self.case, self.seed = case, seed
        self.module = uv.accelerate(case.module)
        self.module.h_detach = p
        self.T = case.padded.shape[0]
        places = self.module.num_layers * (2 if self.module.bidirectional else 1)
        torch.manual_seed(seed)
        self.cuts = [torch.rand(self.T) < p for _ in range(places)]
        self.given = self._leaves()

    def _leaves(self) -> list[Tensor]:
        x, hx = self.case.x, self.case.hx
        data = x.data if isinstance(x, PackedSequence) else x
        states = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
        return [v.detach().clone().requires_grad_() for v in (data, *states)]

    @property
    def inputs(self) -> list[Tensor]:
        return [*self.given, *self.module.parameters()]

    def call(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The module, on the leaves."""
        x, hx, (data, *states) = self.case.x, self.case.hx, self.given
        packed = x._replace(data=data) if isinstance(x, PackedSequence) else data
        state = None if hx is None else tuple(states) if isinstance(hx, tuple) else states[0]
        torch.manual_seed(self.seed)
        return plain_loops.time_major(self.case, self.module(packed, state))

    def loop(self, steps: dict[str, plain_loops.Steps]) -> tuple[Tensor, tuple[Tensor, ...]]:
        data, *states = self.given
        x: Any = self.case.x
        x = nn.utils.rnn.pad_packed_sequence(x._replace(data=data))[0] if isinstance(x, PackedSequence) else data
        if x.dim() == 2:
            x, states = x.unsqueeze(1), [s.unsqueeze(1) for s in states]
        elif self.module.batch_first and not isinstance(self.case.x, PackedSequence):
            x = x.transpose(0, 1)
        hx = tuple(states) if states else None
        return plain_loops.run_module(self.module, self.case, x, hx, self.cuts, steps)

    def error(self, outputs: tuple[Tensor, tuple[Tensor, ...]]) -> Tensor:
        """A number that every output enters."""
        make = torch.Generator().manual_seed(self.seed)
        y, final = outputs
        parts = [(torch.randn(v.shape, generator=make, dtype=v.dtype) * v).sum() for v in (y, *final)]
        return sum(parts[1:], parts[0])

    def gradients(self, outputs: tuple[Tensor, tuple[Tensor, ...]]) -> list[Tensor]:
        asked: Any = torch.autograd.grad(self.error(outputs), self.inputs, allow_unused=True, materialize_grads=True)
        return list(asked)


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        size = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * size)


P = st.sampled_from([0.0, 0.3, 0.6, 1.0])


@given(case=module_cases(), p=P, every=st.none() | st.integers(1, 8), seed=st.integers(0, 99))
def test_a_layer_is_its_loop_with_detach(case: ModuleCase, p: float, every: int | None, seed: int) -> None:
    both = Compared(case, p, seed)
    both.module.checkpoint_every = every
    outputs, expected = both.call(), both.loop({})
    close([outputs[0], *outputs[1]], [expected[0], *expected[1]], 1e-12)
    close(both.gradients(outputs), both.gradients(expected), 1e-12)


def norms_of(kind: dict[tuple[int, int], Tensor], found: dict[int, Tensor], T: int, B: int, gates: int = 1) -> Tensor:
    """`[T, B, gates]` of what autograd found for each of a loop's tensors; 0 where there is none."""
    made = torch.zeros(T, B, gates, dtype=torch.float64)
    for (t, b), v in kind.items():
        d = found[id(v)]
        made[t, b] = torch.stack([part.norm() for part in d.chunk(gates)])
    return made


@pytest.mark.parametrize("how", ["recorded", "replayed", "partial"])
@settings(max_examples=30)
@given(case=module_cases(projections=False), p=P, every=st.none() | st.integers(1, 8), seed=st.integers(0, 99))
def test_a_watch_records_the_gradient_of_the_loop(
    how: str, case: ModuleCase, p: float, every: int | None, seed: int
) -> None:
    both = Compared(case, p, seed)
    both.module.checkpoint_every = every
    steps: dict[str, plain_loops.Steps] = {}
    expected = both.loop(steps)
    asked = [v for s in steps.values() for kind in (s.h, s.c, s.a) for v in kind.values()]
    asked += [w for s in steps.values() for pair in s.w.values() for w in pair]
    grads = torch.autograd.grad(both.error(expected), asked, allow_unused=True, materialize_grads=True)
    found = {id(v): d for v, d in zip(asked, grads, strict=True)}
    holder = nn.Sequential(both.module)
    with uv.watch(both.module, partial=how == "partial") as flow, uv.watch(holder) as inner:
        both.error(both.call()).backward()
    if how == "recorded":  # the innermost watch is the one that the kernels notify
        flow = {name.removeprefix("0."): record for name, record in inner.items()}  # type: ignore[assignment]
    B = case.padded.shape[1]
    for name, seen in steps.items():
        record, gates = flow[name], {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 3, "LSTM": 4}[both.module.mode]
        assert record.valid
        pairs = [(record.dh, norms_of(seen.h, found, both.T, B)[..., 0])]
        pairs += [(record.dgates, norms_of(seen.a, found, both.T, B, gates))]
        if record.dc is not None:
            pairs += [(record.dc, norms_of(seen.c, found, both.T, B)[..., 0])]
        by_step = torch.zeros(both.T, dtype=torch.float64)
        for t in range(both.T):
            here = [seen.w[t, b] for b in range(B) if (t, b) in seen.w]
            sums = [sum(found[id(pair[k])] for pair in here) for k in (0, 1)]
            by_step[t] = torch.sqrt(sum(torch.as_tensor(g).square().sum() for g in sums))  # type: ignore[arg-type]
        pairs += [(record.dweight, by_step)]
        for mine, theirs in pairs:
            assert mine is not None
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12 * max(1.0, float(theirs.max())))


@pytest.mark.parametrize("every", [None, 4])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_an_audit_finds_nothing_but_rounding(kind: type[nn.RNNBase], every: int | None) -> None:
    torch.manual_seed(0)
    layer: Any = cures.h_detach_(kind(2, 5, 2, bidirectional=True, dropout=0.3).double(), 0.5)
    layer.checkpoint_every = every
    x = torch.randn(11, 3, 2, dtype=torch.float64)
    assert uv.audit(layer, x, loss=lambda out: out[0].square().sum()).worst < 1e-12


@pytest.mark.parametrize("name", [name for name, kind in uv.cells.ZOO.items() if kind().carries and kind().sources])
def test_checkpointing_changes_no_number_of_any_cell(name: str) -> None:
    torch.manual_seed(0)
    layer = uv.nn.Recurrent(uv.cells.ZOO[name](), 2, 3, num_layers=2, bidirectional=True, dtype=torch.float64)
    cures.h_detach_(layer, 0.5)
    x, found = torch.randn(9, 4, 2, dtype=torch.float64), []
    for every in (None, 1, 4, 20):
        layer.checkpoint_every = every
        torch.manual_seed(3)
        y, _ = layer(x, lengths=[9, 0, 4, 7])
        found.append(torch.autograd.grad(y.square().sum(), list(layer.parameters())))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_in_a_compiled_model(kind: type[nn.RNNBase], every: int | None) -> None:
    torch.manual_seed(0)
    layer: Any = cures.h_detach_(kind(2, 3).double(), 0.5)
    layer.checkpoint_every = every
    x = torch.randn(8, 2, 2, dtype=torch.float64)
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager")):
        torch.manual_seed(5)
        found.append(torch.autograd.grad(run(x)[0].square().sum(), list(layer.parameters())))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    layer.h_detach = None
    uncut = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    assert not torch.allclose(uncut[1], found[0][1])


def steps_of_a_cell(
    cell: Any, x: Tensor, state: Any, cuts: list[bool], lengths: list[int] | None = None
) -> tuple[Tensor, Any]:
    """The user's own loop; `cuts` are made by the loop itself, on a cell without hooks."""
    y, out = [], state
    for t, stops in enumerate(cuts):
        if isinstance(cell, nn.GRUCell) and stops:
            (w_r, w_z, w_n), (u_r, u_z, u_n) = cell.weight_ih.chunk(3), cell.weight_hh.chunk(3)
            (b_r, b_z, b_n), (d_r, d_z, d_n) = cell.bias_ih.chunk(3), cell.bias_hh.chunk(3)
            h = out.detach()
            r = (x[t] @ w_r.mT + b_r + h @ u_r.mT + d_r).sigmoid()
            z = (x[t] @ w_z.mT + b_z + h @ u_z.mT + d_z).sigmoid()
            n = (x[t] @ w_n.mT + b_n + r * (h @ u_n.mT + d_n)).tanh()
            out = (1 - z) * n + z * out
        elif isinstance(cell, nn.LSTMCell) and stops:
            out = cell(x[t], (out[0].detach(), out[1]))
        else:
            out = cell(x[t], out)
        y.append(out[0] if isinstance(out, tuple) else out)
    return torch.stack(y), out


def gradients(y: Tensor, inputs: list[Tensor]) -> Any:
    return torch.autograd.grad(y.square().sum(), inputs, allow_unused=True, materialize_grads=True)


def start(kind: type[nn.RNNCellBase], B: int = 2, H: int = 3) -> Any:
    make = torch.Generator().manual_seed(8)
    states = [torch.randn(B, H, generator=make, dtype=torch.float64).requires_grad_() for _ in range(2)]
    return tuple(states) if kind is nn.LSTMCell else states[0]


@pytest.mark.parametrize("p", [0.4, 1.0])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_a_cell_stepped_by_hand_is_its_loop_with_detach(kind: type[nn.RNNCellBase], p: float) -> None:
    torch.manual_seed(0)
    plain: Any = kind(2, 3).double()
    hooked = cures.h_detach_(copy.deepcopy(plain), p)
    x = torch.randn(10, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(7)
    cuts = [bool(torch.rand(()) < p) for _ in x]
    found = []
    for cell in (hooked, plain):
        torch.manual_seed(7)
        state = start(kind)
        y, _ = steps_of_a_cell(cell, x, state, [False] * 10 if cell is hooked else cuts)
        inputs = [x, *(state if isinstance(state, tuple) else (state,)), *cell.parameters()]
        first = torch.autograd.grad(
            y.square().sum(), inputs, create_graph=True, allow_unused=True, materialize_grads=True
        )
        penalty = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
        found.append([y.detach(), *(g.detach() for g in first), *second])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    torch.manual_seed(7)
    with torch.no_grad():
        assert torch.equal(found[0][0], steps_of_a_cell(plain, x, start(kind), [False] * 10)[0])


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_a_watch_of_a_hooked_cell_records_what_the_layer_records(kind: type[nn.RNNCellBase]) -> None:
    """One sequence whose gradient goes on through cut steps: nothing of it is reported as detached."""
    torch.manual_seed(0)
    cell: Any = cures.h_detach_(kind(2, 3).double(), 0.5)
    layer: Any = (uv.nn.LSTM if kind is nn.LSTMCell else uv.nn.GRU)(2, 3).double()
    for name, weight in cell.named_parameters():
        getattr(layer, f"{name}_l0").data.copy_(weight)
    x = torch.randn(10, 2, 2, dtype=torch.float64)
    torch.manual_seed(7)
    cut = torch.stack([torch.rand(()) < 0.5 for _ in range(9)])
    cut = torch.cat([torch.tensor([False]), cut])  # the first step reads no state
    with uv.watch(cell) as stepped:
        torch.manual_seed(7)
        y, _ = steps_of_a_cell(cell, x, None, [False] * 10)
        y.square().sum().backward()
    d = uv.nn.modules.layer_directions(layer)[0]
    state = tuple(x.new_zeros(2, 3) for _ in d.cell.states)
    tr = engine.trace(d.cell, x, state, d.weights.detach())
    flow = engine.adjoint(tr, 2 * tr.y, (None,) * len(state), cut=cut)
    record = stepped["cell"]
    assert record.valid
    assert record.detached == ()
    assert record.residual < 1e-12
    torch.testing.assert_close(record.dh, flow.dstate[0].norm(dim=-1), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(record.dgates, flow.da.unflatten(-1, (-1, 3)).norm(dim=-1), rtol=1e-11, atol=1e-13)
    if kind is nn.LSTMCell:
        torch.testing.assert_close(record.dc, flow.dstate[1].norm(dim=-1), rtol=1e-11, atol=1e-13)
    assert bool((flow.da_hh != flow.da).any()) == (kind is nn.GRUCell)
    torch.testing.assert_close(cell.weight_hh.grad, engine.weight_gradients(tr, flow).w_hh, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("clip_first", [False, True])
def test_clipping_bounds_all_that_a_hooked_cell_hands_back(kind: type[nn.RNNCellBase], clip_first: bool) -> None:
    """As in a layer: the carry's part, too, whichever cure came first."""
    torch.manual_seed(0)
    cell: Any = kind(2, 3).double()
    for clips in (clip_first, not clip_first):
        cell = cures.clip_recurrence_(cell, 0.3) if clips else cures.h_detach_(cell, 1.0)
    layer: Any = (uv.nn.LSTM if kind is nn.LSTMCell else uv.nn.GRU)(2, 3).double()
    for name, weight in cell.named_parameters():
        getattr(layer, f"{name}_l0").data.copy_(weight)
    x, state = torch.randn(6, 2, 2, dtype=torch.float64), start(kind)
    y, _ = steps_of_a_cell(cell, x, state, [False] * 6)
    states = state if isinstance(state, tuple) else (state,)
    found = gradients(y, [*states, *cell.parameters()])
    layer.h_detach, layer.clip = 1.0, 0.3
    given = tuple(s.unsqueeze(0) for s in states)
    z, _ = layer(x, given if len(given) > 1 else given[0])
    expected = gradients(z, [*states, *layer.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("zone_first", [False, True])
def test_zoneout_keeps_the_gradient_of_what_it_keeps(kind: type[nn.RNNCellBase], zone_first: bool) -> None:
    """A unit that keeps its old h hands the error at it back: that path is no matrix's."""
    torch.manual_seed(0)
    cell: Any = kind(2, 3).double()
    for zones in (zone_first, not zone_first):
        cell = cures.zoneout_(cell, {"h": 0.5}) if zones else cures.h_detach_(cell, 1.0)
    state = start(kind)
    torch.manual_seed(1)
    out = cell(torch.randn(2, 2, dtype=torch.float64), state)
    h0 = state[0] if kind is nn.LSTMCell else state
    (found,) = torch.autograd.grad((out[0] if kind is nn.LSTMCell else out).sum(), h0)
    torch.manual_seed(1)
    x = torch.randn(2, 2, dtype=torch.float64)
    torch.rand(())  # whether to cut
    kept = (torch.rand(2, 3) < 0.5).double()
    if kind is nn.LSTMCell:
        expected = kept
    else:
        q = x @ cell.weight_ih.mT + cell.bias_ih + h0 @ cell.weight_hh.mT + cell.bias_hh
        expected = kept + (1 - kept) * q.chunk(3, -1)[1].sigmoid()
    assert 0 < int(kept.sum()) < 6
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)


def test_a_hooked_gru_cell_under_autocast_and_parametrized() -> None:
    torch.manual_seed(0)
    cell: Any = nn.utils.parametrizations.spectral_norm(nn.GRUCell(2, 3), "weight_hh")
    twin = copy.deepcopy(cell)
    cures.h_detach_(cell, 1.0)
    h, x = torch.randn(2, 3, requires_grad=True), torch.randn(2, 2)
    assert torch.equal(cell(x, h), twin(x, h))
    assert torch.equal(cell(x, h), twin(x, h))  # its power iteration has moved once a step
    with torch.autocast("cpu", torch.bfloat16):
        out = cell(x, h)
    (found,) = torch.autograd.grad(out.float().sum(), h)
    q = x @ cell.weight_ih.mT + cell.bias_ih + h @ cell.eval().weight_hh.mT + cell.bias_hh
    torch.testing.assert_close(found, q.chunk(3, -1)[1].sigmoid().detach(), rtol=2e-2, atol=2e-2)


def test_a_hooked_cell_can_be_changed_in_place_copied_pickled_and_freed_of_its_hooks() -> None:
    import pickle

    torch.manual_seed(0)
    cell: Any = cures.h_detach_(nn.GRUCell(2, 3).double(), 1.0)
    again = pickle.loads(pickle.dumps(copy.deepcopy(cell)))
    x, h = torch.randn(4, 2, 2, dtype=torch.float64), start(nn.GRUCell)
    found = []
    for one in (cell, again):
        state = one(x[0], h)
        state *= 0.5
        found.append(torch.autograd.grad(one(x[1], state).sum(), h)[0])
    assert torch.equal(*found)
    cures.h_detach_(cell, 0.5)
    assert (len(cell._forward_pre_hooks), len(cell._forward_hooks)) == (1, 1)
    cures.h_detach_(cell, None)
    assert (len(cell._forward_pre_hooks), len(cell._forward_hooks)) == (0, 0)
    assert not cell._forward_hooks_with_kwargs


def test_the_adjoint_map_is_that_of_the_exact_derivatives() -> None:
    torch.manual_seed(0)
    layer, x = nn.LSTM(2, 3).double(), torch.randn(9, 2, 2, dtype=torch.float64)
    exact = uv.flow.adjoint_map(layer, x).log_norms
    cures.h_detach_(layer, 1.0)
    assert torch.equal(uv.flow.adjoint_map(layer, x).log_norms, exact)


def test_a_vmap_draws_one_cut_for_all_samples_or_says_so() -> None:
    layer, x = cures.h_detach_(nn.LSTM(2, 3).double(), 0.5), torch.randn(9, 1, 4, 2, dtype=torch.float64)

    def mapped(randomness: str) -> torch.Tensor:
        return torch.func.vmap(lambda v: layer(v)[0], in_dims=2, out_dims=2, randomness=randomness)(x)

    torch.testing.assert_close(mapped("same"), layer(x[:, 0])[0].unsqueeze(1))
    with pytest.raises(ValueError, match=r"same steps for all samples of a vmap.*randomness='same'"):
        mapped("different")


def test_other_transforms_cut_as_autograd_does() -> None:
    layer, x = cures.h_detach_(nn.LSTM(2, 3).double(), 0.5), torch.randn(9, 4, 2, dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return layer(x)[0].square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)

    def of_one(x: torch.Tensor) -> torch.Tensor:
        return layer(x.unsqueeze(1))[0].square().sum()

    torch.manual_seed(3)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(of_one), 1, 1, randomness="same")(x), expected)


def test_a_layer_that_draws_cuts_compiles_in_one_graph() -> None:
    layer, x = cures.h_detach_(uv.nn.LSTM(2, 3), 0.5), torch.randn(9, 4, 2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    expected = torch.autograd.grad(layer(x)[0].sum(), layer.weight_hh_l0)
    with torch._dynamo.config.patch(allow_rnn=True):
        torch.manual_seed(3)
        found = torch.autograd.grad(compiled(x)[0].sum(), layer.weight_hh_l0)
    torch.testing.assert_close(found, expected)
