"""What torch's own kernel for whole sequences of a cell leaves to be computed.

Such a kernel (cuDNN's on a GPU) returns the outputs h_t of all steps and the final states, and on the way back δp_t,
the error at the input's share of every step. All else follows from these without another pass over the steps: the
gates from h, the other states from the gates, the errors at the states from δp.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from unvanish.cells.calculus import Diagonals

Shares = Callable[[], tuple[Tensor, Tensor]]
"""→ the input's and the recurrent share (p, q) of the steps at hand, `[..., G·H]` each"""


class TorchKernel(ABC):
    """torch's kernel of one cell, and the equations of what it does not return. It is pure: all steps at once."""

    name: str
    """the function: torch.<name>"""

    @abstractmethod
    def kept(self, shares: Shares, y: Tensor) -> Tensor:
        """`[..., ≥ G, H]` the gates' values and after them what else the cell's `partials` reads (`Point.kept`), from
        the shares, or from the outputs y `[..., R]`."""

    def others(self, kept: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(keep, add) `[..., H]` of each state but the first: s_t = keep_t ⊙ s_{t-1} + add_t."""
        return []

    def recurrent(self, dp: Tensor, kept: Tensor) -> Tensor:
        """δq `[..., G·H]` from δp; the same tensor where the two shares enter as a sum."""
        return dp

    def between(self, kept: Tensor, after: tuple[Tensor, ...]) -> tuple[Diagonals, Diagonals]:
        """(U, C) of `unvanish.cells.calculus`: ∂s^a_t/∂s^b_t where a is made from b in the same step, and
        ∂s^b_t/∂s^b_{t-1} at fixed shares; no pair of different states is in C."""
        return {}, {}
