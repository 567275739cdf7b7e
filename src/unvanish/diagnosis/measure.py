"""The measurement of one layer and direction: separate error sources over the lag, and their possible causes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from unvanish import engine, flow
from unvanish.diagnosis.layer_inputs import Given
from unvanish.diagnosis.student import t_quantile
from unvanish.engine.precision import full_precision
from unvanish.flow.adjoint_map import map_of
from unvanish.flow.gates import gates_of
from unvanish.flow.lyapunov import spectrum_of
from unvanish.flow.stack import Stack, run_stack
from unvanish.nn.modules import LayerDirection, layer_directions

EXPONENT_STEPS = 2048
"""the last steps, over which the leading Lyapunov exponent is averaged"""
SOURCES = 6
"""the most error sources that are followed"""
FRACTION = 0.01
"""the fraction of the gradient at lag 0 that still counts as arriving"""


@dataclass
class Measured:
    """One layer and direction."""

    place: LayerDirection
    above: int
    """layers between it and the output, where the errors enter"""
    curve: Tensor
    """[ℓ] ln‖∂E_k/∂s_{k−ℓ}‖ relative to lag 0 over sources and samples, see `middle`"""
    slopes: Tensor
    """[B] nats per step, each sample's own"""
    lag: int
    """asked for, or the longest that the data offers"""
    asked: bool
    decay: flow.Decay
    evidence: dict[str, float]


@full_precision()
def measure(given: Given, lag: int | None, samples: int, seed: int, lr: float) -> list[Measured]:
    """Every layer and direction of a module."""
    keep = (given.lengths > 0).nonzero().flatten()[:samples]
    lengths = given.lengths[keep]
    longest = int(lengths.max())
    x, error = given.x[:longest, keep], given.error[:longest, keep]
    hx = given.hx
    if hx is not None:
        hx = tuple(h[:, keep] for h in hx) if isinstance(hx, tuple) else hx[:, keep]
    whole = bool((lengths == len(x)).all())
    fed: Tensor | PackedSequence = x if whole else pack_padded_sequence(x, lengths, enforce_sorted=False)
    stack = run_stack(given.layer, fed, hx)
    return [
        _measure_place(given, place, x, fed, hx, stack, lengths, error, lag, seed, lr)
        for place in layer_directions(given.layer)
    ]


def _measure_place(
    given: Given,
    place: LayerDirection,
    x: Tensor,
    fed: Tensor | PackedSequence,
    hx: object,
    stack: Stack,
    lengths: Tensor,
    error: Tensor,
    lag: int | None,
    seed: int,
    lr: float,
) -> Measured:
    T, layer = len(x), given.layer
    made = (error != 0).any(-1) & (torch.arange(T)[:, None] < lengths[None, :]).to(error.device)
    if not bool(made.any()):
        # The error entered through c or lower layers: it is replaced by a random one at each sample's last step.
        direction = torch.randn(error.shape[-1], generator=torch.Generator().manual_seed(seed)).to(error)
        last = (lengths - 1).to(error.device)
        error[last, torch.arange(error.shape[1])] = direction
        made[last, torch.arange(error.shape[1])] = True
    steps = made.any(1).nonzero().flatten().tolist()
    room = (lambda k: int(lengths.max()) - 1 - k) if place.reverse else (lambda k: k)
    offered = max(room(k) for k in steps)
    wanted = offered if lag is None else min(lag, offered)
    sources = _spread([k for k in steps if room(k) >= wanted] or [max(steps, key=room)])
    found = map_of(stack, error[sources], place.name, sources)
    curves = torch.full((len(sources), x.shape[1], offered + 1), torch.nan, dtype=torch.float64)
    for i, k in enumerate(sources):
        over_lag = found.over_lag(i).mT[:, : room(k) + 1]
        relative = over_lag - over_lag[:, :1]
        relative[~relative[:, 0].isfinite()] = torch.nan
        _cut(relative, given.cuts, k, place.reverse)
        if not place.reverse:
            curves[i, :, : relative.shape[1]] = relative
        else:
            inside = torch.arange(k, k + relative.shape[1])[None, :] < lengths[:, None]
            curves[i, :, : relative.shape[1]] = torch.where(inside, relative, torch.nan)
    over_lags = curves.flatten(0, 1)[:, : wanted + 1]
    curve, arriving = middle(over_lags)
    decay = flow.decay(curve, FRACTION) if bool(curve[0].isfinite()) else flow.Decay(-math.inf, 0.0, 0)
    slopes = torch.tensor([slope(row[: wanted + 1]) for row in curves.nanmedian(0).values], dtype=torch.float64)
    evidence = _evidence(given, place, x, stack, lengths, made)
    asked = lag is not None and lag <= offered
    evidence |= {
        "steps": float(T),
        "lag": float(wanted),
        "survival": math.exp(min(float(curve[-1]), 700.0)),
        "median_survival": math.exp(min(float(over_lags[:, -1].nanmedian()), 700.0)),
        "arriving": float(arriving[-1]),
        "half_arriving": float((arriving >= 0.5).nonzero().max()) if bool((arriving >= 0.5).any()) else 0.0,
        "offered": float(offered),
    }
    evidence["uninterrupted"] = float(max(k - max((c for c in given.cuts if c <= k), default=0) for k in sources) + 1)
    weights = [w for w in place.weights[:2] if w is not None]
    # Adam moves every weight by about lr; all in the error's direction, that is lr √N.
    step = (
        lr * math.sqrt(sum(w.numel() for w in weights)) / max(math.hypot(*(float(w.norm()) for w in weights)), 1e-300)
    )
    evidence["sensitivity"] = _sensitivity(given, place, fed, hx, stack, error, sources[-1 if not place.reverse else 0])
    evidence["step_change"] = evidence["sensitivity"] * step
    above = layer.num_layers - 1 - place.layer
    return Measured(place, above, curve, slopes, wanted if lag is None else lag, asked or lag is None, decay, evidence)


