"""My model answers at every step, and the gradient per step looks flat and healthy.

Does the gradient of each error reach far? With an error at every step, new gradient enters
all the time and hides that each one vanishes. The adjoint map keeps them apart: row k is
the error at step k, and column t the size of its gradient at step t.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import unvanish as uv

torch.manual_seed(0)
T = 100
gru, head = nn.GRU(4, 24, batch_first=True), nn.Linear(24, 4)
x, target = torch.randn(8, T, 4), torch.randn(8, T, 4)

with uv.watch(gru) as flow:
    nn.functional.mse_loss(head(gru(x)[0]), target, reduction="sum").backward()
summed = flow["l0"].dh.median(dim=1).values
print(f"summed flow: ‖∂E/∂h_t‖ is {summed[10]:.1f} at t = 10 and {summed[T - 10]:.1f} at t = {T - 10}: flat")

found = uv.flow.adjoint_map(gru, x, sources="all")
reaches = [uv.flow.decay(found.over_lag(k).median(dim=1).values).reach for k in range(20, T)]
print(f"one error at a time: 1 % of the gradient remains after {min(reaches)} to {max(reaches)} of {T} steps")

figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
decades = found.log_norms.median(dim=2).values / torch.tensor(10.0).log()
image = ax.imshow(decades.masked_fill(decades.isinf(), torch.nan).numpy(), vmin=-6, vmax=0, cmap="viridis")
ax.set(xlabel="step t at which the gradient arrives", ylabel="step k of the error")
figure.colorbar(image, label=r"$\log_{10}\|\partial E_k/\partial h_t\|$")
figure.savefig("adjoint-map.png", dpi=150)
print("adjoint-map.png shows all of them.")
