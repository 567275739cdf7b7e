"""One layer's gradients as the backend computes them, compared with those recomputed in float64."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unvanish.engine.precision import rounds_to_tf32
from unvanish.flow.audit_report import LayerAudit, StepError
from unvanish.flow.recomputed import Errors, Noise, outputs_of, recomputed, relative_error, step_norms
from unvanish.flow.tapped import Tapped, TappedCall

DRAWS = 3
"""runs in float64 in which every input is changed by half a unit in the last place of the backend's dtype"""
MARGIN = {torch.bfloat16: 4.0, torch.float16: 4.0, torch.float32: 10.0, torch.float64: 100.0}
"""Rounding explains this many times the largest error of these runs and of the loop in the backend's dtype. Over 1,050
random layers the kernels' error was at most 1.9 times that in bfloat16, 5.2 times in float32, 22 times in float64."""


def arrived(call: TappedCall, gradients: dict[int, Tensor]) -> list[Tensor | None]:
    """∂E/∂y and ∂E/∂(each final state); None where nothing arrived."""
    return [gradients.get(id(_data(v))) for v in (call.y, *call.final)]


def compare(
    name: str,
    seen: Tapped,
    calls: list[TappedCall],
    gradients: dict[int, Tensor],
    compiled: dict[str, Tensor] | None = None,
) -> LayerAudit:
    """The comparison of one layer over all its calls that a gradient reached.

    Args:
        name: of the layer.
        seen: its module, as it was tapped.
        calls: those that a gradient reached.
        gradients: id of a tensor → the gradient that autograd found for it.
        compiled: the weights' ∂E/∂W of the compiled model, if that backend is audited: then inputs, states and outputs
            are inside its graph, and only the weights are compared.
    """
    module = seen.module
    coarse = max((call.dtype for call in calls), key=lambda dtype: torch.finfo(dtype).eps)
    rounded = torch.float32 if coarse == torch.float64 else coarse
    sums = _Sums({}, {}, [{} for _ in range(1 + DRAWS)])
    outputs: list[tuple[Tensor, Tensor]] = []
    by_step: list[list[Tensor]] = []
    views: dict[str, dict[int, Tensor]] = {}
    for call in calls:
        y, *final = arrived(call, gradients)
        exact, out = recomputed(module, call, Errors(y, tuple(final)), torch.float64)
        rough = [recomputed(module, call, Errors(y, tuple(final)), rounded)[0]]
        for seed in range(DRAWS):
            noise = Noise(torch.finfo(rounded).eps / 2, seed)
            rough.append(recomputed(module, call, Errors(y, tuple(final)), torch.float64, noise)[0])
        outputs += zip(outputs_of(module, call), out, strict=True)
        for key, v in ({"x": _data(call.x)} | dict(zip(("h0", "c0"), call.hx, strict=False))).items():
            sums.append(key, _found(gradients, v), exact[key], *(r[key] for r in rough))
        x = [exact["x"], *(v - exact["x"] for v in (_found(gradients, _data(call.x)), *(r["x"] for r in rough)))]
        by_step.append([step_norms(module, call, v) for v in x])
        for key, w in call.weights.items():
            if w.requires_grad:
                # Calls may share a weight's tensor, whose gradient then is their sum.
                new = id(w) not in views.setdefault(key, {})
                views[key][id(w)] = w
                sums.add(
                    key,
                    _found(gradients, w) if new else torch.zeros((), device="cpu"),
                    exact[key],
                    *(r[key] for r in rough),
                )
    names = [*views, *(key for key in sums.reference if key not in views)]
    if compiled is not None:
        names = [key for key in views if key in compiled]
        for key in names:
            # Other uses of the weight, a penalty for instance, are taken out as the uncompiled model has them.
            elsewhere = _found(gradients, module.get_parameter(key)) - sums.backend[key][0]
            sums.backend[key] = [compiled[key].detach().cpu().double() - elsewhere]
    errors = {_label(module, k): relative_error(zip(sums.backend[k], sums.reference[k], strict=True)) for k in names}
    rounding = max(
        relative_error(zip(again[k], sums.reference[k], strict=True)) for again in sums.rounded for k in sums.reference
    )
    eps, label = torch.finfo(rounded).eps, str(coarse).removeprefix("torch.")
    factor = torch.finfo(coarse).eps / eps
    own = any(getattr(module, option, None) is not None for option in ("clip", "h_detach"))  # run without cuDNN
    cudnn = isinstance(module, nn.RNNBase) and torch.backends.cudnn.enabled and not own
    if coarse == torch.float32 and _data(calls[0].x).is_cuda and rounds_to_tf32(cudnn):
        label, factor = "TF32", 2.0**13
    explained = MARGIN[coarse] * factor * max(rounding, eps / 2)
    kind = next(b.__name__ for b in type(module).__mro__ if not b.__name__.startswith("Parametrized"))
    if compiled is not None:
        return LayerAudit(name, kind, label, len(calls), errors, explained)
    # Where a gradient has left the range of the dtype, the two can't be compared.
    floor = torch.finfo(rounded).tiny / eps
    size, *apart = (torch.cat(column) for column in zip(*by_step, strict=True))
    found, *again = (float(torch.where(size > floor, d / size, 0.0).max()) for d in apart)
    step = StepError(found, MARGIN[coarse] * factor * max(*again, eps / 2))
    return LayerAudit(name, kind, label, len(calls), errors, explained, relative_error(outputs), step)


class _Sums(NamedTuple):
    """Gradient by name: a tensor per call, or one over all calls."""

    backend: dict[str, list[Tensor]]
    reference: dict[str, list[Tensor]]
    rounded: list[dict[str, list[Tensor]]]

    def append(self, key: str, *values: Tensor) -> None:
        for column, v in zip((self.backend, self.reference, *self.rounded), values, strict=True):
            column.setdefault(key, []).append(v)

    def add(self, key: str, *values: Tensor) -> None:
        for column, v in zip((self.backend, self.reference, *self.rounded), values, strict=True):
            column[key] = [column[key][0] + v.double() if key in column else v.double()]


def _found(gradients: dict[int, Tensor], v: Tensor) -> Tensor:
    """The backend's gradient in float64 on the CPU; 0 where it gave none."""
    d = gradients.get(id(v))
    return (torch.zeros_like(v) if d is None else d).detach().cpu().double()


def _label(module: nn.Module, key: str) -> str:
    """ "weight_hh_l1_reverse" → "W_hh l1.reverse", and "W_hh" where there is one layer and direction."""
    stem, _, place = key.partition("_l")
    short = stem.replace("weight_", "W_").replace("bias_", "b_")
    single = not isinstance(module, nn.RNNBase) or (module.num_layers == 1 and not module.bidirectional)
    return short if single or not place else f"{short} l{place.replace('_', '.')}"


def _data(v: Any) -> Tensor:
    return v if isinstance(v, Tensor) else v.data