def middle(curves: Tensor) -> tuple[Tensor, Tensor]:
    """(curve, arriving) `[ℓ]` of the followed errors' own `[N, ℓ]`: ln √p + the median of those that are not 0, and p.

    p is the share of the errors that are not exactly 0 at the lag: relu units that are off lose an error in one sample
    and pass it on in another, and a weight's gradient is the mean over samples. √p is what their root mean square
    loses. Where none is 0 the curve is the median.
    """
    there, alive = (~curves.isnan()).sum(0), curves.isfinite()
    p = alive.sum(0) / there
    median = curves.where(alive, torch.nan).nanmedian(0).values
    return torch.where(p > 0, median + 0.5 * p.log(), torch.where(there > 0, -torch.inf, torch.nan)), p


def _spread(steps: list[int]) -> list[int]:
    if len(steps) <= SOURCES:
        return steps
    return sorted({steps[round(i * (len(steps) - 1) / (SOURCES - 1))] for i in range(SOURCES)})


def _cut(relative: Tensor, cuts: tuple[int, ...], k: int, reverse: bool) -> None:
    """Set the gradient to 0 beyond a state that was detached."""
    before = [c for c in cuts if c <= k]
    if before and not reverse:
        relative[:, k - before[-1] + 1 :] = -torch.inf


def slope(curve: Tensor) -> float:
    """The slope of a line through the finite values of a curve; NaN where there are fewer than two."""
    present = curve.isfinite()
    if int(present.sum()) < 2:
        return math.nan
    lag = torch.arange(len(curve), dtype=torch.float64)[present]
    lag = lag - lag.mean()
    return float((lag @ (curve[present] - curve[present].mean())) / (lag @ lag))


