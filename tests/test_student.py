"""Student's t: closed forms of one and two degrees of freedom, the tables, and the normal distribution far out."""

import math
from statistics import NormalDist

import pytest

from unvanish.diagnosis.student import t_quantile


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_closed_forms(confidence: float) -> None:
    assert t_quantile(1, confidence) == pytest.approx(math.tan(math.pi * confidence / 2), rel=1e-12)
    assert t_quantile(2, confidence) == pytest.approx(confidence * math.sqrt(2 / (1 - confidence**2)), rel=1e-12)


# Abramowitz & Stegun 1964, table 26.10
@pytest.mark.parametrize(("freedom", "t"), [(3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (29, 2.045), (30, 2.042)])
def test_the_table(freedom: int, t: float) -> None:
    assert t_quantile(freedom) == pytest.approx(t, abs=5e-4)


def test_many_degrees_are_nearly_normal() -> None:
    z = NormalDist().inv_cdf(0.975)
    assert t_quantile(2000) == pytest.approx(z + (z**3 + z) / (4 * 2000), rel=1e-6)


@pytest.mark.parametrize(("freedom", "confidence"), [(0, 0.95), (3, 0.0), (3, 1.0)])
def test_what_has_no_quantile(freedom: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="expected freedom ≥ 1"):
        t_quantile(freedom, confidence)
