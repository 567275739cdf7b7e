"""Truncated backpropagation through time, and what it cuts."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from unvanish.cures.hidden_state import HiddenState, joined


@dataclass(frozen=True)
class Piece:
    """Steps [start, end) of a long sequence, and the state at which they begin."""

    x: Tensor
    """this part of the input, in its own layout"""
    state: Any
    """the layer's hx; None: its initial state"""
    start: int
    end: int
    _axis: int = field(repr=False)

    def of(self, v: Tensor) -> Tensor:
        """This part of anything with the input's time axis: targets, masks."""
        return v.narrow(self._axis, self.start, self.end - self.start)


class TruncatedBPTT:
    """Process a long sequence in pieces of `steps`, with a backward pass for each, and pass on the state without graph:

        ∂E_t/∂s_k is kept for k in the piece of t and is 0 for every earlier k

        walk = TruncatedBPTT(x, steps=100)
        for piece in walk:
            y, state = rnn(piece.x, piece.state)
            loss = criterion(head(y), piece.of(target))
            loss.backward()
            optimizer.step(); optimizer.zero_grad()
            walk.hand_on(state)

    `kept(lag)` returns the share of all pairs of steps at a lag that are within one piece; after the loop, `discarded`
    has the gradient that arrived at each cut and was dropped.

    Args:
        x: `[T, B, I]`, or `[B, T, I]` with batch_first, or `[T, I]`.
        steps: the length of a piece; the last may be shorter.
        policy: "detach" passes on the value of the state; "reset" starts every piece from the layer's initial state, as
            if the pieces were separate sequences.
        batch_first: whether time is the second axis of x.

    Raises:
        TypeError: x is not a tensor.
        ValueError: x has no steps or too few axes, `steps` is below 1, or the policy is unknown.
        RuntimeError: in the loop, if `hand_on` was not called for the piece before.

    Works with any layer whose state is a tensor, a tuple of tensors, or what `replace_` returns.

    Source: Williams & Peng 1990; Tallec & Ollivier 2017 for its bias.

    Limits: a dependency longer than a piece is learnt only if the state happens to keep the information. Steps near the
    start of a piece have few earlier steps in it: of all pairs at lag ℓ about 1 − ℓ/steps are kept.

    >>> import torch
    >>> walk = TruncatedBPTT(torch.zeros(10, 1, 2), steps=4)
    >>> [walk.kept(lag) for lag in (0, 2, 4)], walk.mean_steps
    ([1.0, 0.5, 0.0], 1.3)
    """

    def __init__(
        self, x: Tensor, steps: int, *, policy: Literal["detach", "reset"] = "detach", batch_first: bool = False
    ) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}; pad a packed sequence first")
        self._axis = 1 if batch_first and x.dim() == 3 else 0
        if x.dim() not in (2, 3) or x.shape[self._axis] == 0:
            raise ValueError(f"x: expected [T, B, I], [B, T, I] or [T, I] with at least one step, got {tuple(x.shape)}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps: expected a whole number of steps, at least 1, got {steps!r}")
        if policy not in ("detach", "reset"):
            raise ValueError(f"policy: expected 'detach' or 'reset', got {policy!r}")
        self.x, self.steps, self.policy = x, steps, policy
        T = x.shape[self._axis]
        self._spans = [(start, min(start + steps, T)) for start in range(0, T, steps)]
        self._handed: list[tuple[Any, list[Tensor]]] = []

    def __len__(self) -> int:
        return len(self._spans)

    def __iter__(self) -> Iterator[Piece]:
        self._handed = []
        for number, (start, end) in enumerate(self._spans):
            if len(self._handed) < number:
                raise RuntimeError("TruncatedBPTT: call walk.hand_on(state) at the end of each turn of the loop")
            state = self._handed[-1][0] if number and self.policy == "detach" else None
            yield Piece(self.x.narrow(self._axis, start, end - start), state, start, end, self._axis)

    def hand_on(self, state: Any) -> None:
        """Cut the state's graph here; its value begins the next piece.

        Raises:
            TypeError: it is neither a tensor nor a tuple of tensors.
        """
        leaves: list[Tensor] = []
        self._handed.append((_cut(state, leaves), leaves))

    @property
    def cuts(self) -> list[int]:
        """The steps at which a piece begins: no gradient passes from them to the step before."""
        return [start for start, _ in self._spans[1:]]

    def kept(self, lag: int) -> float:
        """The share of the pairs (t, t − lag) of the sequence that lie within one piece: 1 at lag 0.

        Raises:
            ValueError: there is no such pair.
        """
        T = self._spans[-1][1]
        if not 0 <= lag < T:
            raise ValueError(f"lag: expected 0 to {T - 1}, within the sequence, got {lag}")
        return sum(max(0, end - start - lag) for start, end in self._spans) / (T - lag)

    @property
    def mean_steps(self) -> float:
        """How many steps back the gradient of a step reaches, averaged over the steps."""
        lengths = [end - start for start, end in self._spans]
        return sum(n * (n - 1) / 2 for n in lengths) / sum(lengths)

    @property
    def discarded(self) -> list[list[Tensor]]:
        """For each cut that a backward pass has reached, in order: ∂E/∂s of each tensor of the state passed across it,
        E the loss of the piece after it. Passing these back would give the first order of what truncation leaves out.

        Raises:
            RuntimeError: policy is "reset", which passes no state on.
        """
        if self.policy == "reset":
            raise RuntimeError("discarded: policy='reset' hands no state over, so no gradient arrives at a cut")
        at_cuts = [leaves for _, leaves in self._handed[: len(self._spans) - 1]]
        return [[s.grad for s in leaves if s.grad is not None] for leaves in at_cuts]


def _cut(state: Any, leaves: list[Tensor]) -> Any:
    """The same state as leaf tensors, which keep the gradients that arrive."""
    if isinstance(state, tuple | list):
        return tuple(_cut(s, leaves) for s in state)
    if isinstance(state, HiddenState):
        return joined(*(_cut(s, leaves) for s in (state.as_subclass(Tensor), *state.others)))
    if not isinstance(state, Tensor):
        raise TypeError(f"state: expected a tensor or a tuple of tensors, got {type(state).__name__}")
    leaves.append(state.detach().requires_grad_(state.is_floating_point()))
    return leaves[-1]
