"""The picture at the top of README.md: `python docs/pictures/adding_reach.py` draws it again beside this file."""

import math
from pathlib import Path

import torch
from torch import nn

import unvanish as uv
from unvanish import draw

STEPS, SAMPLES, HIDDEN = 200, 32, 32
FLOOR = torch.finfo(torch.float32).tiny
"""the smallest normal float32; below it numbers lose digits, and at 1e-45 they are 0"""


def models() -> dict[str, nn.Module]:
    """Freshly initialised layers, from one seed."""
    torch.manual_seed(0)
    kinds = {"tanh-RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM, "LSTM, chrono biases": nn.LSTM}
    made = {name: kind(2, HIDDEN) for name, kind in kinds.items()}
    uv.cures.chrono_(made["LSTM, chrono biases"], max_lag=STEPS)
    return made


def main() -> None:
    """Follow one error, made at the last step, back to the first."""
    task = uv.train.make_task("adding", STEPS)
    x = task.samples("train", range(SAMPLES))[0].transpose(0, 1)
    curves = {}
    for name, layer in models().items():
        found = uv.flow.adjoint_map(layer, x, sources=[-1]).over_lag(0).median(-1).values
        curves[name] = (found - found[0]).tolist()
        print(f"{name}: {math.exp(curves[name][-1]):.2g} remains after {STEPS - 1} steps")
    ax = draw.over_lag(curves)
    ax.axhline(math.log10(FLOOR), color="0.4", linewidth=0.8, linestyle=":")
    ax.text(0, math.log10(FLOOR), " smallest normal float32, 10⁻³⁸", color="0.35", fontsize=7, va="bottom")
    ax.set_title("Adding problem, before training: gradient remaining over the lag", loc="left", fontsize=10)
    draw.figure_of(ax).savefig(Path(__file__).with_name("adding-reach-before.png"), dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
