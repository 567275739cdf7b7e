"""A training that is interrupted, killed, or runs out of disk goes on to the same weights, bit for bit."""

import errno
import hashlib
import multiprocessing
import os
import random
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_train import TEXT, sines
from unvanish import train
from unvanish.cli import main
from unvanish.train import Classification, LanguageModel, Settings, Trained
from unvanish.train.checkpoints import SEAL, SealedCheckpointIO, newest

WITH_ALL = Settings(
    cell="gru",
    hidden=6,
    layers=2,
    dropout=0.3,
    epochs=12,
    batch=16,
    lr=0.02,
    optimizer="adamw",
    weight_decay=0.01,
    schedule="cosine",
    patience=3,
    omega=0.01,
)
SHORT = Settings(cell="gru", hidden=4, epochs=8, batch=16, lr=0.02, dropout=0.3, schedule="cosine", patience=0)
CARRIED = Settings(cell="lstm", hidden=6, epochs=3, batch=4, tbptt=16, dropout=0.2, patience=0, every=7)


def problem(settings: Settings) -> train.Classification | train.LanguageModel:
    return LanguageModel(TEXT) if settings is CARRIED else Classification(sines())


def same(a: Trained, b: Trained) -> bool:
    states = a.model.state_dict(), b.model.state_dict()
    weights = all(torch.equal(v, w) for v, w in zip(*(s.values() for s in states), strict=True))
    return weights and all(a.config[key] == b.config[key] for key in ("validation", "test", "gradient_flow"))


class StopError(Exception):
    pass


