"""An auxiliary loss with short paths: at random steps the most recent input is reconstructed from the state."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot


class Reconstruction(nn.Module):
    """L_aux: from the state at a random anchor a, a decoder reconstructs the `length` steps that were read last:

        x̂_{a-ℓ+1}, …, x̂_a = decoder(h_a),   L_aux = mean |x̂ − x|²,  or the cross-entropy of tokens

    The decoder is a GRU that starts from W h_a + b and reads, at each step, the true one before. To reconstruct, the
    recurrence has to carry its inputs over at least ℓ steps. This gradient does not travel the long way from the task's
    loss, and it fills the state with information that the task's loss can use.

        aux = Reconstruction(state_size=128, input_size=8, length=50)
        optimizer = torch.optim.Adam([*model.parameters(), *aux.parameters()])
        y, _ = rnn(x)
        loss = task_loss(head(y[-1]), target) + 0.5 * aux(y, x)

    Args:
        state_size: of the states; H, or D·H of a bidirectional layer's output.
        input_size: features of x; for tokens their number of kinds.
        length: ℓ, how many steps are reconstructed.
        anchors: how many per sample and call; each sample has its own.
        tokens: whether x holds whole numbers `[T, B]` below `input_size`.
        hidden_size: of the decoder; None: state_size.
        batch_first: whether states and x are `[B, T, ·]`.

    Raises:
        ValueError: a number is below 1.

    Source: Trinh, Dai, Luong & Le 2018, "Learning longer-term dependencies in RNNs with auxiliary losses" (r-LSTM).

    Limits: it rewards keeping all of the input, even what the task does not need, and costs a decoder of ℓ steps per
    anchor. It helps with dependencies far beyond ℓ only as far as the task's own gradient uses the shaped states.
    The paper truncates both gradients; combine with `TruncatedBPTT` for that.

    >>> aux = Reconstruction(state_size=4, input_size=2, length=3)
    >>> aux(torch.zeros(10, 5, 4), torch.zeros(10, 5, 2)).shape
    torch.Size([])
    """

    def __init__(
        self,
        state_size: int,
        input_size: int,
        length: int,
        *,
        anchors: int = 1,
        tokens: bool = False,
        hidden_size: int | None = None,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        hidden_size = state_size if hidden_size is None else hidden_size
        sizes = {"state_size": state_size, "input_size": input_size, "length": length, "anchors": anchors}
        for name, value in (sizes | {"hidden_size": hidden_size}).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number, at least 1, got {value!r}")
        self.input_size, self.length, self.anchors = input_size, length, anchors
        self.tokens, self.batch_first = tokens, batch_first
        self.start = nn.Linear(state_size, hidden_size)
        self.decoder = nn.GRU(input_size, hidden_size)
        self.out = nn.Linear(hidden_size, input_size)

    def forward(
        self,
        states: Tensor,
        x: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """L_aux, a scalar.

        Args:
            states: `[T, B, H]` h after each step.
            x: `[T, B, I]` what was read, or tokens `[T, B]`.
            lengths: `[B]` steps of each sample; None: T. Samples shorter than `length` are left out.
            generator: of the anchors, on the CPU; None: torch's default.

        Raises:
            ValueError: states and x do not fit each other or the sizes, or every sample is too short.
        """
        if self.batch_first:
            states, x = states.transpose(0, 1), x.transpose(0, 1)
        axes = 2 if self.tokens else 3
        if (states.dim(), x.dim()) != (3, axes) or states.shape[:2] != x.shape[:2]:
            given = f"states {tuple(states.shape)} and x {tuple(x.shape)}"
            raise ValueError(f"x: expected {axes} axes, the first two those of the states [T, B, H], got {given}")
        T, B = states.shape[:2]
        steps = torch.full((B,), T) if lengths is None else torch.as_tensor(lengths).cpu()
        long = (steps >= self.length).nonzero().flatten()
        if not len(long):
            raise ValueError(f"length: expected at most the {int(steps.max())} steps of the longest sample")
        sample = long.repeat_interleave(self.anchors)
        room = (steps[sample] - self.length + 1).double()
        drawn = torch.rand(len(sample), generator=generator, dtype=torch.float64)
        last = self.length - 1 + (drawn * room).long().minimum(room.long() - 1)
        written = (last - self.length + 1) + torch.arange(self.length)[:, None]
        written, sample, last = (v.to(states.device) for v in (written, sample, last))
        target = x[written, sample]
        values = one_hot(target, self.input_size).to(states.dtype) if self.tokens else target
        # Targets are detached: a learnt input, such as an embedding, must not adapt to become easy to reconstruct.
        values = values.detach()
        given = torch.cat([torch.zeros_like(values[:1]), values[:-1]])
        hidden, _ = self.decoder(given, self.start(states[last, sample]).unsqueeze(0))
        found = self.out(hidden)
        return cross_entropy(found.flatten(0, 1), target.flatten()) if self.tokens else mse_loss(found, values)
