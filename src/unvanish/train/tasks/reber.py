"""The embedded Reber grammar (Smith & Zipser 1989; Fahlman 1991; Hochreiter & Schmidhuber 1997, experiment 1)."""

from collections.abc import Collection, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from unvanish.train.tasks.task import IGNORED, Samples, Split, Task, as_float, whole

SYMBOLS = "BTPSXVE"
STRINGS = 256
"""per split, as in the papers"""

REBER: tuple[dict[str, int], ...] = (
    {"B": 1},
    {"T": 2, "P": 3},
    {"S": 2, "X": 4},
    {"T": 3, "V": 5},
    {"X": 3, "S": 6},
    {"P": 4, "V": 6},
    {"E": 7},
)
"""node → symbol → next node; the last node is 7"""


def _embedded() -> tuple[dict[str, int], ...]:
    """B, T or P, a Reber string, the same T or P again, E: two nodes, a copy of the grammar after T, one after P."""
    inner = len(REBER)
    copies = [{symbol: start + to for symbol, to in node.items()} for start in (2, 3 + inner) for node in REBER]
    end = 2 * inner + 4
    first, second = copies[:inner], copies[inner:]
    return ({"B": 1}, {"T": 2, "P": 3 + inner}, *first, {"T": end}, *second, {"P": end}, {"E": end + 1}, {})


EMBEDDED = _embedded()
LONG_RANGE = (2 + len(REBER), 3 + 2 * len(REBER))
"""the nodes at which the second symbol is due again"""


_NEXT = torch.tensor([[node.get(symbol, -1) for symbol in SYMBOLS] for node in EMBEDDED])
"""[nodes, symbols] the next node, −1 where the symbol can't follow"""


class EmbeddedReber(Task):
    """B, T or P, a string of Reber's grammar, the same T or P again, E: after each symbol the next one is to be
    predicted.

    x is one-hot over {B, T, P, S, X, V, E}; y_t is the symbol that follows x_t. Strings have 9 to T + 1 symbols, 12 in
    the mean; longer ones (1 in 900 for the default T = 30) are drawn again. After the string come steps of zeros
    without an answer. (Before it they would reveal its length, and with it the next symbol.) 256 strings to
    train, 256 to validate, 256 to test; the latter do not occur among the first.

    A string is right if at every step the symbols that may follow have the largest outputs; reported is the share of
    strings that are not. Knowing all but the second symbol gets half of them right: chance.
    """

    name = "embedded-reber"
    title = "Embedded Reber grammar"
    describe = "At every step the next symbol of a random grammar is predicted; the last but one repeats the second."
    source = "Smith & Zipser 1989; Fahlman 1991; Hochreiter & Schmidhuber 1997, experiment 1"
    kind = "prediction"
    default_length = 30
    least_length: ClassVar[int] = 20
    """for shorter ones there are too few strings to keep 256 apart from those to train"""
    inputs = len(SYMBOLS)
    outputs = len(SYMBOLS)
    chance = 0.5
    solved_below = 0.5 / STRINGS

    def __init__(self, length: int | None = None, seed: int = 0) -> None:
        super().__init__(whole(length, "length", self.default_length, self.least_length), seed)
        self.answers = self.length
        train = [self._draw("train", index, ()) for index in range(STRINGS)]
        seen = set(train)
        self._strings: dict[Split, list[str]] = {
            "train": train,
            "validation": [self._draw("validation", index, seen) for index in range(STRINGS)],
            "test": [self._draw("test", index, seen) for index in range(STRINGS)],
        }

    @property
    def metric(self) -> str:
        return "share of strings with a wrong prediction"

    def size(self, split: Split) -> int:
        return STRINGS

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        x = np.zeros((len(indices), self.length, self.inputs), dtype=np.float32)
        y = np.full((len(indices), self.length), IGNORED)
        for row, index in enumerate(indices):
            symbols = [SYMBOLS.index(symbol) for symbol in self._strings[split][index]]
            steps = len(symbols) - 1
            x[row, np.arange(steps), symbols[:-1]] = 1
            y[row, :steps] = symbols[1:]
        return as_float(x), torch.as_tensor(y)

    def error(self, answer: Tensor, y: Tensor) -> Tensor:
        long_range, other = self.wrong(answer, y)
        return (long_range | other).double().mean()

    def wrong(self, answer: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """([B], [B]): whether the prediction of the last symbol but one is wrong, and whether any other is.

        Args:
            answer: `[B, T, 7]`
            y: `[B, T]`
        """
        nodes = _nodes(y)
        may = _NEXT.to(y.device)[nodes] >= 0
        least = answer.where(may, torch.inf).amin(-1)
        most = answer.where(~may, -torch.inf).amax(-1)
        wrong = ~(least > most) & (y != IGNORED)
        long_range = torch.isin(nodes, torch.tensor(LONG_RANGE, device=y.device))
        return (wrong & long_range).any(1), (wrong & ~long_range).any(1)

    def _draw(self, split: Split, index: int, without: Collection[str]) -> str:
        """The string of a sample; where two symbols may follow, each has probability ½."""
        rng = self.generator(split, index)
        while True:
            node, string = 0, ""
            while EMBEDDED[node]:
                choices = list(EMBEDDED[node])
                symbol = choices[rng.integers(len(choices))]
                node, string = EMBEDDED[node][symbol], string + symbol
            if len(string) <= self.length + 1 and string not in without:
                return string


def _nodes(y: Tensor) -> Tensor:
    """[B, T] the node of the grammar before y_t; the first answer is the symbol after B."""
    following = _NEXT.to(y.device)
    node, nodes = torch.ones_like(y[:, 0]), []
    for y_t in y.unbind(1):
        nodes.append(node)
        node = torch.where(y_t == IGNORED, node, following[node, y_t.clamp(0)])
    return torch.stack(nodes, 1)