@pytest.mark.parametrize("settings", [WITH_ALL, CARRIED])
def test_it_goes_on_to_the_same_weights(tmp_path: Path, settings: Settings) -> None:
    whole = train.train_on(problem(settings), settings, flow_every=None)
    total = whole.config["updates"]
    for stop in (1, total // 2, total):

        def tell(done: int, most: int, error: float | None, stop: int = stop) -> None:
            if done == stop:
                raise StopError

        out = tmp_path / str(stop)
        with pytest.raises(StopError):
            train.train_on(problem(settings), settings, out=out, flow_every=None, tell=tell)
        begun: list[int] = []
        again = train.train_on(
            problem(settings),
            settings,
            out=out,
            resume=True,
            flow_every=None,
            tell=lambda done, most, error, begun=begun: begun.append(done),
        )
        assert same(again, whole)
        assert begun[0] == 1 if stop == 1 else begun[0] > total // 3
        assert same(Trained.load(out), whole)
        assert not (out / "checkpoints").exists()


def test_a_stop_that_was_decided_stays_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(cell="gru", hidden=4, epochs=30, batch=16, patience=2, lr=0.3)
    whole = train.train_on(Classification(sines()), settings, flow_every=None)
    assert whole.config["updates"] < 30 * 6
    monkeypatch.setattr(Classification, "judge", lambda *_: (_ for _ in ()).throw(StopError))
    with pytest.raises(StopError):
        train.train_on(Classification(sines()), settings, out=tmp_path / "m", flow_every=None)
    monkeypatch.undo()
    assert same(
        train.train_on(Classification(sines()), settings, out=tmp_path / "m", resume=True, flow_every=None), whole
    )


def train_once(out: Path, die_at: int | None = None) -> None:
    """Where `die_at` is given, dies before a rename (even) or after it (odd)."""
    torch.set_num_threads(1)
    halves, rename = iter(range(10**9)), os.replace

    def replace(a: str, b: str) -> None:
        for act in (lambda: rename(a, b), lambda: None):
            if next(halves) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            act()

    os.replace = replace  # type: ignore[assignment]
    resumed(out)


def train_limited(out: Path, said: Path) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    try:
        resumed(out)
    except OSError as error:
        said.write_text(str(error))


@pytest.fixture(scope="module")
def fork() -> Any:
    """Processes that start fast, from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_resume"])
    return context


@pytest.fixture(scope="module")
def whole() -> Trained:
    return train.train_on(Classification(sines()), SHORT, flow_every=20)


def resumed(out: Path) -> Trained:
    return train.train_on(Classification(sines()), SHORT, out=out, resume=True, flow_every=20)


def test_killed_at_20_random_moments(tmp_path: Path, fork: Any, whole: Trained) -> None:
    moments, killed, turn = random.Random(0), 0, 0
    while killed < 20:
        out = tmp_path / str(turn)
        process = fork.Process(target=train_once, args=(out,))
        process.start()
        process.join(moments.uniform(0.1, 0.8))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if (out / "config.json").exists():
            assert same(Trained.load(out), whole)
            turn += 1
    assert same(resumed(tmp_path / str(turn)), whole)


@pytest.mark.parametrize("die_at", [0, 1, 2, 3, 9, 18, 21, 23, 24, 25, 26, 27])
def test_killed_before_or_after_a_rename(tmp_path: Path, die_at: int, fork: Any, whole: Trained) -> None:
    process = fork.Process(target=train_once, args=(tmp_path / "m", die_at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert same(resumed(tmp_path / "m"), whole)
    page = {"report.html", "report-card.png", "report-card.svg"}
    model = {"run.json", "model.safetensors", "config.json"}
    assert {path.name for path in (tmp_path / "m").iterdir()} == page | model


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, whole: Trained) -> None:
    def stop(done: int, total: int, error: float | None) -> None:
        if done == 30:
            raise StopError

    with pytest.raises(StopError):
        train.train_on(Classification(sines()), SHORT, out=tmp_path / "m", tell=stop)
    last = max((tmp_path / "m" / "checkpoints").iterdir())
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="is damaged: its checksum is wrong; going on from the one before"):
        assert same(resumed(tmp_path / "m"), whole)


def test_one_changed_bit_of_a_weight_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "update-000000001.ckpt"
    SealedCheckpointIO().save_checkpoint({"weight": torch.full((64,), 1.5)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((64,), 1.5).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its checksum is wrong"):
        SealedCheckpointIO().load_checkpoint(path)


def test_the_newest_checkpoint_is_the_latest(tmp_path: Path) -> None:
    for update in (9, 10):
        SealedCheckpointIO().save_checkpoint({"update": update}, tmp_path / f"update-{update:09d}.ckpt")
    found = newest(tmp_path)
    assert found is not None
    assert found.name == "update-000000010.ckpt"


def test_a_sealed_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "update-000000001.ckpt"
    SealedCheckpointIO().save_checkpoint({"model": Path.home}, path)
    with pytest.raises(ValueError, match="holds more than plain data and is refused"):
        SealedCheckpointIO().load_checkpoint(path)
    for body in (b"", b"PK\3\4", b"\x80\2."):
        path.with_suffix(".forged").write_bytes(body + hashlib.sha256(body).digest() + SEAL)
        with pytest.raises(ValueError, match=r"holds (no checkpoint of torch|more than plain data)"):
            SealedCheckpointIO().load_checkpoint(path.with_suffix(".forged"))
    with pytest.warns(UserWarning, match="going on from the one before"):
        assert newest(tmp_path) is None


@pytest.mark.parametrize("full", ["checkpoint", "page", "model"])
def test_a_full_disk_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str, whole: Trained
) -> None:
    fsync, left = os.fsync, iter(range(10**9))

    def no_space(file: int) -> None:
        if next(left) >= {"checkpoint": 4, "page": 10, "model": 13}[full]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(
        OSError, match=r"--out: .*m can't be written: No space left on device; .*ckpt is kept; add --res"
    ):
        resumed(tmp_path / "m")
    monkeypatch.undo()
    assert not list((tmp_path / "m").rglob(".*"))
    assert same(resumed(tmp_path / "m"), whole)


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path, fork: Any, whole: Trained) -> None:
    """The system's own refusal, in a process of its own, and the command's words for it."""
    process = fork.Process(target=train_limited, args=(tmp_path / "m", tmp_path / "said"))
    process.start()
    process.join()
    assert (
        (tmp_path / "said").read_text().startswith(f"--out: {tmp_path / 'm'} can't be written: File too large; nothing")
    )
    assert same(resumed(tmp_path / "m"), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_what_is_kept_and_ends_with_130(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(bars: object, label: str, done: int, total: int, error: float | None) -> None:
        if done == 25:
            os.kill(os.getpid(), number)

    monkeypatch.setattr("unvanish.cli.progress.TrainingBars.update", interrupt)
    monkeypatch.chdir(tmp_path)
    options = "--task adding --length 10 --hidden 4 --steps 40 --every 10"
    command = ["unvanish", "train", *options.split()]
    monkeypatch.setattr(sys, "argv", command)
    # A shell starts what runs in the background deaf to Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            main()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    assert "interrupted; unvanish-model/checkpoints/update-000000020.ckpt is kept; add --resume" in " ".join(
        capsys.readouterr().err.split()
    )


def test_only_the_same_training_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed(tmp_path / "m")
    other = sines()
    other.x[0][0] += 1
    for settings, data, message in (
        (SHORT, other, "--resume: data: "),
        (replace(SHORT, lr=0.5), sines(), r"--resume: lr: .* was begun with 0.02, got 0.5"),
        (replace(SHORT, seed=1), sines(), r"--resume: (data|seed): "),
        (SHORT, sines(121), "--resume: data: "),
    ):
        with pytest.raises(ValueError, match=message):
            train.train_on(Classification(data), settings, out=tmp_path / "m", resume=True)
    with pytest.raises(FileExistsError, match=r"holds a finished training"):
        train.train_on(Classification(sines()), SHORT, out=tmp_path / "m")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".gitignore").touch()
    with pytest.raises(ValueError, match=r"holds files that are not from a training"):
        train.train_on(Classification(sines()), SHORT, out=tmp_path / "mine", resume=True)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"--out: .* is a file|--out: .*can't be written"):
            train.train_on(Classification(sines()), SHORT, out=out)
    assert (tmp_path / "mine" / ".gitignore").exists()
    # An unwritable folder; root may write into any, so the system is asked in words of its own.
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(OSError, match=r"--out: .*new can't be written: Permission denied"):
        train.train_on(Classification(sines()), SHORT, out=tmp_path / "new")
