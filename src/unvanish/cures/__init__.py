"""Cures for vanishing and exploding gradients, each usable alone on a stock torch module.

Belongs here: changes to a model or to its training that let gradients survive, each usable alone on a stock torch
module.
Does not: proving that one helps (`diagnosis`), comparing them (`train.compare`).

- initialise: `forget_bias_`, `chrono_`, `uniform_gate_`, `orthogonal_`, `identity_`, `spectral_radius_`,
  `critical_`
- learn: `CarryRate` (a separate learning rate for the carry gates)
- clip: `GradientClipper` (global norm, threshold from what was observed), `clip_recurrence_` (δ inside the recurrence)
- cut: `h_detach_` (at some steps the gradient passes through the carry alone), `TruncatedBPTT`,
  `forced` (the state is reset from the data before an error has doubled; Mikhaeil et al. 2022)
- help: `Reconstruction` (an auxiliary loss with short paths; Trinh et al. 2018)
- penalise: `Omega` (Pascanu et al. 2013), `GradientFlossing` (Engelken 2023), `LocalStability` (Herranz-Celotti &
  Rouat 2023)
- regularise: `zoneout_`, `recurrent_dropout_` (noise that leaves the memory long)
- constrain: `constrain_` (orthogonal or spectral W_hh), `layer_norm_` (of every gate's share)
- rescue: `rescue_` (smallest change of the forget biases)
- replace: `replace_` (RNN → GRU, LSTM or any other cell), `widen_` (more units behind the same interface)
"""

from unvanish.cures.carry_bias import chrono_, forget_bias_, uniform_gate_
from unvanish.cures.carry_rate import CarryRate
from unvanish.cures.clip import GradientClipper, clip_recurrence_
from unvanish.cures.constrain import constrain_
from unvanish.cures.critical import critical_
from unvanish.cures.flossing import GradientFlossing
from unvanish.cures.forcing import forced, forcing_interval
from unvanish.cures.h_detach import h_detach_
from unvanish.cures.layer_norm import layer_norm_
from unvanish.cures.local_stability import LocalStability
from unvanish.cures.omega import Omega
from unvanish.cures.reconstruction import Reconstruction
from unvanish.cures.recurrent_matrix import identity_, orthogonal_, spectral_radius_
from unvanish.cures.recurrent_noise import recurrent_dropout_, zoneout_
from unvanish.cures.replace import replace_
from unvanish.cures.rescue import rescue_
from unvanish.cures.truncation import TruncatedBPTT
from unvanish.cures.widen import widen_

__all__ = [
    "CarryRate",
    "GradientClipper",
    "GradientFlossing",
    "LocalStability",
    "Omega",
    "Reconstruction",
    "TruncatedBPTT",
    "chrono_",
    "clip_recurrence_",
    "constrain_",
    "critical_",
    "forced",
    "forcing_interval",
    "forget_bias_",
    "h_detach_",
    "identity_",
    "layer_norm_",
    "orthogonal_",
    "recurrent_dropout_",
    "replace_",
    "rescue_",
    "spectral_radius_",
    "uniform_gate_",
    "widen_",
    "zoneout_",
]
