"""The states of cells and layers that a model calls step after step, as sequences."""

from torch import Tensor, nn

from unvanish.capture import Call, Returned, link, returned
from unvanish.flow.state_reach import log_norms_of_states
from unvanish.nn.modules import as_states, cell_of


class SteppedStates:
    """For each module the longest sequence of one-step calls, each continuing the one before, with its graph."""

    def __init__(self) -> None:
        self._last: dict[str, Returned] = {}
        self._open: dict[str, list[Call]] = {}
        self._longest: dict[str, list[Call]] = {}

    def add(self, call: Call) -> None:
        """A call that has returned."""
        if not call.stepwise:
            return
        name, found = call.name, link(as_states(call.hx), self._last.get(call.name))
        self._last[name] = returned(call.states)
        if found is None or found.cut or name not in self._open:
            self._open[name] = []
        self._open[name].append(call)
        if len(self._open[name]) >= len(self._longest.get(name, [])):
            self._longest[name] = self._open[name]

    def take(self) -> dict[str, list[Call]]:
        """Name → calls of the longest sequence, if it has at least two; the stored calls are released."""
        found = {name: calls for name, calls in self._longest.items() if len(calls) > 1}
        for held in (self._last, self._open, self._longest):
            held.clear()
        return found


def log_norms_of_calls(calls: list[Call], seed: int) -> dict[str, Tensor]:
    """Record name → ln‖∂E_T/∂s_t‖ of an error made at the last step's s alone, relative to lag 0, over the lag,
    `[T, B]`; s is the state that serves as the cell's memory (c for the LSTM)."""
    module, name = calls[0].module, calls[0].name
    cell = cell_of(module)
    which = cell.states.index(cell.remembers)
    states: list[Tensor] = [call.states[which] for call in calls]
    if isinstance(module, nn.RNNCellBase):
        return {name or "cell": log_norms_of_states(states, seed)}
    ends = ("", ".reverse") if module.bidirectional else ("",)
    places = [f"l{k}{end}" for k in range(module.num_layers) for end in ends]
    return {
        f"{name}.{place}".removeprefix("."): log_norms_of_states(states, seed, layer)
        for layer, place in enumerate(places)
    }
