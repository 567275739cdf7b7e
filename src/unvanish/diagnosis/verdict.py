"""From measurements to a verdict and its cause. Everything is relative: to lag 0, to the lag, to a unit's own range."""

import math
from typing import Literal

import torch

from unvanish.diagnosis.measure import FRACTION, Measured

Verdict = Literal["vanishes", "healthy", "explodes", "chaotic", "saturated", "dead", "undecided"]
"""the possible verdicts on a layer's gradient"""

MOST = 0.5
"""a share of units or steps that counts as most of them"""
TOO_SENSITIVE = 1.0
"""the change of a state by one step of Adam, relative to the state's size"""


def judge(m: Measured) -> tuple[Verdict, str]:
    """(verdict, cause) of one layer and direction."""
    e, lag = m.evidence, m.lag
    if e["offered"] < 2 and m.place.reverse and e["steps"] > 2:
        where = (
            "the loss reads this direction at the step that it processes first, so no gradient travels through it"
            if not m.above
            else "the error arises at the step that this direction processes first, and reaches its others through "
            "the layer above alone, whose verdict covers that path"
        )
        return "undecided", f"{where}; read the reverse direction at the first step, as torch's final state does"
    if e["offered"] < 2:
        return "undecided", f"the longest lag in the batch is {e['offered']:.0f}; a rate needs at least 2 steps"
    if len(m.slopes) < 2:
        return "undecided", "a single sample gives no interval; pass at least two"
    if not m.asked:
        return (
            "undecided",
            f"the longest lag in the batch is {e['offered']:.0f} steps, not {lag}; pass longer sequences",
        )
    bounded = not m.place.cell.rectifies
    grows = float(m.curve[-1]) > -math.log(FRACTION)
    if bounded and grows and e.get("lyapunov_low", -math.inf) > 0 and e["lyapunov"] * lag > 1:
        radius = f"; spectral radius of W_hh {e['spectral_radius']:.2f}" if "spectral_radius" in e else ""
        return "chaotic", (
            f"recurrent weights too large: neighbouring states diverge by {e['lyapunov']:.3f} nats per step "
            f"(Lyapunov exponent){radius}"
        )
    if _explodes(m):
        return _grows(m)
    if m.decay.reach >= lag:
        arrives = f"the gradient reaches back all {lag} steps: {_left(e)}{_lost(m)}{_handed_down(m)}{_held(e, lag)}"
        if e["step_change"] > TOO_SENSITIVE:
            return "healthy", (
                f"{arrives}, but the state is too sensitive: one step of Adam changes it by up to "
                f"{e['step_change']:.2g} times its size; take a smaller learning rate, or shorter memories"
            )
        return "healthy", arrives
    return _fades(m)


def _explodes(m: Measured) -> bool:
    """More than a hundredfold at the lag, or its square on the way; by stretching, not by the number of paths.

    A layer with m layers above it is reached over a lag ℓ along C(ℓ + m, m) paths, over lag 0 along one.
    """
    hundredfold = -math.log(FRACTION)
    each = m.curve - torch.tensor([_log_ways(lag, m.above) for lag in range(len(m.curve))])
    own = m.evidence.get("lyapunov", -math.inf) * (len(m.curve) - 1)
    stretched = float(each[-1]) > hundredfold or float(each.max()) > 2 * hundredfold
    return stretched or (float(m.curve[-1]) > hundredfold and own > hundredfold)


def _log_ways(lag: int, above: int) -> float:
    return math.log(math.comb(lag + above, above))


def _left(e: dict[str, float]) -> str:
    return f"a fraction of {e['survival']:.2g} remains" if e["survival"] <= 1 else f"{e['survival']:.2g} times as large"


def _lost(m: Measured) -> str:
    """The share of errors of which no gradient remains, in words."""
    lost = 1 - m.evidence["arriving"]
    if lost == 0:
        return ""
    why = ", because at some step every relu unit was off" if m.place.cell.rectifies else ""
    return f"; for {100 * lost:.3g} % of the errors followed, the gradient becomes exactly 0{why}"


