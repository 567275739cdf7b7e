"""A Lightning callback: how far the gradient reaches back, logged while a model trains."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from unvanish.capture import Call, Capture, hidden_parts, steps_of
from unvanish.capture.named_states import Getter, NamedStates
from unvanish.engine.precision import cpu_by_default
from unvanish.extras import extra
from unvanish.flow.adjoint_map import adjoint_map
from unvanish.flow.gates import gate_statistics
from unvanish.flow.reach import Decay, decay
from unvanish.flow.state_reach import log_norms_of_states
from unvanish.flow.stepped_states import SteppedStates, log_norms_of_calls
from unvanish.nn.modules import SequenceModule, evaluating, layer_directions, time_major

with extra("lab"):
    import lightning


class _Input(NamedTuple):
    """A layer's input of one call, a few samples of it."""

    x: Tensor | PackedSequence
    hx: Any


STUCK = 3
"""the number of measurements before a loss that has not fallen can cause a warning"""
SHORT, FALLEN = 0.25, 0.95
"""a reach below this share of the steps is short; a loss above this share of the first has not fallen"""


class GradientFlow(lightning.Callback):
    """Rate, reach and saturation of every recurrent layer, at every `every`-th optimizer step.

    It measures ‖∂E_T/∂s_{T−ℓ}‖ on the samples that the layer has just received, with the present weights; s is the
    state that serves as the cell's memory (c for the LSTM). E_T is a single error at the layer's last step, a random
    unit vector, because the reach of a gradient summed over errors at all steps is not defined. A cell, or a layer
    that the model calls step by step, is measured through autograd's graph, before the backward pass; the error is then
    at s itself, and saturation is not known.

        lightning.Trainer(callbacks=[uv.flow.GradientFlow(every=100)])

    Logged to all of the trainer's loggers, per layer and direction:

    - `gradient_flow/encoder.lstm.l0/reach`, steps: the largest lag at which a `fraction` of the gradient remains;
    - `…/rate`, nats per step; −∞ if the layer is dead, so that no gradient enters it;
    - `…/saturation`, the share of gate values that are saturated;
    - a picture of the curves, if a logger accepts pictures (TensorBoard, W&B).

    The progress bar shows the shortest reach and the number of steps, `reach 7/39`. If the loss has not fallen and a
    gradient reaches over less than a quarter of the steps, it warns once per training.

    In a distributed run each process measures its own samples, and the median is taken over all processes.
    `latest` has what was logged last.

    Args:
        every: optimizer steps between two measurements; the first is measured.
        fraction: fraction of the gradient at lag 0 above which a lag counts as reached.
        samples: number of samples measured per process and step.
        states: module name → where its state is, as in `watch`; measured by autograd alone, before the backward pass.
        pictures: whether to draw pictures.
        seed: seed of the random error.

    Raises:
        ValueError: an option is out of range; or, when training starts, the model has no recurrent layer and no state
            is named.
    """

    def __init__(
        self,
        every: int = 100,
        *,
        fraction: float = 0.01,
        samples: int = 8,
        states: Mapping[str, Getter] | None = None,
        pictures: bool = True,
        seed: int = 0,
    ) -> None:
        if every < 1 or samples < 1:
            raise ValueError(f"every, samples: expected at least 1, got {every} and {samples}")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction: expected a number between 0 and 1, got {fraction}")
        self.every, self.fraction, self.samples, self.pictures, self.seed = every, fraction, samples, pictures, seed
        self.states = dict(states or {})
        self.latest: dict[str, Decay] = {}
        """layer and direction → rate, half-life and reach"""
        self.saturation: dict[str, float] = {}
        """layer and direction → share of gates and steps at which φ' is below 5 % of its maximum"""
        self._steps: dict[str, int] = {}
        self._inputs: dict[str, _Input] = {}
        self._shown: dict[str, list[Tensor]] = {}
        self._stepped = SteppedStates()
        self._curves: dict[str, Tensor] = {}
        self._capture: Capture | None = None
        self._named: NamedStates | None = None
        self._observing = False
        self._measured = -1
        self._losses: list[float] = []
        self._means: list[float] = []
        self._warned = False

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._capture = Capture(pl_module, self._stepped.add, self._take, without_gradients=False)
        self._named = NamedStates(pl_module, self.states, self._show, self._capture.problems)
        if not self._capture.parts.modules and not self.states:
            raise ValueError(
                f"model: {type(pl_module).__name__} has no nn.RNN, nn.LSTM, nn.GRU, cell or unvanish.nn.Recurrent; "
                "name the module whose state recurs with states=, or drop the GradientFlow callback"
            )
        self._measured, self._losses, self._means, self._warned = -1, [], [], False
        bar = trainer.progress_bar_callback
        if bar is not None:
            usual = bar.get_metrics
            bar.get_metrics = lambda t, m: usual(t, m) | self._in_the_bar()  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step != self._measured and not self._observing:
            assert self._capture is not None
            assert self._named is not None
            self._capture.__enter__()
            self._named.open()
            self._observing = True

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        if not self._observing:
            return
        assert self._capture is not None
        # Under checkpointing the graph is run again while it is measured: what was seen so far is taken out first.
        shown, self._shown = self._shown, {}
        found: dict[str, Tensor] = {}
        for name, states in shown.items():
            curve = self._capture.guarded(name, lambda s=states: log_norms_of_states(s, self.seed))
            found |= {} if curve is None else {name: curve}
        for name, calls in self._stepped.take().items():
            if name in self._inputs and steps_of(calls[0].module, self._inputs[name].x) >= len(calls):
                continue
            self._inputs.pop(name, None)
            found |= self._capture.guarded(name, lambda c=calls: log_norms_of_calls(c, self.seed)) or {}
        self._curves = {name: curve[:, : self.samples].cpu() for name, curve in found.items()}

    @cpu_by_default()
    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not self._observing:
            return
        self._stop_observing()
        self._measured = trainer.global_step
        own = {name: curve for layer in self._inputs for name, curve in self._measure(layer)}
        curves = _gather(own | self._curves)
        self.saturation = {name: share for layer in self._inputs for name, share in self._saturated(layer)}
        for held in (self._inputs, self._curves, self._shown):
            held.clear()
        middle = {name: _middle(curve) for name, curve in curves.items()}
        self.latest = {name: _decay(curve, self.fraction) for name, curve in middle.items()}
        self._steps = {name: len(curve) for name, curve in curves.items()}
        self._look_at_the_loss(trainer.global_step)
        if trainer.is_global_zero:
            self._log(trainer, middle)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(float(loss.detach()))

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._stop_observing()
        bar = trainer.progress_bar_callback
        if bar is not None:
            vars(bar).pop("get_metrics", None)
        assert self._capture is not None
        assert self._named is not None
        measured = {name.rpartition(".l")[0] for name in self.latest} | set(self.latest)
        hidden = dict(hidden_parts(pl_module)) | self._named.called
        why_not = {name: why for name, why in hidden.items() if name not in measured} | self._named.unrecorded
        for name, why in (why_not | self._capture.problems).items():
            warnings.warn(f"GradientFlow: {name or 'the model'}: {why}", RuntimeWarning, stacklevel=2)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._stop_observing()

    def state_dict(self) -> dict[str, Any]:
        return {"latest": {name: tuple(found) for name, found in self.latest.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.latest = {name: Decay(*found) for name, found in state_dict["latest"].items()}

    def _stop_observing(self) -> None:
        if self._observing:
            assert self._capture is not None
            assert self._named is not None
            self._capture.__exit__()
            self._named.close()
            self._stepped.take()
            self._observing = False

    def _take(self, call: Call) -> bool:
        """Called when a call begins: keeps the first of the step; under checkpointing it is repeated."""
        if call.name not in self._inputs and isinstance(call.module, SequenceModule):
            self._inputs[call.name] = _first_samples(call.module, call.x, call.hx, call.lengths, self.samples)
        return True

    def _show(self, name: str, h: Any) -> None:
        if isinstance(h, Tensor):
            self._shown.setdefault(name, []).append(h)

    def _in_the_bar(self) -> dict[str, str]:
        if not self._steps:
            return {}
        name = min(self._steps, key=self._share)
        return {"reach": f"{self.latest[name].reach}/{self._steps[name] - 1}"}

    def _share(self, name: str) -> float:
        """The share of the steps over which the gradient reaches."""
        return self.latest[name].reach / max(self._steps[name] - 1, 1)

    def _look_at_the_loss(self, step: int) -> None:
        """Warn once if the loss does not fall and a gradient reaches over few of the steps."""
        if self._losses:
            self._means.append(sum(self._losses) / len(self._losses))
            self._losses.clear()
        name = min(self._steps, key=self._share, default=None)
        if self._warned or name is None or self._share(name) >= SHORT or len(self._means) < STUCK:
            return
        first, *_, last = self._means
        if last < FALLEN * first:
            return
        self._warned = True
        warnings.warn(
            f"after {step} steps the loss has not fallen ({first:.3g} → {last:.3g}), and the gradient at {name} "
            f"reaches over {self.latest[name].reach} of {self._steps[name] - 1} steps; uv.diagnose finds out "
            "whether that is the reason",
            RuntimeWarning,
            stacklevel=2,
        )

    def _measure(self, name: str) -> list[tuple[str, Tensor]]:
        """For each layer and direction, its name and ln‖∂E_T/∂s_{T−ℓ}‖ relative to lag 0, `[T, B]`, T each sample's own
        last step; NaN beyond its length."""
        layer, (x, hx) = self._layer(name), self._inputs[name]
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

    def _layer(self, name: str) -> SequenceModule:
        assert self._capture is not None
        return self._capture.parts.modules[name]  # type: ignore[return-value]

    def _saturated(self, name: str) -> list[tuple[str, float]]:
        """Of each layer and direction."""
        layer, (x, hx) = self._layer(name), self._inputs[name]
        with evaluating(layer):
            places = [place.name for place in layer_directions(layer)]
        found = [(place, gate_statistics(layer, x, hx, at=place).saturation) for place in places]
        return [(f"{name}.{place}".removeprefix("."), float(share.mean())) for place, share in found]

    def _error(self, layer: SequenceModule) -> Tensor:
        """[D·R] one random unit vector per direction."""
        shape = (2 if layer.bidirectional else 1, layer.proj_size or layer.hidden_size)
        random = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return nn.functional.normalize(random, dim=-1).flatten().to(next(layer.parameters()))

    def _log(self, trainer: lightning.Trainer, curves: dict[str, Tensor]) -> None:
        metrics: dict[str, float] = {}
        for name, found in self.latest.items():
            metrics[f"gradient_flow/{name}/rate"] = found.rate
            metrics[f"gradient_flow/{name}/reach"] = float(found.reach)
        metrics |= {f"gradient_flow/{name}/saturation": share for name, share in self.saturation.items()}
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


def _first_samples(layer: SequenceModule, x: Tensor | PackedSequence, hx: Any, lengths: Any, n: int) -> _Input:
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
        return _Input(x if x.dim() == 2 else x[:n] if batch_axis == 0 else x[:, :n], states(slice(n)))
    keep = (found > 0).nonzero().flatten()[:n]
    part = padded.detach().to(dtype).index_select(batch_axis, keep.to(padded.device))
    packed = pack_padded_sequence(part, found[keep].long(), layer.batch_first, enforce_sorted=False)
    return _Input(packed, states(keep.to(padded.device)))


def _lengths(layer: SequenceModule, x: Tensor | PackedSequence) -> Tensor:
    """[B] in the user's order."""
    if isinstance(x, PackedSequence):
        return pad_packed_sequence(x)[1]
    T, B = time_major(layer, x).x.shape[:2]
    return torch.full((B,), T)


def _gather(curves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The samples of all processes side by side, padded with NaN to the longest."""
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
