"""The loss is NaN. Where does the NaN come from?

In which layer, step, sample and gate does it first appear, in the forward or the backward pass?
"""

import torch
from torch import nn

import unvanish as uv

torch.manual_seed(0)
model = nn.RNN(4, 16, nonlinearity="relu", num_layers=2)
with torch.no_grad():
    model.weight_hh_l1.mul_(9)  # as after an update that was too large
x = torch.randn(120, 8, 4)

loss = model(x)[0].square().mean()
print(f"The loss is {loss.item()}; it does not say why.")

try:
    with uv.watch(model) as flow:
        model(x)[0].square().mean().backward()
    print(flow["l1"].dh)
except uv.flow.NonFiniteError as error:
    print(error)

rate = uv.flow.lyapunov(model, x[:20], n=1, at="l1").exponents
print(f"Before that, a small change of the state of layer l1 grows by {float(rate):.2f} nats per step.")
uv.cures.constrain_(model, "spectral", scale=1.0)  # σ_max(W_hh) ≤ 1 in every layer, during training too

with uv.watch(model) as flow:
    model(x)[0].square().mean().backward()
print(f"With σ_max ≤ 1 the loss is finite, and the median of ‖∂E/∂h_t‖ is {flow['l1'].dh.median():.1e}.")