def _handed_down(m: Measured) -> str:
    """Growth that comes from the number of paths, not from any single one."""
    if float(m.curve[-1]) <= -math.log(FRACTION):
        return ""
    ways = math.exp(_log_ways(len(m.curve) - 1, m.above))
    return f", because the layers above pass it down at every step, along {ways:.2g} paths in all"


def _held(e: dict[str, float], lag: int) -> str:
    """A remark on recurrent weights that are large enough for an explosion which saturation prevents."""
    growth = lag * math.log(max(e.get("spectral_radius", 0.0), 1e-300))
    if growth <= -math.log(FRACTION):
        return ""
    return (
        f"; growth is suppressed only by saturation: spectral radius of W_hh {e['spectral_radius']:.2f}, with φ' = 1 "
        f"the gradient would grow by 10^{growth / math.log(10):.0f} over the lag"
    )


def _grows(m: Measured) -> tuple[Verdict, str]:
    e = m.evidence
    radius = f"; spectral radius of W_hh {e['spectral_radius']:.2f}" if "spectral_radius" in e else ""
    norm = e.get("spectral_norm", e["largest_block_norm"])
    return "explodes", f"recurrent weights too large: W_hh stretches by up to {norm:.2f} per step{radius}"


def _fades(m: Measured) -> tuple[Verdict, str]:
    e, lag, reach = m.evidence, m.lag, m.decay.reach
    cell = m.place.cell
    if e["detached"] and e["uninterrupted"] < lag:
        earlier = (
            "" if reach >= e["uninterrupted"] - 1 else f"; even between two cuts the gradient reaches back only {reach}"
        )
        return "vanishes", (
            f"detached: the state is detached {e['detached']:.0f} times (truncated BPTT), and no gradient passes that; "
            f"the lag is {lag} steps, of which {e['uninterrupted']:.0f} lie between two cuts{earlier}"
        )
    if cell.rectifies and not bool((m.curve[1:] > -math.inf).any()):
        return "dead", "no relu unit is on: φ' is 0 everywhere, so no gradient passes even one step"
    if e["constant_tail"] > MOST and reach < e["constant_tail"] * lag:
        return "vanishes", (
            f"padding: the last {e['constant_tail']:.0%} of the steps repeat one input, and the gradient vanishes "
            f"within them (reach {reach}); pack the sequences, or read each sample's state at its own last step"
        )
    if e["saturated"] > MOST and "carry_half_life" not in e and e["spectral_norm"] >= 1:
        return "saturated", f"activations saturated: {e['saturated']:.0%} of φ' are below 5 % of their maximum"
    if e["saturated"] > MOST and "carry_half_life" in e:
        return "saturated", (
            f"gates saturated: {e['saturated']:.0%} of their φ' are below 5 % of the maximum"
            + (f"; W_ih x has standard deviation {e['input_scale']:.1f}" if "input_scale" in e else "")
        )
    last = " Few steps enter the loss, so no other error is nearer." if e["error_steps"] < 0.1 else ""
    if "carry_half_life" in e:
        return "vanishes", (
            f"{cell.carry_title}: gradient half-life {e['carry_half_life']:.2g} steps for the median unit, "
            f"{e['longest_carry_half_life']:.2g} for the slowest 10 %; the lag is {lag}.{last}"
        )
    radius, norm = e.get("spectral_radius", math.nan), e["spectral_norm"]
    if cell.rectifies and radius >= 1:
        return "vanishes", (
            f"relu units off: W_hh alone preserves a gradient (spectral radius {radius:.2f}), but over {lag} steps "
            f"{_left(e)}{_lost(m)}; for half of the errors it stays above 0 over {e['half_arriving']:.0f} steps. "
            f"{e['saturated']:.0%} of the units are off.{last}"
        )
    if radius >= 1:
        return "vanishes", (
            f"activation slopes: W_hh alone preserves a gradient (spectral radius {radius:.2f}), but φ' shrinks it: "
            f"{e['saturated']:.0%} of the units are saturated.{last}"
        )
    return "vanishes", f"recurrent weights too small: spectral radius {radius:.2f}, norm {norm:.2f} of W_hh.{last}"
