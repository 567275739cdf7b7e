"""How far below the bar a copy is, and whether that is more than chance."""

import math
from typing import NamedTuple

from torch import Tensor

SURE = 3.5
"""standard errors over groups of samples; with 16 groups chance alone exceeds it once in 600 times"""
SURE_OF_PAIRS = 5.0
"""standard deviations over random pairings of answers and targets"""
LIKELY = 1.5
"""standard errors from which further tests are worthwhile"""
VISIBLE = 0.03
"""share of the bar: a smaller fall is not called learning, however certain it is"""
CLEAR = 0.25
"""share of the bar: with such a fall nothing else needs a trial"""
ALONE = 0.3
"""share of the bar: the fall required where a single loss gives no standard error"""


class Score(NamedTuple):
    """A copy's losses against the best constant answer's, on the same samples."""

    loss: float
    bar: float
    gain: float
    """bar − loss"""
    error: float
    """standard error of the gain over groups of samples; NaN for a single group"""

    @property
    def share(self) -> float:
        """Gain as a share of the bar's size."""
        return self.gain / max(abs(self.bar), 1e-12)

    @property
    def learns(self) -> bool:
        """Whether the loss is below the bar by more than chance."""
        if not math.isfinite(self.gain):
            return False
        if math.isnan(self.error):
            return self.share > ALONE
        return self.gain > SURE * self.error and self.share > VISIBLE

    @property
    def visible(self) -> bool:
        """Whether the loss is noticeably below the bar, if not yet beyond doubt."""
        return self.gain > LIKELY * self.error and self.share > VISIBLE


def score(losses: Tensor, bar: Tensor) -> Score:
    """From `[G]` losses of the same groups of samples; the groups are paired, so that hard samples cancel.

    gain = mean(bar − loss)      error = std(bar − loss) / √G
    """
    gains = bar - losses
    error = float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return Score(float(losses.mean()), float(bar.mean()), float(gains.mean()), error)


def ahead(better: Tensor, worse: Tensor) -> bool:
    """Whether the first losses are below the second by more than chance."""
    gains = worse - better
    if len(gains) < 2:
        return False
    return float(gains.mean()) > SURE * float(gains.std()) / math.sqrt(len(gains))
