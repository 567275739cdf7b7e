"""A trained model for other programs: ONNX, or torch.export; checked against the model before it counts as written."""

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unvanish import nn as layers
from unvanish.extras import extra
from unvanish.flow.files import write_atomically
from unvanish.nn import restore
from unvanish.nn.modules import SequenceModule
from unvanish.train.data.sequences import Scale
from unvanish.train.models import SequenceModel
from unvanish.train.problems import from_json
from unvanish.train.trained import Trained

TOLERANCE = 1e-4
"""the largest difference to the model's own answers, relative to the largest of them, attributed to rounding"""
SIZES = ((3, 7), (1, 12), (5, 2))
"""batch and steps of the sequences that are compared"""


class Exported(nn.Module):
    """x `[B, T, I]`, as it stands in the data, or symbols `[B, T]` int64, with `lengths` `[B]` int64 → the answer.

    Scales are part of it: values go in unscaled, NaN where one is missing, and a regression comes out in the units of
    its target. A classification answers `[B, classes]` logits; a forecast `[B, horizon]` values; a language model
    `[B, T, symbols]` logits, and in ONNX it takes no lengths, on which they don't depend. Values after the end of a
    sequence have no influence, except on the answers there.

    Args:
        trained: the model.
        plain: of torch's own layers instead of ours.
    """

    mean: Tensor
    deviation: Tensor
    target_mean: Tensor
    target_deviation: Tensor

    def __init__(self, trained: Trained, *, plain: bool) -> None:
        super().__init__()
        config = trained.config
        self.model: SequenceModel = deepcopy(trained.model).eval().requires_grad_(False)
        self.model.recurrent.checkpoint_every = self.model.recurrent.clip = None  # type: ignore[assignment]
        if plain:
            restore(self.model)
        # In a padded batch the backward direction has to begin at each sample's own last step.
        self.directions = _directions(self.model.recurrent) if self.model.recurrent.bidirectional else None
        scale = from_json(config["input"])
        self.kind: str = config["kind"]
        if isinstance(scale, Scale):
            self.register_buffer("mean", torch.tensor(scale.mean))
            self.register_buffer("deviation", torch.tensor(scale.deviation))
        mean, deviation = config.get("target_scale", (0.0, 1.0))
        if self.kind == "forecasting" and isinstance(scale, Scale):
            mean, deviation = 0.0, scale.deviation[0]
        self.register_buffer("target_mean", torch.tensor(float(mean)))
        self.register_buffer("target_deviation", torch.tensor(float(deviation)))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The answer."""
        m, scaled = self.model, self.scaled(x)
        if m.embedding is not None:
            scaled = m.embedding(scaled)
        states = m.recurrent(scaled)[0] if self.directions is None else self._both(self.directions, scaled, lengths)
        return self.unscaled(m.head(self._read(states, lengths)), x, lengths)

    def scaled(self, x: Tensor) -> Tensor:
        """The model's input."""
        if self.model.embedding is not None:
            return x
        x = (x - self.mean) / self.deviation
        return torch.where(torch.isnan(x), torch.zeros_like(x), x)

    def unscaled(self, answer: Tensor, x: Tensor, lengths: Tensor) -> Tensor:
        """The model's answer in the units of its target."""
        if self.kind == "forecasting":  # the change from the last known value
            return answer * self.target_deviation + self._last(x, lengths)[:, :1]
        return answer * self.target_deviation + self.target_mean

    def _read(self, states: Tensor, lengths: Tensor) -> Tensor:
        if self.model.read == "all":
            return states
        if self.model.read == "last":
            if self.directions is None:
                return self._last(states, lengths)
            H = self.model.recurrent.hidden_size
            return torch.cat([self._last(states[..., :H], lengths), states[:, 0, H:]], dim=-1)
        steps = torch.arange(states.shape[1], device=states.device)
        inside = (steps[None, :] < lengths[:, None]).unsqueeze(2)
        return (states * inside).sum(1) / lengths[:, None]

    def _both(self, layers: nn.ModuleList, x: Tensor, lengths: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device)[None, :]
        turned = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps).unsqueeze(2)
        for forward, backward in layers:  # type: ignore[misc]
            back = backward(x.gather(1, turned.expand(-1, -1, x.shape[2])))[0]
            x = torch.cat([forward(x)[0], back.gather(1, turned.expand(-1, -1, back.shape[2]))], dim=-1)
        return x

    def _last(self, x: Tensor, lengths: Tensor) -> Tensor:
        return x[torch.arange(x.shape[0], device=x.device), lengths - 1]


def _directions(layer: SequenceModule) -> nn.ModuleList:
    """[layer][forward, backward], each a layer that runs forward."""
    if isinstance(layer, layers.Recurrent):
        return _directions_of_a_cell(layer)
    options = {key: getattr(layer, key) for key in ("nonlinearity",) if hasattr(layer, key)}
    found = nn.ModuleList()
    for k in range(layer.num_layers):
        inputs = layer.input_size if k == 0 else 2 * layer.hidden_size
        pair = [type(layer)(inputs, layer.hidden_size, batch_first=True, **options) for _ in range(2)]  # type: ignore[call-arg]
        for one, suffix in zip(pair, ("", "_reverse"), strict=True):
            parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            one.load_state_dict({f"{part}_l0": getattr(layer, f"{part}_l{k}{suffix}") for part in parts})
        found.append(nn.ModuleList(pair))
    return found.requires_grad_(False)


