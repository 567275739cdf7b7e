"""A Lightning callback: how far the error reaches back, logged while a model trains."""

import math
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor, distributed, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from unvanish.flow.adjoint_map import adjoint_map
from unvanish.flow.reach import Decay, decay
from unvanish.nn.modules import evaluating, layer_directions, time_major


class _Heard(NamedTuple):
    """A layer's input of one call, a few samples of it."""

    x: Tensor | PackedSequence
    hx: Any


class GradientFlow(lightning.Callback):
    """Rate, half-life and reach of the error in every recurrent layer, at every `every`-th optimizer step.

    The error is one made at the layer's last step alone, a random unit vector: of the flow summed over all steps
    nothing can be said of reach, since new error enters everywhere. Measured is ‖∂E_T/∂s_{T−ℓ}‖ of the samples that
    the layer has just been given, s = c for the LSTM and h for the others, with the weights of the moment.

        lightning.Trainer(callbacks=[uv.flow.GradientFlow(every=100)])

    Logged to all of the trainer's loggers, per layer and direction:

    - `gradient_flow/encoder.lstm.l0/rate`, nats per step; −∞ where the layer is dead and lets no error in;
    - `…/half_life`, steps; left out where the error does not fade;
    - `…/reach`, steps: the largest lag at which a `fraction` of the error is left;
    - a picture of the curves, where a logger takes pictures (TensorBoard, W&B).

    In a distributed run every process measures its own samples, and the median is taken over those of all.
    `latest` holds what was logged last.

    Args:
        every: optimizer steps between two measurements; the first is measured.
        fraction: of the error at lag 0 that still counts as reached.
        samples: measured per process and step.
        pictures: whether to draw.
        seed: of the random error.

    Raises:
        ValueError: an option is out of range; on fitting, the model has no nn.RNN, nn.LSTM or nn.GRU.
    """

    def __init__(
        self, every: int = 100, *, fraction: float = 0.01, samples: int = 8, pictures: bool = True, seed: int = 0
    ) -> None:
        if every < 1 or samples < 1:
            raise ValueError(f"every, samples: expected at least 1, got {every} and {samples}")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction: expected a number between 0 and 1, got {fraction}")
        self.every, self.fraction, self.samples, self.pictures, self.seed = every, fraction, samples, pictures, seed
        self.latest: dict[str, Decay] = {}
        """layer and direction → rate, half-life and reach"""
        self._heard: dict[str, _Heard] = {}
        self._handles: list[Any] = []
        self._layers: dict[str, nn.RNNBase] = {}
        self._measured = -1

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._layers = {name: m for name, m in pl_module.named_modules() if isinstance(m, nn.RNNBase)}
        if not self._layers:
            raise ValueError(
                f"model: {type(pl_module).__name__} has no nn.RNN, nn.LSTM or nn.GRU; drop the GradientFlow callback"
            )
        self._measured = -1

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step != self._measured and not self._handles:
            for name, layer in self._layers.items():
                self._handles.append(layer.register_forward_pre_hook(self._hear(name), with_kwargs=True))

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not self._handles:
            return
        self._stop_listening()
        self._measured = trainer.global_step
        curves = _gather({name: curve for layer in self._heard for name, curve in self._measure(layer)})
        self._heard.clear()
        middle = {name: _middle(curve) for name, curve in curves.items()}
        self.latest = {name: _decay(curve, self.fraction) for name, curve in middle.items()}
        if trainer.is_global_zero:
            self._log(trainer, middle)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._stop_listening()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._stop_listening()

    def state_dict(self) -> dict[str, Any]:
        return {"latest": {name: tuple(found) for name, found in self.latest.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.latest = {name: Decay(*found) for name, found in state_dict["latest"].items()}

    def _stop_listening(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hear(self, name: str) -> Any:
        def hook(layer: nn.RNNBase, args: Any, kwargs: Any) -> None:
            # The first call of the step; under checkpointing it comes again.
            if name not in self._heard:
                x = args[0] if args else kwargs["input"]
                hx = args[1] if len(args) > 1 else kwargs.get("hx")
                self._heard[name] = _first_samples(layer, x, hx, kwargs.get("lengths"), self.samples)

        return hook

    def _measure(self, name: str) -> list[tuple[str, Tensor]]:
        """Of each layer and direction: its name and ln‖∂E_T/∂s_{T−ℓ}‖ relative to lag 0, `[T, B]`, T each sample's own
        last step; NaN beyond its length."""
        layer, (x, hx) = self._layers[name], self._heard[name]
        lengths, unit, found = _lengths(layer, x), self._error(layer), []
        with evaluating(layer):
            places = layer_directions(layer)
        for place in places:
            last = torch.zeros_like(lengths) if place.reverse else lengths - 1
            sources = sorted(set(last.tolist()))
            made = torch.tensor(sources)[:, None] == last[None, :]
            error = unit * made.unsqueeze(-1).to(unit)
            found_map = adjoint_map(layer, x, hx, sources=sources, at=place.name, error=error)
            curves = torch.full((int(lengths.max()), len(lengths)), torch.nan, dtype=torch.float64)
            for b, (k, length) in enumerate(zip(last.tolist(), lengths.tolist(), strict=True)):
                curve = found_map.over_lag(sources.index(k))[:length, b]
                curves[:length, b] = curve - curve[0]
            found.append((f"{name}.{place.name}".removeprefix("."), curves))
        return found

    def _error(self, layer: nn.RNNBase) -> Tensor:
        """[D·R] one random unit vector per direction."""
        shape = (2 if layer.bidirectional else 1, layer.proj_size or layer.hidden_size)
        random = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return nn.functional.normalize(random, dim=-1).flatten().to(next(layer.parameters()))

    def _log(self, trainer: lightning.Trainer, curves: dict[str, Tensor]) -> None:
        metrics: dict[str, float] = {}
        for name, found in self.latest.items():
            metrics[f"gradient_flow/{name}/rate"] = found.rate
            metrics[f"gradient_flow/{name}/reach"] = float(found.reach)
            if found.half_life is not None:
                metrics[f"gradient_flow/{name}/half_life"] = found.half_life
        step = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
        if not self.pictures:
            return
        from unvanish import draw

        shown = {name: curve.tolist() for name, curve in curves.items()}
        for logger in trainer.loggers:
            log_image = getattr(logger, "log_image", None)
            add = getattr(getattr(logger, "experiment", None), "add_figure", None)
            if log_image is not None:
                log_image("gradient_flow", [draw.over_lag(shown).figure], step=step)
            elif add is not None:
                add("gradient_flow", draw.over_lag(shown).figure, step)


def _first_samples(layer: nn.RNNBase, x: Tensor | PackedSequence, hx: Any, lengths: Any, n: int) -> _Heard:
    """A few samples in the weights' dtype, detached; packed where they differ in length."""
    dtype = next(layer.parameters()).dtype
    batch_axis = 0 if layer.batch_first else 1

    def state(h: Tensor, keep: Tensor | slice) -> Tensor:
        return h.detach().to(dtype) if h.dim() == 2 else h.detach().to(dtype)[:, keep]

    def states(keep: Tensor | slice) -> Any:
        if hx is None:
            return None
        return tuple(state(h, keep) for h in hx) if isinstance(hx, tuple | list) else state(hx, keep)

    if isinstance(x, PackedSequence):
        padded, found = pad_packed_sequence(x, batch_first=layer.batch_first)
    elif lengths is not None:
        padded, found = x, torch.as_tensor(lengths).cpu()
    else:
        x = x.detach().to(dtype)
        return _Heard(x if x.dim() == 2 else x[:n] if batch_axis == 0 else x[:, :n], states(slice(n)))
    keep = (found > 0).nonzero().flatten()[:n]
    part = padded.detach().to(dtype).index_select(batch_axis, keep.to(padded.device))
    packed = pack_padded_sequence(part, found[keep].long(), layer.batch_first, enforce_sorted=False)
    return _Heard(packed, states(keep.to(padded.device)))


def _lengths(layer: nn.RNNBase, x: Tensor | PackedSequence) -> Tensor:
    """[B] in the user's order."""
    if isinstance(x, PackedSequence):
        return pad_packed_sequence(x)[1]
    T, B = time_major(layer, x).x.shape[:2]
    return torch.full((B,), T)


def _gather(curves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The samples of all processes side by side, NaN where one is shorter than the longest."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return curves
    everyone: list[dict[str, Tensor]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everyone, curves)
    T = {name: max(len(other[name]) for other in everyone) for name in curves}
    pad = nn.functional.pad
    return {
        name: torch.cat([pad(c[name], (0, 0, 0, T[name] - len(c[name])), value=torch.nan) for c in everyone], dim=1)
        for name in curves
    }


def _middle(curves: Tensor) -> Tensor:
    """The median over the samples that an error enters, `[T]`, as far as the longest of these reaches."""
    middle = curves.nanmedian(1).values
    reached = int((~middle.isnan()).sum())
    return middle[:reached] if reached else middle


def _decay(curve: Tensor, fraction: float) -> Decay:
    if not bool(curve[0].isfinite()):
        # Not even the error of lag 0 comes in: the layers above are dead.
        return Decay(-math.inf, 0.0, 0)
    return decay(curve, fraction)
