"""What is used of torch without documentation, one function each: the question it answers, and what to use instead if
torch drops it.

torch's own layers keep their weights in `_flat_weights`, and modules their parts in `_parameters` and `_modules`; those
names are part of what a layer of torch is, and are used where layers are.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C import _autograd
from torch.autograd import Variable, forward_ad
from torch.autograd.graph import Node
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._device import DeviceContext

Dropout = _DropoutNd
"""what torch's dropout layers have in common. Instead: a tuple of them"""


def transform_active() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp, functionalize) is running. Instead: look for functorch's
    wrappers among the arguments."""
    return torch._C._are_functorch_transforms_active()


def forward_mode_active() -> bool:
    """Whether forward-mode differentiation is running. Instead: `forward_ad.unpack_dual` of every argument."""
    return forward_ad._current_level >= 0


def writable_backends() -> AbstractContextManager[None]:
    """Within, the settings of torch.backends can be written, also after `disable_global_flags`, which torch's own test
    library calls when it is imported. Instead: leave the settings alone where `torch.backends.flags_frozen()`."""
    return getattr(torch.backends, "__allow_nonbracketed_mutation")()


def mode_active() -> bool:
    """Whether a TorchDispatchMode sees torch's operations. Instead: always call the kernels as operators."""
    return torch._C._len_torch_dispatch_stack() > 0


