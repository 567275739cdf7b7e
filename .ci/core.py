"""What an installation without extras has to do; `make wheel` runs it in an environment that holds nothing else."""

import importlib.util

import torch
from torch import nn

import unvanish as uv


class Model(nn.Module):
    """Reads 30 steps and answers from the last."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, 2] → [B, 1]."""
        return self.head(self.lstm(x)[0][:, -1])


for absent in ("pandas", "lightning", "scipy"):
    assert importlib.util.find_spec(absent) is None, f"{absent} belongs to an extra"
model, x, y = Model(), torch.randn(16, 30, 2), torch.randn(16, 1)
with uv.watch(model) as flow:
    nn.functional.mse_loss(model(x), y).backward()
assert flow["lstm.l0"].valid
print(flow)
print(uv.diagnose(model, x, y, loss=nn.functional.mse_loss, budget=0))
