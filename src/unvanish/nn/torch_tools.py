"""How torch's tools treat our layers: as leaves in torch.fx, as torch's own class in TorchScript.

These tools recognise a layer by its class, or by the Python module that defines the class.
"""

import warnings
from typing import Any, cast

import torch
from torch import nn

from unvanish import torch_internals


class TorchTools(nn.Module):
    """A layer that torch's tools treat like the torch class that it derives from."""

    def _as_torchs(self) -> nn.Module:
        """The same weights in torch's class.

        Raises:
            ValueError: the layer uses an option that torch's does not have.
        """
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in this layer's place."""
        return self._as_torchs()

    def _leaf(self, x: Any, hx: Any, **options: Any) -> Any:
        """The call as one node of the graph that torch.fx traces, as for torch's own layers; None outside fx."""
        if not isinstance(x, torch.fx.Proxy):
            return None
        tracer: Any = x.tracer
        if getattr(tracer, "root", None) is self:
            return None
        if torch_internals.quantizes(tracer):
            # Its tables of quantisable modules contain torch's own classes.
            cast(Any, self).__class__ = type(self._as_torchs())
        given = {name: v for name, v in options.items() if v is not None}
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,) if hx is None else (x, hx), given)

    @property
    def qconfig(self) -> Any:
        """How torch's eager quantisation should treat the layer."""
        if "qconfig" not in vars(self):
            raise AttributeError("qconfig: not set")
        return vars(self)["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        vars(self)["qconfig"] = value
        advice = "to quantise it, call unvanish.restore(model) first"
        if value is not None:
            try:
                kind = type(self._as_torchs())
            except ValueError as error:
                advice = f"torch's, which it quantises, can't take its place: {error}"
            else:
                # It compares with the classes in torch.nn, where ours may stand in the place of torch's.
                if vars(nn).get(kind.__name__) is kind:
                    cast(Any, self).__class__ = kind
                    return
        warnings.warn(
            f"torch's eager quantisation knows layers by their class and leaves this {type(self).__name__} of unvanish "
            f"as it is; {advice}",
            UserWarning,
            stacklevel=2,
        )

    @qconfig.deleter
    def qconfig(self) -> None:
        del vars(self)["qconfig"]
