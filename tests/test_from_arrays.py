"""`uv.flow.from_arrays`: the record of a layer that another framework ran."""

import os
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import unvanish as uv
from unvanish.flow import LayerFlow, from_arrays

KEYS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def array(v: Tensor) -> np.ndarray[Any, Any]:
    return v.detach().numpy().copy()


def torch_layout(layer: nn.RNNBase, end: str) -> Any:
    return {f"{k}_l0{end}": array(getattr(layer, f"{k}_l0{end}")) for k in KEYS if hasattr(layer, f"{k}_l0{end}")}


def as_sequence(layer: nn.RNNBase, end: str) -> Any:
    return list(torch_layout(layer, end).values())


def keras_layout(layer: nn.RNNBase, end: str) -> Any:
    """kernel, recurrent_kernel, bias; written out gate by gate."""
    order = {"LSTM": [0, 1, 2, 3], "GRU": [1, 0, 2]}.get(layer.mode, [0])
    parts = {k: np.split(v, len(order)) for k, v in torch_layout(layer, end).items()}
    named = {k.partition("_l0")[0]: np.concatenate([v[i] for i in order]) for k, v in parts.items()}
    found = [named["weight_ih"].T, named["weight_hh"].T]
    if layer.mode == "GRU":
        found.append(np.stack([named.get("bias_ih", 0 * found[0][0]), named.get("bias_hh", 0 * found[0][0])]))
    elif layer.bias:
        found.append(named["bias_ih"] + named["bias_hh"])
    return found


def keras_names(layer: nn.RNNBase, end: str) -> Any:
    names = ("lstm/lstm_cell/kernel", "lstm/lstm_cell/recurrent_kernel", "lstm/lstm_cell/bias")
    return dict(zip(names, keras_layout(layer, end), strict=False))


def flax_layout(layer: nn.RNNBase, end: str) -> Any:
    gates = {"LSTM": "ifgo", "GRU": "rzn"}.get(layer.mode, " ")
    given = {k.partition("_l0")[0]: np.split(v, len(gates)) for k, v in torch_layout(layer, end).items()}
    params: dict[str, dict[str, Any]] = {}
    for i, gate in enumerate(gates):
        for side, stem in (("i", "ih"), ("h", "hh")):
            params[(side + gate).strip()] = {"kernel": given[f"weight_{stem}"][i].T}
        if layer.bias:
            # flax has one bias per gate, but for the GRU's candidate, which has two.
            both = given["bias_ih"][i], given["bias_hh"][i]
            if gate == "n":
                params["in"]["bias"], params["hn"]["bias"] = both
            else:
                params[(("h" if layer.mode == "LSTM" else "i") + gate).strip()]["bias"] = both[0] + both[1]
    return {"params": {"cell": params}}


LAYOUTS: dict[str, tuple[str, Callable[[nn.RNNBase, str], Any]]] = {
    "torch": ("torch", torch_layout),
    "sequence": ("torch", as_sequence),
    "keras": ("keras", keras_layout),
    "keras names": ("keras", keras_names),
    "flax": ("flax", flax_layout),
}


