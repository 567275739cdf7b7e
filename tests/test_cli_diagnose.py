"""`unvanish diagnose`, as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SOURCE = """
import torch
from torch import nn
from helper import WIDTH

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(3, WIDTH, batch_first=True)

    def forward(self, x):
        return self.encoder(x)[0][:, -1]

def factory():
    torch.manual_seed(0)
    return Model(), (torch.randn(4, 40, 3), torch.rand(4, WIDTH) - 0.5), nn.functional.mse_loss

def wrong():
    return Model()

def broken():
    return nn.Linear(2, 2)(torch.zeros(3, 5))

def number():
    return 1, factory()[1], nn.functional.mse_loss

def ends():
    raise SystemExit(0)

def unfit():
    return Model(), (torch.randn(4, 40, 7), torch.rand(4, WIDTH) - 0.5), nn.functional.mse_loss

def mismatched():
    model, (x, y), loss = factory()
    return nn.Sequential(model, nn.Linear(WIDTH, 1)), (x, y[:, 0]), loss

def stepped():
    model, (x, y), loss = factory()
    return model, lambda m: loss(m(x), y)

def lightning():
    import lightning

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder = nn.LSTM(3, WIDTH, batch_first=True)

        def training_step(self, batch, index):
            x, y = batch
            loss = nn.functional.mse_loss(self.encoder(x)[0][:, -1], y)
            self.log("loss", loss)
            return {"loss": loss}

    return Lit(), factory()[1]

def loaded():
    model, batch, loss = factory()
    return model, list(batch), loss

def checkpointed():
    from pathlib import Path
    from lit import Lit

    return Lit.load_from_checkpoint(Path(__file__).parent / "lit.ckpt"), factory()[1]
"""

LIGHTNING = """
import lightning
from torch import nn

