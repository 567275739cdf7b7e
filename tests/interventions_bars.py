"""What the tests of test_interventions_parts*.py share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.interventions_subjects import Last, recall, subject
from unvanish.diagnosis.interventions.bar import Bar, best_constant
from unvanish.diagnosis.interventions.material import Rows


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Wrapped(nn.Module):
    """A GRU with a head, whose answer is brought into another form."""

    def __init__(self, out: int, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.form = Last(nn.GRU(4, 8, batch_first=True), out), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.net(x))


def bar_of(model: nn.Module, x: Any, y: Any, loss: Callable[..., Tensor]) -> Bar:
    rows = Rows(subject(model, x, y, loss=loss), len(x), 0)
    found, _ = best_constant(rows, 0)
    assert found is not None
    return found


def on_held_out(rows: Rows, loss: Callable[[Tensor], Tensor]) -> float:
    return float(torch.stack([loss(group) for group in rows.groups]).mean())


X, Y = recall(200, 5)
NUMBERS = 40 + 7 * torch.randn(200, generator=seeded())
