"""One training pass of a copy, seen from outside: the arguments and results of its modules and of torch's functions."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from unvanish import torch_internals
from unvanish.diagnosis.structure import mapped, tensors
from unvanish.nn.layers import SequenceLayer


@dataclass
class Called:
    """A call of one of torch's functions."""

    name: str
    """ "cross_entropy" """
    args: tuple[Any, ...]
    options: dict[str, Any]
    result: Any
    path: str
    """innermost module that was running"""
    inside: bool
    """whether the model was running; otherwise the call belongs to the loss or the step"""

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at this position or with this name."""
        return self.args[position] if len(self.args) > position else self.options.get(name, default)


@dataclass
class ModuleCall:
    """A call of a module."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    options: dict[str, Any]
    output: Any = None

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors among its arguments."""
        return tensors((self.args, self.options))

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors that it returned."""
        return tensors(self.output)


DROPPING = {"dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d"}
"""functions of (input, p, training) that set random values to zero"""
THRESHOLDS = {"gt", "ge", "lt", "le", "__gt__", "__ge__", "__lt__", "__le__", "sign", "round", "heaviside"}
"""functions whose derivative is 0 or does not exist"""
WATCHED = {
    "cross_entropy", "nll_loss", "log_softmax", "binary_cross_entropy_with_logits", "binary_cross_entropy", "kl_div",
    "ctc_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "gaussian_nll_loss", "relu", "add", "sub",
    "rsub", "mul", "div", "sum", "mean", "relu_", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__",
    "__truediv__", "__eq__", "eq", *THRESHOLDS, *DROPPING,
}  # fmt: skip
COMPARING = {
    "cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "binary_cross_entropy", "mse_loss", "l1_loss",
    "smooth_l1_loss", "huber_loss", "kl_div", "gaussian_nll_loss", "sub", "__sub__",
}  # fmt: skip
"""loss functions, whose second argument is a target"""


class Trace(TorchFunctionMode):
    """A context that records the calls of `model`'s modules and of torch's functions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.functions: list[Called] = []
        self.modules: list[ModuleCall] = []
        self._running: list[tuple[ModuleCall, AbstractContextManager[Any]]] = []
        """calls that have not returned, each with the context it runs in"""
        self._model = model
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Trace":
        for path, module in self._model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            self._handles.append(module.register_forward_pre_hook(self._before(path), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, options: Any) -> None:
            call = ModuleCall(path, module, args, options)
            self.modules.append(call)
            # A mode would make layers of ours leave the engine for torch's own forward.
            ours = isinstance(module, SequenceLayer)
            within = torch_internals.no_functions_overridden() if ours else nullcontext()
            self._running.append((call, within))
            within.__enter__()

        return hook

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        while self._running:
            call, within = self._running.pop()
            within.__exit__(None, None, None)
            if call.module is module:
                call.output = output
                return

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        name = getattr(func, "__name__", "")
        if name in WATCHED:
            path = self._running[-1][0].path if self._running else ""
            self.functions.append(Called(name, args, options, result, path, bool(self._running)))
        return result


@dataclass
class Pass:
    """A traced training pass with its gradients."""

    model: nn.Module
    trace: Trace
    loss: Tensor | None = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    """∂E/∂w of every parameter that requires one; None where autograd found no way"""
    answers: list[Tensor] = field(default_factory=list)
    """floating-point outputs of the model's first call"""
    error: Exception | None = None
    """the error that the pass raised"""


def traced(model: nn.Module, loss: Callable[[nn.Module], Tensor], *, backward: bool = True) -> Pass:
    """Run the loss of this model forward and backward, and record its calls."""
    trace = Trace(model)
    done = Pass(model, trace)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(trace)
            done.loss = loss(model)
        own = next((call for call in trace.modules if call.path == ""), None)
        done.answers = [t for t in (own.outputs if own else []) if t.is_floating_point()]
        if backward and done.loss.requires_grad:
            names = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            for _, p in names:
                p.grad = None
            done.loss.backward(retain_graph=True)
            done.gradients = {n: None if p.grad is None else p.grad.detach() for n, p in names}
    except Exception as error:
        done.error = error
    return done


def double(value: Any) -> Any:
    """The same structure with its floating-point tensors in float64."""
    return mapped(value, lambda t: t.double() if t.is_floating_point() else t)
