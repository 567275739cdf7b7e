"""The operators' multiplications and additions, for torch's FlopCounterMode: those that torch's own layers make."""

from typing import Any

Shape = tuple[int, ...]


def forward(
    x: Shape, h0: Shape, c0: Any, w_ih: Shape, w_hh: Shape, b_ih: Any, b_hh: Any, w_hr: Shape | None, *_: Any, **__: Any
) -> int:
    """W_ih x_t, W_hh h_{t-1} and W_hr m_t at every step of every sample."""
    T, B = x[:2]
    return 2 * T * B * (_size(w_ih) + _size(w_hh) + _size(w_hr))


def backward(dy: Any, dh: Any, dc: Any, x: Shape, h0: Shape, c0: Any, *given: Any, **_: Any) -> int:
    """The gradients of the weights, as many products as forward; the gradient's products with W_hh between steps, with
    W_hr at every step, and with W_ih where x requires its gradient."""
    w_ih, w_hh, w_hr = given[0], given[1], given[4]
    T, B = x[:2]
    want_dx = given[-1]
    between = (T - 1) * _size(w_hh) + T * _size(w_hr) + (T * _size(w_ih) if want_dx else 0)
    return forward(x, h0, c0, *given[:5]) + 2 * B * between


def _size(shape: Shape | None) -> int:
    return 0 if shape is None else shape[0] * shape[1]
