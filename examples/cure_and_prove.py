"""I know the lag of my data. Initialise the forget gates for it, and prove that it helped.

The proof compares the gradient and the learning, with and without the cure. The task: a
symbol at the first step, noise for 99 steps, then name the symbol; chance is an error of 7/8.
"""

import torch
from torch import nn

import unvanish as uv
from unvanish.train import TASKS

LAG, UPDATES = 100, 200
task = TASKS["delayed-recall"](LAG)
x, y = task.samples("validation", range(200))


def train(cure: bool) -> tuple[float, float]:
    """Train from the same seed, cured or not; (fraction of the gradient at the first step, error rate afterwards)."""
    torch.manual_seed(0)
    lstm, head = uv.nn.LSTM(task.inputs, 32, batch_first=True), nn.Linear(32, task.outputs)
    if cure:
        uv.cures.chrono_(lstm, max_lag=LAG)
    lag = uv.flow.adjoint_map(lstm, x[:16], sources=[-1]).over_lag(0).median(dim=1).values
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=1e-2)
    for update in range(UPDATES):
        batch, answer = task.samples("train", range(32 * update, 32 * (update + 1)))
        optimizer.zero_grad()
        task.loss(head(lstm(batch)[0][:, -1]), answer).backward()
        nn.utils.clip_grad_norm_(lstm.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return float((lag[-1] - lag[0]).exp()), float(task.error(head(lstm(x)[0][:, -1]), y))


results = {cure: train(cure) for cure in (False, True)}
for cure, (left, wrong) in results.items():
    name = "chrono LSTM" if cure else "plain LSTM"
    print(f"{name:11s}  gradient remaining at the first step: {left:.0e}   wrong after {UPDATES} updates: {wrong:.0%}")
