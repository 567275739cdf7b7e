"""Cures for vanishing and exploding gradients, each usable alone: initialise, clip, penalise, constrain, rescue."""

from unvanish.cures.carry_bias import chrono_, forget_bias_
from unvanish.cures.recurrent_matrix import identity_, orthogonal_, spectral_radius_

__all__ = ["chrono_", "forget_bias_", "identity_", "orthogonal_", "spectral_radius_"]
