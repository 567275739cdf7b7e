"""Local stability: before training, weights for which one step, in time or in depth, keeps a gradient's size."""

from typing import Any

import torch
from torch import Tensor, nn

from unvanish.cures.layer_weights import finite
from unvanish.cures.mean_square import input_gain, mean_square_gain
from unvanish.cures.traced import TracedModel
from unvanish.engine.precision import full_precision


class LocalStability:
    """L = mean over layers of (r_time − ρ)² + (r_depth − ρ)²: a loss to pre-train with, on inputs alone.

        r_time² = χ, the factor by which a step changes a gradient's mean square (for one state: ‖∂h_t/∂h_{t-1}‖_F²/H)
        r_depth² = ‖∂h_t/∂x_t‖_F²/H, of every layer that reads another

    ρ is 1 for a single layer. In a stack the number of paths through the grid of time and depth grows, and ρ = ½ for
    both radii keeps their sum bounded.

        stability = LocalStability(model)
        for _ in range(300):
            optimizer.zero_grad()
            stability(x).backward()
            optimizer.step()

    `stability(*inputs)` runs model(*inputs) and takes every recurrent call in it; gradients flow to all weights that
    shape the trajectory. Targets are not needed; random inputs of the data's size serve too.

    Args:
        model: nn.RNN, nn.LSTM, nn.GRU, `unvanish.nn.Recurrent` or a module that contains some.
        target: ρ; None: 1 for a single layer, ½ where any layer reads another.
        steps: how many steps of the second half of each call are measured.
        samples: how many samples of the batch are.

    Raises:
        TypeError: model is not a module, or holds cells, which have no sequence of their own; target is not a number.
        ValueError: there is no recurrent layer, or a number does not fit.

    Source: Herranz-Celotti & Rouat 2023, "Stabilizing RNN gradients through pre-training" (local stability condition).

    Limits: the mean square of one step, not the growth over many: slow gates go on in one direction for many steps (see
    `GradientFlossing` for the exponents). The radius here is the root mean square singular value; the paper's condition
    leaves the choice open. The graph keeps `steps` matrices `[B, S, S]` for S states.

    >>> rnn, x = nn.RNN(2, 8), torch.randn(20, 4, 2)
    >>> stability = LocalStability(rnn)
    >>> stability(x).backward()
    >>> list(stability.radii(x))
    ['l0']
    """

    def __init__(self, model: nn.Module, target: float | None = None, steps: int = 8, samples: int = 8) -> None:
        self._traced = TracedModel(model, "LocalStability")
        self.target = None if target is None else finite("target", target, above=0.0)
        if steps < 1 or samples < 1:
            raise ValueError(f"steps, samples: expected at least 1 of each, got {steps}, {samples}")
        self.steps, self.samples = steps, samples

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """L for model(*args, **kwargs), a differentiable scalar.

        Raises:
            ValueError: no recurrent layer ran, or a call has no steps to be measured.
        """
        found = self.radii(*args, **kwargs)
        stacked = any(depth is not None for _, depth in found.values())
        rho = self.target if self.target is not None else 0.5 if stacked else 1.0
        terms = [(r - rho).square() for pair in found.values() for r in pair if r is not None]
        return torch.stack(terms).sum() / len(found)

    def radii(self, *args: Any, **kwargs: Any) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Layer name → (r_time, r_depth), the mean over its calls; r_depth is None for a layer that reads no other.

        Raises:
            ValueError: as `stability(…)`.
        """
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        traced = self._traced(*args, **kwargs)
        with full_precision():
            for name, passes in traced.items():
                time = torch.stack([mean_square_gain(tr, self.steps, self.samples).sqrt() for _, tr in passes]).mean()
                depth = None
                if not name.removesuffix(".reverse").endswith("l0"):
                    gains = [input_gain(tr, self.steps, self.samples).sqrt() for _, tr in passes]
                    depth = torch.stack(gains).mean()
                found[name] = time, depth
        return found
