"""What the tests of test_capture*.py share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

X = torch.randn(9, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
F = X.float()


class Packs(nn.LSTM):
    """Packs its input itself; a sample without steps gets a zero state."""

    def forward(self, x: Tensor, hx: Any = None, lengths: Tensor | None = None) -> Any:  # type: ignore[override]
        assert lengths is not None
        y, state = super().forward(pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=False), hx)
        state = tuple(torch.where((lengths == 0)[None, :, None], 0.0, s) for s in state)
        return pad_packed_sequence(y)[0], state


class Normed(nn.GRU):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = nn.LayerNorm(self.input_size)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(3 * self.norm(x))[0]


class Masked(nn.RNN):
    """Step by step, where a mask is off the state is set to zero."""

    def forward(self, *, batch: dict[str, Tensor]) -> dict[str, Any]:  # type: ignore[override]
        h, out = None, []
        for x, keep in zip(batch["x"], batch["mask"], strict=True):
            y, h = super().forward(x[None], h)
            h = h * keep[:, None]
            out.append(y)
        return {"y": torch.cat(out), "more": (h, 3)}


class Directly(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.forward(x)[0]


MASK = torch.ones(9, 4, dtype=torch.float64)
MASK[3, 1] = MASK[6, 2] = 0
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], str]] = {
    "packs": (lambda: Packs(5, 6), lambda m: m(X, lengths=torch.tensor([9, 4, 1, 6]))[0], "l0"),
    "packs, all shorter": (lambda: Packs(5, 6), lambda m: m(X, lengths=torch.tensor([8, 4, 1, 0]))[0], "l0"),
    "normed": (lambda: Normed(5, 6), lambda m: m(X), "l0"),
    "masked": (lambda: Masked(5, 6), lambda m: m(batch={"x": X, "mask": MASK})["y"], "l0"),
    "forward called": (lambda: Directly(nn.LSTM(5, 6)), lambda m: m(X), "inner.l0"),
    "a cell's forward called": (lambda: Directly(Stepped()), lambda m: m(X), "inner.cell"),
}


class Stepped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(5, 6)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        h = x.new_zeros(x.shape[1], 6)
        out = []
        for row in x:
            h = self.cell.forward(row, h)
            out.append(h)
        return (torch.stack(out),)