def close(ours: LayerFlow, theirs: LayerFlow) -> None:
    assert ours.cell == theirs.cell
    assert ours.gate_names == theirs.gate_names
    names = ("lengths", "dh", "dc", "dgates", "dweight", "gates", "saturation", "log_carry")
    for name in names:
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert (found is None) == (expected is None), name
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14, equal_nan=True, msg=name)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "mode": draw(st.sampled_from(["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])),
        "bias": draw(st.booleans()),
        "reverse": draw(st.booleans()),
        "initial": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "sizes": [draw(st.integers(1, most)) for most in (6, 4, 3, 5)],
        "proj": draw(st.integers(0, 3)),
        "ragged": draw(st.booleans()),
        "layout": draw(st.sampled_from(list(LAYOUTS))),
        "seed": draw(st.integers(0, 2**31)),
    }


@given(cases())
@settings(deadline=None, max_examples=150)
def test_the_record_is_the_one_that_a_watch_makes(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    (T, B, I, H), mode, reverse = case["sizes"], case["mode"], case["reverse"]
    layout, convert = LAYOUTS[case["layout"]]
    proj = min(case["proj"], H - 1) if mode == "LSTM" and layout == "torch" else 0
    options = {"bias": case["bias"], "bidirectional": reverse, "dtype": torch.float64}
    if mode == "LSTM":
        layer: nn.RNNBase = nn.LSTM(I, H, proj_size=proj, **options)
    elif mode == "GRU":
        layer = nn.GRU(I, H, **options)
    else:
        layer = nn.RNN(I, H, nonlinearity=mode.removeprefix("RNN_").lower(), **options)
    lengths = torch.randint(1, T + 1, (B,)) if case["ragged"] else None
    x, R, D = torch.randn(T, B, I, dtype=torch.float64), proj or H, 1 + reverse
    states = [torch.randn(D, B, n, dtype=torch.float64) for n in (R, H)][: 1 + (mode == "LSTM")]
    hx: Any = None if not case["initial"] else tuple(states) if mode == "LSTM" else states[0]
    given_x: Any = x
    if lengths is not None:
        given_x = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    dy = torch.randn(T, B, D * R, dtype=torch.float64)
    if lengths is not None:
        dy[torch.arange(T)[:, None] >= lengths] = 0
    with uv.watch(layer) as flow:
        y = layer(given_x, hx)[0]
        if lengths is not None:
            y = nn.utils.rnn.pad_packed_sequence(y, total_length=T)[0]
        y.backward(dy)
    initial = [array(s[D - 1]) for s in states] if case["initial"] else []
    turn = (lambda v: v.transpose(0, 1)) if case["batch_first"] else (lambda v: v)
    ours = from_arrays(
        mode.lower(),
        convert(layer, "_reverse" * reverse),
        array(turn(x)),
        array(turn(dy[..., R * (D - 1) :])),
        *initial,
        layout=layout,
        reverse=reverse,
        lengths=lengths,
        batch_first=case["batch_first"],
    )
    theirs = flow["l0.reverse" if reverse else "l0"]
    assert ours.dh.shape[0] == T
    # A packed batch ends at its longest sample.
    close(_until(ours, theirs.dh.shape[0]), theirs)


def _until(record: LayerFlow, T: int) -> LayerFlow:
    from dataclasses import replace

    timed = ("dh", "dc", "dgates", "dweight", "gates", "saturation")
    return replace(record, **{k: getattr(record, k)[:T] for k in timed if getattr(record, k) is not None})


def test_a_sigmoid_rnn_and_other_kinds_of_array() -> None:
    torch.manual_seed(0)
    layer, x = uv.nn.RNN(3, 4, nonlinearity="sigmoid"), torch.randn(5, 2, 3)
    dy = torch.ones(5, 2, 4)

    class Foreign:
        """An array of a framework that NumPy can read."""

        def __init__(self, v: Tensor) -> None:
            self.v = v

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return self.v.detach().numpy()

    weights = {k: Foreign(v) for k, v in layer.state_dict().items()}
    one = from_arrays("rnn_sigmoid", weights, x.requires_grad_(), Foreign(dy).v.tolist())
    two = from_arrays("rnn_sigmoid", layer.state_dict(), x.detach().half().float(), dy.numpy().astype("float32"))
    torch.testing.assert_close(one.dh, two.dh, rtol=1e-2, atol=1e-3)
    assert np.isnan(one.residual)


LSTM: dict[str, Any] = {k: array(v) for k, v in nn.LSTM(3, 4).state_dict().items()}
X, DY = np.ones((5, 2, 3)), np.ones((5, 2, 4))
GRU_KERNELS = [np.ones((3, 12)), np.ones((4, 12))]


@pytest.mark.parametrize(
    ("error", "says", "arguments"),
    [
        (ValueError, r"cell: expected one of .*lstm, gru, got 'mgu'", ("mgu", LSTM, X, DY)),
        (ValueError, r"x: expected \[T, B, ...\] with at least one step .* got \(5, 3\)", ("lstm", LSTM, X[:, 0], DY)),
        (ValueError, r"dy: expected the steps and samples of x, .*\(5, 2\), got \(4, 2\)", ("lstm", LSTM, X, DY[:4])),
        (ValueError, r"dy: .*see batch_first=True", ("lstm", LSTM, X, DY.transpose(1, 0, 2))),
        (ValueError, r"weight_ih_l0: expected|weight_ih: expected \(12, 3\)", ("lstm", LSTM, X, DY[..., :3])),
        (ValueError, r"weights: expected weight_ih, .* got no weight_hh", ("lstm", {"weight_ih": 1}, X, DY)),
        (ValueError, r"expected 2 to 5 arrays for layout 'torch'.*got 8", ("lstm", [1] * 8, X, DY)),
        (
            ValueError,
            r"expected one layer and direction, got weight_ih_l0.*_l1",
            ("lstm", nn.LSTM(3, 4, 2).state_dict(), X, DY),
        ),
        (ValueError, r"h0: expected \(2, 4\), got \(1, 2, 4\)", ("lstm", LSTM, X, DY, np.ones((1, 2, 4)))),
        (ValueError, r"c0: expected None, a gru has no cell", ("gru", LSTM, X, DY, None, np.ones((2, 4)), "torch")),
        (
            ValueError,
            r"layout: expected one of 'torch', 'keras', 'flax', got 'jax'",
            ("lstm", LSTM, X, DY, None, None, "jax"),
        ),
        (TypeError, r"x: expected an array of real numbers, got a ndarray of complex128", ("lstm", LSTM, X * 1j, DY)),
        (TypeError, r"dy: expected an array of real numbers, got a list of <U1", ("lstm", LSTM, X, ["a"])),
        (
            ValueError,
            r"reset_after=True.*got a bias \(12,\)",
            ("gru", [*GRU_KERNELS, np.ones(12)], X, DY, None, None, "keras"),
        ),
        (ValueError, r"reset_after=True.*got no bias.*pass zeros", ("gru", GRU_KERNELS, X, DY, None, None, "keras")),
        (
            ValueError,
            r"bias: expected \(16,\)",
            ("lstm", [np.ones((3, 16)), np.ones((4, 16)), np.ones(12)], X, DY, None, None, "keras"),
        ),
        (
            ValueError,
            r"got no if, ig, io, hi, hf, hg, ho",
            ("lstm", {"ii": {}, "y": {}}, X, DY, None, None, "flax"),
        ),
    ],
)
def test_errors_name_the_argument(error: type[Exception], says: str, arguments: Any) -> None:
    with pytest.raises(error, match=says):
        from_arrays(*arguments)


def test_a_gradient_where_there_is_no_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dy: expected 0 where .* got 1 at step 3 of sample 1, whose length is 3"):
        from_arrays("lstm", LSTM, X, DY, lengths=[5, 3])


def test_a_nan_is_located() -> None:
    x = X.copy()
    x[2, 1, 0] = np.nan
    with pytest.raises(
        uv.flow.NonFiniteError, match="lstm: NaN first appears in the forward pass at step 2, sample 1, in the input x"
    ):
        from_arrays("lstm", LSTM, x, DY)


class TestKeras:
    """Against Keras' own layers, stepped by hand, on its torch backend."""

    BUILD: ClassVar[dict[str, tuple[str, dict[str, Any]]]] = {
        "lstm": ("LSTM", {}),
        "lstm without bias": ("LSTM", {"use_bias": False}),
        "gru": ("GRU", {"reset_after": True}),
        "rnn_tanh": ("SimpleRNN", {}),
        "rnn_relu": ("SimpleRNN", {"activation": "relu"}),
    }

    @pytest.mark.parametrize("name", BUILD)
    def test_states(self, name: str) -> None:
        if "KERAS_BACKEND" not in os.environ:
            os.environ["KERAS_BACKEND"] = "torch"
        keras = pytest.importorskip("keras")
        if keras.backend.backend() != "torch":
            pytest.skip("Keras runs on another backend than torch")
        torch.manual_seed(0)
        kind, options = self.BUILD[name]
        layer = getattr(keras.layers, kind)(6, return_sequences=True, dtype="float64", **options)
        x = torch.randn(3, 7, 4, dtype=torch.float64)
        layer.build(x.shape)
        layer.set_weights([np.random.default_rng(0).normal(size=w.shape) * 0.5 for w in layer.get_weights()])
        states = [torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(1 + (kind == "LSTM"))]
        initial, hs, cs = [array(s) for s in states], [], []
        for t in range(7):
            _, states = layer.cell(x[:, t], states)
            for kept, state in zip((hs, cs), states, strict=False):
                state.retain_grad()
                kept.append(state)
        y = torch.stack(hs, 1)
        torch.testing.assert_close(layer(x, initial_state=[torch.from_numpy(s) for s in initial]), y)
        dy = torch.randn_like(y)
        y.backward(dy)
        ours = from_arrays(
            name.partition(" ")[0], layer.get_weights(), x, dy, *initial, layout="keras", batch_first=True
        )
        for found, kept in ((ours.dh, hs), (ours.dc, cs)):
            if kept:
                expected = torch.stack([s.grad.norm(dim=1) for s in kept])
                # Keras multiplies matrices in float32, whatever the layer's dtype.
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
