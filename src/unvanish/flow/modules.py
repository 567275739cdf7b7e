"""What `unvanish.nn.modules` offers to the measurements."""

from unvanish.nn.modules import LayerDirection, TimeMajor, in_user_order, initial_states, layer_directions, time_major

__all__ = ["LayerDirection", "TimeMajor", "in_user_order", "initial_states", "layer_directions", "time_major"]
