"""My LSTM does well on short sequences and forgets early steps of long ones.

Does its gradient reach that far at all? The gradient of the weights, `weight_hh_l0.grad`,
can't tell: it is large as long as any step contributes. So look at every step.
"""

import torch
from torch import nn

import unvanish as uv


class Classifier(nn.Module):
    """The usual model: an embedding, an LSTM, and an answer from the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, T]` → `[B, 2]`"""
        states, _ = self.lstm(self.embed(tokens))
        return self.head(states[:, -1])


torch.manual_seed(0)
model = Classifier()
tokens, labels = torch.randint(20, (16, 300)), torch.randint(2, (16,))

with uv.watch(model) as flow:
    nn.functional.cross_entropy(model(tokens), labels).backward()

layer = flow["lstm.l0"]
left = (layer.dc / layer.dc[-1]).median(dim=1).values  # fraction of the last step's gradient, at each step
for lag in (0, 10, 50, 100, 299):
    print(f"{lag:4d} steps back: {left[-1 - lag]:.1e} of the gradient remains")

half_life = torch.log(torch.tensor(2.0)) / -layer.log_carry
print(f"The forget gates alone halve a unit's gradient every {half_life.min():.1f} to {half_life.max():.1f} steps.")
print(f"The gradient of the weights looks healthy: ‖W_hh.grad‖ = {model.lstm.weight_hh_l0.grad.norm():.1e}.")
print(f"The record agrees with autograd's own gradient to {layer.residual:.0e}.")