def _directions_of_a_cell(layer: layers.Recurrent) -> nn.ModuleList:
    found = nn.ModuleList()
    for k in range(layer.num_layers):
        inputs, pair = layer.input_size if k == 0 else 2 * layer.hidden_size, []
        for suffix in ("", "_reverse"):
            one = layers.Recurrent(layer.cell, inputs, layer.hidden_size, bias=layer.bias, batch_first=True)
            end = f"_l{k}{suffix}"
            one.load_state_dict({name: getattr(layer, name.removesuffix("_l0") + end) for name in one.state_dict()})
            pair.append(one)
        found.append(nn.ModuleList(pair))
    return found.requires_grad_(False)


def plain_state_dict(trained: Trained) -> dict[str, Tensor]:
    """The weights under names that torch's own modules have: `recurrent.` loads into an nn.LSTM, nn.GRU or nn.RNN,
    `head.` into an nn.Linear, `embedding.` into an nn.Embedding."""
    return {name: value.detach().clone() for name, value in trained.model.state_dict().items()}


def export(trained: Trained, path: str | os.PathLike[str], *, steps: int | None = None) -> float:
    """Write `Exported` to a file: .onnx (ONNX), or .pt2 (torch.export).

    Batch and time are dynamic. A .pt2 file uses an operator of unvanish for this, so a program that loads it has to
    import unvanish first; with `steps` it uses only torch's own operators, for x of exactly this many steps (pad, and
    pass the lengths). The written file is read back and compared with the model on random sequences.

    Returns:
        The largest difference found, relative to the largest answer.

    Raises:
        ValueError: another suffix, `steps` for .onnx, or a model that was trained on no data.
        MissingExtraError: for .onnx, a package of the extra `onnx` is not installed.
        ArithmeticError: the file does not answer as the model does.
        OSError: the file can't be written.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"OUT: expected a name that ends in .onnx or .pt2, got {path.name}")
    if steps is not None and (path.suffix == ".onnx" or steps < 1):
        raise ValueError(f"steps: expected none for .onnx, where time is open, and 1 or more for .pt2; got {steps}")
    if "input" not in trained.config:
        raise ValueError(f"model: expected one that was trained on data, got one of the {trained.config['kind']}")
    if not path.parent.is_dir():
        raise OSError(f"OUT: {path} can't be written: there is no folder {path.parent}")
    if isinstance(trained.model.recurrent, layers.Recurrent) and steps is None:
        raise ValueError(
            f"steps: expected a number of steps and a name that ends in .pt2, since the loop of a "
            f"{trained.model.recurrent.cell.name} is written out step by step; got none"
        )
    window = trained.config.get("window")
    examples = [_example(trained, batch, steps or window or length, seed) for seed, (batch, length) in enumerate(SIZES)]
    module = Exported(trained, plain=path.suffix == ".onnx" or steps is not None).eval()
    reference = Exported(trained, plain=False).eval()
    stage = path.with_name(f".{path.name}.stage{path.suffix}")
    try:
        answers = _onnx(module, examples, stage) if path.suffix == ".onnx" else _pt2(module, examples, stage, steps)
        apart = []
        for (x, lengths), answer in zip(examples, answers, strict=True):
            own = reference.unscaled(reference.model(reference.scaled(x), lengths), x, lengths)
            inside = torch.arange(own.shape[1]) < lengths[:, None] if trained.model.read == "all" else slice(None)
            own, answer = own[inside], answer[inside]
            apart.append((own - answer).abs().max() / own.abs().max())
        worst = float(torch.stack(apart).max())
        if not worst <= TOLERANCE:
            raise ArithmeticError(f"{path}: its answers differ from the model's by {worst:.1e}; nothing was written")
        write_atomically(path, stage.read_bytes())
    finally:
        stage.unlink(missing_ok=True)
    return worst


def _example(trained: Trained, batch: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = trained.config["shape"]
    lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
    lengths[0] = steps
    if shape["symbols"] is not None:
        return torch.randint(shape["symbols"], (batch, steps), generator=generator), lengths
    scale = from_json(trained.config["input"])
    assert isinstance(scale, Scale)
    x = torch.randn(batch, steps, shape["inputs"], generator=generator)
    return x * torch.tensor(scale.deviation) + torch.tensor(scale.mean), lengths


def _onnx(module: Exported, examples: list[Any], path: Path) -> list[Tensor]:
    import warnings

    with extra("onnx"):
        import onnx  # noqa: F401 (the exporter needs it, and says so late)
        import onnxruntime

    names = ["x", "lengths"]
    open_axes = {"x": {0: "batch", 1: "steps"}, "lengths": {0: "batch"}, "answer": {0: "batch"}}
    if module.model.read == "all":  # no answer depends on the lengths, and the exporter takes them out
        names.pop()
        open_axes = {"x": open_axes["x"], "answer": open_axes["x"]}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # The exporter built on torch.export fixes the number of steps of a recurrent layer; this one keeps it dynamic.
        torch.onnx.export(
            module,
            examples[0],
            path,
            dynamo=False,
            input_names=names,
            output_names=["answer"],
            dynamic_axes=open_axes,
            opset_version=17,
        )
    session = onnxruntime.InferenceSession(path)
    return [
        torch.from_numpy(session.run(None, {name: v.numpy() for name, v in zip(names, e, strict=False)})[0])
        for e in examples
    ]


def _pt2(module: Exported, examples: list[Any], path: Path, steps: int | None) -> list[Tensor]:
    batch = torch.export.Dim("batch")
    x = {0: batch} if steps is not None else {0: batch, 1: torch.export.Dim("steps")}
    with torch.no_grad():
        program = torch.export.export(module, examples[0], dynamic_shapes={"x": x, "lengths": {0: batch}})
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
        return [loaded(*example) for example in examples]
