"""Observing the recurrent modules of a running model, with one definition of call, sequence, continuation, cut, state.

Belongs here: definitions of call, sequence, continuation, cut and state, which every observer shares.
Does not: measuring, replaying, or anything that changes a number in the user's pass.

- A *call* is one call of a recurrent module at its kernel (`Call`): its arguments and what it returned.
- A *state* is what a module passes to its next call: h, or h and c.
- A call *continues* an earlier one if its initial state is the state that the earlier call returned: the same tensor,
  a view or a copy of it, or something computed from it (`continuation`). Otherwise it starts a new *sequence*.
- A *cut* is a continuation in value but not in the graph: no gradient passes.
- A *reset* is a sample whose state was set to zero between two calls, as at the end of an episode.

`watch`, `diagnose`, `Omega`, `GradientFlossing` and `GradientFlow` observe through `Capture`. It never raises in the
user's pass, changes no numbers and attaches nothing to a module.
"""

from unvanish.capture.calls import Call, Capture, steps_of
from unvanish.capture.continuation import Link, Returned, link, returned
from unvanish.capture.parts import Parts, hidden_parts

__all__ = ["Call", "Capture", "Link", "Parts", "Returned", "hidden_parts", "link", "returned", "steps_of"]
