"""What torch's tools see of our layers: leaves to torch.fx, torch's own class to TorchScript.

These tools know a layer by its class, or by the module that its class stands in.
"""

import warnings
from typing import Any, cast

import torch
from torch import nn

from unvanish import torch_internals


class TorchTools(nn.Module):
    """A layer that torch's tools take as they take the class of torch's that it derives from."""

    def _as_torchs(self) -> nn.Module:
        """The same weights in torch's class.

        Raises:
            ValueError: the layer uses what torch's does not have.
        """
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in this layer's place."""
        return self._as_torchs()

    def _leaf(self, x: Any, hx: Any, **options: Any) -> Any:
        """The call as one node of the graph that torch.fx traces, as of torch's own layers; None outside fx."""
        if not isinstance(x, torch.fx.Proxy):
            return None
        tracer: Any = x.tracer
        if getattr(tracer, "root", None) is self:
            return None
        if torch_internals.quantizes(tracer):
            # Its tables of what can be quantised hold torch's own classes.
            cast(Any, self).__class__ = type(self._as_torchs())
        given = {name: v for name, v in options.items() if v is not None}
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,) if hx is None else (x, hx), given)

    @property
    def qconfig(self) -> Any:
        """How torch's eager quantisation is to treat the layer."""
        if "qconfig" not in vars(self):
            raise AttributeError("qconfig: not set")
        return vars(self)["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        warnings.warn(
            f"torch's eager quantisation knows layers by their class and leaves this {type(self).__name__} of unvanish "
            "as it is; to quantise it, call unvanish.restore(model) first",
            UserWarning,
            stacklevel=2,
        )
        vars(self)["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        del vars(self)["qconfig"]
