"""Inputs that drive gates into saturation, ids used as numbers, units that are off, copies of each other."""

import torch
from torch import Tensor, nn

from unvanish.diagnosis.exact.testbench import RECURRENT, Bench
from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.structure import tensors
from unvanish.nn.modules import RecurrentModule

SIGMOID, TANH = 4.4, 2.2
"""|pre-activation| beyond which the slope is below 5 % of its maximum"""
MOST = 0.6
DRAWN = 1 << 16
"""of more steps of all samples than these, as many are drawn"""


def input_scale(bench: Bench) -> list[Finding]:
    """Saturation by W_ih x + b alone, with the inputs unchanged and standardised per feature."""
    seen: set[str] = set()
    found: list[Finding] = []
    for call in bench.training.trace.modules:
        module = call.module
        if call.path in seen or not isinstance(module, RECURRENT) or not call.inputs:
            continue
        seen.add(call.path)
        weight, bias = _weights(module)
        if weight is None or getattr(module, "nonlinearity", "tanh") == "relu":
            continue
        x = call.inputs[0].detach().to(weight.dtype)
        if not x.is_floating_point() or x.shape[-1] != weight.shape[1]:
            continue
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) > DRAWN:
            # Not every n-th: that could be the steps of one sample.
            drawn = torch.randint(len(flat), (DRAWN,), generator=torch.Generator().manual_seed(0))
            flat = flat[drawn.to(flat.device)]
        share = _saturated(module, flat @ weight.T + bias)
        if share < MOST:
            continue
        spread = flat.std(0)
        usual = (flat - flat.mean(0)) / torch.where(spread > 0, spread, torch.ones_like(spread))
        after = _saturated(module, usual @ weight.T + bias)
        rms = float(flat.double().square().mean().sqrt())
        if after < share / 2 and rms > 3:
            found.append(
                Finding(
                    "input_scale", "error", call.path,
                    f"The inputs of `{call.path}` are so large that they drive its units into saturation.",
                    f"root mean square of the inputs: {rms:.3g}; {share:.0%} of the pre-activations lie where the "
                    f"slope is below 5 % of its maximum, {after:.0%} if every feature is standardised.",
                    "Standardise the inputs by the training set's mean and standard deviation, "
                    "`x = (x - mean) / std`, or put a normalisation layer in front.",
                )
            )  # fmt: skip
        else:
            found.append(
                Finding(
                    "saturated", "error" if share > 0.9 else "warning", call.path,
                    f"Units of `{call.path}` are saturated by its own weights: no gradient passes through them.",
                    f"{share:.0%} of the pre-activations W_ih x + b lie where the slope is below 5 % of its maximum, "
                    f"{after:.0%} with standardised inputs; standard deviation of the weights: "
                    f"{float(weight.std()):.3g}.",
                    "Re-initialise the weights; torch's default is uniform in ±1/sqrt(units).",
                )
            )  # fmt: skip
    return found[:1]


def _weights(module: nn.Module) -> tuple[Tensor | None, Tensor]:
    weight = getattr(module, "weight_ih_l0", getattr(module, "weight_ih", None))
    if not isinstance(weight, Tensor):
        return None, torch.zeros(())
    bias = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    for name in ("bias_ih_l0", "bias_hh_l0", "bias_ih", "bias_hh"):
        own = getattr(module, name, None)
        if isinstance(own, Tensor):
            bias = bias + own.detach()
    return weight.detach(), bias


def _saturated(module: nn.Module, before: Tensor) -> float:
    """Share of pre-activations on a flat part of their sigmoid or tanh. A gate held open by its bias is intentional and
    does not count, so the mean over the data is subtracted first."""
    size = getattr(module, "hidden_size", before.shape[-1])
    gates = before.unflatten(-1, (-1, size)) if before.shape[-1] % size == 0 else before.unsqueeze(-2)
    limits = torch.full((gates.shape[-2],), SIGMOID)
    candidate = {4: 2, 3: 2, 1: 0}.get(len(limits))
    if candidate is not None:
        limits[candidate] = TANH
    gates = gates.abs()
    if len(limits) == 4:  # the forget gate's bias may be large on purpose
        return float((gates[:, [0, 2, 3]] > limits[[0, 2, 3], None].to(gates)).double().mean())
    if len(limits) == 3:  # so may the update gate's
        return float((gates[:, [0, 2]] > limits[[0, 2], None].to(gates)).double().mean())
    return float((gates > limits[:, None].to(gates)).double().mean())


