"""An exported model answers as `predict` does, on any batch and any lengths, without the rest of the package."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from unvanish.cli import main
from unvanish.extras import MissingExtraError
from unvanish.train.data.sequences import Sequences
from unvanish.train.data.series import Series
from unvanish.train.export import Exported, export, plain_state_dict
from unvanish.train.forecasting import Forecasting
from unvanish.train.language import LanguageModel
from unvanish.train.problems import Classification, DataProblem, Regression
from unvanish.train.settings import Settings
from unvanish.train.trained import SCHEMA, Trained

RNG = np.random.default_rng(0)
VALUES = [RNG.normal(5, 3, size=(n, 2)) for n in (4, 9, 2, 7, 9, 3, 8, 5, 6, 9)]
TEXTS = ["so it goes", "it goes on", "so so", "on and on it goes"] * 3


def untrained(problem: DataProblem, **settings: Any) -> Trained:
    """Weights as they begin: what a model answers is no matter here."""
    shape = problem.begin(Settings(hidden=6, **settings))
    torch.manual_seed(0)
    config = {"schema": SCHEMA, "kind": problem.kind, "shape": asdict(shape), **problem.keep()}
    return Trained(shape.build(9), config)


def of(name: str) -> tuple[Trained, Any]:
    names = [str(i) for i in range(12)]
    values = Sequences(list(VALUES), ["a", "b"] * 5, names[:10], ["p", "q"])
    if name == "classes":
        return untrained(Classification(values), layers=2, cell="gru"), values
    if name == "both ways":
        return untrained(Classification(values), layers=2, bidirectional=True), values
    if name == "mean":
        return untrained(Classification(values), read="mean", cell="rnn", checkpoint_every=2), values
    if name == "numbers":
        data = Sequences(list(VALUES), [str(7 + i) for i in range(10)], names[:10], ["p", "q"])
        return untrained(Regression(data), cell="irnn", clip_recurrence=1.0), data
    if name == "texts":
        data = Sequences(TEXTS, ["a", "b"] * 6, names, ["text"])
        return untrained(Classification(data)), data
    wave = 50 + np.cumsum(RNG.normal(size=(60, 2)), 0)
    return untrained(Forecasting(Series({"": wave}, ["p", "q"]), horizon=2, window=5)), Series({"": wave}, ["p", "q"])


def batch(trained: Trained, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As a program of the user's would lay it out: raw values, padded with anything."""
    if isinstance(data, Series):
        return torch.tensor(data.values[""][-5:], dtype=torch.float32)[None], torch.tensor([5])
    if isinstance(data.x[0], str):
        from unvanish.train.data.vocabulary import Vocabulary

        words = Vocabulary.from_json(trained.config["input"]["vocabulary"])
        x = [words(text) for text in data.x]
    else:
        x = [torch.tensor(v, dtype=torch.float32) for v in data.x]
    return nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=3), torch.tensor([len(v) for v in x])


def read(trained: Trained, answer: torch.Tensor) -> Any:
    if trained.config["kind"] == "classification":
        return [trained.config["classes"][k] for k in answer.argmax(1).tolist()]
    return answer.squeeze(1).tolist() if trained.config["kind"] == "regression" else answer[0].tolist()


def assert_same(said: Any, expected: Any) -> None:
    expected = expected[""] if isinstance(expected, dict) else expected
    assert said == (expected if isinstance(expected[0], str) else pytest.approx(expected, rel=1e-4))


def test_a_language_model_answers_at_every_step_of_any_batch(tmp_path: Path) -> None:
    trained = untrained(LanguageModel("so it goes. " * 60), batch=4)
    assert export(trained, tmp_path / "m.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    x = torch.randint(len("so it ge.") - 1, (2, 11))
    (answer,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), trained.model.eval()(x))


KINDS = ["classes", "both ways", "mean", "numbers", "texts", "forecast"]


