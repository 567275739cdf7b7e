"""What a watch takes for one pass: cells in a loop, calls that follow one another, marks, several backwards."""

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import unvanish as uv
from tests.test_watch import project_out
from unvanish.flow import backward_runs


class Decoder(nn.Module):
    """The user's own loop of a torch cell."""

    def __init__(self, kind: Callable[..., nn.RNNCellBase], detach_every: int | None = None) -> None:
        super().__init__()
        self.cell = kind(3, 4, dtype=torch.float64)
        self.detach_every = detach_every
        self.states: list[tuple[Tensor, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        hx = None
        total = x.new_zeros(())
        for t, row in enumerate(x):
            if self.detach_every and t and t % self.detach_every == 0:
                hx = tuple(h.detach() for h in hx) if isinstance(hx, tuple) else hx.detach()
            hx = self.cell(row, hx)
            self.states.append(hx if isinstance(hx, tuple) else (hx,))
            for s in self.states[-1]:
                s.retain_grad()
            total = total + (hx[0] if isinstance(hx, tuple) else hx).square().sum()
        return total


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("detach_every", [None, 2])
def test_cells_in_a_loop(kind: Callable[..., nn.RNNCellBase], detach_every: int | None) -> None:
    torch.manual_seed(0)
    model = Decoder(kind, detach_every)
    with uv.watch(model) as flow:
        model(torch.randn(5, 2, 3, dtype=torch.float64)).backward()
    record = flow["cell"]
    for norms, i in ((record.dh, 0), (record.dc, 1)):
        if norms is not None:
            expected = torch.stack([s[i].grad.norm(dim=1) for s in model.states])
            torch.testing.assert_close(norms, expected, rtol=1e-12, atol=1e-15)
    assert (record.dc is not None) == (kind is nn.LSTMCell)
    assert record.residual <= 1e-12
    assert record.detached == ((2, 4) if detach_every else ())


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell, uv.nn.RNNCell])
def test_a_single_sample_without_a_batch_axis_is_recorded_as_a_batch_of_one(
    kind: Callable[..., nn.RNNCellBase],
) -> None:
    torch.manual_seed(0)
    cell, x = kind(3, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    found = []
    for rows in (x, x.unsqueeze(1)):
        with uv.watch(cell) as flow, uv.cures.Omega(cell) as omega:
            hx, total = None, x.new_zeros(())
            for row in rows:
                hx = cell(row, hx)
                total = total + sum(
                    (i + 1) * s.square().sum() for i, s in enumerate(hx if isinstance(hx, tuple) else [hx])
                )
            total.backward()
        assert flow["cell"].residual <= 1e-12
        found.append((flow["cell"].dh, *((flow["cell"].dc,) if kind is nn.LSTMCell else ()), omega.penalty()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("family", [nn, uv.nn])
def test_states_may_come_in_a_list(family: Any) -> None:
    torch.manual_seed(0)
    whole, cell = family.LSTM(3, 4), family.LSTMCell(3, 4)
    x = torch.randn(6, 2, 3)

    def run(form: Any) -> None:
        y, hx = whole(x[:3])
        (y.sum() + whole(x[3:], form(hx))[0].sum()).backward()
        hx = cell(x[0])
        for row in x[1:]:
            hx = cell(row, form(hx))
        hx[0].sum().backward()

    records = []
    for form in (tuple, list):
        with uv.watch(nn.ModuleList([whole, cell])) as flow:
            run(form)
        records.append([flow[name].dh for name in ("0.l0", "1")])
    assert [len(dh) for dh in records[1]] == [6, 6]
    assert all(torch.equal(a, b) for a, b in zip(*records, strict=True))


def test_a_module_called_step_by_step_is_one_pass() -> None:
    torch.manual_seed(0)
    whole = nn.LSTM(3, 4, num_layers=2, dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    with uv.watch(whole) as expected:
        project_out(whole(x), 1).backward()

    with uv.watch(whole) as flow:
        hx, ys = None, []
        for t in range(6):
            y, hx = whole(x[t : t + 1], hx)
            ys.append(y)
        project_out((torch.cat(ys), hx), 1).backward()
    for name in ("l0", "l1"):
        for field in ("dh", "dc", "dgates", "dweight", "gates"):
            torch.testing.assert_close(
                getattr(flow[name], field), getattr(expected[name], field), rtol=1e-11, atol=1e-14
            )
        assert flow[name].residual <= 1e-12


def test_marks_in_a_custom_cell() -> None:
    torch.manual_seed(0)
    w = nn.Linear(4, 4, bias=False, dtype=torch.float64)

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = w

        def forward(self, x: Tensor) -> Tensor:
            h = x[0] * 0
            for row in x:
                h = uv.mark(torch.tanh(self.w(h) + row), "mine")
            return h.sum()

    model, x = Custom(), torch.randn(5, 2, 4, dtype=torch.float64)
    with uv.watch(model) as flow:
        model(x).backward()
    rnn = nn.RNN(4, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_ih_l0.copy_(torch.eye(4))
        rnn.weight_hh_l0.copy_(w.weight)
    with uv.watch(rnn) as expected:
        rnn(x)[1].sum().backward()
    torch.testing.assert_close(flow["mine"].dh, expected["l0"].dh, rtol=1e-12, atol=1e-15)
    assert uv.mark(x, "outside") is x


@pytest.mark.parametrize("name", ["rnn", "rnn.l0"])
def test_a_mark_may_not_take_a_layers_name(name: str) -> None:
    model = nn.ModuleDict({"rnn": nn.RNN(2, 3)})
    with uv.watch(model) as flow:
        h = model["rnn"](torch.zeros(4, 1, 2))[0][-1]
        assert uv.mark(h, name) is h
        h.sum().backward()
    assert "name of a layer of the model" in flow.skipped[name]
    assert flow["rnn.l0"].cell == "rnn_tanh"


def test_several_backwards_add_up() -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(2, 3, dtype=torch.float64), torch.randn(4, 2, 2, dtype=torch.float64)
    with uv.watch(lstm) as once:
        y, _ = lstm(x)
        (y[-1].sum() + y[1].square().sum()).backward()
    with uv.watch(lstm) as twice:
        y, _ = lstm(x)
        y[-1].sum().backward(retain_graph=True)
        first = twice["l0"].dh.clone()
        y[1].square().sum().backward()
    torch.testing.assert_close(twice["l0"].dh, once["l0"].dh, rtol=1e-12, atol=1e-15)
    assert not torch.allclose(first, once["l0"].dh)
    assert twice["l0"].residual <= 1e-12
    assert len(twice.passes("l0")) == 1


def test_truncated_bptt_gives_one_pass_per_chunk_and_keeps_the_last_few() -> None:
    torch.manual_seed(0)
    gru = nn.GRU(2, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(gru.parameters(), 0.1)
    with uv.watch(gru, keep=2) as flow:
        h = None
        for length in (4, 5, 6):
            y, h = gru(torch.randn(length, 2, 2, dtype=torch.float64), h)
            optimizer.zero_grad()
            y.sum().backward()
            optimizer.step()
            h = h.detach()
    assert [record.dh.shape[0] for record in flow.passes("l0")] == [5, 6]
    assert all(record.residual <= 1e-12 for record in flow.passes("l0"))
    assert flow.dropped == 1


def test_one_layer_used_twice_in_one_loss() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(2, 3, dtype=torch.float64)
    with uv.watch(lstm) as flow:
        a, b = (lstm(torch.randn(4, 2, 2, dtype=torch.float64))[0][-1] for _ in range(2))
        (a * b).sum().backward()
    assert [record.residual <= 1e-12 for record in flow.passes("l0")] == [True, True]


@pytest.mark.parametrize("kind", [nn.LSTM, uv.nn.LSTM])
def test_passes_stand_in_the_order_of_the_calls(kind: type[nn.RNNBase]) -> None:
    layer = kind(3, 4)
    with uv.watch(layer) as flow:
        sum(layer(torch.randn(T, 2, 3))[0].sum() for T in (5, 9, 7)).backward()  # type: ignore[union-attr]
    assert [len(record.dh) for record in flow.passes("l0")] == [5, 9, 7]
    assert len(flow["l0"].dh) == 7


def test_passes_of_two_threads_are_both_measured() -> None:
    layers = [nn.LSTM(3, 4, dtype=torch.float64) for _ in range(2)]
    model = nn.ModuleList(layers)
    with uv.watch(model) as flow:
        losses = [layer(torch.randn(5, 2, 3, dtype=torch.float64))[0].sum() for layer in layers]
        threads = [Thread(target=loss.backward) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(flow[f"{i}.l0"].residual <= 1e-12 for i in range(2))
    assert not flow.skipped


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_pass_does_not_wait_for_ever_for_another(recomputed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two GPUs the other one may be waiting for the thread in which this one ends, or is computed again."""
    monkeypatch.setattr(backward_runs, "LONGEST_WAIT", 0.05)
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    with uv.watch(layer) as flow:
        y = checkpoint(lambda v: layer(v)[0].sin(), x, use_reentrant=False) if recomputed else layer(x)[0]
        with flow._alone("") as alone:
            assert alone
            thread = Thread(target=y.sum().backward)
            thread.start()
            thread.join(20)
        assert not thread.is_alive()
    assert layer.weight_hh_l0.grad is not None
    assert "still being measured after 0.05 seconds" in flow.skipped[""]
    assert "not recorded: the model: the backward pass of another thread" in repr(flow)
