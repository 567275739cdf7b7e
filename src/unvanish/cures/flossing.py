"""Gradient flossing: push Lyapunov exponents to zero, where gradients neither vanish nor explode."""

from typing import Any

import torch
from torch import Tensor, nn

from unvanish import engine
from unvanish.cures.traced import TracedModel
from unvanish.engine.precision import full_precision
from unvanish.flow.singular import orthonormal, orthonormalised
from unvanish.flow.stack import full_jacobians, reading_order


class GradientFlossing:
    """L = mean_i λ_i²,  λ_i = 1/T Σ_t ln|R_ii(t)|,  J_t Q_{t-1} = Q_t R(t): the first n exponents, squared.

    J_t is the Jacobian of the full state (s = h, or (h, c) for the LSTM) along the trajectory that the input drives;
    derivatives go through Q, R, J and the states, by autograd. Used before training, or every few epochs:

        floss = GradientFlossing(model, n=8)
        for _ in range(300):
            optimizer.zero_grad()
            floss(x).backward()
            optimizer.step()

    `floss(*inputs)` runs model(*inputs) and takes, of every nn.RNN, nn.LSTM and nn.GRU call in it, each layer's and
    direction's own spectrum; squares are averaged over exponents, samples, layers. Gradients flow to all weights that
    shape the trajectory, an embedding before the layer among them. Dropout between layers is off, as for the exponents
    in `uv.flow`.

    Args:
        model: nn.RNN, nn.LSTM, nn.GRU or a module that contains some.
        n: how many exponents, from the largest; at most the size of the state. An LSTM's H smallest exponents are
            often −∞ or nearly so (h has no memory of its own): keep n ≤ H.
        every: steps between two QR decompositions; more is cheaper, until the columns of the product grow parallel.
        warmup: steps of each sample read before averaging begins, in which Q turns towards the leading directions.
        seed: of the first Q.

    Raises:
        TypeError: model is not a module, or holds cells, which have no sequence of their own.
        ValueError: there is no recurrent layer, or a number does not fit.

    Source: Engelken 2023, "Gradient flossing: improving gradient descent through dynamic control of Jacobians",
    equations 4 to 6; QR on products of Jacobians from Benettin et al. 1980.

    Limits: T matrices `[B, S, S]` and their QR stay in the graph, so that cost is T·B·S²·(S + n) and memory T·B·S²:
    floss on few samples and a few hundred steps. Exponents are averages over time; they don't show what happens at
    single steps.

    >>> rnn, x = nn.RNN(2, 8), torch.randn(30, 4, 2)
    >>> floss = GradientFlossing(rnn, n=2)
    >>> floss(x).backward()
    >>> floss.exponents(x)["l0"].shape
    torch.Size([4, 2])
    """

    def __init__(self, model: nn.Module, n: int = 1, every: int = 1, warmup: int = 0, seed: int = 0) -> None:
        self._traced = TracedModel(model, "GradientFlossing")
        if n < 1 or every < 1 or warmup < 0:
            raise ValueError(f"n, every, warmup: expected n ≥ 1, every ≥ 1, warmup ≥ 0, got {n}, {every}, {warmup}")
        self.n, self.every, self.warmup, self.seed = n, every, warmup, seed

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """L for model(*args, **kwargs), a differentiable scalar.

        Raises:
            ValueError: no recurrent layer ran, n exceeds its state, or a sample has no more than `warmup` steps.
            ArithmeticError: an exponent is −∞ or NaN: the Jacobians' product has no n directions left.
        """
        found = self.exponents(*args, **kwargs)
        for name, value in found.items():
            if bool(value.isnan().any()):
                raise ArithmeticError(
                    f"{name}: an exponent is NaN, since input, weights or states are not finite; find where that "
                    "first appears with uv.watch"
                )
            if not bool(value.isfinite().all()):
                i = int((~value.isfinite()).any(0).nonzero()[0])
                raise ArithmeticError(
                    f"{name}: exponent {i + 1} of {self.n} is not finite: the product of Jacobians has rank {i} or "
                    "less, as with dead or saturated units; lower n"
                )
        return torch.stack([value.square().mean() for value in found.values()]).mean()

    def exponents(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """λ `[B, n]` in nats per step, by layer name ("encoder.lstm.l0"), differentiable; samples in the user's order.

        Raises:
            ValueError: no recurrent layer ran, n exceeds its state, or a sample has no more than `warmup` steps.
        """
        traced = self._traced(*args, **kwargs)
        with full_precision():
            found = {
                name: torch.stack([inputs.in_user_order(self._spectrum(tr), 0) for inputs, tr in passes])
                for name, passes in traced.items()
            }
        return {name: values.mean(0) if len(values) > 1 else values[0] for name, values in found.items()}

    def _spectrum(self, tr: engine.Trace) -> Tensor:
        T, B = tr.x.shape[:2]
        S = sum(s.shape[-1] for s in tr.final)
        if self.n > S:
            raise ValueError(f"n: expected at most {S}, the size of the state of this layer, got {self.n}")
        lengths = [T] if tr.active is None else tr.active.sum(0).flatten().tolist()
        if self.warmup >= min(lengths):
            raise ValueError(
                f"warmup: expected fewer than the {min(lengths)} steps of the shortest sample, got {self.warmup}"
            )
        # Averaging starts with a freshly orthonormal Q, so the step before it is one of the decompositions.
        decomposed = {T, *(self.warmup + (T - length if tr.reverse else 0) for length in lengths)}
        q = orthonormal(B, S, self.n, self.seed, tr.x)
        total, counted = q.new_zeros(B, self.n), q.new_zeros(B, 1)
        read, pending = torch.zeros_like(counted), torch.zeros_like(counted)
        for number, t in enumerate(reading_order(tr), start=1):
            q = full_jacobians(tr, t) @ q
            pending = pending + (1.0 if tr.active is None else tr.active[t].to(q))
            if number % self.every and number not in decomposed:
                continue
            q, r = orthonormalised(q)
            warm = read >= self.warmup
            total = total + torch.where(warm, r.diagonal(dim1=-2, dim2=-1).abs(), 1.0).log()
            counted = counted + torch.where(warm, pending, 0.0)
            read, pending = read + pending, torch.zeros_like(pending)
        return total / counted