@pytest.mark.parametrize("name", KINDS)
def test_onnx_answers_as_predict_does(name: str, tmp_path: Path) -> None:
    trained, data = of(name)
    assert export(trained, tmp_path / "m.onnx") < 1e-5
    x, lengths = batch(trained, data)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    answer = torch.from_numpy(session.run(None, {"x": x.numpy(), "lengths": lengths.numpy()})[0])
    assert_same(read(trained, answer), trained.predict(data))
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("name", ["classes", "both ways", "texts", "forecast"])
def test_torch_export_answers_as_predict_does(name: str, tmp_path: Path) -> None:
    trained, data = of(name)
    assert export(trained, tmp_path / "m.pt2") < 1e-5
    x, lengths = batch(trained, data)
    answer = torch.export.load(tmp_path / "m.pt2").module()(x, lengths)
    assert_same(read(trained, answer), trained.predict(data))


def test_torch_export_of_torchs_own_operators(tmp_path: Path) -> None:
    trained, data = of("mean")
    export(trained, tmp_path / "m.pt2", steps=9)
    program = torch.export.load(tmp_path / "m.pt2")
    assert not any("unvanish" in str(node.target) for node in program.graph.nodes)
    assert read(trained, program.module()(*batch(trained, data))) == trained.predict(data)


def test_a_missing_value_is_the_mean_there_too() -> None:
    trained, data = of("numbers")
    module = Exported(trained, plain=True)
    x, lengths = batch(trained, data)
    filled = x.clone()
    x[1, 3, 0], filled[1, 3, 0] = float("nan"), trained.config["input"]["scale"]["mean"][0]
    torch.testing.assert_close(module(x, lengths), module(filled, lengths))


def test_the_weights_load_into_torchs_own_modules() -> None:
    trained, data = of("classes")
    weights = plain_state_dict(trained)
    parts = {
        "recurrent": nn.GRU(2, 6, num_layers=2, batch_first=True),
        "head": nn.Linear(6, 2),
    }
    nn.ModuleDict(parts).load_state_dict(weights)
    scale = trained.config["input"]["scale"]
    x = torch.tensor((data.x[1] - scale["mean"]) / scale["deviation"], dtype=torch.float32)[None]
    answer = parts["head"](parts["recurrent"](x)[0][:, -1])
    assert read(trained, answer) == trained.predict(data)[1:2]
    torch.testing.assert_close(answer, trained.model(x))


def test_a_file_that_answers_wrongly_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, _ = of("classes")
    module = sys.modules["unvanish.train.export"]  # the package's `export` is the function
    for wrong in (1, torch.nan):
        monkeypatch.setattr(module, "_onnx", lambda module, examples, _, w=wrong: [module(*e) + w for e in examples])
        with pytest.raises(ArithmeticError, match="differ from the model's"):
            export(trained, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_what_it_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, _ = of("classes")
    for name in ("m.onnx", "m.pt2"):
        with pytest.raises(OSError, match=f"OUT: .*{name} can't be written: there is no folder"):
            export(trained, tmp_path / "none" / name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"onnx is not installed; run: pip install 'unvanish\[onnx\]'"):
        export(trained, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m.pt", {}, r"OUT: expected a name that ends in .onnx or .pt2"),
        ("m.onnx", {"steps": 3}, "steps: expected none for .onnx"),
        ("m.pt2", {"steps": 0}, "steps: expected none for .onnx"),
    ],
)
def test_what_cannot_be_exported_is_named(name: str, options: Any, message: str, tmp_path: Path) -> None:
    data = Sequences(list(VALUES), ["a", "b"] * 5, [], ["p", "q"])
    with pytest.raises(ValueError, match=message):
        export(untrained(Classification(data)), tmp_path / name, **options)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    of("classes")[0].save(Path("m"))
    monkeypatch.setattr(sys, "argv", ["unvanish", "export", "m", "m.onnx"])
    main()
    assert capsys.readouterr().out.startswith("m.onnx: answers as the model does, to ")
    assert Path("m.onnx").stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", ["unvanish", "export", "m", "m.pth"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "OUT: expected a name that ends in .onnx or .pt2" in capsys.readouterr().err