def fake_mode_active() -> bool:
    """Whether operations return FakeTensors, which have a shape but no memory. Instead: test what `torch.empty(0)`
    returns."""
    return mode_active() and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def captures_graph() -> bool:
    """Whether calls are recorded into a graph (compile, export, make_fx, AOTAutograd), which then holds our operators.
    Instead: `torch.compiler.is_compiling` alone, which knows nothing of make_fx."""
    if torch.compiler.is_compiling():
        return True
    if not mode_active():
        return False
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.PROXY, keys.FUNCTIONAL))


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)` where no transform is active and none has left a wrapper among the tensors. Instead:
    `function.apply`, which looks for them."""
    base: Any = super(torch.autograd.Function, function)
    return base.apply(*args)


def saved_tensors_hooked() -> bool:
    """Whether what autograd saves passes through a user's hooks, which may return other tensors. Instead: assume so, at
    the price of checking everything that was saved."""
    return _autograd._top_saved_tensors_default_hooks(False) is not None


def keeps_graph() -> bool:
    """Whether the backward pass that is running retains the graph. Instead: assume so, at the price of memory."""
    return _autograd._get_current_graph_task_keep_graph()


def backward_number() -> int:
    """The number of the backward pass that is running, −1 outside. Instead: count passes with a callback on the engine,
    which runs once per pass."""
    return torch._C._current_graph_task_id()


def after_backward(callback: Callable[[], None]) -> None:
    """Have this called when the backward pass that is running has ended. Instead: a hook on every leaf, which knows
    nothing of the others."""
    Variable._execution_engine.queue_callback(callback)


def vjp(outputs: Sequence[Tensor], errors: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Σ_k errors_kᵀ ∂outputs_k/∂input of each input. Instead: `torch.autograd.grad(outputs, inputs, errors)`, which
    imports SymPy to compare their shapes, and takes more than a second for it."""
    return Variable._execution_engine.run_backward(
        tuple(outputs), tuple(errors), False, False, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )


def tracing() -> bool:
    """Whether torch.jit.trace is running. Instead: `torch.jit.is_tracing`, which scripted code may not call."""
    return torch._C._get_tracing_state() is not None


def overridden(given: Iterable[Any]) -> bool:
    """Whether calls of torch's functions with these arguments are intercepted: by a tensor's `__torch_function__`, or a
    TorchFunctionMode other than the one that sets the default device. Instead: `torch.overrides.has_torch_function`
    alone, which is true under a default device too."""
    given = tuple(given)
    if not torch.overrides.has_torch_function(given):
        return False
    if any(not isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack()):
        return True
    disabled = torch._C._disabled_torch_function_impl
    return any(getattr(type(v), "__torch_function__", disabled) is not disabled for v in given if type(v) is not Tensor)


def another_default_device() -> bool:
    """Whether tensors that name no device are made elsewhere than on the CPU (`torch.set_default_device`). Instead:
    `torch.get_default_device` alone, which takes microseconds."""
    return torch._C._len_torch_function_stack() > 0 and torch.get_default_device().type != "cpu"


def fixed(size: int | torch.SymInt) -> bool:
    """Whether an axis has the same size in every run of a graph that is being captured. Instead: `isinstance(size,
    int)`, which torch.compile answers with yes for any size. Takes a second to import."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(size)


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's own layers multiply in this dtype of less than single precision by instructions of this CPU: with
    AVX-512 alone, oneDNN emulates bfloat16. Instead: time a product of matrices in it against one in float32."""
    ask = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if ask is None or not torch.backends.mkldnn.is_available() or not getattr(torch.ops.mkldnn, ask)():
        return False
    return dtype is torch.float16 or not torch.cpu._is_avx512_supported() or torch.cpu._is_avx512_bf16_supported()


def quantizes(tracer: Any) -> bool:
    """Whether torch.fx traces a model in order to quantise it. Instead: the name of the tracer's class."""
    made = sys.modules.get("torch.ao.quantization.fx.tracer")
    return made is not None and isinstance(tracer, made.QuantizationTracer)


def notes(node: Node) -> dict[Any, Any]:
    """A dict for notes at a node of the graph; torch declares the property as a method. Instead: a weak dictionary by
    node."""
    return cast(dict[Any, Any], node.metadata)


def as_plain_tensors() -> AbstractContextManager[Any]:
    """Within, subclasses of Tensor are treated as tensors. Instead: `as_subclass(Tensor)` of every argument."""
    return torch._C.DisableTorchFunctionSubclass()


def no_functions_overridden() -> Any:
    """A context in which no mode or subclass sees torch's functions. Instead: leave the mode, and enter it again."""
    return torch._C.DisableTorchFunction()


def fake(v: Tensor) -> bool:
    """Whether v has a shape but no memory. Instead: the name of its class."""
    return isinstance(v, torch._subclasses.FakeTensor)


def batched(v: Tensor) -> bool:
    """Whether v differs from sample to sample of a vmap that is running, outside torch.compile. Instead:
    `transform_active`, for all transforms alike."""
    if torch.compiler.is_compiling():
        return False  # torch.compile can't trace the question
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while functorch.is_functorch_wrapped_tensor(v):
        if functorch.is_batchedtensor(v):
            return True
        v = functorch.get_unwrapped(v)
    return False


def wrapped_by_transform(v: Tensor) -> bool:
    """Whether v is a wrapper of a torch.func transform. Instead: `transform_active`."""
    return torch._C._functorch.is_functorch_wrapped_tensor(v)  # pyright: ignore[reportAttributeAccessIssue]


def compiled(module: nn.Module) -> nn.Module | None:
    """The module that torch.compile made this one from; None if it is not of its making. Instead: the name of its
    class, and its one child."""
    made = sys.modules.get("torch._dynamo")
    return cast(Any, module)._orig_mod if made is not None and isinstance(module, made.OptimizedModule) else None


def compiler_that_compares() -> AbstractContextManager[Any]:
    """Within, what torch.compile made runs compiled however often it was compiled before, and draws eager's random
    numbers. Instead: `torch.compiler.reset`, which also throws away what was compiled. Takes seconds to import."""
    inductor: Any = import_module("torch._inductor.config")
    stack = ExitStack()
    stack.enter_context(torch._dynamo.config.patch(recompile_limit=256))
    stack.enter_context(inductor.patch(fallback_random=True))
    return stack


def flatten_for_cudnn(weights: list[Tensor], kernel: str, hidden: int, projected: int) -> None:
    """Put the weights of one layer and direction, in torch's order, into one block of memory, in place, where cuDNN
    will run `kernel` ("lstm", "gru", "rnn_tanh", "rnn_relu"); projected: the size of a projected h, 0 without. Instead:
    `flatten_parameters` of a layer that is made to hold them, or nothing: cuDNN's caller then copies them at every
    call, with a warning."""
    w_ih, private = weights[0], cast(Any, torch)
    if not (w_ih.is_cuda and torch.backends.cudnn.is_acceptable(w_ih) and private._use_cudnn_rnn_flatten_weight()):
        return
    from torch.backends.cudnn import rnn

    mode = rnn.get_cudnn_mode(kernel.upper())
    with torch.no_grad(), torch.cuda.device_of(w_ih):
        private._cudnn_rnn_flatten_weight(
            weights, len(weights), w_ih.shape[1], mode, hidden, projected, num_layers=1, batch_first=False,
            bidirectional=False,
        )  # fmt: skip


def storage_key(v: Tensor) -> int:
    """The same number for tensors that share memory, also where that memory is not real. Instead: `data_ptr`, for real
    memory."""
    return v.untyped_storage()._cdata


def decomposition(func: Any) -> Callable[..., Any] | None:
    """An operation in terms of simpler ones, or None. Instead: torch.export's table."""
    from torch._decomp import decomposition_table

    return decomposition_table.get(func)


_keys_of = torch._C._dispatch_keys


def _keys(v: Tensor) -> int:
    return _keys_of(v).raw_repr()


def _ordinary_keys() -> frozenset[int]:
    with torch.inference_mode():
        inference = torch.empty(0)
    return frozenset({_keys(torch.empty(0, device="cpu")), _keys(inference)})


_ORDINARY_TYPES = (Tensor, nn.Parameter)
_ORDINARY_KEYS = _ordinary_keys()


def odd_one(given: Iterable[Tensor | None]) -> Tensor | None:
    """The first tensor that is not ordinary, or None if all are.

    An ordinary tensor is dense, and its values are what lies in the CPU's memory: it is not a subclass, no wrapper of a
    transform, not sparse, and has no negation or conjugation pending. Instead of dispatch keys: test `device`,
    `layout`, `is_neg`, `is_conj` and `_is_zerotensor`, and call the kernels as operators under transforms.
    """
    for v in given:
        if v is not None and (type(v) not in _ORDINARY_TYPES or _keys_of(v).raw_repr() not in _ORDINARY_KEYS):
            return v
    return None


def kind(v: Tensor) -> str:
    """What makes v other than ordinary, as the end of a sentence whose subject is v."""
    if type(v) not in _ORDINARY_TYPES:
        return f"is a {type(v).__module__}.{type(v).__qualname__}, a subclass of Tensor"
    if v.device.type != "cpu":
        return f"is on {v.device}"
    if v.layout is not torch.strided:
        return f"has the layout {v.layout}"
    if v._is_zerotensor():
        return "is a tensor of zeros without memory (call .clone())"
    if v.is_neg():
        return "has its negation pending (call .resolve_neg())"
    if v.is_conj():
        return "has its conjugation pending (call .resolve_conj())"
    return f"has the dispatch keys {_keys_of(v)}"


def materialised(v: Tensor) -> Tensor:
    """v with its values in memory: what is pending is carried out, and a subclass that only adds behaviour in Python is
    read as the tensor that it is. Where that is not enough, v as it came."""
    if odd_one((v,)) is None:
        return v
    if type(v) not in _ORDINARY_TYPES and _keys(v) in _ORDINARY_KEYS:
        return v.as_subclass(Tensor)
    if v.layout is torch.strided and (v.is_neg() or v.is_conj() or v._is_zerotensor()):
        return v.clone().resolve_neg().resolve_conj()
    return v
