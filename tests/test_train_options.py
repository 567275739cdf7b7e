"""Every option of `unvanish train` and `unvanish predict` has an effect; what has none is refused."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.test_train import TEXT, call, seasons, write
from unvanish.cli.train import predict, train
from unvanish.train import Trained

DATA = {"--data": "d.csv", "--target": "y", "--logger": "none", "--flow-every": "0"}
SMALL = DATA | {"--steps": "8", "--every": "4", "--hidden": "3", "--batch": "16"}
AHEAD = SMALL | {"--data": "s.csv", "--target": "sales", "--kind": "forecasting"}
TASK = {k: v for k, v in SMALL.items() if k not in ("--data", "--target")} | {"--task": "adding", "--length": "10"}
Effect = Callable[[Trained, Trained], bool]


def weights(a: Trained, b: Trained) -> bool:
    return a.config["sha256"] != b.config["sha256"]


def kept(key: str) -> Effect:
    return lambda a, b: a.config[key] != b.config[key]


def shape(key: str) -> Effect:
    return lambda a, b: a.config["shape"][key] != b.config["shape"][key]


# option: (the command without it, what is added or changed, what must differ)
CHANGED: dict[str, tuple[dict[str, str], dict[str, str], Effect]] = {
    "task": (TASK, {"--task": "multiplication"}, weights),
    "data": (SMALL, {"--data": "other.csv"}, weights),
    "kind": (SMALL | {"--data": "n.csv"}, {"--kind": "regression"}, kept("kind")),
    "target": (SMALL | {"--data": "n.csv"}, {"--target": "q"}, weights),
    "id": (SMALL | {"--data": "long.csv"}, {"--id": "i"}, kept("split")),
    "text": (SMALL | {"--data": "t.csv"}, {"--text": "words"}, kept("input")),
    "missing": (SMALL | {"--data": "holes.csv", "--missing": "mean"}, {"--missing": "previous"}, weights),
    "horizon": (AHEAD, {"--horizon": "2"}, kept("horizon")),
    "window": (AHEAD, {"--window": "7"}, weights),
    "season": (AHEAD, {"--season": "12"}, lambda a, b: "seasonal naive" in b.config["test"].keys() - a.config["test"]),
    "length": (TASK, {"--length": "12"}, weights),
    "cell": (SMALL, {"--cell": "gru"}, weights),
    "hidden": (SMALL, {"--hidden": "4"}, weights),
    "layers": (SMALL, {"--layers": "2"}, weights),
    "bidirectional": (SMALL, {"--bidirectional": ""}, weights),
    "dropout": (SMALL, {"--dropout": "0.5"}, weights),
    "read": (SMALL, {"--read": "mean"}, weights),
    "epochs": (
        {k: v for k, v in SMALL.items() if k != "--steps"} | {"--epochs": "1"},
        {"--epochs": "2"},
        kept("updates"),
    ),
    "steps": (SMALL, {"--steps": "9"}, kept("updates")),
    "batch": (SMALL, {"--batch": "8"}, weights),
    "lr": (SMALL, {"--lr": "0.001"}, weights),
    "optimizer": (SMALL, {"--optimizer": "sgd"}, weights),
    "weight_decay": (SMALL, {"--weight-decay": "0.1"}, weights),
    "schedule": (SMALL, {"--schedule": "cosine"}, weights),
    "clip": (SMALL | {"--optimizer": "sgd"}, {"--clip": "0.001"}, weights),
    "clip_recurrence": (SMALL, {"--clip-recurrence": "1e-6"}, weights),
    "omega": (SMALL, {"--omega": "1"}, weights),
    "tbptt": (SMALL, {"--tbptt": "3"}, weights),
    "checkpoint_every": (SMALL, {"--checkpoint-every": "3"}, shape("checkpoint_every")),
    "patience": (SMALL | {"--every": "1", "--lr": "1", "--steps": "30"}, {"--patience": "1"}, kept("updates")),
    "every": (SMALL, {"--every": "2"}, kept("validation")),
    "seed": (SMALL, {"--seed": "1"}, weights),
    "flow_every": (SMALL, {"--flow-every": "4"}, kept("gradient_flow")),
    "budget": (SMALL | {"--lr": "1e-9"}, {"--budget": "2"}, lambda a, b: "plan" in b.config.keys() - a.config.keys()),
}
# seen elsewhere: below, in test_resume, and in test_distributed
ELSEWHERE = {"time", "out", "resume", "logger", "devices", "nodes", "accelerator", "as_json", "quiet"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "d.csv")
    (folder / "other.csv").write_text("\n".join((folder / "d.csv").read_text().splitlines()[:91]))
    numbers = [f"{k % 3},{k % 2},{k % 5},{k % 2}" for k in range(60)]
    (folder / "n.csv").write_text("\n".join(["p,q,r,y", *numbers]))
    holes = [f"1,,{k},3,{'ab'[k % 2]}" for k in range(40)]
    (folder / "holes.csv").write_text("\n".join(["p,q,r,s,y", *holes]))
    long = [f"{k // 2},{k % 3},{'ab'[k // 2 % 2]}" for k in range(120)]
    (folder / "long.csv").write_text("\n".join(["i,v,y", *long]))
    words = [f"{k},{'good fine' if k % 2 else 'bad poor'},{k % 2}" for k in range(60)]
    (folder / "t.csv").write_text("\n".join(["v,words,y", *words]).replace("bad poor", "1").replace("good fine", "2"))
    (folder / "s.csv").write_text("\n".join(["sales", *map(str, seasons().values[""][:, 0])]))
    (folder / "book.txt").write_text(TEXT)
    return folder


def line(options: dict[str, str]) -> list[str]:
    return [part for pair in options.items() for part in pair if part]


@pytest.fixture
def run(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    monkeypatch.chdir(files)
    made = iter(range(100))

    def trained(options: dict[str, str]) -> Trained:
        out = tmp_path / str(next(made))
        code = call(["train", *line(options), "--out", str(out)], monkeypatch)
        assert code == 0, capsys.readouterr().err
        return Trained.load(out)

    return trained


def test_the_table_holds_every_option() -> None:
    assert CHANGED.keys() | ELSEWHERE == inspect.signature(train).parameters.keys()
    assert not CHANGED.keys() & ELSEWHERE


@pytest.mark.parametrize("option", list(CHANGED))
def test_an_option_has_its_effect(option: str, run: Callable) -> None:
    base, change, differs = CHANGED[option]
    assert differs(run(base), run(base | change))


def test_checkpoints_of_the_states_are_used_in_training(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    from unvanish.nn import layers

    real = layers.run_in_pieces
    monkeypatch.setattr(layers, "run_in_pieces", lambda every, *a: called.append(every) or real(every, *a))
    a, b = run(SMALL), run(SMALL | {"--checkpoint-every": "5"})
    assert set(called) == {5}
    for v, w in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
        torch.testing.assert_close(v, w)


REFUSED = [
    (["--data", "n.csv"], "--target: expected the column of the answers"),
    ([], "--task, --data: expected one of them"),
    (["--task", "adding", "--data", "d.csv"], "--task, --data: expected one of them"),
    (["--task", "adding", "--target", "y"], "--target: not used by a task"),
    (["--task", "adding", "--horizon", "2"], "--horizon: not used by a task"),
    (["--task", "adding", "--epochs", "2"], "epochs: the samples of adding are drawn without end"),
    (["--task", "copy", "--read", "mean"], "read, bidirectional: copy is answered at the end"),
    (["--length", "9", *line(DATA)], "--length: data has its own"),
    (["--time", "t", *line(DATA)], "--time is for tables of a step per row"),
    (["--season", "2", *line(DATA)], "--season: not used by classification"),
    (["--kind", "language", "--data", "book.txt", "--target", "y"], "--target: not used by language"),
    (["--kind", "language", "--data", "book.txt", "--batch", "4000"], "too few for 4000 streams"),
    (["--kind", "language", "--data", "book.txt", "--bidirectional"], "a language model reads all states"),
    (["--kind", "language", "--data", "d.csv"], "--text: expected the column"),
    (["--kind", "language", "--data", "d.csv", "--text", "nope"], "d.csv: row 1: no column 'nope' (--text)"),
    (["--kind", "forecasting", "--data", "s.csv"], "--target: expected the column that is forecast"),
    (["--kind", "forecasting", "--data", "v.ts", "--target", "y"], "--kind: v.ts holds sequences with a label each"),
    ([*line(AHEAD), "--season", "100"], "season: expected at most the window"),
    ([*line(AHEAD), "--horizon", "0"], "horizon: expected at least 1"),
    ([*line(AHEAD), "--time", "sales"], "must be different columns"),
    ([*line(DATA), "--read", "all"], "read: expected last or mean"),
    ([*line(DATA), "--read", "some"], "read: expected one of last, mean, all"),
    ([*line(DATA), "--epochs", "2", "--steps", "2"], "epochs, steps: expected one of them"),
    ([*line(DATA), "--dropout", "1"], "dropout: expected a share"),
    ([*line(DATA), "--layers", "0"], "layers: expected a positive number"),
    ([*line(DATA), "--lr", "nan"], "lr: expected a positive number"),
    ([*line(DATA), "--optimizer", "lion"], "optimizer: expected one of adam"),
    ([*line(DATA), "--schedule", "step"], "schedule: expected one of constant, cosine"),
    ([*line(DATA), "--omega", "-1"], "omega: expected 0 or more"),
    ([*line(DATA), "--patience", "-1"], "patience: expected 0 or more"),
    ([*line(DATA), "--seed", "-1"], "seed: expected 0 or more"),
    ([*line(DATA), "--tbptt", "3", "--bidirectional"], "tbptt: expected at least 1 and a network that runs forward"),
    ([*line(DATA), "--logger", "mlflow"], "logger: expected one of csv, tensorboard, wandb, none"),
    ([*line(DATA), "--flow-every", "-1"], "--flow-every: expected 0 or more"),
    ([*line(DATA), "--devices", "0"], "devices: expected a positive number"),
    ([*line(DATA), "--nodes", "3", "--batch", "32"], "batch: expected a multiple of the 3 processes"),
    ([*line(DATA), "--accelerator", "abacus"], "devices, nodes, accelerator: "),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_trained(
    options: list[str],
    message: str,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    assert call(["train", *options, "--out", str(tmp_path / "m")], monkeypatch) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.glob("m/*")) == [], "the same name serves for the command put right"


def test_loggers_write_or_say_what_is_missing(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(SMALL | {"--logger": "csv", "--flow-every": "2"})
    said = (tmp_path / "0" / "logs" / "version_0" / "metrics.csv").read_text()
    for column in ("train_loss", "validation_loss", "validation_error", "gradient_flow/model.recurrent.l0/reach"):
        assert column in said.splitlines()[0]
    run(SMALL | {"--logger": "tensorboard"})
    assert list((tmp_path / "1" / "logs").glob("events.out.tfevents.*"))
    monkeypatch.setattr(
        "unvanish.train.logs.WandbLogger", lambda **_: (_ for _ in ()).throw(ModuleNotFoundError("wandb"))
    )
    from unvanish.train import make_loggers

    with pytest.raises(ValueError, match="logger: wandb is not installed; pip install wandb, or choose another"):
        make_loggers("wandb", tmp_path)


def test_what_is_printed(run: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    run(SMALL | {"--quiet": ""})
    assert capsys.readouterr().out == ""
    trained = run(SMALL | {"--json": ""})
    assert json.loads(capsys.readouterr().out)["test"] == trained.config["test"]
    run(SMALL | {"--data": "holes.csv", "--missing": "mean", "--flow-every": "4"})
    said = capsys.readouterr().out
    for part in ("Split: whole sequences, drawn by the seed within each class", "class a: 20 of 40", "test, model:"):
        assert part in said
    assert "test, majority class" in said
    assert "gradient in recurrent.l0, before → after training: reach " in said


def test_times_are_looked_at(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.csv").write_text("t,v\n1,5\n3,6\n2,7\n")
    command = ["train", "--kind", "forecasting", "--data", "s.csv", "--target", "v", "--time", "t"]
    assert call(command, monkeypatch) == 2
    assert "row 4, column 't': expected a later time" in capsys.readouterr().err


def test_predict(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(AHEAD | {"--horizon": "2"})
    run({"--kind": "language", "--data": "book.txt", "--steps": "8", "--batch": "4", "--tbptt": "16"})
    run(TASK)
    capsys.readouterr()
    ahead, language, task = (str(tmp_path / str(k)) for k in range(3))
    assert call(["predict", ahead, "--data", "s.csv", "--target", "sales"], monkeypatch) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(",")[:2] for row in rows] == [["series", "step"], ["", "1"], ["", "2"]]
    said = {}
    for name, options in {
        "plain": [],
        "again": [],
        "prompt": ["--prompt", "a dog"],
        "length": ["--length", "20"],
        "seed": ["--seed", "3"],
        "temperature": ["--temperature", "0.01"],
    }.items():
        prompt = [] if "--prompt" in options else ["--prompt", "the cat"]
        assert call(["predict", language, *prompt, *options], monkeypatch) == 0
        said[name] = capsys.readouterr().out.rstrip("\n")
    assert said.pop("again") == said["plain"]
    assert len(set(said.values())) == len(said)
    assert len(said["length"]) == len("the cat") + 20
    for wrong, message in (
        ([language], "--prompt: expected the text"),
        ([language, "--prompt", ""], "prompt, length, temperature: expected"),
        ([language, "--prompt", "aß"], "prompt: character 2 is 'ß', which the training text does not hold"),
        ([language, "--prompt", "a", "--data", "s.csv"], "--data: not used by a model of kind language"),
        (
            [ahead, "--data", "s.csv", "--target", "sales", "--length", "3"],
            "--length: not used by a model of kind forecasting",
        ),
        ([ahead], "--data: expected a file"),
        ([ahead, "--data", "n.csv", "--target", "q"], "expected the channels"),
        ([task, "--data", "d.csv"], "MODEL: expected one that was trained on data, got one of the task adding"),
    ):
        assert call(["predict", *wrong], monkeypatch) == 2, wrong
        assert message in " ".join(capsys.readouterr().err.split())
    tested = {"model", "data", "prompt", "target", "id", "time", "text", "missing", "length", "temperature", "seed"}
    assert tested == inspect.signature(predict).parameters.keys()


def test_damaged_weights_are_refused(run: Callable, tmp_path: Path) -> None:
    run(SMALL)
    weights = tmp_path / "0" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its checksum is wrong"):
        Trained.load(tmp_path / "0")
