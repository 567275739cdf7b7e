"""My many-to-one classifier has two layers and one answer at the end.

In which layer, and on which path, does its gradient vanish?
"""

import torch
from torch import nn

import unvanish as uv

torch.manual_seed(0)
lstm = nn.LSTM(8, 32, num_layers=2, batch_first=True)
head = nn.Linear(32, 4)
x, labels = torch.randn(8, 120, 8), torch.randint(4, (8,))

# The gradient of the loss at the last step of the last layer: ∂E/∂h_T.
last = lstm(x)[0][:, -1].detach().requires_grad_()
(error,) = torch.autograd.grad(nn.functional.cross_entropy(head(last), labels, reduction="sum"), last)

for name in ("l1", "l0"):
    found = uv.flow.adjoint_map(lstm, x, sources=[-1], error=error.unsqueeze(0), at=name)
    fade = uv.flow.decay(found.over_lag(0).median(dim=1).values)
    print(f"{name}: the gradient halves every {fade.half_life:.1f} steps; 1 % of it remains after {fade.reach} steps")

# Within the last layer: which path carries the gradient one step back? Shares sum to 1.
every_step = torch.zeros(120, 8, 32)
every_step[-1] = error
terms = uv.flow.decompose(lstm, x, error=every_step)
shares = {name: float(term.share.nanmedian()) for name, term in terms.terms.items()}
for name, share in sorted(shares.items(), key=lambda item: -item[1]):
    print(f"{name:12s} {share:6.1%}")

keeps = uv.flow.gate_statistics(lstm, x).log_carry.exp()
print(f"Most of it arrives along the carry, which keeps only {keeps.mean():.2f} of it per step: open the forget gates.")
