"""Two processes (gloo) train as one with the joint batch does."""

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch

from tests.test_train import TEXT, sines
from unvanish import train
from unvanish.train import LanguageModel, Machines, Regression, Settings, Trained

# No dropout: each process draws its own.
SETTINGS = {
    "regression": Settings(cell="gru", hidden=6, epochs=6, batch=16, schedule="cosine", omega=0.1),
    "language": Settings(cell="lstm", hidden=6, steps=30, batch=4, tbptt=16, every=10),
}
TOLERANCE = 1e-4
"""relative, of losses and weights: gradients are float32 and summed in another order"""


def train_it(kind: str, out: Path, machines: Machines | None = None, stop: int | None = None) -> Trained:
    def tell(done: int, total: int, error: float | None) -> None:
        if done == stop:
            raise KeyboardInterrupt

    problem = Regression(sines(number=True)) if kind == "regression" else LanguageModel(TEXT)
    return train.train_on(
        problem,
        SETTINGS[kind],
        out=out,
        resume=True,
        machines=machines,
        tell=tell,
        loggers=train.make_loggers("csv", out),
    )


def one_of_two(rank: int, port: int, kind: str, out: Path) -> None:
    """As torchrun starts it."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    train_it(kind, out, Machines(devices=2))


@pytest.mark.parametrize(("kind", "stop"), [("regression", None), ("regression", 20), ("language", None)])
def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path, kind: str, stop: int | None) -> None:
    """`stop`: one process begins, is interrupted, and two go on."""
    one = train_it(kind, tmp_path / "one")
    if stop is not None:
        with pytest.raises(KeyboardInterrupt):
            train_it(kind, tmp_path / "two", stop=stop)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_distributed", "tests.test_resume"])
    processes = [context.Process(target=one_of_two, args=(r, port, kind, tmp_path / "two")) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    two = Trained.load(tmp_path / "two")
    assert two.config["validation"]["error"] == pytest.approx(one.config["validation"]["error"], rel=TOLERANCE)
    for name, value in two.model.state_dict().items():
        torch.testing.assert_close(value, one.model.state_dict()[name], rtol=TOLERANCE, atol=TOLERANCE)
    if stop is None:
        curves = [(tmp_path / n / "version_0" / "metrics.csv").read_text().splitlines() for n in ("one", "two")]
        place = curves[0][0].split(",").index("train_loss")
        losses = [[float(row.split(",")[place]) for row in curve[1:] if row.split(",")[place]] for curve in curves]
        assert len(losses[0]) > 2
        assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)


def test_devices_and_nodes_must_be_what_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes were launched, got devices 2 and nodes 1"):
        Machines(devices=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="batch: expected a multiple of the 2 processes, got 15"):
        train.fit(None, None, train.TrainingConfiguration(1, 15, 0.1, 1.0, 0), machines=Machines(devices=2))  # type: ignore[arg-type]