def ids_as_numbers(bench: Bench) -> list[Finding]:
    """Whole numbers of an integer input that reach a weight directly, without an embedding."""
    ids = [
        t for t in tensors(bench.subject.call) if not t.is_floating_point() and t.dtype in (torch.int64, torch.int32)
    ]
    ids = [t for t in ids if t.numel() > 4 and int(t.max()) - int(t.min()) >= 9 and len(t.unique()) >= 6]
    if not ids:
        return []
    for call in bench.training.trace.modules:
        if not isinstance(call.module, nn.Linear | nn.Conv1d | RecurrentModule) or not call.inputs:
            continue
        x = call.inputs[0].detach()
        for given in ids:
            if x.numel() != given.numel() and not (
                x.dim() and x.shape[-1] == 1 and isinstance(call.module, nn.RNNCellBase)
            ):
                continue
            values = x.reshape(-1).sort().values.double().cpu()
            own = given.reshape(-1).sort().values.double().cpu()
            if len(values) != len(own):
                continue
            scale = float(values.abs().max()) / max(float(own.abs().max()), 1e-30)
            if scale > 0 and torch.allclose(values, own * scale, rtol=1e-5, atol=1e-6 * scale):
                return [
                    Finding(
                        # Several whole numbers per step may well be counts.
                        "ids_as_numbers", "error" if given.dim() < 3 or given.shape[-1] == 1 else "warning", call.path,
                        f"`{call.path}` receives ids as if they were quantities: id 7 is not between 6 and 8 in "
                        "meaning.",
                        f"Its input holds the {len(given.unique())} different ids of an integer input, from "
                        f"{int(given.min())} to {int(given.max())}, as numbers.",
                        f"Look them up first: nn.Embedding({int(given.max()) + 1}, features), or one_hot.",
                    )
                ]  # fmt: skip
    return []


def dead(bench: Bench) -> list[Finding]:
    """relu units that are off for every sample and step."""
    results = [
        (c.path, c.result) for c in bench.training.trace.functions
        if c.name in ("relu", "relu_") and isinstance(c.result, Tensor) and c.result.numel() > 8
    ] + [
        (c.path, c.outputs[0]) for c in bench.training.trace.modules
        if getattr(c.module, "nonlinearity", "") == "relu" and isinstance(c.module, RECURRENT) and c.outputs
    ]  # fmt: skip
    by_path: dict[str, list[Tensor]] = {}
    for path, value in results:
        by_path.setdefault(path, []).append(value.detach())
    for path, values in by_path.items():
        if all(not bool((v != 0).any()) for v in values):
            return [
                Finding(
                    "dead", "error", path,
                    "All relu units are off for every sample and step: nothing passes them, forward or backward.",
                    f"{sum(v.numel() for v in values)} of as many outputs are exactly 0.",
                    "Re-initialise the weights and biases before them, with smaller inputs or a smaller learning "
                    "rate; or use leaky_relu.",
                )
            ]  # fmt: skip
    return []


def symmetric(bench: Bench) -> list[Finding]:
    """Units that start as copies of each other get the same gradient, and stay copies."""
    for call in bench.training.trace.modules:
        module = call.module
        if not isinstance(module, RECURRENT) or getattr(module, "hidden_size", 0) < 2 or not call.outputs:
            continue
        weight, _ = _weights(module)
        if weight is None or weight.shape[0] % module.hidden_size:
            continue
        rows = weight.unflatten(0, (-1, module.hidden_size))
        y = call.outputs[0].detach()
        if bool((rows == rows[:, :1]).all()) and bool((y == y[..., :1]).all()):
            return [
                Finding(
                    "symmetric", "error", call.path,
                    f"All units of `{call.path}` are copies of each other: they get the same gradient and stay copies, "
                    "so that it has the capacity of one unit.",
                    f"{module.hidden_size} units give exactly the same output for all samples and steps; their input "
                    "weights are equal.",
                    "Initialise its weights at random: reset_parameters(), or orthogonal and xavier inits. Constants "
                    "are for biases.",
                )
            ]  # fmt: skip
    return []
