"""The measured passes of a watch, the last few of each layer."""

from unvanish.flow.watched_sequence import Measured

Token = tuple[int, int]
"""(number of the sequence, index of the record in it)"""


class Passes:
    """Token → its measurement, in the order of the calls; the last `keep` of each layer."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._found: dict[Token, Measured] = {}
        self.dropped = 0
        """passes measured and forgotten, since more than `keep` of a layer came"""

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, token: Token, measured: Measured) -> None:
        """Store the measurement of a pass, replacing an earlier one of the same pass."""
        self._found[token] = measured
        same = [key for key, other in self._found.items() if other.flow.name == measured.flow.name]
        for key in same[: -self._keep]:
            del self._found[key]
            self.dropped += 1

    def of(self, name: str) -> list[Measured]:
        """The measurements of one layer, oldest first."""
        return [measured for measured in self._found.values() if measured.flow.name == name]

    def latest(self, step: int | None = None) -> dict[str, Measured]:
        """Name → the last one of each layer, or the last that was measured in a training step."""
        return {m.flow.name: m for m in self._found.values() if step is None or m.flow.step == step}
