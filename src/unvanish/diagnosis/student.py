"""The quantile of Student's t distribution that a confidence interval of a mean needs."""

import math


def t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """t with P(|T| ≤ t) = `confidence`, for a whole number of degrees of freedom ν ≥ 1.

    With θ = arctan(t/√ν) the probability is a finite sum (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4):

        ν odd:  2/π (θ + sin θ (cos θ + 2/3 cos³ θ + … + (2·4⋯(ν−3))/(3·5⋯(ν−2)) cos^{ν−2} θ))
        ν even: sin θ (1 + 1/2 cos² θ + … + (1·3⋯(ν−3))/(2·4⋯(ν−2)) cos^{ν−2} θ)

    It grows with θ, which is found by bisection.

    Raises:
        ValueError: `freedom` is below 1, or `confidence` not between 0 and 1.
    """
    if freedom < 1 or not 0 < confidence < 1:
        raise ValueError(f"expected freedom ≥ 1 and 0 < confidence < 1, got {freedom} and {confidence}")
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _within(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.tan(high) * math.sqrt(freedom)


def _within(theta: float, freedom: int) -> float:
    """P(|T| ≤ √ν tan θ)."""
    odd = freedom % 2
    power = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(odd, freedom - 1, 2):
        total += power
        power *= math.cos(theta) ** 2 * (k + 1) / (k + 2)
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total
