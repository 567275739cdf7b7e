"""I train, and the loss does not fall. Does the reach of the gradient grow?

Watch every 50th update, and act.
The task: a symbol at the first step, noise for 29 steps, then name the symbol.
"""

import torch
from torch import nn

import unvanish as uv
from unvanish.train import TASKS

torch.manual_seed(0)
task = TASKS["delayed-recall"](30)
gru, head = uv.nn.GRU(task.inputs, 32, batch_first=True), nn.Linear(32, task.outputs)
model = nn.ModuleDict({"gru": gru, "head": head})
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
clipper = uv.cures.GradientClipper(model.parameters(), maximum=1.0)
reach: dict[int, int] = {}


def loss_of(update: int) -> torch.Tensor:
    """The loss on a fresh batch."""
    x, y = task.samples("train", range(32 * update, 32 * (update + 1)))
    return task.loss(head(gru(x)[0][:, -1]), y)


for update in range(301):
    optimizer.zero_grad()
    if update % 50 == 0:
        with uv.watch(model) as flow:
            loss = loss_of(update)
            loss.backward()
        norms = flow["gru.l0"].dh.median(dim=1).values
        fade = uv.flow.decay(norms.log().flip(0))  # one error, at the last step: dh over the lag
        reach[update] = fade.reach
        print(f"update {update:3d}  loss {loss:.3f}  rate {fade.rate:+.3f} nats per step  reach {fade.reach:2d} steps")
        if update == 100 and fade.reach < task.length - 1:
            print(
                "The gradient does not reach the symbol, and training does not change that: open the gate that carries."
            )
            uv.cures.forget_bias_(gru, 3.0)
    else:
        loss_of(update).backward()
    clipper.clip_()
    optimizer.step()
