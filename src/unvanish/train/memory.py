"""What a training will hold in memory, estimated before it begins: a machine that swaps tells nobody why."""

from pathlib import Path

FLOAT = 4
GATES = 4
"""of the largest cell"""


def estimated(inputs: int, hidden: int, outputs: int, length: int, batch: int) -> int:
    """Bytes of one layer and its read-out in training, in float32, to about a factor of 2.

    Weights 4 times (gradient, Adam's two averages), and per step and sample the gates, states and input, twice: kept
    from the forward pass, and worked on in the backward.
    """
    weights = GATES * hidden * (inputs + hidden + 2) + outputs * (hidden + 1)
    return FLOAT * (4 * weights + 2 * length * batch * ((GATES + 2) * hidden + inputs))


def available() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def require(needed: int, advice: str) -> None:
    """Check that there is room.

    Raises:
        ValueError: there is not; `advice` says what to lower.
    """
    free = available()
    if free is not None and needed > free:
        raise ValueError(
            f"{advice}: needs about {needed / 2**30:,.3g} GiB, {free / 2**30:,.3g} GiB are available; lower one"
        )
