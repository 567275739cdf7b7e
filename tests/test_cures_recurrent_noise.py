"""Zoneout and recurrent dropout are the equations' loop with the masks that were drawn."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import unvanish as uv
from unvanish import cures
from unvanish.nn.modules import layer_directions

DOUBLE = torch.float64


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def layer(name, **options):
    torch.manual_seed(1)
    if hasattr(nn, name):
        return getattr(nn, name)(2, 3, **options).double()
    return uv.nn.Recurrent(uv.cells.ZOO[name](), 2, 3, dtype=DOUBLE, **options)


def by_hand(plain, x, masks, zoned, dropped):
    """One layer and direction of the equations, a step at a time."""
    (d,) = layer_directions(plain)
    cell, w = d.cell, d.weights
    states = cell.start(x[0], (3,) * len(cell.states))
    names = list(dict.fromkeys(cell.sources.values())) if dropped else []
    read = dict(zip(cell.states, states, strict=True))
    y = []
    for p, mask in zip(cell.project(x, w), masks, strict=True):
        parts = mask.split(3, -1)
        m_zone = dict(zip(zoned, parts[: len(zoned)], strict=True))
        m_drop = dict(zip(names, parts[len(zoned) :], strict=True))
        shown = tuple(read[s] for s in cell.states)
        q = cell.recur(shown, w)
        new = cell.evaluate(p, q, states, w.v)
        if cell.same_step:
            made = dict(zip(cell.states, new, strict=True))
            late = tuple(
                m_drop.get(s, 1) * zone(made[s], old, m_zone.get(s)) for s, old in zip(cell.states, states, strict=True)
            )
            new = cell.evaluate(p, cell.completed(q, late, w), states, w.v)
        states = tuple(zone(s, old, m_zone.get(a)) for a, s, old in zip(cell.states, new, states, strict=True))
        read = {a: m_drop.get(a, 1) * s for a, s in zip(cell.states, states, strict=True)}
        y.append(states[0])
    return torch.stack(y), states


def zone(new, old, m):
    return new if m is None else torch.where(m > 0.5, new, old)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "peephole", "lem", "slstm", "cornn"])
@pytest.mark.parametrize("kind", ["zoneout", "dropout", "both"])
def test_is_the_loop_of_the_equations(name, kind):
    plain, x = layer(name), noise(8, 2, 2)
    noisy = copy.deepcopy(plain)
    states = layer_directions(plain)[0].cell.states
    if kind != "dropout":
        noisy = cures.zoneout_(noisy, 0.4)
    if kind != "zoneout":
        noisy = cures.recurrent_dropout_(noisy, 0.5)
    torch.manual_seed(0)
    (mask,) = noisy.draw(x)
    assert 0 < float((mask == 0).double().mean()) < 1
    y, final = noisy(x, masks=[mask])
    expected, ends = by_hand(plain, x, mask, states if kind != "dropout" else (), kind != "zoneout")
    torch.testing.assert_close(y, expected)
    for found, end in zip(final if isinstance(final, tuple) else (final,), ends, strict=True):
        torch.testing.assert_close(found[0], end)
    mine = torch.autograd.grad(y.square().sum(), list(noisy.parameters()))
    named = {key.rpartition(".")[2]: g for (key, _), g in zip(noisy.named_parameters(), mine, strict=True)}
    theirs = torch.autograd.grad(expected.square().sum(), list(plain.parameters()))
    for (key, _), g in zip(plain.named_parameters(), theirs, strict=True):
        torch.testing.assert_close(named[key], g, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_in_evaluation_zoneout_is_the_mean_and_dropout_nothing(name):
    plain, x = layer(name).eval(), noise(6, 2, 2)
    dropped = cures.recurrent_dropout_(copy.deepcopy(plain), 0.5)
    torch.testing.assert_close(dropped(x), plain(x))
    zoned = cures.zoneout_(copy.deepcopy(plain), {"h": 0.25})
    h = noise(1, 2, 3, seed=3)
    states = (h, 0 * h) if name == "LSTM" else h
    (one, _), (mixed, _) = plain(x[:1], states), zoned(x[:1], states)
    torch.testing.assert_close(mixed, 0.25 * h + 0.75 * one)


def test_a_unit_that_is_zoned_out_hands_its_error_on_unchanged():
    zoned, x = cures.zoneout_(layer("LSTM"), {"c": 0.5}), noise(10, 2, 2)
    keep = torch.zeros(10, 2, 3, dtype=DOUBLE)
    c0 = torch.zeros(1, 2, 3, dtype=DOUBLE, requires_grad=True)
    _, (_, c) = zoned(x, (torch.zeros_like(c0), c0), masks=[keep])
    torch.testing.assert_close(torch.autograd.grad(c.sum(), c0)[0], torch.ones_like(c0))
    assert torch.equal(c, c0)


def test_dropout_hides_the_same_units_in_every_step_and_rescales():
    dropped, x = cures.recurrent_dropout_(layer("GRU"), 0.5), torch.zeros(6, 50, 2, dtype=DOUBLE)
    (mask,) = dropped.draw(x)
    assert torch.equal(mask, mask[:1].expand_as(mask))
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert abs(float(mask.mean()) - 1) < 0.4
    (drawn,) = cures.zoneout_(layer("GRU"), 0.3).draw(torch.zeros(60, 50, 2))
    assert abs(float((drawn == 0).double().mean()) - 0.3) < 0.02
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("options", [{"num_layers": 2, "bidirectional": True}, {"num_layers": 2, "batch_first": True}])
def test_interface_of_the_layer_in_whose_place_it_stands(options):
    plain, x = layer("LSTM", **options), noise(3, 3, 2)
    noisy = cures.zoneout_(copy.deepcopy(plain), {"c": 0.5})
    noisy.noise = type(noisy.noise)({"c": 0.0})
    hx = tuple(noise(2 * (1 + plain.bidirectional), 3, 3, seed=s) for s in (1, 2))
    torch.testing.assert_close(noisy(x, hx), plain(x, hx))
    torch.testing.assert_close(noisy(x[0]), plain(x[0]))
    packed = pack_padded_sequence(x, torch.tensor([1, 3, 2]), options.get("batch_first", False), enforce_sorted=False)
    (y, ends), (expected, theirs) = noisy(packed, hx), plain(packed, hx)
    torch.testing.assert_close(pad_packed_sequence(y), pad_packed_sequence(expected))
    torch.testing.assert_close(ends, theirs)
    ragged = noisy(x, hx, lengths=[1, 3, 2])
    torch.testing.assert_close(ragged[1], theirs)


def test_parameters_stay_the_optimizers_and_masks_are_replayed():
    model, x = nn.ModuleDict({"rnn": layer("LSTM"), "head": nn.Linear(3, 1).double()}), noise(5, 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert cures.recurrent_dropout_(cures.zoneout_(model, {"h": 0.1, "c": 0.5}), 0.2) is model
    assert {id(p) for p in model.parameters()} == held
    assert repr(model["rnn"]).startswith("NoisyLayers(\n  zoneout of h: 0.1, zoneout of c: 0.5, recurrent dropout: 0.2")
    torch.manual_seed(3)
    first = model["rnn"](x)[0]
    assert not torch.equal(model["rnn"](x)[0], first)
    torch.manual_seed(3)
    assert torch.equal(model["rnn"](x)[0], first)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    masks = model["rnn"].draw(x)
    assert torch.equal(twin["rnn"](x, masks=masks)[0], model["rnn"](x, masks=masks)[0])
    cures.zoneout_(cures.recurrent_dropout_(model, 0.0), 0.0)
    torch.manual_seed(1)
    torch.testing.assert_close(model["rnn"](x), layer("LSTM")(x))


def test_watch_records_the_noisy_pass_and_other_cures_reach_it():
    model = cures.zoneout_(nn.Sequential(layer("GRU")), 0.3)
    cures.chrono_(model, 50)
    cures.orthogonal_(model)
    with uv.watch(model) as flow:
        model(noise(9, 3, 2))[0].square().sum().backward()
    (record,) = flow.values()
    assert record.residual < 1e-9
    z = (model[0].layers[0].bias_ih_l0 + model[0].layers[0].bias_hh_l0)[3:6].sigmoid()
    assert bool((1 / (1 - z) <= 50 + 1e-6).all())


def test_zoneout_of_a_single_cell():
    torch.manual_seed(0)
    cell, x = nn.LSTMCell(2, 3).double(), noise(6, 4, 2)
    plain = copy.deepcopy(cell)
    assert cures.zoneout_(cell, {"c": 0.5}) is cell
    torch.manual_seed(5)
    masks = [(torch.rand(4, 3) >= 0.5).double() for _ in x]
    torch.manual_seed(5)
    a = b = (torch.zeros(4, 3, dtype=DOUBLE),) * 2
    for step, m in zip(x, masks, strict=True):
        a, (h, c) = cell(step, a), plain(step, b)
        b = (h, torch.where(m > 0, c, b[1]))
    torch.testing.assert_close(a, b)
    cures.zoneout_(cell, 0.0)
    torch.testing.assert_close(cell(x[0]), plain(x[0]))


def test_noise_errors():
    with pytest.raises(ValueError, match="from 0 to below 1"):
        cures.zoneout_(nn.LSTM(2, 3), 1.0)
    with pytest.raises(ValueError, match="states h, c, got z"):
        cures.zoneout_(nn.LSTM(2, 3), {"z": 0.1})
    with pytest.raises(TypeError, match="no recurrent matrix"):
        cures.recurrent_dropout_(layer("mingru"), 0.1)
    with pytest.raises(TypeError, match="where a sequence begins"):
        cures.recurrent_dropout_(nn.LSTMCell(2, 3), 0.1)
    with pytest.raises(ValueError, match="projection"):
        cures.zoneout_(nn.LSTM(2, 3, proj_size=2), 0.1)
    with pytest.raises(ValueError, match="parametrization"):
        cures.zoneout_(cures.constrain_(nn.LSTM(2, 3)), 0.1)
    noisy = cures.zoneout_(nn.LSTM(2, 3), 0.1)
    with pytest.raises(ValueError, match=r"^masks: expected"):
        noisy(torch.zeros(4, 1, 2), masks=[])
    with pytest.raises(ValueError, match="num_layers"):
        uv.nn.Recurrent(uv.cells.noisy.Noisy(uv.cells.GRU(), ("h",)), 2, 3, num_layers=2)
