"""The effect of biases alone on the gradient before any training: cures, one forget bias for all units, the rescue."""

import torch

from unvanish import cures, flow
from unvanish.cures.layer_weights import layers_of
from unvanish.nn.modules import RecurrentModule, cell_of
from unvanish.seeding import generators_kept, seeded
from unvanish.train.gradient_breakdown import ending_together
from unvanish.train.gradient_reach import PROBES, measure
from unvanish.train.models import REMEDIES, recipe
from unvanish.train.records import BiasReach, Cured, Rescue
from unvanish.train.tasks import Task

BIASES = tuple(step / 2 for step in range(-2, 15))
"""forget biases that are measured, −1 to 7"""
SURVIVAL = 0.5
"""the survival that a rescue aims for"""


def cured(task: Task, name: str, hidden: int, seed: int) -> list[Cured]:
    """The effect of each cure of a plain recipe on the gradient before training; the global random state is kept."""
    found = []
    with generators_kept():
        for remedy in REMEDIES.get(name, ()):
            torch.manual_seed(seed)
            chosen = recipe(remedy)
            found.append(Cured(remedy, chosen.title, measure(chosen.build(task, hidden), task, 0)))
    return found


def forget_bias_series(task: Task, hidden: int, seed: int) -> list[BiasReach]:
    """A fresh LSTM from one seed with all forget biases set to each of `BIASES`; the global random state is kept."""
    found = []
    with seeded(seed):
        model = recipe("lstm").build(task, hidden)
        for bias in BIASES:
            cures.forget_bias_(model.recurrent, bias)
            found.append(BiasReach(bias, measure(model, task, 0)))
    return found


def rescued(task: Task, name: str, hidden: int, seed: int) -> Rescue | None:
    """The smallest change of the carry gate's biases after which half of a gradient survives the whole sequence.

    None: no gate carries the state, or the states' reaction kept the survival from the target.
    """
    with seeded(seed):
        model = recipe(name).build(task, hidden)
        layer = model.recurrent
        if cell_of(layer).carry_gate is None:
            return None
        gate, _ = cell_of(layer).carry_gate or ("", 1)
        x, _ = ending_together(task, PROBES)
        x = x.float()
        lag = x.shape[1] - 1
        kept, before = flow.survival(layer, x, lag=lag), _bias(layer, gate)
        try:
            cures.rescue_(layer, x, lag=lag, target=SURVIVAL)
        except ArithmeticError:
            return None
        return Rescue(gate, lag, SURVIVAL, kept, before, _bias(layer, gate), measure(model, task, 0))


def _bias(layer: RecurrentModule, gate: str) -> list[float]:
    """The input's and the recurrent share's bias of a gate, added, per unit."""
    found = sum(layers_of(layer)[0].biases(gate, "rescue_"), torch.zeros(()))
    return [float(f"{v:.5g}") for v in found.tolist()]
