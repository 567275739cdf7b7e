"""The measured passes of a watch, the last few of each layer."""

from unvanish.flow.watched_sequence import Measured

Token = tuple[int, int]
"""(number of the sequence, index of the record in it)"""


class Passes:
    """The last `keep` measurements of each layer, in the order of the calls."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._found: dict[str, dict[Token, Measured]] = {}
        self.dropped = 0
        """passes measured and forgotten, since more than `keep` of a layer came"""

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, token: Token, measured: Measured) -> None:
        """Store the measurement of a pass, replacing an earlier one of the same pass."""
        held = self._found.setdefault(measured.flow.name, {})
        held[token] = measured
        if len(held) > self._keep:
            del held[next(iter(held))]
            self.dropped += 1

    def of(self, name: str) -> list[Measured]:
        """The measurements of one layer, oldest first."""
        return list(self._found.get(name, {}).values())

    def latest(self, step: int | None = None) -> dict[str, Measured]:
        """Name → the last one of each layer, or the last that was measured in a training step."""
        return {name: m for name, held in self._found.items() for m in held.values() if step in (None, m.flow.step)}
