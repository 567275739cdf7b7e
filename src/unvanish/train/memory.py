"""Estimates of the memory that a training or a data file needs, made before it starts, because a machine that swaps
gives no reason."""

from pathlib import Path

FLOAT = 4
GATES = 4
"""of the largest cell"""
CELL, LINE = 80, 100
"""bytes of a cell of text as a Python string, in its row's and its column's list; of a row's own list and number"""


def estimated(
    inputs: int,
    hidden: int,
    outputs: int,
    length: int,
    batch: int,
    *,
    layers: int = 1,
    directions: int = 1,
    checkpoint_every: int | None = None,
    symbols: int = 0,
    answered: int = 1,
    judged: int = 0,
) -> int:
    """Bytes of recurrent layers and their read-out in training, in float32, to about a factor of 2:

        4 (4 P + max(2 B (K L D (G + 2) H + T I + A O), J (2 D H + I + O)))    G = 4 gates

    P weights count 4 times (with gradient and Adam's two averages); gates and states per sample and kept step, input
    and answers count twice: kept from the forward pass, and used in the backward. K = T, or T/n + n where one state in
    n is kept. J steps are judged at once, of which only states, input and answers are kept.

    Args:
        inputs, hidden, outputs, length, batch, layers, directions: I, H, O, T, B, L, D.
        checkpoint_every: n.
        symbols: rows of an embedding of width I.
        answered: A, steps that are answered.
        judged: J, steps of all samples judged at once, together.
    """
    T, D, H = length, directions, hidden
    deeper = (layers - 1) * D * GATES * H * (D * H + H + 2)
    weights = D * GATES * H * (inputs + H + 2) + deeper + outputs * (D * H + 1) + symbols * inputs
    kept = T if checkpoint_every is None else min(T, T // checkpoint_every + checkpoint_every)
    trained = 2 * batch * (kept * layers * D * (GATES + 2) * H + T * inputs + answered * outputs)
    return FLOAT * (4 * weights + max(trained, judged * (2 * D * H + inputs + outputs)))


def of_csv(text: str) -> int:
    """The most bytes that a text takes as a table of strings, then of numbers: 4 per character while it is split."""
    rows = text.count("\n") + 1
    return 5 * len(text) + CELL * (text.count(",") + rows) + LINE * rows


def of_ts(text: str) -> int:
    """Bytes that the series of a .ts file take: its lines, and two float64 per value."""
    rows = text.count("\n") + 1
    return len(text) + LINE * rows + 16 * (text.count(",") + text.count(":") + rows)


def available() -> int | None:
    """Bytes available without swapping; None where the system does not report them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def require(needed: int, what: str, remedy: str = "lower one") -> None:
    """Check that there is room.

    Raises:
        ValueError: there is not; `remedy` says what to do about it.
    """
    free = available()
    if free is not None and needed > free:
        raise ValueError(
            f"{what}: needs about {needed / 2**30:,.3g} GiB, {free / 2**30:,.3g} GiB are available; {remedy}"
        )
