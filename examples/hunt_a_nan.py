"""The loss is NaN. Where was it born?

In which layer, at which step, in which sample and gate, on the way there or back?
"""

import torch
from torch import nn

import unvanish as uv

torch.manual_seed(0)
model = nn.RNN(4, 16, nonlinearity="relu", num_layers=2)
with torch.no_grad():
    model.weight_hh_l1.mul_(9)  # too long a step of the optimizer, say
x = torch.randn(120, 8, 4)

loss = model(x)[0].square().mean()
print(f"The loss is {loss.item()}; it says nothing about where.")

try:
    with uv.watch(model) as flow:
        model(x)[0].square().mean().backward()
    print(flow["l1"].dh)
except uv.flow.NonFiniteError as error:
    print(error)

rate = uv.flow.lyapunov(model, x[:20], n=1, at="l1").exponents
print(f"Long before that, a disturbance of layer l1 grows by {float(rate):.2f} nats per step.")
uv.cures.constrain_(model, "spectral", scale=1.0)  # σ_max(W_hh) = 1 in every layer, also while training

with uv.watch(model) as flow:
    model(x)[0].square().mean().backward()
print(f"Held to σ_max = 1 the loss is finite and ‖∂E/∂h_t‖ is {flow['l1'].dh.median():.1e} at most steps.")