def _evidence(
    given: Given,
    place: LayerDirection,
    x: Tensor,
    stack: Stack,
    lengths: Tensor,
    made: Tensor,
) -> dict[str, float]:
    w_hh = place.weights.w_hh
    gates = gates_of(stack, place.name)
    found = {f"saturated_{g}": float(v.mean()) for g, v in zip(gates.gate_names, gates.saturation, strict=True)}
    found["saturated"] = float(gates.saturation.mean())
    if gates.log_carry is not None:
        half_life = gates.half_life.double()
        found["carry_half_life"] = float(half_life.median())
        found["longest_carry_half_life"] = float(half_life.quantile(0.9))
    elif w_hh is not None:
        if w_hh.shape[0] == w_hh.shape[1]:
            found["spectral_radius"] = float(torch.linalg.eigvals(w_hh).abs().max())
        found["spectral_norm"] = float(torch.linalg.matrix_norm(w_hh, 2))
    if w_hh is not None:
        blocks = w_hh.unflatten(0, (-1, given.layer.hidden_size))
        found["largest_block_norm"] = float(torch.linalg.matrix_norm(blocks, 2).max())
    followed = min(len(x), EXPONENT_STEPS)
    exponents = spectrum_of(stack, place.name, 1, warmup=followed // 4, last=followed)
    own = exponents.per_sample[:, 0]
    own = own[own.isfinite()]
    if len(own):
        found["lyapunov"] = float(own.mean())
        found["lyapunov_low"] = found["lyapunov"] - half_width(own)
    T, B = x.shape[:2]
    if place.layer == 0:
        inside = (torch.arange(T)[:, None] < lengths).to(x.device)
        found["input_scale"] = float(nn.functional.linear(x[inside], place.weights.w_ih).std())
    # Each sample's own last steps: what is packed has no padding, although x is filled up here.
    same = (x == x[lengths - 1, torch.arange(B)]).all(-1)
    runs = torch.stack([same[:n, b].flip(0).cumprod(0).sum() for b, n in enumerate(lengths.tolist())]).cpu()
    found["constant_tail"] = float(((runs - 1) / lengths).median())
    found["error_steps"] = float(made.any(1).sum()) / T
    found["detached"] = float(len(given.cuts))
    return found


def half_width(values: Tensor) -> float:
    """t s/√n: half of the 95 % interval of a mean; Student's t, as the samples are few. NaN of one."""
    n = len(values)
    return t_quantile(n - 1) * float(values.std()) / math.sqrt(n) if n > 1 else math.nan


def _sensitivity(
    given: Given,
    place: LayerDirection,
    fed: Tensor | PackedSequence,
    hx: object,
    stack: Stack,
    error: Tensor,
    k: int,
) -> float:
    """‖∂E_k/∂W‖ ‖W‖ / (‖∂E_k/∂h_k‖ ‖h_k‖): the relative change of the state per relative change of the weights."""
    wanted = [w for w in place.weights[:2] if w is not None]
    if place.layer == given.layer.num_layers - 1:
        h, gradients = _last_layer(stack, stack.index(place.name), error, k, getattr(given.layer, "clip", None))
    else:
        with torch.enable_grad():
            for w in wanted:
                w.requires_grad_(True)
            y, _ = given.layer(fed, hx)
            h = (nn.utils.rnn.pad_packed_sequence(y)[0] if isinstance(y, PackedSequence) else y)[k]
            gradients = torch.autograd.grad((h * error[k]).sum(), wanted)
            for w in wanted:
                w.requires_grad_(False)
    norm = math.hypot(*(float(d.norm()) for d in gradients))
    weights = math.hypot(*(float(w.norm()) for w in wanted))
    below = float((error[k].norm(dim=-1) * h.detach().norm(dim=-1)).sum())
    # A gradient beyond float64 counts as e⁷⁰⁰, which is near the end of float64's range.
    return (norm if math.isfinite(norm) else math.exp(700.0)) * weights / below if below > 0 else math.nan


def _last_layer(stack: Stack, place: int, error: Tensor, k: int, clip: float | None) -> tuple[Tensor, list[Tensor]]:
    """(h_k in the user's order, ∂E_k/∂W of the place), from the pass that was kept."""
    tr, width = stack.traces[place], stack.traces[place].y.shape[-1]
    part = slice((place % stack.directions) * width, (place % stack.directions + 1) * width)
    dy = torch.zeros_like(tr.y)
    dy[k] = stack.inputs.in_internal_order(error[k], 0)[:, part]
    gradients = engine.gradients_of_weights(tr, dy, (None,) * len(tr.final), clip)[:2]
    above = torch.cat([other.y[k] for other in stack.traces[-stack.directions :]], dim=-1)
    return stack.inputs.in_user_order(above, 0), [d for d in gradients if d is not None]
