"""What torch's own layers can do on this machine in less than single precision."""

from functools import cache

import pytest
import torch
from torch import nn


@cache
def runs_under_autocast(kind: str) -> bool:
    """Whether torch's layer runs under autocast to bfloat16."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            getattr(nn, kind)(2, 3)(torch.zeros(2, 1, 2))
    except RuntimeError:
        return False
    return True


def skip_where_torch_raises(kind: str) -> None:
    """Skip a test of torch's layer under autocast to bfloat16 where torch raises an error: its LSTM needs AVX-512."""
    if not runs_under_autocast(kind):
        pytest.skip(f"torch's {kind} has no bfloat16 under autocast on this processor")