class Lit(lightning.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.LSTM(3, width, batch_first=True)

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.mse_loss(self.encoder(x)[0][:, -1], y)

    def configure_optimizers(self):
        import torch
        return torch.optim.Adam(self.parameters(), lr=0.01)
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("WIDTH = 8\n")
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path / "mine.py"


def unvanish(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "80"}
    command = [sys.executable, "-c", "from unvanish.cli import main; main()", "diagnose", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_says_what_is_wrong_and_what_to_do(mine: Path) -> None:
    done = unvanish(f"{mine}:mismatched", "--budget", "0")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("target_mismatch: Every answer is compared with every target")
    assert "(4, 1)" in done.stdout
    assert "do: Give both the same shape" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    found = json.loads(unvanish(f"{mine}:mismatched", "--budget", "0", "--json").stdout)
    assert found["findings"][0]["code"] == "target_mismatch"
    assert not found["healthy"]


def test_a_healthy_model_exits_with_0_and_shows_its_reach(mine: Path) -> None:
    done = unvanish(f"{mine}:factory", "--budget", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("healthy: ")
    assert "encoder.l0 (lstm): vanishes" in done.stdout


def test_a_factory_may_return_a_step_or_a_lightning_module(mine: Path) -> None:
    for name in ("stepped", "lightning"):
        done = unvanish(f"{mine}:{name}", "--budget", "0", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["findings"][0]["code"] == "healthy"
        assert list(found["layers"]) == ["encoder.l0"]


def test_a_lightning_module_from_a_checkpoint(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning

    (mine.parent / "lit.py").write_text(LIGHTNING)
    monkeypatch.syspath_prepend(str(mine.parent))
    monkeypatch.delitem(sys.modules, "lit", raising=False)
    from lit import Lit  # type: ignore[import-not-found]

    module = Lit(8)
    with torch.no_grad():
        module.encoder.bias_hh_l0[8:16] = 6.0
    data = torch.utils.data.TensorDataset(torch.randn(8, 40, 3), torch.rand(8, 8))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=2, accelerator="cpu", default_root_dir=mine.parent, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    trainer.save_checkpoint(mine.parent / "lit.ckpt")
    done = unvanish(f"{mine}:checkpointed", "--budget", "0", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == "Lit"
    assert found["layers"]["encoder.l0"]["verdict"] == "healthy", "with the weights of the checkpoint"


def test_a_page(mine: Path) -> None:
    page = mine.parent / "page.html"
    done = unvanish(f"{mine}:mismatched", "--budget", "0", "--out", str(page))
    assert done.returncode == 1, done.stderr
    assert done.stdout.endswith(f"Page: {page}\n")
    assert "Every answer is compared with every target" in page.read_text("utf-8")
    quiet = unvanish(f"{mine}:factory", "--budget", "0", "--out", str(page), "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert "no fault found" in page.read_text("utf-8")
    for wrong in (mine.parent, mine.parent / "no" / "page.html"):
        refused = unvanish(f"{mine}:factory", "--out", str(wrong))
        assert refused.returncode == 2
        assert "--out: expected a file in a folder that exists" in refused.stderr


def test_a_batch_may_be_a_list_as_loaders_make_it(mine: Path) -> None:
    done, listed = (unvanish(f"{mine}:{name}", "--budget", "0", "--json") for name in ("factory", "loaded"))
    assert done.returncode == listed.returncode == 0
    assert done.stdout == listed.stdout


def test_json_and_a_checkpoint(mine: Path) -> None:
    scope: dict[str, object] = {}
    sys.path.insert(0, str(mine.parent))
    try:
        exec(mine.read_text(), scope)
    finally:
        sys.path.pop(0)
    model = scope["Model"]()  # type: ignore[operator]
    with torch.no_grad():
        model.encoder.bias_ih_l0[8:16] = 6.0
    torch.save(model.state_dict(), mine.parent / "weights.pt")
    done = unvanish(
        f"{mine}:factory", "--budget", "0", "--json", "--lag", "20", "--checkpoint", str(mine.parent / "weights.pt")
    )
    found = json.loads(done.stdout)
    assert found["layers"]["encoder.l0"]["verdict"] == "healthy"
    assert found["layers"]["encoder.l0"]["lag"] == 20


def test_interventions_end_in_a_plan_or_in_none(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads that wait for each other on a busy machine make an update a hundred times as slow.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source = mine.read_text().replace("randn(4, 40, 3)", "randn(80, 20, 3)").replace("rand(4, WIDTH)", "rand(80, 1)")
    mine.write_text(source.replace("self.encoder(x)[0][:, -1]", "self.encoder(x)[0][:, -1, :1]"))
    found = json.loads(unvanish(f"{mine}:factory", "--budget", "20", "--json").stdout)
    assert found["tried"], "the target is noise: nothing helps, but something was tried"
    assert found["plan"]["code"] == ""


def test_a_trained_folder_on_the_users_file(tmp_path: Path) -> None:
    from unvanish import train

    file = tmp_path / "mine.csv"
    rows = [",".join([*(f"{(7 * i + 3 * t) % 11}" for t in range(8)), "ab"[i % 2]]) for i in range(24)]
    file.write_text("\n".join([",".join([*(f"x{t}" for t in range(8)), "label"]), *rows]) + "\n")
    problem = train.read_problem(file, target="label")
    train.train_on(problem, train.Settings(cell="lstm", hidden=4, epochs=1), out=tmp_path / "model")
    folder, given = str(tmp_path / "model"), ("--data", str(file), "--target", "label", "--budget", "0")
    done = unvanish(folder, *given, "--json")
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)["layers"]["recurrent.l0"]
    assert (found["cell"], found["lag"]) == ("lstm", 7)
    assert unvanish(folder, *given[:2], *given[4:], "--json").stdout == done.stdout, "the folder tells the columns"
    task = train.TaskProblem(train.make_task("adding", 5))
    train.train_on(task, train.Settings(hidden=2, steps=1), out=tmp_path / "task", flow_every=None)
    drawn = unvanish(str(tmp_path / "task"), "--budget", "0", "--json")
    assert json.loads(drawn.stdout)["layers"]["recurrent.l0"]["lag"] == 4, drawn.stderr
    for arguments, message in (
        ((str(tmp_path), *given), "has no config.json; name a folder that `unvanish train` finished"),
        ((str(tmp_path / "task"), *given), "was trained on the task adding, which draws its own; leave it out"),
        ((folder, "--budget", "0"), "--data: expected a file like the one that"),
        ((folder, *given, "--id", "label", "--time", "x0"), "--target 'label', --id 'label', --time 'x0' must be"),
    ):
        refused = unvanish(*arguments)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{mine}", "expected a Python file and a function"),
        ("{mine}:nothing", "has no function 'nothing'"),
        ("{mine}:wrong", "expected wrong() to return (model, batch, loss), (model, step) or"),
        ("{folder}/other.py:factory", "there is no file"),
        ("{mine}:broken", "broken() raised RuntimeError: mat1 and mat2 shapes"),
        ("{mine}:broken", "return nn.Linear(2, 2)(torch.zeros(3, 5))"),
        ("{mine}:number", "expected number() to return a torch.nn.Module as model, got int"),
        ("{mine}:ends", "ends() raised SystemExit: 0; at"),
        ("{mine}:unfit", "loss(model(input), target) raised RuntimeError: input.size(-1) must be equal to input_size"),
        ("{mine}:unfit", "mine.py, line 12: return self.encoder(x)[0][:, -1]"),
        ("{folder}", "has no config.json; name a folder that `unvanish train` finished"),
        ("{folder}/raises.py:factory", "raises.py, line 2: 1 / 0"),
    ],
)
def test_wrong_sources_are_refused(source: str, message: str, mine: Path) -> None:
    (mine.parent / "raises.py").write_text("# runs on import\n1 / 0\n")
    done = unvanish(source.format(mine=mine, folder=mine.parent))
    assert done.returncode == 2
    assert done.stderr.startswith("error:")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pickle_that_holds_more_than_tensors_is_refused(mine: Path) -> None:
    torch.save({"weights": subprocess.Popen}, mine.parent / "evil.pt")
    (mine.parent / "junk.safetensors").write_bytes(b"junk")
    torch.save({"other": torch.zeros(1)}, mine.parent / "other.pt")
    for name, message in (
        ("evil.pt", "no plain state_dict"),
        ("junk.safetensors", "can't be read: SafetensorError"),
        ("other.pt", "does not fit the model"),
        ("missing.pt", "there is no file"),
    ):
        done = unvanish(f"{mine}:factory", "--checkpoint", str(mine.parent / name))
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
